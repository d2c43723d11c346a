"""The training loop: steps, hooks, and an orderly end when the machine is taken away."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils

from jaxlong.core.types import BadInput, Batch
from jaxlong.train.grads import Metrics
from jaxlong.train.state import TrainState
from jaxlong.train.step import Step, checked_names
from jaxlong.train.throughput import Throughput

log = logging.getLogger(__name__)

Values = dict[str, float]
"""Metrics of one step as numbers of the host."""


class Hook:
    """Something to do during training; override what is needed. Step n is the state after n steps.

    Numbers arrive one step late, so that the host never waits for the step that the device is computing. A
    hook that needs the state itself says so with `wants`: the numbers of that step are then delivered first.
    """

    def begin(self, step: int, steps: int) -> None:
        """Before the first step: `step` are done, the last will be `steps`."""

    def metrics(self, step: int, values: Values) -> None:
        """The numbers of a step; each step's once, in order."""

    def wants(self, step: int) -> bool:
        """Whether to call `state` after this step."""
        return False

    def state(self, step: int, state: TrainState) -> None:
        """The state after a step. The next step may reuse its memory: copy what is kept."""

    def finish(self, step: int, state: TrainState) -> None:
        """After the last step, also when SIGTERM makes it the last."""

    def close(self) -> None:
        """Always called at the end, also after an error; not for hooks whose `begin` was not called."""


class Stopped(SystemExit):
    """Training ended early on SIGTERM, with all hooks finished. Uncaught, it ends the program with exit code 0."""

    def __init__(self, step: int, state: TrainState):
        super().__init__(0)
        self.step, self.state = step, state


class Diverged(RuntimeError):
    """Too many steps in a row were skipped, told in one line."""


def fit(
    state: TrainState,
    step: Step,
    batches: Iterable[Batch],
    *,
    steps: int,
    hooks: Sequence[Hook] = (),
    patience: int = 20,
    flops_per_token: float | None = None,
) -> TrainState:
    """Repeat `step` until the state counts `steps` steps; a restored state goes on where it was.

    One batch is taken a step and none beyond the last, so an iterator's own state always matches. In the
    main thread SIGTERM ends training after the step under way (with several processes, after the same step
    everywhere), and Ctrl-C stays what it is.

    Args:
        step: from `make_step`, jitted; other functions need no metric but `loss`.
        batches: placed as the step expects them.
        hooks: called in this order.
        patience: steps skipped in a row after which to give up.
        flops_per_token: of the model, forward and backward; adds `mfu` on devices whose peak is known.

    Raises:
        Stopped: SIGTERM came; the hooks have finished (a checkpoint is saved).
        Diverged: `patience` steps in a row were not finite; names the first bad leaf.
        BadInput: the batches end too early.
    """
    number = int(state.step)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(_Termination())
        for hook in hooks:
            stack.callback(hook.close)
            hook.begin(number, steps)
        delivery = _Delivery(hooks, checked_names(state), Throughput(flops_per_token), patience)
        if number < steps:
            for batch in batches:
                state, metrics = step(state, batch)
                number += 1
                delivery.add(number, metrics, batch.tokens.size)
                wanting = [hook for hook in hooks if hook.wants(number)]
                if wanting:
                    delivery.flush()
                for hook in wanting:
                    hook.state(number, state)
                if number >= steps or stop.agreed(number):
                    break
        delivery.flush()
        for hook in hooks:
            hook.finish(number, state)
    if stop.requested:
        raise Stopped(number, state)
    if number < steps:
        raise BadInput("train.steps", steps, f"the batches end after step {number}", f"{number} or fewer")
    return state


class _Delivery:
    """Hands each step's numbers to the hooks once the following step is under way; watches for skipped steps."""

    def __init__(self, hooks: Sequence[Hook], names: Sequence[str], speed: Throughput, patience: int):
        self.hooks, self.names, self.speed, self.patience = hooks, names, speed, patience
        self.pending: tuple[int, Metrics, int] | None = None

    def add(self, step: int, metrics: Metrics, tokens: int) -> None:
        earlier, self.pending = self.pending, (step, metrics, tokens)
        if earlier is not None:
            self._deliver(*earlier)

    def flush(self) -> None:
        if self.pending is not None:
            last, self.pending = self.pending, None
            self._deliver(*last)

    def _deliver(self, step: int, metrics: Metrics, tokens: int) -> None:
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        streak, bad = values.pop("streak", 0), values.pop("first_bad", -1)
        values |= self.speed.arrived(tokens)
        for hook in self.hooks:
            hook.metrics(step, values)
        if streak == 1:
            log.warning("step %d is skipped: %s is not finite", step, self.names[bad])
        if streak >= self.patience:
            raise Diverged(f"step {step}: the last {streak} steps were skipped; {self.names[bad]} is not finite")


class _Termination:
    """Whether SIGTERM came: noted by an own handler, or agreed on by all processes of a job."""

    def __enter__(self) -> _Termination:
        self.requested = False
        # With several processes JAX itself catches the signal, and all agree on a step at which to stop.
        self.own = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        if self.own:
            self.before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if self.own:
            signal.signal(signal.SIGTERM, self.before or signal.SIG_DFL)  # None: set outside Python, not restorable

    def _note(self, number: int, frame: Any) -> None:
        self.requested = True

    def agreed(self, step: int) -> bool:
        if jax.process_count() > 1:
            self.requested = multihost_utils.reached_preemption_sync_point(step)
        return self.requested

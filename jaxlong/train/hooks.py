"""Hooks of the training loop: progress, metrics, checkpoints, profiles, and whatever comes every n steps."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO, runtime_checkable

import jax

from jaxlong.core.types import BadInput
from jaxlong.train.atomic import replace_text
from jaxlong.train.checkpoint import Store
from jaxlong.train.loop import Hook, Values
from jaxlong.train.state import TrainState


@runtime_checkable
class HasState(Protocol):
    """A data iterator that knows where it is: its state is JSON-able and gives back the same batches."""

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


@runtime_checkable
class Sink(Protocol):
    """Where numbers can be written."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...


# Numbers ------------------------------------------------------------------------------------------------


class JsonLines(Hook):
    """One JSON object a line: `{"step": n, "loss": ..., ...}`; a number that is not finite becomes null.

    When a run goes on from step n, lines of later steps are dropped first (in one rename), as is a line that
    was cut off by a kill: every step stands there once. Process 0 writes.

    Args:
        every: steps between lines; the last step always has one.
    """

    def __init__(self, path: str | Path, every: int = 1):
        self.path, self.every = Path(path), every
        self.file: TextIO | None = None
        self.last: tuple[int, Values] | None = None

    def begin(self, step: int, steps: int) -> None:
        if jax.process_index() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                replace_text(self.path, "".join(_lines_up_to(step, self.path.read_text(errors="replace"))))
            self.file = self.path.open("a", buffering=1)

    def metrics(self, step: int, values: Values) -> None:
        self.last = (step, values)
        if step % self.every == 0:
            self._write_last()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a line, whatever the step."""
        if self.file is not None:
            line = {name: value if math.isfinite(value) else None for name, value in values.items()}
            self.file.write(json.dumps({"step": step} | line) + "\n")

    def finish(self, step: int, state: TrainState) -> None:
        self._write_last()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def _write_last(self) -> None:
        if self.last is not None:
            self.write(*self.last)
            self.last = None


def _lines_up_to(step: int, text: str) -> list[str]:
    """The whole lines of steps up to `step`."""
    kept = []
    for line in text.splitlines(keepends=True):
        try:
            done = json.loads(line)["step"] <= step
        except (ValueError, TypeError, KeyError):
            done = False
        if done and line.endswith("\n"):
            kept.append(line)
    return kept


class TensorBoard(Hook):
    """Scalars as TensorBoard events, through tensorboardX (extra [metrics]). Process 0 writes.

    When a run goes on from step n, TensorBoard is told to hide what it had of later steps.

    Raises:
        BadInput: tensorboardX is not installed.
    """

    def __init__(self, directory: str | Path, every: int = 1):
        try:
            import tensorboardX  # noqa: F401
        except ImportError:
            raise BadInput("train.tensorboard", True, "needs tensorboardX", "pip install jaxlong[metrics]") from None
        self.directory, self.every = Path(directory), every
        self.writer: Any = None

    def begin(self, step: int, steps: int) -> None:
        from tensorboardX import SummaryWriter

        if jax.process_index() == 0:
            self.writer = SummaryWriter(str(self.directory), purge_step=step + 1)

    def metrics(self, step: int, values: Values) -> None:
        if step % self.every == 0:
            self.write(step, values)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add scalars, whatever the step."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None


# Progress -----------------------------------------------------------------------------------------------


class Progress(Hook):
    """How far, how fast, how long still: a bar on a terminal or in a notebook, plain lines elsewhere.

    Process 0 shows it, on stderr.

    Args:
        seconds: least time between two plain lines; the first and the last step always have one.
    """

    def __init__(self, title: str = "train", seconds: float = 10.0):
        self.title, self.seconds = title, seconds
        self.bar: Any = None
        self.task: Any = None
        self.steps = 0
        self.last_line = -math.inf

    def begin(self, step: int, steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.steps = steps
        console = Console(stderr=True)
        notebook = console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None  # rich draws with it
        if jax.process_index() == 0 and (console.is_terminal or notebook):
            text = TextColumn("{task.fields[told]}")
            columns = (TextColumn(self.title), BarColumn(), MofNCompleteColumn(), text, TimeElapsedColumn())
            self.bar = Progress(*columns, console=console)
            self.task = self.bar.add_task(self.title, total=steps, completed=step, told="compiling")
            self.bar.start()

    def metrics(self, step: int, values: Values) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=step, told=self._told(step, values))
        elif jax.process_index() == 0 and (step == self.steps or time.monotonic() - self.last_line >= self.seconds):
            self.last_line = time.monotonic()
            sys.stderr.write(f"{self.title} {step}/{self.steps}  {self._told(step, values)}\n")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _told(self, step: int, values: Values) -> str:
        parts = [f"loss {values['loss']:.4f}"]
        if "tokens_per_second" in values:
            left = (self.steps - step) * values["seconds_per_step"]
            parts += [f"{_short(values['tokens_per_second'])} tokens/s", f"{_clock(left)} left"]
        if "mfu" in values:
            parts.append(f"MFU {values['mfu']:.1%}")
        if values.get("skipped"):
            parts.append(f"{values['skipped']:.0f} skipped")
        return "  ".join(parts)


def _short(number: float) -> str:
    """Three digits: 987, 12.3k, 4.56M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"


def _clock(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# State --------------------------------------------------------------------------------------------------


class Checkpoints(Hook):
    """Saves every n steps and at the end, with the state of the data iterator after the saved step's batch.

    Put it after hooks whose work a restart must not lose (JsonLines, Every).
    """

    def __init__(self, store: Store, *, every: int, data: HasState | None = None):
        if every < 1:
            raise BadInput("train.save_every", every, "is no number of steps", "1 or more")
        self.store, self.every, self.data = store, every, data
        self.saved = 0

    def begin(self, step: int, steps: int) -> None:
        self.saved = step

    def wants(self, step: int) -> bool:
        return step % self.every == 0

    def state(self, step: int, state: TrainState) -> None:
        self.store.save(state, None if self.data is None else self.data.get_state())
        self.saved = step

    def finish(self, step: int, state: TrainState) -> None:
        if step != self.saved:
            self.state(step, state)
        self.store.wait()

    def close(self) -> None:
        self.store.close()


class Every(Hook):
    """Calls `fn(step, state)` every n steps; numbers that it returns go to the sinks (JsonLines, TensorBoard)."""

    def __init__(
        self, every: int, fn: Callable[[int, TrainState], Mapping[str, float] | None], sinks: Sequence[Sink] = ()
    ):
        if every < 1:
            raise BadInput("every", every, "is no number of steps", "1 or more")
        self.every, self.fn, self.sinks = every, fn, sinks

    def wants(self, step: int) -> bool:
        return step % self.every == 0

    def state(self, step: int, state: TrainState) -> None:
        values = self.fn(step, state)
        for sink in self.sinks if values else ():
            sink.write(step, values)


class Profile(Hook):
    """A `jax.profiler` trace of the steps `first` to `last`, both included, for TensorBoard or Perfetto."""

    def __init__(self, directory: str | Path, first: int, last: int):
        if not 0 <= first <= last:
            raise BadInput("train.profile", (first, last), "is no window of steps", "(first, last) with first <= last")
        self.directory, self.first, self.last = Path(directory), max(first, 1), last
        self.running = False

    def begin(self, step: int, steps: int) -> None:
        if step == self.first - 1:
            self._start()

    def wants(self, step: int) -> bool:
        return step in (self.first - 1, self.last)

    def state(self, step: int, state: TrainState) -> None:
        jax.block_until_ready(state)
        if step == self.last:
            self.close()
        else:
            self._start()

    def close(self) -> None:
        if self.running:
            self.running = False
            jax.profiler.stop_trace()

    def _start(self) -> None:
        self.running = True
        jax.profiler.start_trace(str(self.directory))

"""Optimizers and learning-rate schedules as values, and the optax transformation that they describe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax import Array
from optax.contrib import MuonDimensionNumbers, muon

from jaxlong.core.types import BadInput

# Schedules ----------------------------------------------------------------------------------------------


@runtime_checkable
class Schedule(Protocol):
    """A learning rate as a function of the step and the number of steps."""

    def rate(self, step: Array, steps: int) -> Array:
        """The rate of the step that follows `step` applied ones; a float32 scalar."""
        ...


@dataclass(frozen=True)
class Constant:
    """Linear warm-up, then `peak`."""

    peak: float
    warmup: int = 0

    def __post_init__(self):
        _check_rates(self.peak, self.warmup)

    def rate(self, step: Array, steps: int) -> Array:
        return self.peak * _warm(step, self.warmup)


@dataclass(frozen=True)
class Cosine:
    """Linear warm-up, then half a cosine from `peak` to `final * peak` at the last step (arXiv 1608.03983)."""

    peak: float
    warmup: int = 0
    final: float = 0.1

    def __post_init__(self):
        _check_rates(self.peak, self.warmup, self.final)

    def rate(self, step: Array, steps: int) -> Array:
        _fits(self, self.warmup, steps)
        along = _along(step, self.warmup, steps)
        fall = self.final + (1 - self.final) * 0.5 * (1 + jnp.cos(jnp.pi * along))
        return self.peak * jnp.where(step < self.warmup, _warm(step, self.warmup), fall)


@dataclass(frozen=True)
class WSD:
    """Warm-up, stable, decay: linear to `peak`, constant, then linear to `final * peak` over the last
    `decay` steps (MiniCPM, arXiv 2404.06395)."""

    peak: float
    warmup: int = 0
    decay: int = 0
    final: float = 0.0

    def __post_init__(self):
        _check_rates(self.peak, self.warmup, self.final)
        if self.decay < 0:
            raise BadInput("schedule.decay", self.decay, "is no number of steps", "0 or more")

    def rate(self, step: Array, steps: int) -> Array:
        _fits(self, self.warmup + self.decay, steps)
        along = _along(step, steps - self.decay, steps)
        fall = 1 - (1 - self.final) * along
        return self.peak * jnp.where(step < self.warmup, _warm(step, self.warmup), fall)


def _warm(step: Array, warmup: int) -> Array:
    """Rises to 1 at step `warmup`; not 0 at the first step, which would waste a batch."""
    return jnp.minimum(1.0, (step + 1) / (warmup + 1))


def _along(step: Array, start: int, end: int) -> Array:
    """0 up to `start`, 1 from `end` on."""
    return jnp.clip((step - start) / max(end - start, 1), 0.0, 1.0)


def _check_rates(peak: float, warmup: int, final: float = 1.0) -> None:
    if not peak > 0:
        raise BadInput("schedule.peak", peak, "is no learning rate", "more than 0")
    if warmup < 0:
        raise BadInput("schedule.warmup", warmup, "is no number of steps", "0 or more")
    if not 0 <= final <= 1:
        raise BadInput("schedule.final", final, "is no fraction of the peak", "0 to 1")


def _fits(schedule: Schedule, needed: int, steps: int) -> None:
    if needed > steps:
        raise BadInput("schedule", schedule, f"takes {needed} steps, the run has {steps}", f"{steps} or fewer")


SCHEDULES: Mapping[str, type] = {"constant": Constant, "cosine": Cosine, "wsd": WSD}

# Optimizers ---------------------------------------------------------------------------------------------


@runtime_checkable
class Optimizer(Protocol):
    """Turns gradients into a direction of descent; step size and weight decay are applied outside."""

    weight_decay: float

    def direction(self, axes: Any) -> optax.GradientTransformation: ...


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101)."""

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self):
        _check_decays({"b1": self.b1, "b2": self.b2}, self.eps, self.weight_decay)

    def direction(self, axes: Any) -> optax.GradientTransformation:
        return optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps)


@dataclass(frozen=True)
class Muon:
    """Momentum orthogonalised by Newton-Schulz for matrices, Adam for all else (Jordan, 2024).

    A matrix is a parameter with one input and one output dimension beside those of layers and experts,
    where heads and their channels count as one: [L, D, F], [L, D, H, C] and [L, H, C, D] are, embeddings, the
    head, norms, biases and convolutions are not. Updates have root mean square `rms`, at which Adam's
    learning rates and weight decay carry over (Liu et al., arXiv 2502.16982).
    """

    beta: float = 0.95
    iterations: int = 5
    rms: float = 0.2
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self):
        _check_decays({"beta": self.beta, "b1": self.b1, "b2": self.b2}, self.eps, self.weight_decay)
        if self.iterations < 1:
            raise BadInput("optimizer.iterations", self.iterations, "is no number of iterations", "1 or more")
        if not self.rms > 0:
            raise BadInput("optimizer.rms", self.rms, "is no size of an update", "more than 0")

    def direction(self, axes: Any) -> optax.GradientTransformation:
        return muon(
            learning_rate=-1.0,  # optax negates it: what comes out is the direction, as from scale_by_adam
            ns_steps=self.iterations,
            beta=self.beta,
            eps=self.eps,
            adam_b1=self.b1,
            adam_b2=self.b2,
            consistent_rms=self.rms,
            muon_weight_dimension_numbers=None if axes is None else _map_axes(matrix_dimensions, axes),
        )


def _check_decays(decays: Mapping[str, float], eps: float, weight_decay: float) -> None:
    for name, value in decays.items():
        if not 0 <= value < 1:
            raise BadInput(f"optimizer.{name}", value, "is no decay rate", "0 or more, below 1")
    if not eps > 0:
        raise BadInput("optimizer.eps", eps, "divides by zero", "more than 0")
    if weight_decay < 0:
        raise BadInput("optimizer.weight_decay", weight_decay, "would grow the weights", "0 or more")


OPTIMIZERS: Mapping[str, type] = {"adamw": AdamW, "muon": Muon}

# What a parameter is ------------------------------------------------------------------------------------

STACKED = ("layers", "experts")
"""Logical axes along which a parameter is many parameters."""

HEADS = ("heads", "kv_heads", "head_dim")
"""Logical axes that, side by side, are one dimension of a matrix."""


def _groups(names: Any) -> list[list[int]]:
    """Axes of a parameter, without stacked ones, neighbouring head axes together."""
    groups: list[list[int]] = []
    for axis, name in enumerate(names):
        if name in STACKED:
            continue
        if name in HEADS and groups and names[groups[-1][-1]] in HEADS:
            groups[-1].append(axis)
        else:
            groups.append([axis])
    return groups


def matrix_dimensions(names: Any) -> MuonDimensionNumbers | None:
    """Input and output axes of a matrix from its logical axis names, inputs first; None if it is no matrix."""
    groups = _groups(names)
    if len(groups) != 2 or None in names or "vocab" in names:
        return None
    return MuonDimensionNumbers(reduction_axis=tuple(groups[0]), output_axis=tuple(groups[1]))


def decays(names: Any) -> bool:
    """Whether weight decay applies: not to norms, biases and other vectors, stacked or not."""
    return len(_groups(names)) > 1


def _map_axes(fn: Callable[[Any], Any], axes: Any) -> Any:
    return jax.tree.map(fn, axes, is_leaf=lambda node: isinstance(node, tuple | jax.sharding.PartitionSpec))


# Together -----------------------------------------------------------------------------------------------


def make_optimizer(
    optimizer: Optimizer, schedule: Schedule, *, steps: int, clip: float = 1.0, axes: Any = None
) -> optax.GradientTransformation:
    """Clipping, the optimizer's direction, decoupled weight decay, the scheduled step size.

    Args:
        steps: optimizer steps of the whole run, which schedules with an end need.
        clip: largest global norm of the gradient; 0 clips nothing.
        axes: tree of logical axis names in the shape of the parameters, a PartitionSpec or tuple a leaf
            (`jaxlong.model.logical_axes`). None takes every axis for itself: then a parameter stacked over
            layers counts as a matrix if it has two axes.

    Raises:
        BadInput: the schedule does not fit into `steps`.
    """
    rate = learning_rate(schedule, steps)
    mask = _map_axes(decays, axes) if axes is not None else lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    return self_moving(
        optax.chain(
            optax.clip_by_global_norm(clip) if clip else optax.identity(),
            optimizer.direction(axes),
            optax.add_decayed_weights(optimizer.weight_decay, mask),
            optax.scale_by_learning_rate(rate),
        )
    )


SELF_MOVING = ("selection_bias", "centroids")
"""Parameters that move by a rule of their own layer: what the layer gives as their gradient is the step, negated."""


def self_moving(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` for all parameters but those named in `SELF_MOVING`, from which their gradient is subtracted as it is.

    They take no part in the norm that clips the others' gradients.
    """
    own = lambda path: str(getattr(path[-1], "key", "")) in SELF_MOVING

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        others = jax.tree_util.tree_map_with_path(lambda path, g: jnp.zeros_like(g) if own(path) else g, grads)
        updates, state = tx.update(others, state, params)
        pick = lambda path, update, g: -g if own(path) else update
        return jax.tree_util.tree_map_with_path(pick, updates, grads), state

    return optax.GradientTransformation(tx.init, update)


def learning_rate(schedule: Schedule, steps: int) -> Callable[[Array], Array]:
    """applied steps [] -> learning rate [] of the next one, for `make_optimizer` and `make_step` alike."""
    schedule.rate(jnp.zeros((), jnp.int32), steps)  # refuses a schedule that does not fit, before compilation
    return lambda step: jnp.asarray(schedule.rate(step, steps), jnp.float32)

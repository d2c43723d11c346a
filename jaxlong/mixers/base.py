"""The contract of a sequence mixer: one call for training, prefill, decode and chunked training."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.types import State


@runtime_checkable
class SequenceMixer(Protocol):
    """A linen module that mixes tokens along the sequence.

    `state=None` mixes whole sequences in parallel form and keeps nothing (training). With a state, x
    continues what the state has seen, for any T >= 1: a prefill chunk, one decoding step, a chunk of
    truncated or exact chunked training; it is differentiable. `segment_ids=None` means one segment, 0.
    """

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: State | None = None,
    ) -> tuple[Float[Array, "B T D"], State | None]: ...

    def init_state(self, batch: int, max_len: int, *, width: int, max_chunk: int, dtype: Any) -> State:
        """The empty state for up to `max_len` tokens of width `width`, fed at most `max_chunk` at a time."""
        ...

    def state_bytes(self, batch: int, max_len: int, *, width: int, max_chunk: int, itemsize: int) -> int:
        """Size of that state by the published formula, in bytes."""
        ...

    def mixing_flops(self, length: int) -> float:
        """Forward flops a token in rows of `length` tokens, beyond 2 a parameter."""
        ...

    @classmethod
    def examples(cls) -> dict[str, SequenceMixer]:
        """Small settings that together use every field; the laws run on each."""
        ...


def projection(
    module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], *, inputs: int, dtype: Any
) -> Float[Array, "..."]:
    """A weight with logical axis names, of variance 1 / fan-in over its first `inputs` axes, cast to `dtype`."""
    fan_in = range(inputs)
    init = nn.initializers.variance_scaling(
        1.0, "fan_in", "truncated_normal", in_axis=tuple(fan_in), out_axis=tuple(range(inputs, len(shape)))
    )
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32).astype(dtype)

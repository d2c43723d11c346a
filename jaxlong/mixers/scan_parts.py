"""What the mixers of diagonal recurrences share: where documents begin, the convolution before them, initial values."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxlong.core.state import ConvTail, Recurrent
from jaxlong.mixers.base import vector
from jaxlong.ops.attend import Backend
from jaxlong.ops.chunks import starts
from jaxlong.ops.short_conv import short_conv


def entry(
    positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None, memory: Recurrent | None, backend: Backend
) -> tuple[Int[Array, "B T"], Any, Bool[Array, "B T"] | None]:
    """The segments of a call, the arrays that it continues, its resets; None where there is nothing to continue."""
    segments = jnp.zeros_like(positions) if segment_ids is None else segment_ids
    if memory is None:
        return segments, None, None if segment_ids is None else starts(segments, backend=backend)
    return segments, memory.memory, starts(segments, memory.segment_ids)


def unpack(state: Any) -> tuple[Recurrent | None, ConvTail | None]:
    """The parts of a state that is None, a memory, or a memory and the tail of a convolution."""
    if state is None or isinstance(state, Recurrent):
        return state, None
    return state


def pack(memory: Recurrent, tail: ConvTail | None) -> Any:
    """The inverse of `unpack`."""
    return memory if tail is None else (memory, tail)


def convolve(
    module: nn.Module,
    parts: tuple[Array, ...],
    segments: Int[Array, "B T"],
    tail: ConvTail | None,
    *,
    width: int,
    backend: Backend,
    bias: bool = True,
) -> tuple[list[Array], ConvTail]:
    """One causal convolution over the channels of all parts [B T ...]; the parts, and the new tail."""
    flat = jnp.concatenate([part.reshape(*part.shape[:2], -1) for part in parts], axis=-1)
    kernel = vector(module, "conv", (width, flat.shape[-1]), (None, None), taps)
    flat, tail = short_conv(flat, kernel, segments, tail, backend=backend)
    if bias:
        flat += vector(module, "conv_bias", flat.shape[-1:], (None,)).astype(flat.dtype)
    ends, at = [], 0
    for part in parts[:-1]:
        at += math.prod(part.shape[2:])
        ends.append(at)
    return [new.reshape(part.shape) for new, part in zip(jnp.split(flat, ends, axis=-1), parts, strict=True)], tail


taps = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=0, out_axis=())
"""Initial values of a convolution's taps: uniform within W ** -0.5."""


def step_bias(key: Array, shape: tuple[int, ...], dtype: Any) -> Float[Array, "..."]:
    """Biases whose softplus is log-uniform in [0.001, 0.1]: the first step sizes of the Mamba mixers."""
    step = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(1e-3), math.log(1e-1)))
    return step + jnp.log(-jnp.expm1(-step))


def log_rate(least: float) -> Any:
    """Initial values log A, where A is uniform in [least, 16]: the decay of a head is exp(-A softplus(step))."""
    return lambda key, shape, dtype: jnp.log(jax.random.uniform(key, shape, dtype, least, 16.0))

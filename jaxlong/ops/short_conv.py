"""Short causal depthwise convolution that respects documents and continues from a state."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.state import ConvTail


def short_conv(
    x: Float[Array, "B T D"],
    kernel: Float[Array, "W D"],
    segment_ids: Int[Array, "B T"],
    tail: ConvTail | None = None,
) -> tuple[Float[Array, "B T D"], ConvTail]:
    """y_t = sum_j kernel_j * x_(t - W + 1 + j), over the tokens of t's own segment.

    Args:
        x: inputs; `tail` holds the W - 1 inputs before them (None: nothing was seen).
        kernel: one filter a channel; the last tap is the token itself.

    Returns:
        The outputs, and the tail from which the next call continues.
    """
    width, length = kernel.shape[0], x.shape[1]
    if tail is None:
        tail = ConvTail.empty(x.shape[0], width, x.shape[2], x.dtype)
    seen = jnp.concatenate([tail.x.astype(x.dtype), x], axis=1)
    segments = jnp.concatenate([tail.segment_ids, segment_ids], axis=1)
    y = jnp.zeros_like(x)
    for tap in range(width):
        same = segments[:, tap : tap + length] == segment_ids
        y += jnp.where(same[..., None], seen[:, tap : tap + length], 0) * kernel[tap].astype(x.dtype)
    rest = slice(length, length + width - 1)
    return y, ConvTail(x=seen[:, rest], segment_ids=segments[:, rest])

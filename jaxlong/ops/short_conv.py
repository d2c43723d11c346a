"""Short causal depthwise convolution that respects documents and continues from a state."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.state import EMPTY, ConvTail
from jaxlong.ops.attend import Backend
from jaxlong.parallel.prefix import Chain, final, halo
from jaxlong.parallel.rows import over_spans, spread


def short_conv(
    x: Float[Array, "B T D"],
    kernel: Float[Array, "W D"],
    segment_ids: Int[Array, "B T"],
    tail: ConvTail | None = None,
    *,
    backend: Backend = Backend(),
) -> tuple[Float[Array, "B T D"], ConvTail]:
    """y_t = sum_j kernel_j * x_(t - W + 1 + j), over the tokens of t's own segment.

    Args:
        x: inputs; `tail` holds the W - 1 inputs before them (None: nothing was seen).
        kernel: one filter a channel; the last tap is the token itself.
        backend: its layout says how rows lie on the devices of a mesh: each span gets the W - 1 tokens before it.

    Returns:
        The outputs, and the tail from which the next call continues.
    """
    width, length = kernel.shape[0], x.shape[1]
    if tail is None and spread(length, backend.layout):
        return over_spans(_on_spans, (x, segment_ids), kernel, layout=backend.layout)
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


def _on_spans(tokens: tuple[Array, Array], kernel: Array, chain: Chain) -> tuple[Array, ConvTail]:
    y, tail = short_conv(tokens[0], kernel, tokens[1], tail_before(*tokens, kernel.shape[0], chain))
    return y, final(tail, chain)


def tail_before(x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"], width: int, chain: Chain) -> ConvTail:
    """The tail that each span of a chain (`parallel.prefix`) continues, for a convolution of that width."""
    before = slice(width - 1)
    ids = halo(segment_ids - EMPTY, chain, before=width - 1)[:, before] + EMPTY
    return ConvTail(halo(x, chain, before=width - 1)[:, before], ids)

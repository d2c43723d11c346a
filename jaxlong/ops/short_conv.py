"""Short causal depthwise convolution that respects documents and continues from a state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.state import EMPTY, ConvTail
from jaxlong.ops.attend import Backend
from jaxlong.parallel.manual import vary_alike
from jaxlong.parallel.prefix import Chain, final, halo
from jaxlong.parallel.rows import over_spans, spread

ROWS = 256
"""On a CPU, tokens whose part of the gradient of the taps is one sum: what is summed then stays in the cache."""


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
    y = _filtered(*vary_alike((seen, segments, kernel)))
    rest = slice(length, length + width - 1)
    return y, ConvTail(x=seen[:, rest], segment_ids=segments[:, rest])


@jax.custom_vjp
def _filtered(seen: Float[Array, "B S D"], segments: Int[Array, "B S"], kernel: Float[Array, "W D"]) -> Array:
    """Filters [B T D] of S = T + W - 1 tokens: each of the last T adds up its taps.

    The gradient keeps these arguments; automatic rules would keep the masked inputs of every tap.
    """
    taps, length = kernel.shape[0], seen.shape[1] - kernel.shape[0] + 1
    y = jnp.zeros_like(seen[:, :length])
    for tap in range(taps):
        same = segments[:, tap : tap + length] == segments[:, taps - 1 :]
        y += jnp.where(same[..., None], seen[:, tap : tap + length], 0) * kernel[tap].astype(seen.dtype)
    return y


def _filtered_forward(*arguments: Array) -> tuple[Array, tuple[Array, ...]]:
    return _filtered(*arguments), arguments


def _filtered_backward(saved: tuple[Array, ...], dy: Array) -> tuple[Array, None, Array]:
    seen, segments, kernel = saved
    d_seen = jax.linear_transpose(lambda x: _filtered.fun(x, segments, kernel), seen)(dy)[0]

    def part(start: Array | int, count: int) -> Array:
        """What `count` tokens add to the gradient of the taps."""
        cut = lambda x, more: jax.lax.dynamic_slice_in_dim(x, start, count + more, axis=1)
        inputs, ids = (cut(x, kernel.shape[0] - 1) for x in (seen, segments))
        return jax.linear_transpose(lambda k: _filtered.fun(inputs, ids, k), kernel)(cut(dy, 0))[0]

    def in_parts() -> Array:
        rows = min(ROWS, dy.shape[1])
        groups, rest = divmod(dy.shape[1], rows)
        add = lambda total, n: (total + part(n * rows, rows), None)
        return jax.lax.scan(add, part(groups * rows, rest), jnp.arange(groups))[0]

    # One sum over all tokens is one pass on an accelerator; a CPU first writes all that it adds to fresh memory.
    total = jax.lax.platform_dependent(cpu=in_parts, default=lambda: part(0, dy.shape[1]))
    return d_seen, None, total


_filtered.defvjp(_filtered_forward, _filtered_backward)


def _on_spans(tokens: tuple[Array, Array], kernel: Array, chain: Chain) -> tuple[Array, ConvTail]:
    y, tail = short_conv(tokens[0], kernel, tokens[1], tail_before(*tokens, kernel.shape[0], chain))
    return y, final(tail, chain)


def tail_before(x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"], width: int, chain: Chain) -> ConvTail:
    """The tail that each span of a chain (`parallel.prefix`) continues, for a convolution of that width."""
    before = slice(width - 1)
    ids = halo(segment_ids - EMPTY, chain, before=width - 1)[:, before] + EMPTY
    return ConvTail(halo(x, chain, before=width - 1)[:, before], ids)

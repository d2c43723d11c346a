"""The previous token of the same document, as the RWKV family mixes it into each token, and the next."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.state import ConvTail
from jaxlong.ops.attend import Backend
from jaxlong.ops.short_conv import tail_before
from jaxlong.parallel.prefix import Chain, final, halo
from jaxlong.parallel.rows import over_spans, spread


def token_shift(
    x: Float[Array, "B T D"],
    segment_ids: Int[Array, "B T"],
    tail: ConvTail | None = None,
    *,
    backend: Backend = Backend(),
) -> tuple[Float[Array, "B T D"], ConvTail]:
    """x_(t-1), or zero at the first token of a document.

    Args:
        tail: the one token before x, a convolution's tail of width 2 (None: nothing was seen).
        backend: its layout says how rows lie on the devices of a mesh: each span gets the token before it.

    Returns:
        The previous tokens, and the tail from which the next call continues.
    """
    if tail is None and spread(x.shape[1], backend.layout):
        return over_spans(_on_spans, (x, segment_ids), None, layout=backend.layout)
    if tail is None:
        tail = ConvTail.empty(x.shape[0], 2, x.shape[2], x.dtype)
    seen = jnp.concatenate([tail.x.astype(x.dtype), x], axis=1)
    segments = jnp.concatenate([tail.segment_ids, segment_ids], axis=1)
    same = segments[:, :-1] == segment_ids
    return jnp.where(same[..., None], seen[:, :-1], 0), ConvTail(x=seen[:, -1:], segment_ids=segments[:, -1:])


def next_token(x: Float[Array, "B T D"], *, backend: Backend = Backend()) -> Float[Array, "B T D"]:
    """x_(t+1), or zero at the end of the row.

    Args:
        backend: its layout says how rows lie on the devices of a mesh: each span gets the token behind it.
    """
    if spread(x.shape[1], backend.layout):
        behind = lambda x, _, chain: (halo(x, chain, after=1)[:, 1:], None)
        return over_spans(behind, x, None, layout=backend.layout)[0]
    return jnp.pad(x[:, 1:], [(0, 0), (0, 1), (0, 0)])


def _on_spans(tokens: tuple[Array, Array], _: None, chain: Chain) -> tuple[Array, ConvTail]:
    previous, tail = token_shift(*tokens, tail_before(*tokens, 2, chain))
    return previous, final(tail, chain)

"""The lightning indexer of DeepSeek Sparse Attention: cheap scores that choose keys, and the loss that teaches them.

Paper: DeepSeek-V3.2, arXiv 2512.02556, section 2.1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from jaxlong.core.mask import Mask
from jaxlong.core.types import BadInput
from jaxlong.ops.dense import head_grid, precision, visible
from jaxlong.ops.select import QUERY_BLOCK, Selection, map_queries, top_k

FLOAT8_BLOCK = 128
"""Numbers that share a scale."""

SCORES = 2**26
"""Scores of all heads that a block of queries may hold (256 MiB); it has at least one query."""

_UNSEEN = -1e30
"""The logit of what is not seen: finite, so that a row of nothing else has a gradient, which is 0."""


class Sight(NamedTuple):
    """Where queries and keys are: what `attend` takes beside the arrays themselves."""

    q_positions: Int[Array, "B T"]
    k_positions: Int[Array, "B S"]
    q_segments: Int[Array, "B T"] | None
    k_segments: Int[Array, "B S"] | None


def index_scores(
    q: Float[Array, "B T I C"], w: Float[Array, "B T I"], k: Float[Array, "B S C"]
) -> Float[Array, "B T S"]:
    """I_ts = sum_j w_tj relu(q_tj . k_s) / sqrt(I C), in float32 whatever the inputs are."""
    q, w, k = (x.astype(jnp.float32) for x in (q, w, k))
    products = jnp.einsum("btic,bsc->btis", q, k, precision=precision(q.dtype))
    return _weighted(products, w, q.shape[-1])


def select_by_index(
    q: Float[Array, "B T I C"],
    w: Float[Array, "B T I"],
    k: Float[Array, "B S C"],
    sight: Sight,
    *,
    mask: Mask,
    heads: int,
    count: int,
    oldest: Int[Array, ""] | None = None,
) -> Selection:
    """The `count` keys of largest index score among those that a query sees, for all heads together.

    Scores are computed for a block of queries at a time. No gradient passes.

    Args:
        heads: of the attention, whose mask it is; what one of them sees can be chosen.
        oldest: the slot of the oldest key, where slots are a ring; of equal scores the older key is chosen.
    """
    k = k.astype(jnp.float32)

    def choose(queries):
        q, w, positions, segments = queries
        part = sight._replace(q_positions=positions, q_segments=segments)
        scores, seen = index_scores(q, w, k)[:, :, None], _seen(mask, part, heads).any(1)[:, :, None]
        if oldest is None:
            return top_k(scores, count, seen)
        indices, valid = top_k(jnp.roll(scores, -oldest, axis=-1), count, jnp.roll(seen, -oldest, axis=-1))
        return Selection((indices + oldest) % k.shape[1], valid)

    block = _queries_at_once(q.shape[2] * k.shape[1])
    return map_queries(choose, (q, w, sight.q_positions, sight.q_segments), block=block)


def index_loss(
    attention: tuple[Float[Array, "B T H M"], Float[Array, "B S M"]],
    index: tuple[Float[Array, "B T I C"], Float[Array, "B T I"], Float[Array, "B S C"]],
    sight: Sight,
    chosen: Selection | None,
    *,
    mask: Mask,
    scale: float,
) -> Float[Array, "B T"]:
    """How far the indexer is from the attention that it should foresee, for each query.

        p_t = sum_h softmax(scale q_th . k) / H;   L_t = KL(p_t || softmax(I_t))

    over the keys that the query sees, or those chosen among them. The gradient flows to `index` alone. One block of
    queries at a time is in memory, also backward. A query that sees nothing loses nothing.

    Args:
        attention: queries (absorbed) and keys (latents) of the attention, one key for all heads.
        index: queries, weights and keys of the indexer.
    """
    (q, k), (iq, w, ik) = lax.stop_gradient(attention), index
    k, ik = k.astype(jnp.float32), ik.astype(jnp.float32)  # gradients of all blocks of queries add up in float32
    H, S = q.shape[2], k.shape[1]

    def loss(queries):
        q, iq, w, positions, segments, chosen = queries
        part = sight._replace(q_positions=positions, q_segments=segments)
        q, iq, w = (x.astype(jnp.float32) for x in (q, iq, w))
        seen = _seen(mask, part, H)
        if chosen is None:
            scores = jnp.einsum("bthm,bsm->bhts", q, k, precision=precision(q.dtype))
            return _divergence(scale * scores, index_scores(iq, w, ik), seen)
        slots, valid = chosen.indices[:, :, 0], chosen.valid[:, :, 0]
        seen = jnp.take_along_axis(seen, slots[:, None], axis=-1) & valid[:, None]
        take = jax.vmap(lambda row, index: row.at[index].get(mode="promise_in_bounds"))
        scores = jnp.einsum("bthm,btsm->bhts", q, take(k, slots), precision=precision(q.dtype))
        products = jnp.einsum("btic,btsc->btis", iq, take(ik, slots), precision=precision(q.dtype))
        return _divergence(scale * scores, _weighted(products, w, iq.shape[-1]), seen)

    n = S if chosen is None else chosen.indices.shape[-1]
    block = _queries_at_once(max(H * n, iq.shape[2] * n, 0 if chosen is None else n * k.shape[-1], S))
    return map_queries(loss, (q, iq, w, sight.q_positions, sight.q_segments, chosen), block=block)


def float8(x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
    """What is left of x after a Hadamard transform and 8 bits a number, in the dtype of x.

    e4m3 with one power-of-two scale for each `FLOAT8_BLOCK` numbers (all, if fewer), as DeepSeek's kernels keep index
    queries and keys. The transform spreads outliers and leaves products of two transformed vectors as they were. The
    gradient passes the rounding unchanged.

    Raises:
        BadInput: C is not a power of two.
    """
    size = x.shape[-1]
    turned = jnp.einsum("...c,cd->...d", x.astype(jnp.float32), _hadamard(size), precision=lax.Precision.HIGHEST)
    blocks = turned.reshape(*turned.shape[:-1], -1, min(size, FLOAT8_BLOCK))
    return _round8(blocks).reshape(x.shape).astype(x.dtype)


@jax.custom_jvp
def _round8(x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
    largest = float(jnp.finfo(jnp.float8_e4m3fn).max)
    fraction, exponent = jnp.frexp(jnp.maximum(jnp.abs(x).max(-1, keepdims=True), 1e-4) / largest)
    scale = jnp.ldexp(jnp.ones_like(fraction), exponent - (fraction == 0.5))  # 2 ** ceil(log2(max / largest))
    rounded = jnp.clip(x / scale, -largest, largest).astype(jnp.float8_e4m3fn)
    return lax.optimization_barrier(rounded).astype(x.dtype) * scale  # the barrier keeps the compiler from undoing it


_round8.defjvps(lambda tangent, rounded, x: tangent)


def _hadamard(size: int) -> Float[np.ndarray, "C C"]:
    """Sylvester's matrix, orthogonal and symmetric."""
    if size & (size - 1):
        raise BadInput("index_dim", size, "a Hadamard transform doubles from 1", "a power of two")
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.float32(math.sqrt(size))


def _weighted(products: Float[Array, "B T I S"], w: Float[Array, "B T I"], dim: int) -> Float[Array, "B T S"]:
    w = w * (w.shape[-1] * dim) ** -0.5
    return jnp.einsum("btis,bti->bts", jax.nn.relu(products), w, precision=precision(w.dtype))


def _divergence(
    attention: Float[Array, "B H T S"], index: Float[Array, "B T S"], seen: Bool[Array, "B #H T S"]
) -> Float[Array, "B T"]:
    """KL(mean over heads of softmax(attention) || softmax(index)) over what is seen."""
    any_head = seen.any(1)
    heads = jax.nn.softmax(jnp.where(seen, attention, _UNSEEN), axis=-1)
    target = jnp.where(seen, heads, 0).sum(1)
    target = lax.stop_gradient(target / jnp.maximum(target.sum(-1, keepdims=True), 1e-30))
    index = jax.nn.log_softmax(jnp.where(any_head, index, _UNSEEN), axis=-1)
    held = target > 0
    return jnp.where(held, target * (jnp.log(jnp.where(held, target, 1)) - index), 0).sum(-1)


def _seen(mask: Mask, sight: Sight, heads: int) -> Bool[Array, "B #H T S"]:
    """Which keys each head sees."""
    return visible(mask, *sight, head_grid(None, heads, 1))[:, 0]


def _queries_at_once(numbers: int) -> int:
    return max(1, min(QUERY_BLOCK, SCORES // numbers))

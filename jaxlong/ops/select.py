"""Attention over keys chosen for each query: top-k selection, and softmax over what it chose.

    chosen = top_k(scores, 64, allowed)                       # scores of tokens, or of blocks of tokens
    out, lse = attend_selected(q, k, v, chosen, mask=causal(), q_positions=t, k_positions=s)

A selection names keys by their slots in the array of keys, so it serves whole rows and caches alike. The choice has no
gradient; `straight_through_top_k` gives it one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int

from jaxlong.core.mask import Mask
from jaxlong.core.types import BadInput
from jaxlong.ops.chunks import join, split
from jaxlong.ops.dense import accumulator, precision

QUERY_BLOCK = 64
"""Queries that are worked on at a time."""

GATHERED = 2**26
"""Numbers of a row that `attend_selected` gathers at a time; fewer queries where they choose much."""


class Selection(NamedTuple):
    """What each query reads: n slots, or n first slots of spans, for each of R groups of heads.

    R is 1 (all heads share a selection), K (the queries of a key head share one) or H (each has its own). Entries that
    are not `valid` name nothing. The valid ones of a query differ from each other: what is named twice counts twice.
    """

    indices: Int[Array, "B T R n"]
    valid: Bool[Array, "B T R n"]


def top_k(scores: Float[Array, "B T R M"], k: int, allowed: Bool[Array, "#B #T #R M"]) -> Selection:
    """The k largest scores among those allowed, largest first; of equal ones the lower index. No gradient passes.

    Args:
        scores: float32, for the choice to be the same whatever the lengths of T and M; -inf is not allowed either.
        k: min(k, M) are returned, those beyond what is allowed with `valid` False.
    """
    best, indices = _largest(jnp.where(allowed, scores, -jnp.inf), k)
    return Selection(indices, best > -jnp.inf)


def attend_selected(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K V"],
    selection: Selection,
    *,
    mask: Mask,
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B T"] | None = None,
    k_segments: Int[Array, "B S"] | None = None,
    block: int = 1,
    scale: float | None = None,
    query_block: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """Softmax attention over the selected keys, and the log of each softmax denominator.

        s = scale q.k;  lse = log(sum_(j selected and seen) exp s_j);  out = sum_j exp(s_j - lse) v_j

    Gathers the keys of `query_block` queries at a time: memory grows with query_block n block (C + V) K, also backward,
    where the gathering is done again. Softmax and sums are float32. A query that sees nothing gets exactly 0 with lse
    -inf. What it does not see changes nothing, not even NaN. Differentiable in q, k and v.

    Args:
        selection: slots of k and v; see `Selection`.
        mask: which positions see which, applied to the selected keys.
        q_segments, k_segments: pairs with different ids do not attend, and a key with a negative id is an empty slot.
            Both or neither.
        block: an index i names the span of slots i to i + block - 1, counted around a ring of S slots. It ends early
            where positions stop counting up by one: at the end of its document.
        scale: C ** -0.5 unless given.
        query_block: queries at a time; None is as many as gather `GATHERED` numbers a row, at most `QUERY_BLOCK`.

    Returns:
        out in v's dtype, lse in float32.

    Raises:
        BadInput: heads that do not fit each other, or segments on one side only.
    """
    (H, C), (S, K) = q.shape[2:], k.shape[1:3]
    groups = selection.indices.shape[2]
    if H % K:
        raise BadInput("heads", H, f"not a multiple of the {K} key heads", "each key head serves equally many queries")
    if groups not in (1, K, H):
        raise BadInput("selection", f"{groups} groups of heads", f"{H} heads read {K} key heads", f"one of {1, K, H}")
    if (q_segments is None) != (k_segments is None):
        given = "k_segments" if q_segments is None else "q_segments"
        raise BadInput("segments", given, "given for one side only", "both q_segments and k_segments, or neither")

    scale = C**-0.5 if scale is None else scale
    shared, own = (groups, 1) if groups in (1, K) else (K, H // K)  # groups = key heads x selections of each
    if query_block is None:
        numbers = K * own * selection.indices.shape[-1] * block * (C + v.shape[-1])
        query_block = max(1, min(QUERY_BLOCK, GATHERED // numbers))
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    heads = jnp.arange(H, dtype=jnp.int32).reshape(K, own, -1, 1, 1)

    def attend_block(queries):
        q, (indices, valid), positions, segments = queries
        slots = (indices[..., None] + jnp.arange(block, dtype=indices.dtype)) % S
        there = _take(k_positions, slots)
        seen = valid[..., None] & (there == there[..., :1] + jnp.arange(block, dtype=there.dtype))
        if segments is not None:
            ids = _take(k_segments, slots)
            seen &= (ids == segments[:, :, None, None, None]) & (ids >= 0)
        by_head = lambda x: jnp.moveaxis(x.reshape(*x.shape[:2], shared, own, -1), 1, 3)  # [B k g t m]
        slots, there, seen = by_head(slots), by_head(there)[:, :, :, None], by_head(seen)[:, :, :, None]
        seen &= mask(positions[:, None, None, None, :, None], there, heads)  # [B #K g #j t m]
        q = jnp.moveaxis(q.reshape(*q.shape[:2], K, own, -1, C), 1, 4)  # [B K g j t C]
        k_chosen, v_chosen = (_gather(x, slots, seen.any(3)) for x in (k, v))
        return _softmax(scale, q, k_chosen, v_chosen, seen)

    out, lse = map_queries(attend_block, (q, selection, q_positions, q_segments), block=query_block)
    return checkpoint_name(out, "attend_out"), checkpoint_name(lse, "attend_lse")


def map_queries(function: Callable[[Any], Any], queries: Any, *, block: int = QUERY_BLOCK) -> Any:
    """`function(queries)` for arrays `[B, T, ...]`, computed for `block` queries at a time, again in the backward pass.

    The last block is padded with zeros (False). One block or less is computed at once.
    """
    length = jax.tree.leaves(queries)[0].shape[1]
    if length <= block:
        return function(queries)
    body = jax.checkpoint(lambda _, part: (None, function(part)), prevent_cse=False)
    _, results = lax.scan(body, None, jax.tree.map(lambda x: split(x, block), queries))
    return jax.tree.map(lambda x: join(x, length), results)


def sigmoid_relaxation(scores: Float[Array, "*B M"], kept: Bool[Array, "*B M"]) -> Float[Array, "*B M"]:
    """Each score by itself: what is not chosen learns too."""
    return jax.nn.sigmoid(scores)


def softmax_relaxation(scores: Float[Array, "*B M"], kept: Bool[Array, "*B M"]) -> Float[Array, "*B M"]:
    """Chosen scores against each other; what is not chosen has no gradient."""
    return jax.nn.softmax(scores, axis=-1, where=kept)


def straight_through_top_k(
    scores: Float[Array, "*B M"],
    k: int,
    *,
    temperature: float = 1.0,
    relaxation: Callable[[Array, Array], Array] = sigmoid_relaxation,
) -> Float[Array, "*B M"]:
    """1 at the k largest scores (ties to the lower index) and 0 elsewhere, with the gradient of a soft choice.

        value: top_k(s);  gradient: d relaxation(s / temperature) / d s

    The straight-through estimator (Bengio et al., arXiv 1308.3432) of a choice. Weigh what was chosen by it, or add
    its logarithm to the logits of what was chosen.

    Args:
        k: how many; all M where there are fewer.
        temperature: above 0; a small one lets only scores near the others learn.
        relaxation: (scores / temperature, chosen) -> the soft choice that stands in for the hard one backward.
    """
    if temperature <= 0:
        raise BadInput("temperature", temperature, "divides the scores", "above 0")
    _, indices = _largest(scores, k)
    kept = jnp.put_along_axis(jnp.zeros(scores.shape, bool), indices, True, axis=-1, inplace=False)
    soft = relaxation(scores / temperature, kept)
    return kept.astype(scores.dtype) + (soft - lax.stop_gradient(soft))


def _largest(scores: Float[Array, "*B M"], k: int) -> tuple[Float[Array, "*B n"], Int[Array, "*B n"]]:
    scores = lax.stop_gradient(jnp.where(scores == 0, 0, scores))  # a sort puts 0.0 before -0.0
    values, indices = lax.top_k(scores, min(k, scores.shape[-1]))
    return values, indices


def _take(x: Int[Array, "B S"], slots: Int[Array, "B T R n b"]) -> Int[Array, "B T R n b"]:
    return jax.vmap(lambda row, index: row.at[index].get(mode="promise_in_bounds"))(x, slots)


def _gather(
    x: Float[Array, "B K S C"], slots: Int[Array, "B k g t m"], seen: Bool[Array, "B #K g t m"]
) -> Float[Array, "B K g t m C"]:
    """Rows of x at those slots, the same for all key heads if k = 1; 0 where no head of the group sees one."""
    slots = jnp.broadcast_to(slots, (x.shape[0], x.shape[1], *slots.shape[2:]))
    rows = jax.vmap(jax.vmap(lambda head, index: head.at[index].get(mode="promise_in_bounds")))(x, slots)
    return jnp.where(seen[..., None], rows, 0)


def _softmax(
    scale: float,
    q: Float[Array, "B K g j t C"],
    k: Float[Array, "B K g t m C"],
    v: Float[Array, "B K g t m V"],
    seen: Bool[Array, "B #K g #j t m"],
) -> tuple[Float[Array, "B t H V"], Float[Array, "B t H"]]:
    """Each query over its own m keys; see `attend_selected`."""
    wide = accumulator(q.dtype)
    product = lambda formula, a, b: jnp.einsum(formula, a, b, preferred_element_type=wide, precision=precision(a.dtype))
    scores = jnp.where(seen, scale * product("bkgjtc,bkgtmc->bkgjtm", q, k), -jnp.inf)
    top = scores.max(-1, keepdims=True)
    top = lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    nothing = total == 0
    total = jnp.where(nothing, 1, total)
    out = product("bkgjtm,bkgtmv->bkgjtv", (weights / total).astype(v.dtype), v)
    lse = jnp.where(nothing, -jnp.inf, top + jnp.log(total))
    by_token = lambda x: jnp.moveaxis(x, 4, 1).reshape(x.shape[0], x.shape[4], -1, x.shape[-1])
    return by_token(out).astype(v.dtype), by_token(lse)[..., 0]

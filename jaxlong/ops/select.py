"""Attention over keys chosen for each query: top-k selection, and softmax over what it chose.

    chosen = top_k(scores, 64, allowed)                       # scores of tokens, or of blocks of tokens
    out, lse = attend_selected(q, k, v, chosen, mask=causal(), q_positions=t, k_positions=s)

A selection names keys by their slots in the array of keys, so it serves whole rows and caches alike. The choice has no
gradient; `straight_through_top_k` gives it one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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
    -inf. What it does not see changes nothing, not even NaN. Differentiable in q, k and v, in reverse mode and once.

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
    (H, C), K = q.shape[2:], k.shape[2]
    groups = selection.indices.shape[2]
    if H % K:
        raise BadInput("heads", H, f"not a multiple of the {K} key heads", "each key head serves equally many queries")
    if groups not in (1, K, H):
        raise BadInput("selection", f"{groups} groups of heads", f"{H} heads read {K} key heads", f"one of {1, K, H}")
    if (q_segments is None) != (k_segments is None):
        given = "k_segments" if q_segments is None else "q_segments"
        raise BadInput("segments", given, "given for one side only", "both q_segments and k_segments, or neither")

    if query_block is None:
        own = H // K if groups == H else 1  # selections of a key head
        numbers = K * own * selection.indices.shape[-1] * block * (C + v.shape[-1])
        query_block = max(1, min(QUERY_BLOCK, GATHERED // numbers))
    static = _Static(mask, block, C**-0.5 if scale is None else scale, query_block)
    ints = _Ints(selection, q_positions, k_positions, q_segments, k_segments)
    out, lse = _attention(static, (q, k, v), ints)
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


class _Static(NamedTuple):
    mask: Mask
    block: int
    scale: float
    query_block: int


class _Ints(NamedTuple):
    selection: Selection
    q_positions: Int[Array, "B T"]
    k_positions: Int[Array, "B S"]
    q_segments: Int[Array, "B T"] | None
    k_segments: Int[Array, "B S"] | None


class _Chosen(NamedTuple):
    """What a block of t queries reads: g selections of m keys for each of k key heads (1: the same for all K)."""

    slots: Int[Array, "B k g t m"]
    seen: Bool[Array, "B #K g #j t m"]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, floats: tuple[Array, Array, Array], ints: _Ints) -> tuple[Array, Array]:
    q, k, v = floats
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)

    def attend_block(queries):
        q, selection, positions, segments = queries
        chosen = _look_up(static, ints, k.shape[1], q.shape[2], selection, positions, segments)
        return _softmax(static.scale, q, _gather(k, chosen), _gather(v, chosen), chosen.seen)

    queries = (q, ints.selection, ints.q_positions, ints.q_segments)
    return map_queries(attend_block, queries, block=static.query_block)


def _attention_fwd(static: _Static, floats: tuple[Array, Array, Array], ints: _Ints):
    return _attention(static, floats, ints), (floats, ints)


def _attention_bwd(static: _Static, residuals, cotangents):
    """Gathers again; gradients of keys and values are added up in place and in float32."""
    (q, k, v), ints = residuals
    length, heads_first = q.shape[1], (k.swapaxes(1, 2), v.swapaxes(1, 2))

    def block(sums, rows):
        (q, selection, positions, segments), out = rows
        chosen = _look_up(static, ints, k.shape[2], q.shape[2], selection, positions, segments)
        attend_block = lambda q, k, v: _softmax(static.scale, q, k, v, chosen.seen)
        _, pull = jax.vjp(attend_block, q, *(_gather(x, chosen) for x in heads_first))
        dq, *new = pull(out)
        return tuple(_scatter(total, chosen, x) for total, x in zip(sums, new, strict=True)), dq

    rows = (q, ints.selection, ints.q_positions, ints.q_segments), cotangents
    rows = jax.tree.map(lambda x: split(x, min(static.query_block, length)), rows)
    sums = tuple(jnp.zeros_like(x, dtype=accumulator(x.dtype)) for x in heads_first)
    (dk, dv), dq = lax.scan(block, sums, rows)
    return (join(dq, length), dk.swapaxes(1, 2).astype(k.dtype), dv.swapaxes(1, 2).astype(v.dtype)), None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _look_up(
    static: _Static,
    ints: _Ints,
    K: int,
    H: int,
    selection: Selection,
    positions: Int[Array, "B t"],
    segments: Int[Array, "B t"] | None,
) -> _Chosen:
    """The slots that a block of queries reads, and which of them it sees."""
    groups = selection.indices.shape[2]
    key_heads, own = (groups, 1) if groups in (1, K) else (K, H // K)
    offset = jnp.arange(static.block, dtype=jnp.int32)
    slots = (selection.indices[..., None] + offset) % ints.k_positions.shape[1]
    of_slots = jax.vmap(lambda row, index: row.at[index].get(mode="promise_in_bounds"))
    there = of_slots(ints.k_positions, slots)
    seen = selection.valid[..., None] & (there == there[..., :1] + offset)
    if segments is not None:
        ids = of_slots(ints.k_segments, slots)
        seen &= (ids == segments[:, :, None, None, None]) & (ids >= 0)
    by_head = lambda x: jnp.moveaxis(x.reshape(*x.shape[:2], key_heads, own, -1), 1, 3)
    slots, there, seen = by_head(slots), by_head(there)[:, :, :, None], by_head(seen)[:, :, :, None]
    heads = jnp.arange(H, dtype=jnp.int32).reshape(K, own, -1, 1, 1)
    return _Chosen(slots, seen & static.mask(positions[:, None, None, None, :, None], there, heads))


def _slots_of_heads(chosen: _Chosen, x: Array) -> Int[Array, "B K g t m"]:
    return jnp.broadcast_to(chosen.slots, (x.shape[0], x.shape[1], *chosen.slots.shape[2:]))


def _gather(x: Float[Array, "B K S C"], chosen: _Chosen) -> Float[Array, "B K g t m C"]:
    """The chosen rows of x; 0 where no head of a group sees one."""
    take = jax.vmap(jax.vmap(lambda head, index: head.at[index].get(mode="promise_in_bounds")))
    return jnp.where(chosen.seen.any(3)[..., None], take(x, _slots_of_heads(chosen, x)), 0)


def _scatter(x: Float[Array, "B K S C"], chosen: _Chosen, new: Float[Array, "B K g t m C"]) -> Float[Array, "B K S C"]:
    """Adds to the chosen rows of x; the transpose of `_gather`."""
    new = jnp.where(chosen.seen.any(3)[..., None], new, 0).astype(x.dtype)
    add = jax.vmap(jax.vmap(lambda head, index, rows: head.at[index].add(rows, mode="promise_in_bounds")))
    return add(x, _slots_of_heads(chosen, x), new)


def _softmax(
    scale: float,
    q: Float[Array, "B t H C"],
    k: Float[Array, "B K g t m C"],
    v: Float[Array, "B K g t m V"],
    seen: Bool[Array, "B #K g #j t m"],
) -> tuple[Float[Array, "B t H V"], Float[Array, "B t H"]]:
    """Each query over its own m keys; see `attend_selected`."""
    (B, K, own), (t, H, C) = k.shape[:3], q.shape[1:]
    q = jnp.moveaxis(q.reshape(B, t, K, own, -1, C), 1, 4)  # [B K g j t C]
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
    by_token = lambda x: jnp.moveaxis(x, 4, 1).reshape(B, t, H, -1)
    return by_token(out).astype(v.dtype), by_token(lse)[..., 0]

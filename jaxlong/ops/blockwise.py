"""Blockwise attention: memory linear in length, forward and backward, in plain JAX.

Scores exist one tile (`block_q` queries by `block_k` keys) at a time. Forward keeps a running maximum, sum and output
per query (online softmax: Milakov and Gimelshein 2018; Rabe and Staats 2021); backward recomputes the probabilities
of a tile from the saved log-sum-exp (FlashAttention: Dao et al. 2022, algorithm 4). A block of queries visits only
the key blocks in which its mask and segments may show it something.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from jaxlong.core.mask import Mask
from jaxlong.core.types import BadInput
from jaxlong.ops.dense import accumulator, distance, finite, grouped, head_grid, precision, visible
from jaxlong.parallel.manual import vary_alike


def blockwise(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K V"],
    *,
    mask: Mask,
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B T"] | None = None,
    k_segments: Int[Array, "B S"] | None = None,
    heads: Int[Array, "H"] | None = None,
    bias: Float[Array, "#B #H #T #S"] | None = None,
    alibi_slopes: Float[Array, "H"] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "H"] | None = None,
    dtype: DTypeLike | None = None,
    block_q: int = 512,
    block_k: int = 512,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """`attend_with_lse` in tiles; `jaxlong.ops.attend` describes the other arguments.

    Any lengths: blocks shrink to fit them and the rest is padded. The gradient flows to q, k, v, bias, slopes and
    sinks, from both results. The output and the lse carry the checkpoint names "attend_out" and "attend_lse": a remat
    policy that saves both never runs the forward loop again.

    Args:
        dtype: of out; v's unless given.
        block_q: queries of a tile, at least 1.
        block_k: keys of a tile, at least 1.
    """
    given = q_positions, k_positions, q_segments, k_segments, heads
    static, ints = _prepare(q, k, mask, given, scale, soft_cap, v.dtype if dtype is None else dtype, block_q, block_k)
    return _attention(static, *vary_alike((_Floats(q, k, v, bias, alibi_slopes, sinks), ints)))


def blockwise_backward(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K V"],
    out: Float[Array, "B T H V"],
    lse: Float[Array, "B T H"],
    dout: Float[Array, "B T H V"],
    dlse: Float[Array, "B T H"],
    *,
    mask: Mask,
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B T"] | None = None,
    k_segments: Int[Array, "B S"] | None = None,
    heads: Int[Array, "H"] | None = None,
    bias: Float[Array, "#B #H #T #S"] | None = None,
    alibi_slopes: Float[Array, "H"] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    block_q: int = 512,
    block_k: int = 512,
) -> tuple[Array | None, ...]:
    """The gradients of q, k, v, bias and slopes in float32, of these keys, which may be a part of all.

    Args:
        out, lse: results over all keys, of which the queries may see others too.
        dout, dlse: the gradients of these.
    """
    given = q_positions, k_positions, q_segments, k_segments, heads
    static, ints = _prepare(q, k, mask, given, scale, soft_cap, v.dtype, block_q, block_k)
    floats = _Floats(q, k, v, bias, alibi_slopes, None)
    return _gradients(static, *vary_alike((floats, ints, out, lse, dout, dlse)), accumulator(q.dtype))[:-1]


def _prepare(
    q: Array,
    k: Array,
    mask: Mask,
    given: tuple,
    scale: float | None,
    soft_cap: float | None,
    dtype: DTypeLike,
    block_q: int,
    block_k: int,
) -> tuple[_Static, _Ints]:
    """What is known to the compiler, and the integers with what was left out."""
    for field, block in (("block_q", block_q), ("block_k", block_k)):
        if block < 1:
            raise BadInput(field, block, "a tile holds at least one token", "1 or more")
    (B, T, H, C), (S, K) = q.shape, k.shape[1:3]
    blocks = _fit(T, block_q), _fit(S, block_k)
    static = _Static(mask, C**-0.5 if scale is None else scale, soft_cap, *blocks, precision(q.dtype), jnp.dtype(dtype))
    q_positions, k_positions, q_segments, k_segments, heads = given
    if q_segments is None:
        q_segments, k_segments = jnp.zeros((B, T), jnp.int32), jnp.zeros((B, S), jnp.int32)
    return static, _Ints(q_positions, k_positions, q_segments, k_segments, head_grid(heads, H, K))


@dataclass(frozen=True)
class _Static:
    mask: Mask
    scale: float
    soft_cap: float | None
    block_q: int
    block_k: int
    precision: lax.Precision | None
    dtype: jnp.dtype  # of out


class _Floats(NamedTuple):
    """What has gradients."""

    q: Any
    k: Any
    v: Any
    bias: Any
    alibi_slopes: Any
    sinks: Any


class _Ints(NamedTuple):
    q_positions: Any
    k_positions: Any
    q_segments: Any
    k_segments: Any
    heads: Any


class _Queries(NamedTuple):
    """Blocks of queries; a leading axis counts them, absent in a single one."""

    index: Int[Array, "*n"]
    q: Float[Array, "*n B K G bq C"]
    positions: Int[Array, "*n B bq"]
    segments: Int[Array, "*n B bq"]


class _Keys(NamedTuple):
    """Blocks of keys, cut where they lie: a cache of which little is visible must not be copied."""

    k: Float[Array, "B *n bk K C"]
    v: Float[Array, "B *n bk K V"]
    positions: Int[Array, "B *n bk"]
    segments: Int[Array, "B *n bk"]


class _Side(NamedTuple):
    """What every tile shares."""

    heads: Int[Array, "K G"]
    bias: Float[Array, "#B #K #G #T #S"] | None  # padded to whole blocks
    slopes: Float[Array, "K G 1 1"] | None
    sinks: Float[Array, "K G 1 1"] | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, floats: _Floats, ints: _Ints):
    return _forward(static, floats, ints)


def _attention_fwd(static, floats, ints):
    out, lse = _forward(static, floats, ints)
    out, lse = checkpoint_name(out, "attend_out"), checkpoint_name(lse, "attend_lse")
    return (out, lse), (floats, ints, out, lse)


def _forward(static: _Static, floats: _Floats, ints: _Ints):
    """Attention by blocks of queries, each over its active blocks of keys."""
    queries, keys, side = _layout(static, floats, ints)
    T, V = floats.q.shape[1], floats.v.shape[-1]
    reaches = _active(static.mask, keys)
    wide = accumulator(floats.q.dtype)

    def block(_, query: _Queries):
        order, count = reaches(query)

        def step(n, carry):
            top, total, out = carry
            j = order[n]
            key = _take(keys, j)
            scores, _, seen = _scores(static, side, query, key, j)
            scores = jnp.where(seen, scores, -jnp.inf)
            new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
            pivot = jnp.where(new_top == -jnp.inf, 0, new_top)
            weights, decay = jnp.exp(scores - pivot), jnp.exp(top - pivot)
            new = _einsum(static, "bkgqs,bskv->bkgqv", weights.astype(key.v.dtype), finite(key.v))
            return new_top, total * decay + weights.sum(-1, keepdims=True), out * decay + new

        top = jnp.full_like(query.q[..., :1], -jnp.inf, dtype=wide)
        if side.sinks is not None:  # a key of value 0 that was seen already
            top = jnp.maximum(top, side.sinks)
        total = jnp.where(top == -jnp.inf, 0.0, jnp.ones_like(top))
        start = (top, total, jnp.zeros_like(query.q, shape=(*query.q.shape[:-1], V), dtype=wide))
        top, total, out = lax.fori_loop(0, count, step, start)
        nothing = total == 0
        total = jnp.where(nothing, 1, total)
        lse = jnp.where(nothing, -jnp.inf, top + jnp.log(total))
        return None, ((out / total).astype(static.dtype), lse)

    _, (out, lse) = lax.scan(block, None, queries)
    return _tokens(out, T), _tokens(lse, T)[..., 0]


def _attention_bwd(static: _Static, residuals, cotangents):
    floats, ints, out, lse = residuals
    found = _gradients(static, floats, ints, out, lse, *cotangents, floats.q.dtype)
    return jax.tree.map(lambda x, like: x.astype(like.dtype), found, floats), None


def _gradients(
    static: _Static,
    floats: _Floats,
    ints: _Ints,
    out: Array,
    lse: Array,
    dout: Array,
    dlse: Array,
    of_q: DTypeLike,
) -> _Floats:
    """Float32 gradients in one pass over blocks of queries; those of keys accumulate as the pass goes on.

    That of q, final once its block is through, has the dtype `of_q`.
    """
    queries, keys, side = _layout(static, floats, ints)
    (T, H), (S, K) = floats.q.shape[1:3], floats.k.shape[1:3]
    wide = accumulator(floats.q.dtype)
    by_query = lambda x: _heads_first(_cut(x, static.block_q, 0).swapaxes(0, 1), K)
    rows = (queries, by_query(out), by_query(lse[..., None]), by_query(dout), by_query(dlse[..., None]))
    reaches = _active(static.mask, keys)

    def block(sums, row):
        query, out, lse, dout, dlse = row
        *sums, dsinks = sums
        order, count = reaches(query)
        pure_q, pure_dout = finite(query.q), finite(dout)
        # d score = p * (dp - delta); a row without keys has out == 0, and its cotangent may be anything
        delta = jnp.where(out == 0, 0, out.astype(wide) * dout.astype(wide)).sum(-1, keepdims=True) - dlse
        lse = jnp.where(lse == -jnp.inf, 0, lse)
        if dsinks is not None:  # a key of value 0: dp = 0
            dsinks = dsinks - (jnp.exp(jnp.minimum(side.sinks - lse, 0)) * delta).sum((0, 3), keepdims=True)[0]

        def step(n, carry):
            dq, dk, dv, dbias, dslopes = carry
            j = order[n]
            key = _take(keys, j)
            scores, capped, seen = _scores(static, side, query, key, j)
            weights = jnp.where(seen, jnp.exp(scores - lse), 0)
            dweights = _einsum(static, "bkgqv,bskv->bkgqs", dout, finite(key.v))
            dscores = jnp.where(seen, weights * (dweights - delta), 0)
            if dbias is not None:
                dbias = _add_tile(static, dbias, dscores, query.index, j)
            if dslopes is not None:
                away = distance(query.positions, key.positions).astype(wide)
                dslopes = dslopes - (dscores * away).sum((0, 3, 4))[..., None, None]
            if capped is not None:
                dscores = jnp.where(seen, dscores * (1 - jnp.square(capped / static.soft_cap)), 0)
            dscores = (dscores * static.scale).astype(query.q.dtype)
            dq = dq + _einsum(static, "bkgqs,bskc->bkgqc", dscores, finite(key.k))
            dk = dk.at[:, j].add(_einsum(static, "bkgqs,bkgqc->bskc", dscores, pure_q))
            dv = dv.at[:, j].add(_einsum(static, "bkgqs,bkgqv->bskv", weights.astype(dout.dtype), pure_dout))
            return dq, dk, dv, dbias, dslopes

        dq, *sums = lax.fori_loop(0, count, step, (jnp.zeros_like(query.q, dtype=wide), *sums))
        return (*sums, dsinks), dq.astype(of_q)

    sums = jax.tree.map(partial(jnp.zeros_like, dtype=wide), (keys.k, keys.v, side.bias, side.slopes, side.sinks))
    (dk, dv, dbias, dslopes, dsinks), dq = lax.scan(block, sums, rows)
    by_key = lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])[:, :S]
    return _Floats(
        _tokens(dq, T),
        by_key(dk),
        by_key(dv),
        None if dbias is None else _unpad(dbias, floats.bias),
        None if dslopes is None else dslopes.reshape(H),
        None if dsinks is None else dsinks.reshape(H),
    )


_attention.defvjp(_attention_fwd, _attention_bwd)


def _scores(static: _Static, side: _Side, query: _Queries, key: _Keys, j: Int[Array, ""]):
    """Of tile (query.index, j): the scores [B K G bq bk] before masking, those of the soft cap, and who sees whom.

    A key whose value is not finite scores NaN: it spoils the queries that see it and no others.
    """
    wide = accumulator(query.q.dtype)
    k = jnp.where(jnp.isfinite(key.v).all(-1, keepdims=True), key.k, jnp.nan)
    scores = _einsum(static, "bkgqc,bskc->bkgqs", query.q, k) * static.scale
    capped = None
    if static.soft_cap is not None:
        scores = capped = static.soft_cap * jnp.tanh(scores / static.soft_cap)
    if side.bias is not None:
        start, size = _tile_of(static, side.bias, query.index, j)
        scores = scores + lax.dynamic_slice(side.bias, start, size).astype(wide)
    if side.slopes is not None:
        scores = scores - side.slopes * distance(query.positions, key.positions).astype(wide)
    seen = visible(static.mask, query.positions, key.positions, query.segments, key.segments, side.heads)
    return scores, capped, seen


def _active(mask: Mask, keys: _Keys) -> Callable[[_Queries], tuple[Int[Array, "n"], Int[Array, ""]]]:
    """A function of a block of queries: the blocks of keys, active ones first, and how many are active.

    Found anew for every block of queries: a table for all of them would grow with the square of the length.
    """
    columns = _spans(keys.positions, keys.segments)

    def active(query: _Queries):
        row = _spans(query.positions[:, None], query.segments[:, None])
        maybe_any, _ = mask.tile(row.first, row.last, columns.first, columns.last)
        meet = (row.low <= columns.high) & (columns.low <= row.high) & row.held & columns.held
        hit = (maybe_any & meet).any(0)
        return jnp.argsort(~hit, stable=True), hit.sum(dtype=jnp.int32)

    return active


class _Spans(NamedTuple):
    """Ranges of the positions and segments of blocks, over the slots that hold a token."""

    first: Int[Array, "B n"]
    last: Int[Array, "B n"]
    low: Int[Array, "B n"]
    high: Int[Array, "B n"]
    held: Bool[Array, "B n"]


def _spans(positions: Int[Array, "B n b"], segments: Int[Array, "B n b"]) -> _Spans:
    slots = segments >= 0
    held = slots.any(-1)
    least = lambda x: jnp.where(held, jnp.where(slots, x, jnp.iinfo(jnp.int32).max).min(-1), 0)
    most = lambda x: jnp.where(slots, x, 0).max(-1)  # both are non-negative where a slot is held
    return _Spans(least(positions), most(positions), least(segments), most(segments), held)


def _layout(static: _Static, floats: _Floats, ints: _Ints) -> tuple[_Queries, _Keys, _Side]:
    """Pads and cuts everything into blocks.

    The barrier makes positions depend on q. Without it they are the same in every layer of a scanned model, and JAX
    takes what follows from them alone out of that scan, for all blocks at once: which block sees which, if not masks.
    """
    floats, ints = lax.optimization_barrier((floats, ints))
    K = floats.k.shape[2]
    by_query = lambda x, fill=0: _cut(x, static.block_q, fill).swapaxes(0, 1)
    by_key = lambda x, fill=0: _cut(x, static.block_k, fill)
    q = _heads_first(by_query(floats.q), K)
    index = jnp.arange(len(q), dtype=jnp.int32)
    queries = _Queries(index, q, by_query(ints.q_positions), by_query(ints.q_segments, -1))
    keys = _Keys(by_key(floats.k), by_key(floats.v), by_key(ints.k_positions), by_key(ints.k_segments, -1))
    by_head = lambda x: None if x is None else x.astype(accumulator(x.dtype)).reshape(*ints.heads.shape, 1, 1)
    side = _Side(
        ints.heads,
        None if floats.bias is None else _pad_bias(static, grouped(floats.bias, K), queries, keys),
        by_head(floats.alibi_slopes),
        by_head(floats.sinks),
    )
    return queries, keys, side


def _fit(length: int, block: int) -> int:
    """The block for a length: as many blocks as asked for, of even size. A multiple of 8 if they pad anyway.

    The number is even beyond 256 tokens: a device's part of a zigzag row is two runs of text, and a block with some of
    either would reach across all between them.
    """
    blocks = -(-length // block)
    blocks += blocks % 2 if length > 256 else 0
    even = -(-length // blocks)
    return even if even * blocks == length else min(block, -(-even // 8) * 8)


def _cut(x: Array, size: int, fill: int) -> Array:
    """[B, L, ...] -> [B, n, size, ...], padded with `fill`."""
    if over := -x.shape[1] % size:
        x = jnp.pad(x, [(0, 0), (0, over)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])


def _heads_first(x: Float[Array, "n B b H C"], K: int) -> Float[Array, "n B K G b C"]:
    n, B, b, H, C = x.shape
    return x.reshape(n, B, b, K, H // K, C).transpose(0, 1, 3, 4, 2, 5)


def _tokens(x: Float[Array, "n B K G b C"], length: int) -> Float[Array, "B L H C"]:
    n, B, K, G, b, C = x.shape
    return x.transpose(1, 0, 4, 2, 3, 5).reshape(B, n * b, K * G, C)[:, :length]


def _take(keys: _Keys, index: Int[Array, ""]) -> _Keys:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False), keys)


def _einsum(static: _Static, formula: str, x: Array, y: Array) -> Array:
    wide = accumulator(x.dtype)
    return jnp.einsum(formula, x, y, preferred_element_type=wide, precision=static.precision)


def _pad_bias(static: _Static, bias: Float[Array, "b k g t s"], queries: _Queries, keys: _Keys) -> Array:
    """Extends what is not shared to whole blocks."""
    whole = (len(queries.index) * static.block_q, keys.k.shape[1] * static.block_k)
    grow = [(0, 0 if have == 1 else want - have) for have, want in zip(bias.shape[3:], whole, strict=True)]
    return jnp.pad(bias, [(0, 0)] * 3 + grow)


def _unpad(dbias: Float[Array, "b k g t s"], bias: Float[Array, "b h t_ s_"]) -> Float[Array, "b h t_ s_"]:
    t, s = bias.shape[2:]
    return dbias[..., :t, :s].reshape(bias.shape)


def _tile_of(static: _Static, bias: Array, i: Array, j: Array) -> tuple[list[Array], list[int]]:
    """Start and size of tile (i, j) in a bias some of whose axes are shared."""
    b, k, g, t, s = bias.shape
    zero = jnp.zeros_like(j)
    start = [zero, zero, zero, zero if t == 1 else i * static.block_q, zero if s == 1 else j * static.block_k]
    return start, [b, k, g, min(t, static.block_q), min(s, static.block_k)]


def _add_tile(static: _Static, dbias: Array, dscores: Float[Array, "B K G bq bk"], i: Array, j: Array) -> Array:
    """Adds the gradient of tile (i, j), summed over the axes that the bias shares."""
    start, size = _tile_of(static, dbias, i, j)
    shared = tuple(axis for axis in range(5) if size[axis] == 1)
    new = lax.dynamic_slice(dbias, start, size) + dscores.sum(shared, keepdims=True)
    return lax.dynamic_update_slice(dbias, new, start)

"""The delta rule and decayed linear attention on TPUs, by Pallas Mosaic.

One program carries the state of a head, `[V K]` float32 in VMEM, through the row: the grid is (rows, heads, blocks of
chunks), its last axis in order. The chunks of a block are unrolled, so that what a chunk does within itself may run
while another waits for the state. Forward, the states at the entries of blocks are kept; backward, a block makes the
states of its chunks again and goes through them against the order of time. Without beta a token writes its value as it
is: linear attention is the same kernels less the correction.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.delta.chunk import CHUNK, CUTS, LEAST, LEAST_BETA, about_middle, across, between, near
from pallas_kernels.delta.config import Blocks, cost

TERMS = 3
"""bfloat16 numbers that add up to a float32: their products with -1, 0 and 1 are exact."""


class Tokens(NamedTuple):
    """Of a whole number of blocks: arrays, or the references of one block."""

    q: Any  # [B I T K] the heads of queries and of keys divide H
    k: Any  # [B J T K]
    v: Any  # [B H T V]
    g: Any  # [B H T K] or [B H 1 T] log decays, float32, 0 where a document begins
    beta: Any  # [B H 1 T] float32, at least LEAST_BETA; None: linear attention
    begins: Any  # [B 1 1 T] float32, 1 where a document begins; None: nowhere


class Geometry(NamedTuple):
    """Indices of a chunk, made once a block."""

    i: Array  # [C C] rows
    j: Array  # [C C] columns
    weights: Array  # [6C C] bfloat16: of the sums of decays that the levels take, to the entry and to the exit
    levels: tuple[Array, ...]  # [C C] pairs whose decays are taken about a middle, then across each cut


class Chunk(NamedTuple):
    """What a chunk does with the state S `[V K]` at its entry, and what its gradient takes again.

    p = solve (v - entered S^T), or v;   o = read S^T + scores p;   S becomes S keep + p^T write
    """

    q: Array  # [C K] float32
    k: Array  # [C K] float32
    v: Array  # [C V]
    beta: Array | None  # [C 1]
    pairs: Array  # [C C] i, j of one document, not i < j
    sums: Array  # [6C K] of decays, by `Geometry.weights`
    until: Array  # [C K] decays from the entry to each row, 0 across documents
    after: Array  # [C K] from each to the exit
    keep: Array  # [1 K]
    read: Array  # [C K]
    write: Array  # [C K]
    scores: Array  # [C C]
    entered: Array | None  # [C K]
    solve: Array | None  # [C C] (I + A)^-1 diag(beta)


class How(NamedTuple):
    """chunks: of a block.    interpret: as of `pl.pallas_call`."""

    chunks: int
    interpret: Any = False

    @property
    def rows(self) -> int:
        return self.chunks * CHUNK


def chunked(
    config: Blocks,
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None,
    beta: Array | None,
    s0: Array | None = None,
    resets: Array | None = None,
) -> tuple[Array, Array]:
    """The results of `ref.reference`, or of `ref.linear` where beta is None; differentiable in all but resets."""
    (batch, length, heads, value_dim), key_dim = v.shape, k.shape[-1]
    how = How(min(config.chunks, pl.cdiv(length, CHUNK)), config.interpret)
    whole = lambda x: jnp.pad(x, [(0, 0), (0, -length % how.rows)] + [(0, 0)] * (x.ndim - 2))
    by_head = lambda x: jnp.moveaxis(whole(x), 2, 1)
    number = lambda x: by_head(x.astype(jnp.float32))[:, :, None]
    begins = None if resets is None else whole(resets.astype(jnp.float32))[:, None, None]
    g = jnp.zeros((batch, length, heads)) if log_decay is None else log_decay.astype(jnp.float32)
    g = g if resets is None else jnp.where(resets[:, :, *[None] * (g.ndim - 2)], 0, g)
    g = number(g) if g.ndim == 3 else by_head(g)
    beta = None if beta is None else jnp.maximum(number(beta), LEAST_BETA)
    s0 = jnp.zeros((batch, heads, key_dim, value_dim)) if s0 is None else s0.astype(jnp.float32)
    tokens = Tokens(by_head(q), by_head(k), by_head(v), g, beta, begins)
    o, s = _rule(how, tokens, jnp.swapaxes(s0, -1, -2)[:, :, None])
    return jnp.moveaxis(o, 1, 2)[:, :length], jnp.swapaxes(s[:, :, 0], -1, -2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rule(how: How, tokens: Tokens, s0: Array) -> tuple[Array, Array]:
    return forward(how, tokens, s0, None)[:2]


def _rule_forward(how: How, tokens: Tokens, s0: Array) -> tuple[tuple[Array, Array], tuple[Tokens, Array]]:
    o, s, entries = forward(how, tokens, s0, jnp.float32)
    return (o, s), (tokens, entries)


def _rule_backward(how: How, kept: tuple[Tokens, Array], cotangents: tuple[Array, Array]) -> tuple[Tokens, Array]:
    tokens, entries = kept
    found, ds0 = backward(how, tokens, entries, *cotangents)

    def added(x: Array, like: Array) -> Array:
        """Over the heads that share one."""
        return x.reshape(*like.shape[:2], -1, *like.shape[2:]).sum(2, dtype=jnp.float32).astype(like.dtype)

    begins = None if tokens.begins is None else jnp.zeros_like(tokens.begins)
    return found._replace(q=added(found.q, tokens.q), k=added(found.k, tokens.k), begins=begins), ds0


_rule.defvjp(_rule_forward, _rule_backward)


def forward(how: How, tokens: Tokens, s0: Array, entries: Any) -> tuple[Array, Array, Array | None]:
    """o `[B H T V]`, the last state `[B H 1 V K]` and the states at the entries of blocks `[B H N V K]`, of a type or
    None."""
    (B, H, T, V), K = tokens.v.shape, tokens.k.shape[-1]
    N = T // how.rows

    def body(tokens, s0, o, last, kept, s):
        pl.when(pl.program_id(2) == 0)(lambda: _put(s, s0[...]))
        if kept is not None:
            _put(kept, s[...])
        geometry = _geometry()
        for at in range(how.chunks):
            chunk = _chunk(tokens, at, geometry)
            o[_rows(at), :] = _advance(chunk, s)[0].astype(o.dtype)
        _put(last, s[...])

    like = functools.partial(_like, tokens.v)
    o, kept = like((B, H, T, V), tokens.v.dtype), None if entries is None else like((B, H, N, V, K), entries)
    out = o, like(s0.shape), kept
    spec = functools.partial(_spec, how.rows, H, lambda n: n)
    return pl.pallas_call(
        body,
        out_shape=out,
        grid=(B, H, N),
        in_specs=jax.tree.map(spec, [tokens, s0]),
        out_specs=jax.tree.map(spec, out),
        scratch_shapes=[pltpu.VMEM((V, K), jnp.float32)],
        cost_estimate=cost(B, T, H, K, V),
        compiler_params=_PARAMS,
        interpret=how.interpret,
        name="delta_forward",
    )(tokens, s0)


def backward(how: How, tokens: Tokens, entries: Array, do: Array, ds: Array) -> tuple[Tokens, Array]:
    """The gradients of the tokens, a head of values each, and of s0."""
    (B, H, T, V), K = tokens.v.shape, tokens.k.shape[-1]
    N = T // how.rows

    def body(tokens, entry, do, ds, found, first, s, back):
        pl.when(pl.program_id(2) == 0)(lambda: _put(back, ds[...]))
        _put(s, entry[...])
        geometry, chain = _geometry(), []
        for at in range(how.chunks):
            chunk, before = _chunk(tokens, at, geometry), s[...]
            chain.append((chunk, before.astype(chunk.read.dtype), _advance(chunk, s)[1]))
        for at in reversed(range(how.chunks)):
            _gradients(found, at, geometry, *chain[at], do[_rows(at), :], back)
        _put(first, back[...])

    like = functools.partial(_like, tokens.v)
    a_head = lambda x: like((B, H, *x.shape[2:]), x.dtype)
    out = jax.tree.map(a_head, tokens._replace(begins=None)), like(ds.shape)
    spec = functools.partial(_spec, how.rows, H, lambda n: N - 1 - n)
    return pl.pallas_call(
        body,
        out_shape=out,
        grid=(B, H, N),
        in_specs=jax.tree.map(spec, [tokens, entries, do, ds]),
        out_specs=jax.tree.map(spec, out),
        scratch_shapes=[pltpu.VMEM((V, K), jnp.float32)] * 2,
        cost_estimate=cost(B, T, H, K, V, backward=True),
        compiler_params=_PARAMS,
        interpret=how.interpret,
        name="delta_backward",
    )(tokens, entries, do, ds)


_PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def _spec(rows: int, heads: int, order: Callable[[Any], Any], x: Any) -> pl.BlockSpec:
    """Blocks of states `[B H N V K]` or `[B H 1 V K]`, of numbers `[B I 1 T]`, or of vectors `[B I T D]`."""
    share = heads // x.shape[1]
    if x.ndim == 5:
        return pl.BlockSpec(
            (None, None, None, *x.shape[3:]), lambda b, h, n: (b, h, order(n) if x.shape[2] > 1 else 0, 0, 0)
        )
    if x.shape[2] == 1:
        return pl.BlockSpec((None, None, 1, rows), lambda b, h, n: (b, h // share, 0, order(n)))
    return pl.BlockSpec((None, None, rows, x.shape[3]), lambda b, h, n: (b, h // share, order(n), 0))


def _like(x: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """An output that varies over the manual axes that x varies over."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def _put(ref: Any, value: Array) -> None:
    ref[...] = value


def _rows(at: int) -> slice:
    return slice(at * CHUNK, (at + 1) * CHUNK)


def _dot(x: Array, y: Array, over: str = "columns rows") -> Array:
    """The float32 product of two matrices of one type over columns or rows of the left and of the right one."""
    dims = tuple(("rows", "columns").index(name) for name in over.split())
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        x, y, (((dims[0],), (dims[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _summed(weights: Array, x: Array) -> Array:
    """weights @ x of bfloat16 weights -1, 0 and 1, as exact as float32."""
    total, rest = 0.0, x
    for _ in range(TERMS):
        part = rest.astype(jnp.bfloat16)
        total, rest = total + _dot(weights, part), rest - part.astype(jnp.float32)
    return total


def _geometry() -> Geometry:
    i, j = (lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in (0, 1))
    chosen = [about_middle(i, j), *(between(i, j, half) for half in CUTS), j <= i, j > i]
    weights = jnp.concatenate([x.astype(jnp.float32).astype(jnp.bfloat16) for x in chosen])
    return Geometry(i, j, weights, (near(i, j), *(across(i, j, half) for half in CUTS)))


def _column(row: Array, geometry: Geometry) -> Array:
    """`[1 C] -> [C 1]`"""
    return jnp.where(geometry.i == geometry.j, row, 0.0).sum(1, keepdims=True)


def _row(column: Array, geometry: Geometry) -> Array:
    """`[C 1] -> [1 C]`"""
    return jnp.where(geometry.i == geometry.j, column, 0.0).sum(0, keepdims=True)


def _factors(sums: Array, level: int) -> tuple[Array, Array]:
    """What later and earlier rows of a level's pairs are multiplied by."""
    z = sums[_rows(level)]
    row = jnp.exp(z)
    return row, row if level else jnp.exp(-z)


def _level(geometry: Geometry, level: int) -> tuple[Array, Array]:
    """The pairs of a level, and those of the scores, which have the diagonal too."""
    pairs = geometry.levels[level]
    return pairs, pairs if level else pairs | (geometry.i == geometry.j)


def _chunk(tokens: Tokens, at: int, geometry: Geometry) -> Chunk:
    """Of the `at`-th chunk of a block."""
    wide = lambda ref: ref[_rows(at), :].astype(jnp.float32)
    q, k, v = wide(tokens.q), wide(tokens.k), tokens.v[_rows(at), :]
    low = v.dtype
    beta = None if tokens.beta is None else tokens.beta[:, _rows(at)]
    pairs, enter, leave = _documents(tokens, at, geometry)
    sums = _sums(tokens.g, at, geometry, k.shape[1])
    until, after = jnp.exp(sums[_rows(4)]) * enter, jnp.exp(sums[_rows(5)]) * leave
    read = (q * until).astype(low)
    scores, met = jnp.zeros((2, CHUNK, CHUNK))
    for level in range(len(geometry.levels)):
        row, column = _factors(sums, level)
        below, seen = _level(geometry, level)
        columns = (k * column).astype(low)
        scores = jnp.where(seen, _dot((q * row).astype(low), columns, "columns columns"), scores)
        if beta is not None:
            met = jnp.where(below, _dot((k * row).astype(low), columns, "columns columns"), met)
    entered, solve, strength = None, None, None
    if beta is not None:
        strength = _column(beta, geometry)
        solve = (_inverse(strength * jnp.where(pairs, met, 0.0), geometry) * beta).astype(low)
        entered = (k * until).astype(low)
    return Chunk(
        q=q,
        k=k,
        v=v,
        beta=strength,
        pairs=pairs,
        sums=sums,
        until=until,
        after=after,
        keep=until[CHUNK - 1 :],
        read=read,
        write=(k * after).astype(low),
        scores=jnp.where(pairs, scores, 0.0).astype(low),
        entered=entered,
        solve=solve,
    )


def _documents(tokens: Tokens, at: int, geometry: Geometry) -> tuple[Array, Array | float, Array | float]:
    """Pairs i, j of one document and not i < j; 1 at rows of the document at the entry; at those of the one at the
    exit."""
    i, j = geometry.i, geometry.j
    if tokens.begins is None:
        return j <= i, 1.0, 1.0
    begins = tokens.begins[:, _rows(at)]
    before = jnp.where(j <= i, begins, 0.0).sum(1, keepdims=True)
    one = lambda x: jnp.where(x, 1.0, 0.0)
    return (j <= i) & (before == _row(before, geometry)), one(before == 0), one(before == begins.sum(1, keepdims=True))


def _sums(g: Any, at: int, geometry: Geometry, key_dim: int) -> Array:
    """Sums of decays `[6C K]`, by `Geometry.weights`."""
    a_head = g.shape[0] == 1
    g = jnp.broadcast_to(_column(g[:, _rows(at)], geometry), (CHUNK, key_dim)) if a_head else g[_rows(at), :]
    return _summed(geometry.weights, jnp.maximum(g, LEAST))


def _inverse(lower: Array, geometry: Geometry) -> Array:
    """(I + lower)^-1 of a strictly lower triangular matrix, by blocks from one row to all, as `twin._inverse`."""
    i, j = geometry.i, geometry.j
    inverse = jnp.where(i == j, 1.0, 0.0) - jnp.where(across(i, j, 1), lower, 0.0)
    half = 2
    while half < CHUNK:
        inverse -= _dot(_dot(inverse, jnp.where(across(i, j, half), lower, 0.0)), inverse)
        half *= 2
    return inverse


def _advance(chunk: Chunk, s: Any) -> tuple[Array, Array]:
    """o `[C V]`, and p as it is written; the state in s becomes that at the exit."""
    low, before = chunk.read.dtype, s[...]
    entry = before.astype(low)
    if chunk.solve is None:
        p, seen = chunk.v, _dot(chunk.read, entry, "columns columns")
    else:
        held, seen = _split(_dot(jnp.concatenate([chunk.entered, chunk.read]), entry, "columns columns"), 2)
        p = _dot(chunk.solve, (chunk.v.astype(jnp.float32) - held).astype(low)).astype(low)
    s[...] = before * chunk.keep + _dot(p, chunk.write, "rows rows")
    return seen + _dot(chunk.scores, p), p


def _gradients(
    found: Tokens, at: int, geometry: Geometry, chunk: Chunk, before: Array, p: Array, do: Array, back: Any
) -> None:
    """Writes the gradients of a chunk; that of the state in `back`, at the exit, becomes that at the entry.

    As `twin.gradients`: what a level of the scores gives to later and to earlier rows, from the same rounded factors,
    adds up to zero, so that the sums over rows keep no rounding errors of what cancels.
    """
    low, after_exit = do.dtype, back[...]
    q, k, exits = chunk.q, chunk.k, after_exit.astype(low)
    dp = _dot(chunk.scores, do, "rows rows") + _dot(chunk.write, exits, "columns columns")
    dk_column = chunk.after * _dot(p, exits)
    if chunk.solve is None:
        dv, kinds, readers = dp.astype(low), do, chunk.read
    else:
        dv = _dot(chunk.solve, dp.astype(low), "rows rows").astype(low)
        kinds, readers = jnp.concatenate([do, -dv]), jnp.concatenate([chunk.read, chunk.entered])
        d_beta = (dv.astype(jnp.float32) * p.astype(jnp.float32)).sum(1, keepdims=True) / (chunk.beta * chunk.beta)
        found.beta[:, _rows(at)] = _row(d_beta, geometry)
    back[...] = after_exit * chunk.keep + _dot(kinds, readers, "rows rows")
    at_exit = (k * dk_column).sum(0, keepdims=True)
    at_exit += chunk.keep * (before.astype(jnp.float32) * after_exit).sum(0, keepdims=True)

    of_pairs = _dot(kinds, p, "columns columns")
    of_entry = _dot(kinds, before)
    rows = [q] if chunk.solve is None else [q, k]
    d_scores = [jnp.where(chunk.pairs, x, 0.0) for x in _split(of_pairs, len(rows))]
    d_rows = [chunk.until * x for x in _split(of_entry, len(rows))]
    d_sum = sum(x * dx for x, dx in zip(rows, d_rows, strict=True)) - k * dk_column
    for level in range(len(geometry.levels)):
        row, column = _factors(chunk.sums, level)
        masks = reversed(_level(geometry, level))
        theirs = jnp.concatenate([jnp.where(m, x, 0.0).astype(low) for m, x in zip(masks, d_scores, strict=False)])
        mine, columns = [(x * row).astype(low) for x in rows], (k * column).astype(low)
        to_rows = _split(_dot(theirs, columns), len(rows))
        to_column = _dot(theirs, jnp.concatenate(mine), "rows rows")
        d_rows = [dx + row * to for dx, to in zip(d_rows, to_rows, strict=True)]
        dk_column += column * to_column
        d_sum += sum(x.astype(jnp.float32) * to for x, to in zip(mine, to_rows, strict=True))
        d_sum -= columns.astype(jnp.float32) * to_column
    found.q[_rows(at), :] = d_rows[0].astype(found.q.dtype)
    found.k[_rows(at), :] = sum(d_rows[1:], dk_column).astype(found.k.dtype)
    found.v[_rows(at), :] = dv.astype(found.v.dtype)
    later = jnp.where(geometry.j >= geometry.i, 1.0, 0.0).astype(jnp.bfloat16)
    dg = _summed(later, d_sum) + at_exit
    if found.g.shape[0] == 1:
        found.g[:, _rows(at)] = _row(dg.sum(1, keepdims=True), geometry)
    else:
        found.g[_rows(at), :] = dg


def _split(x: Array, parts: int) -> list[Array]:
    """Equal parts of the rows."""
    size = x.shape[0] // parts
    return [x[n * size : (n + 1) * size] for n in range(parts)]

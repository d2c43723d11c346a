"""The kernels' steps in plain jax.numpy: the same tiles, the same order, the same roundings.

Each function is the twin of the kernel of its name in `gpu`. Arrays are `[B H N C ...]`, chunks of C tokens; what the
kernels hand on is transposed where they have it so. Matrices are rounded to the inputs' type where the kernels feed
them to a matrix instruction; sums are float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.delta.chunk import CHUNK, CUTS, LEAST, about_middle, across, between, near
from pallas_kernels.delta.rule import Chunks, Gradients, Rows, Tokens


def intra(tokens: Tokens, rows: Rows) -> Chunks:
    """What a chunk does with the state at its entry, from its tokens alone."""
    low = tokens.q.dtype
    q, k, v = (_chunks(x).astype(jnp.float32) for x in (tokens.q, tokens.k, tokens.v))
    g = jnp.maximum(_chunks(tokens.g), LEAST)
    beta, enter, leave, whole, pairs = _rows(rows)
    scores, met = jnp.zeros((2, *q.shape[:3], CHUNK, CHUNK))
    for weights, mask, inverse in _levels():
        row, column = _factors(weights, g, inverse)
        columns = _round(k * column, low)
        scores = jnp.where(mask | (jnp.eye(CHUNK, dtype=bool) & inverse), _dot(_round(q * row, low), columns), scores)
        met = jnp.where(mask, _dot(_round(k * row, low), columns), met)
    scores, met = jnp.where(pairs, scores, 0), jnp.where(pairs, met, 0)
    until, after = (jnp.exp(_sums(weights, g)) for weights in _ends())
    solve = _round(_inverse(beta[..., None] * met, _half(low)) * beta[..., None, :], low)
    entered = _round(k * until * enter[..., None], low)
    return Chunks(
        w=_round(-(solve @ entered), low).astype(low),
        u=_t(_round(solve @ v, low)).astype(low),
        scores=_round(scores, low).astype(low),
        read=_round(q * until * enter[..., None], low).astype(low),
        write=_round(k * after * leave[..., None], low).astype(low),
        keep=until[..., -1, :] * whole[..., None],
        solve=solve.astype(low),
    )


def states(chunks: Chunks, s0: Array) -> tuple[Array, Array, Array]:
    """The states at the entries of all chunks `[B H N V K]`, what each writes `[B H N V C]`, and the last state."""
    low = chunks.w.dtype

    def step(s: Array, chunk: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        w, u, write, keep = (x.astype(jnp.float32) for x in chunk)
        entry = _round(s, low)
        p = _round(u + _dot(entry, w), low)
        return s * keep[..., None, :] + p @ write, (entry.astype(low), p.astype(low))

    first = lambda x: jnp.moveaxis(x, 2, 0)
    s, (entries, p) = jax.lax.scan(step, s0, tuple(map(first, (chunks.w, chunks.u, chunks.write, chunks.keep))))
    return jnp.moveaxis(entries, 0, 2), jnp.moveaxis(p, 0, 2), s


def outputs(chunks: Chunks, entries: Array, p: Array) -> Array:
    """o `[B T H V]`."""
    full = lambda x: x.astype(jnp.float32)
    o = _dot(full(chunks.read), full(entries)) + _dot(full(chunks.scores), full(p))
    return _tokens(o).astype(chunks.read.dtype)


def reverse(chunks: Chunks, do: Array, ds: Array) -> tuple[Array, Array, Array]:
    """The states pass backwards: gradients of the states at the exits `[B H N V K]`, of p `[B H N V C]`, and of s0."""
    low = chunks.w.dtype

    def step(ds: Array, chunk: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        w, scores, read, write, keep, do = (x.astype(jnp.float32) for x in chunk)
        exits = _round(ds, low)
        dp = _round(_t(do) @ scores + _dot(exits, write), low)
        return ds * keep[..., None, :] + _t(do) @ read + dp @ w, (exits.astype(low), dp.astype(low))

    first = lambda x: jnp.moveaxis(x, 2, 0)
    parts = (chunks.w, chunks.scores, chunks.read, chunks.write, chunks.keep, _chunks(do))
    ds, (exits, dp) = jax.lax.scan(step, ds, tuple(map(first, parts)), reverse=True)
    return jnp.moveaxis(exits, 0, 2), jnp.moveaxis(dp, 0, 2), ds


def gradients(
    tokens: Tokens, rows: Rows, chunks: Chunks, entries: Array, p: Array, exits: Array, dp: Array, do: Array
) -> Gradients:
    """Gradients of the tokens, chunk by chunk.

    A decay acts on later queries and on earlier keys; what a level of the scores gives to both, from the same rounded
    factors, adds up to zero over its block, so that the sums over rows keep no rounding errors of what cancels.
    """
    low = tokens.q.dtype
    q, k = (_chunks(x).astype(jnp.float32) for x in (tokens.q, tokens.k))
    g, do = jnp.maximum(_chunks(tokens.g), LEAST), _chunks(do).astype(jnp.float32)
    beta, enter, leave, _, pairs = _rows(rows)
    entries, p, exits, dp = (x.astype(jnp.float32) for x in (entries, p, exits, dp))
    dv = _t(dp @ chunks.solve.astype(jnp.float32))
    d_beta = (_round(dv, low) * _t(p)).sum(-1) / beta**2
    dv = _round(dv, low)
    d_scores = _round(jnp.where(pairs, do @ p, 0), low)
    d_met = _round(jnp.where(pairs, -(dv @ p), 0), low)
    until, after = (jnp.exp(_sums(weights, g)) for weights in _ends())
    until, after = until * enter[..., None], after * leave[..., None]
    dq, dk_row, dk_column = until * (do @ entries), -until * (dv @ entries), after * (_t(p) @ exits)
    at_exit = (k * dk_column).sum(-2) + chunks.keep * (entries * exits).sum(-2)
    d_sum = q * dq + k * dk_row - k * dk_column
    dk = dk_row + dk_column
    for weights, mask, inverse in _levels():
        row, column = _factors(weights, g, inverse)
        q_row, k_row, k_column = _round(q * row, low), _round(k * row, low), _round(k * column, low)
        mine = jnp.where(mask | (jnp.eye(CHUNK, dtype=bool) & inverse), d_scores, 0)
        met = jnp.where(mask, d_met, 0)
        to_q, to_row, to_column = mine @ k_column, met @ k_column, _t(mine) @ q_row + _t(met) @ k_row
        dq, dk = dq + row * to_q, dk + row * to_row + column * to_column
        d_sum += q_row * to_q + k_row * to_row - k_column * to_column
    dg = jnp.einsum("ti,bhnik->bhntk", jnp.triu(jnp.ones((CHUNK, CHUNK))), d_sum, precision="highest")
    of = lambda x, like: _tokens(x).astype(like.dtype)
    return Gradients(
        of(dq, tokens.q), of(dk, tokens.k), of(dv, tokens.v), _tokens(dg + at_exit[..., None, :]), _flat(d_beta)
    )


def _chunks(x: Array) -> Array:
    """`[B T H D] -> [B H N C D]`"""
    batch, length, heads, dim = x.shape
    return jnp.moveaxis(x.reshape(batch, length // CHUNK, CHUNK, heads, dim), 3, 1)


def _tokens(x: Array) -> Array:
    """`[B H N C D] -> [B T H D]`"""
    x = jnp.moveaxis(x, 1, 3)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _flat(x: Array) -> Array:
    """`[B H N C] -> [B H T]`"""
    return x.reshape(*x.shape[:2], -1)


def _rows(rows: Rows) -> tuple[Array, ...]:
    """beta, and who meets the state at the entry, that at the exit, both, and whom, by chunk."""
    split = lambda x: x.reshape(*x.shape[:-1], -1, CHUNK)
    beta = split(rows.beta)
    lower = jnp.tril(jnp.ones((CHUNK, CHUNK), bool))
    if rows.document is None:
        ones = jnp.ones_like(beta)
        return beta, ones, ones, ones[..., 0], lower
    document, enter, leave = (split(x)[:, None] for x in rows[1:])
    return beta, enter, leave, enter[..., -1], lower & (document[..., :, None] == document[..., None, :])


def _levels() -> list[tuple[Array, Array, bool]]:
    """Weights of the decays' sums, the pairs they are for, and whether keys take their inverse, by level."""
    i, j = jnp.indices((CHUNK, CHUNK))
    cuts = [(between(i, j, half).astype(jnp.float32), across(i, j, half), False) for half in CUTS]
    return [(about_middle(i, j), near(i, j), True), *cuts]


def _ends() -> tuple[Array, Array]:
    """Weights of the sums from the entry to each row, and from each to the exit."""
    i, t = jnp.indices((CHUNK, CHUNK))
    return (t <= i).astype(jnp.float32), (t > i).astype(jnp.float32)


def _sums(weights: Array, g: Array) -> Array:
    return jnp.einsum("it,bhntk->bhnik", weights, g, precision="highest")


def _factors(weights: Array, g: Array, inverse: bool) -> tuple[Array, Array]:
    """What rows and columns of the scores are multiplied by."""
    sums = _sums(weights, g)
    return jnp.exp(sums), jnp.exp(-sums if inverse else sums)


def _inverse(lower: Array, low: jnp.dtype) -> Array:
    """(I + lower)^-1 of strictly lower triangular matrices, by blocks from one row to all.

    [[P, 0], [X, Q]] has the inverse [[P', 0], [-Q' X P', Q']]: with D the blocks' inverses, D - D X D.
    """
    i, j = jnp.indices((CHUNK, CHUNK))
    inverse = jnp.eye(CHUNK) - jnp.where(across(i, j, 1), lower, 0)
    half = 2
    while half < CHUNK:
        rounded = _round(inverse, low)
        below = _round(rounded @ _round(jnp.where(across(i, j, half), lower, 0), low), low)
        inverse, half = inverse - below @ rounded, 2 * half
    return inverse


def _half(low: jnp.dtype) -> jnp.dtype:
    """The type in which 16-bit kernels invert: entries are of order 1, so float16 keeps three bits more."""
    return jnp.dtype(jnp.float16) if low.itemsize == 2 else low


def _round(x: Array, dtype: jnp.dtype) -> Array:
    return x.astype(dtype).astype(jnp.float32)


def _dot(x: Array, y: Array) -> Array:
    """x y^T"""
    return x @ _t(y)


def _t(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)

"""The kernels' algorithm in jax.numpy: the same plan, tile by tile in the same order, the same roundings.

What a test of the plan and of the arithmetic needs where there is no Hopper GPU. Slow, and meant to be read.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.flash import Inputs, Setting, plan
from pallas_kernels.plan import EMPTY, MaskPlan, Tokens, Visits


def forward(setting: Setting, inputs: Inputs, block_q: int, block_k: int) -> tuple[Array, Array]:
    """(out, lse) as the forward kernel computes them: online softmax over the tiles that the plan names."""
    found, tokens = plan(setting, inputs, block_q, block_k)
    (B, T, H, _), V = inputs.q.shape, inputs.v.shape[-1]
    q, k, v = _padded(inputs, block_q, block_k)
    out = jnp.zeros((B, q.shape[1], H, V), jnp.float32)
    lse = jnp.zeros((B, q.shape[1], H), jnp.float32)
    for b in range(B):
        for h in range(H):
            key_head = h // (H // inputs.k.shape[2])
            for i in range(q.shape[1] // block_q):
                rows = slice(i * block_q, (i + 1) * block_q)
                read = _reader(setting, inputs, tokens, found, b, h, i, of_query=True)
                tile = _forward_tile(read, q[b, rows, h], k[b, :, key_head], v[b, :, key_head], block_k)
                sink = -jnp.inf if inputs.sinks is None else inputs.sinks[h].astype(jnp.float32)
                top = jnp.full((block_q,), sink, jnp.float32)
                total = jnp.full((block_q,), 0.0 if inputs.sinks is None else 1.0)
                start = jnp.zeros((block_q, V), jnp.float32), top, total
                count = found.by_query.count[_row(found.by_query, b), i]
                sums, top, total = lax.fori_loop(0, count, tile, start)
                empty = total == 0
                safe = jnp.where(empty, 1, total)
                out = out.at[b, rows, h].set(jnp.where(empty[:, None], 0, sums / safe[:, None]))
                lse = lse.at[b, rows, h].set(jnp.where(empty, -jnp.inf, top + jnp.log(safe)))
    return out[:, :T].astype(setting.dtype), lse[:, :T]


def _forward_tile(read: Any, q: Array, k: Array, v: Array, block_k: int):
    def tile(m, carry):
        sums, top, total = carry
        j, scores, seen, _ = read(m, q, k)
        values = lax.dynamic_slice_in_dim(v, j * block_k, block_k)
        scores = jnp.where(seen, scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(1))
        pivot = jnp.where(new_top == -jnp.inf, 0, new_top)
        weights, decay = jnp.exp(scores - pivot[:, None]), jnp.exp(top - pivot)
        sums = sums * decay[:, None] + _product(weights.astype(v.dtype), values)
        return sums, new_top, total * decay + weights.sum(1)

    return tile


def backward(
    setting: Setting, inputs: Inputs, out: Array, lse: Array, dout: Array, dlse: Array, block_q: int, block_k: int
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv) in float32; each loops over its own list of the plan, as the two kernels do."""
    found, tokens = plan(setting, inputs, block_q, block_k)
    (B, T, H, _), S, K = inputs.q.shape, inputs.k.shape[1], inputs.k.shape[2]
    q, k, v = _padded(inputs, block_q, block_k)
    over = ((0, 0), (0, -T % block_q), (0, 0))
    delta = jnp.pad((out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(-1) - dlse, over)
    lse = jnp.pad(jnp.where(lse == -jnp.inf, jnp.inf, lse), over, constant_values=jnp.inf)
    dout = jnp.pad(dout, (*over, (0, 0)))
    dq, dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    for b in range(B):
        for h in range(H):
            key_head = h // (H // K)

            def terms(i, j, scores, seen, damp, b=b, h=h, key_head=key_head):
                rows = lambda x: lax.dynamic_slice_in_dim(x[b, :, h], i * block_q, block_q)
                weights = jnp.where(seen, jnp.exp(scores - rows(lse)[:, None]), 0)
                values = lax.dynamic_slice_in_dim(v[b, :, key_head], j * block_k, block_k)
                dweights = _product(rows(dout), values.T)
                dscores = jnp.where(seen, weights * damp * (dweights - rows(delta)[:, None]), 0) * setting.scale
                return weights.astype(q.dtype), dscores.astype(q.dtype), rows(dout), rows(q)

            for i in range(q.shape[1] // block_q):
                read = _reader(setting, inputs, tokens, found, b, h, i, of_query=True)
                rows = slice(i * block_q, (i + 1) * block_q)

                def of_query(m, sums, read=read, i=i, rows=rows, key_head=key_head, b=b, h=h, terms=terms):
                    j, *tile = read(m, q[b, rows, h], k[b, :, key_head])
                    _, dscores, _, _ = terms(i, j, *tile)
                    return sums + _product(dscores, lax.dynamic_slice_in_dim(k[b, :, key_head], j * block_k, block_k))

                count = found.by_query.count[_row(found.by_query, b), i]
                dq = dq.at[b, rows, h].set(lax.fori_loop(0, count, of_query, dq[b, rows, h]))
            for j in range(k.shape[1] // block_k):
                columns = slice(j * block_k, (j + 1) * block_k)
                read = _reader(setting, inputs, tokens, found, b, h, j, of_query=False)

                def of_key(m, sums, read=read, j=j, columns=columns, key_head=key_head, b=b, h=h, terms=terms):
                    i, *tile = read(m, q[b, :, h], k[b, columns, key_head])
                    weights, dscores, dout_rows, q_rows = terms(i, j, *tile)
                    return sums[0] + _product(dscores.T, q_rows), sums[1] + _product(weights.T, dout_rows)

                count = found.by_key.count[_row(found.by_key, b), j]
                start = dk[b, columns, key_head], dv[b, columns, key_head]
                dk_tile, dv_tile = lax.fori_loop(0, count, of_key, start)
                dk, dv = dk.at[b, columns, key_head].set(dk_tile), dv.at[b, columns, key_head].set(dv_tile)
    return dq[:, :T], dk[:, :S], dv[:, :S]


def _reader(
    setting: Setting, inputs: Inputs, tokens: Tokens, found: MaskPlan, b: int, h: int, own: int, *, of_query: bool
):
    """A function of step m, queries and keys: the other block, the scores of the tile, who sees whom, and damping.

    Block `own` is of the queries or else of the keys and comes as it is; the other side comes whole and is cut here.
    """
    visits = found.by_query if of_query else found.by_key
    row, block_q, block_k = _row(visits, b), found.block_q, found.block_k

    def read(m, q, k):
        other = jnp.asarray(visits.order)[row, own, m]
        i, j = (own, other) if of_query else (other, own)
        cut = lambda x, at, size: lax.dynamic_slice_in_dim(x, at * size, size)
        q, k = (q, cut(k, j, block_k)) if of_query else (cut(q, i, block_q), k)
        scores, damp = setting.scale * _product(q, k.T), 1.0
        if setting.soft_cap is not None:
            tanh = jnp.tanh(scores / setting.soft_cap)
            scores, damp = setting.soft_cap * tanh, 1 - tanh * tanh
        of = lambda x, at, size: cut(jnp.asarray(x)[b if x.shape[0] > 1 else 0], at, size)
        rows, columns = of(tokens.q_positions, i, block_q), of(tokens.k_positions, j, block_k)
        if inputs.slopes is not None:
            scores = scores - inputs.slopes[h] * jnp.abs(rows[:, None] - columns[None, :])
        seen = setting.mask(rows[:, None], columns[None, :], inputs.heads[h]) & (columns != EMPTY)[None, :]
        if tokens.q_segments is not None:
            rows, columns = of(tokens.q_segments, i, block_q), of(tokens.k_segments, j, block_k)
            seen = seen & (rows[:, None] == columns[None, :])
        return other, scores, seen | (m < jnp.asarray(visits.full)[row, own]), damp

    return read


def _row(visits: Visits, b: int) -> int:
    return b if visits.order.shape[0] > 1 else 0


def _padded(inputs: Inputs, block_q: int, block_k: int) -> tuple[Array, Array, Array]:
    pad = lambda x, block: jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0)))
    return pad(inputs.q, block_q), pad(inputs.k, block_k), pad(inputs.v, block_k)


def _product(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)

"""Summaries of runs of tokens: learned queries pool the keys and values of each unit of a document."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.mask import full
from jaxlong.core.state import EMPTY
from jaxlong.ops.attend import Backend, attend_with_lse, merge


class Units(NamedTuple):
    """Units of a level in order: R keys and values each, their number in their document; a negative segment is none."""

    k: Float[Array, "B N R K C"]
    v: Float[Array, "B N R K V"]
    index: Int[Array, "B N"]
    segment_ids: Int[Array, "B N"]


class Running(NamedTuple):
    """The part of a unit that has come: pooled keys and values side by side, and the lse of what was pooled."""

    pooled: Float[Array, "B R K CV"]
    lse: Float[Array, "B R K"]
    index: Int[Array, "B"]
    segment_ids: Int[Array, "B"]

    @classmethod
    def empty(cls, batch: int, summaries: int, kv_heads: int, channels: int) -> Running:
        shape, none = (batch, summaries, kv_heads), jnp.full((batch,), EMPTY, jnp.int32)
        return cls(jnp.zeros((*shape, channels), jnp.float32), jnp.full(shape, -jnp.inf), jnp.zeros_like(none), none)


def summarize(
    parts: Units, queries: Float[Array, "R K C"], *, fan: int, running: Running, backend: Backend
) -> tuple[Units, Running]:
    """One level up: each `fan` parts of a document in a row become one unit of R summaries.

        a_j = softmax_j(p_r . k_j / sqrt(C)) over all keys of the unit;  k'_r = sum_j a_j k_j,  v'_r = sum_j a_j v_j

    The slots are cut into cells of `fan`. Units of a document follow each other without a gap, so at most one ends in
    a cell, and all that it holds is in that cell, the one before and, for the first, `running`. Float32 throughout.

    Args:
        parts: tokens (one key a slot) or the units of the level below.
        running: `Running.empty` or what the call before returned.

    Returns:
        One slot a cell, EMPTY where no unit ended, and the unit that runs on.
    """
    B, N, R, K, C = parts.k.shape
    size, pools = min(fan, N), len(queries)
    count = -(-N // size)
    cells = lambda x, fill: jnp.pad(
        x, [(0, 0), (0, count * size - N)] + [(0, 0)] * (x.ndim - 2), constant_values=fill
    ).reshape(B, count, size, *x.shape[2:])
    index, ids = cells(parts.index, 0), cells(parts.segment_ids, EMPTY)
    unit = jnp.where(ids >= 0, index // fan, -1)

    only = lambda x, one, rest: jnp.where(one, x, rest).max(-1)  # the value at the one slot that is marked
    ends = (ids >= 0) & ((index + 1) % fan == 0)
    end_unit, end_ids = only(unit, ends, -1), only(ids, ends, EMPTY)
    place = jnp.where(ids >= 0, jnp.arange(size), -1)
    last = (place == place.max(-1, keepdims=True)) & (ids >= 0)
    last_unit, last_ids = only(unit, last, -1), only(ids, last, EMPTY)
    head = (ids >= 0) & (unit == end_unit[..., None]) & (ids == end_ids[..., None])
    tail = (ids >= 0) & (unit == last_unit[..., None]) & (ids == last_ids[..., None]) & ~head

    # The queries twice: over the unit that ends in the cell and over the one that leaves it.
    flat = lambda x: cells(x.astype(jnp.float32), 0).reshape(B * count, size * R, K, -1)
    k = flat(parts.k)
    sides = jnp.repeat(jnp.where(head, 0, jnp.where(tail, 1, EMPTY)).reshape(B * count, size), R, axis=1)
    rows = lambda x: jnp.broadcast_to(x, (B * count, *x.shape))
    out, lse = attend_with_lse(
        rows(jnp.concatenate([queries, queries]).astype(jnp.float32)),
        k,
        jnp.concatenate([k, flat(parts.v)], axis=-1),
        mask=full(),
        q_positions=rows(jnp.zeros(2 * pools, jnp.int32)),
        k_positions=jnp.zeros_like(sides),
        q_segments=rows(jnp.repeat(jnp.arange(2, dtype=jnp.int32), pools)),
        k_segments=sides,
        backend=replace(backend, sequence="none"),
    )
    out, lse = (x.reshape(B, count, 2, pools, K, *x.shape[3:]) for x in (out, lse))

    earlier = lambda first, x: jnp.concatenate([first[:, None], x[:, :-1]], axis=1)
    before, before_lse = earlier(running.pooled, out[:, :, 1]), earlier(running.lse, lse[:, :, 1])
    before_unit, before_ids = earlier(running.index, last_unit), earlier(running.segment_ids, last_ids)
    same = (before_unit == end_unit) & (before_ids == end_ids)
    pooled, _ = _joined((before, before_lse), (out[:, :, 0], lse[:, :, 0]), same)
    ended = Units(pooled[..., :C], pooled[..., C:], jnp.maximum(end_unit, 0), end_ids)

    none = last_ids[:, -1] == EMPTY
    on = none | ((before_unit == last_unit)[:, -1] & (before_ids == last_ids)[:, -1])
    left = _joined((before[:, -1:], before_lse[:, -1:]), (out[:, -1:, 1], lse[:, -1:, 1]), on[:, None])
    index, ids = (jnp.where(none, a[:, -1], b[:, -1]) for a, b in ((before_unit, last_unit), (before_ids, last_ids)))
    return ended, Running(left[0][:, 0], left[1][:, 0], index, ids)


def _joined(a: tuple[Array, Array], b: tuple[Array, Array], same: Array) -> tuple[Array, Array]:
    """b, pooled together with a where they are parts of the same unit. Arrays [B N R K ...], `same` [B N]."""
    B, N, R, K, _ = a[0].shape
    flat = lambda out, lse: (out.reshape(B, N * R, K, -1), lse.reshape(B, N * R, K))
    out, lse = merge(flat(a[0], jnp.where(same[..., None, None], a[1], -jnp.inf)), flat(*b))
    return out.reshape(B, N, R, K, -1), lse.reshape(B, N, R, K)

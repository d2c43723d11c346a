"""Summaries of runs of tokens: learned queries pool the keys and values of each unit of a document."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

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
    C, size = parts.k.shape[-1], min(fan, parts.index.shape[1])
    parts = Units(*(_cut(x, size, fill) for x, fill in zip(parts, (0, 0, 0, EMPTY), strict=True)))
    unit = parts.index // fan
    ends = (parts.segment_ids >= 0) & ((parts.index + 1) % fan == 0)
    place = jnp.where(parts.segment_ids >= 0, jnp.arange(size), EMPTY)
    last = (place == place.max(-1, keepdims=True)) & (place >= 0)
    of = lambda one: _Name(*(jnp.where(one, x, EMPTY).max(-1) for x in (unit, parts.segment_ids)))  # one slot a cell
    ended, going = of(ends), of(last)
    within = lambda name: (
        (place >= 0) & (unit == name.unit[..., None]) & (parts.segment_ids == name.segment_ids[..., None])
    )
    head, tail = within(ended), within(going)
    (head, head_lse), (tail, tail_lse) = _pool(parts, queries, (head, tail & ~head), backend)

    earlier = lambda first, x: jnp.concatenate([first[:, None], x[:, :-1]], axis=1)
    before, before_lse = earlier(running.pooled, tail), earlier(running.lse, tail_lse)
    came = _Name(earlier(running.index, going.unit), earlier(running.segment_ids, going.segment_ids))
    pooled, _ = _joined((before, before_lse), (head, head_lse), came.same(ended))
    units = Units(pooled[..., :C], pooled[..., C:], jnp.maximum(ended.unit, 0), ended.segment_ids)

    nothing = going.segment_ids[:, -1] == EMPTY  # in the last cell: then what came runs on
    final = slice(-1, None)
    left, left_lse = _joined(
        (before[:, final], before_lse[:, final]),
        (tail[:, final], tail_lse[:, final]),
        (nothing | came.same(going)[:, -1])[:, None],
    )
    unit, ids = (jnp.where(nothing, a[:, -1], b[:, -1]) for a, b in zip(came, going, strict=True))
    return units, Running(left[:, 0], left_lse[:, 0], unit, ids)


class _Name(NamedTuple):
    """Which unit of which document; EMPTY is none."""

    unit: Int[Array, "B n"]
    segment_ids: Int[Array, "B n"]

    def same(self, other: _Name) -> Bool[Array, "B n"]:
        return (self.unit == other.unit) & (self.segment_ids == other.segment_ids)


def _cut(x: Array, size: int, fill: int) -> Array:
    """[B N ...] -> [B n size ...], padded with `fill`."""
    pad = [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, pad, constant_values=fill).reshape(x.shape[0], -1, size, *x.shape[2:])


def _pool(
    parts: Units, queries: Float[Array, "P K C"], sets: tuple[Array, Array], backend: Backend
) -> list[tuple[Array, Array]]:
    """Keys beside values of each cell [B n P K 2C], pooled over two disjoint sets of its slots, and the lse of each."""
    B, n, size, R, K, _ = parts.k.shape
    flat = lambda x: x.astype(jnp.float32).reshape(B * n, size * R, K, -1)
    rows = lambda x: jnp.broadcast_to(x, (B * n, *x.shape))
    which = jnp.where(sets[0], 0, jnp.where(sets[1], 1, EMPTY)).reshape(B * n, size)
    k, k_sets = flat(parts.k), jnp.repeat(which, R, axis=1)
    out, lse = attend_with_lse(
        rows(jnp.concatenate([queries, queries]).astype(jnp.float32)),
        k,
        jnp.concatenate([k, flat(parts.v)], axis=-1),
        mask=full(),
        q_positions=rows(jnp.zeros(2 * len(queries), jnp.int32)),
        k_positions=jnp.zeros_like(k_sets),
        q_segments=rows(jnp.repeat(jnp.arange(2, dtype=jnp.int32), len(queries))),
        k_segments=k_sets,
        backend=replace(backend, sequence="none"),
    )
    out, lse = (x.reshape(B, n, 2, len(queries), K, *x.shape[3:]) for x in (out, lse))
    return [(out[:, :, side], lse[:, :, side]) for side in range(2)]


def _joined(a: tuple[Array, Array], b: tuple[Array, Array], same: Array) -> tuple[Array, Array]:
    """b, pooled together with a where they are parts of the same unit. Arrays [B N R K ...], `same` [B N]."""
    B, N, R, K, _ = a[0].shape
    flat = lambda out, lse: (out.reshape(B, N * R, K, -1), lse.reshape(B, N * R, K))
    out, lse = merge(flat(a[0], jnp.where(same[..., None, None], a[1], -jnp.inf)), flat(*b))
    return out.reshape(B, N, R, K, -1), lse.reshape(B, N, R, K)

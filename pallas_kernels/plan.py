"""Which tiles of a score matrix a kernel visits, and in what order.

A plan is made of a mask's own tile test, `mask.tile(q0, q1, k0, k1) -> (maybe_any, surely_all)`, on the ranges of
positions that blocks of queries and keys hold, so it follows any order of positions: packed documents, hops of a ring,
zigzag layouts. With NumPy positions everything is computed while tracing; with traced ones it is part of the program,
and the tables are as wide as the other side has blocks. Build it once and pass it to every layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

EMPTY = -1
"""The position that padding and empty slots get on the side of the keys; no position is negative."""


@runtime_checkable
class Predicate(Protocol):
    """What a kernel asks of a mask: hashable, and these two methods (`jaxlong.core.mask.Mask` has both)."""

    def __call__(self, q: Any, k: Any, h: Any = 0) -> Any:
        """True where query position `q` of head `h` sees key position `k`; the three broadcast."""

    def tile(self, q0: Any, q1: Any, k0: Any, k1: Any) -> tuple[Any, Any]:
        """`(maybe_any, surely_all)` of all pairs of queries q0..q1 and keys k0..k1, ends included, of every head."""


class Visits(NamedTuple):
    """For each block of one side, the blocks of the other that it visits. Leading axis P: batch rows, or 1 for all.

    order: [P n W] blocks of the other side: first those all of whose pairs attend, then those of which some may; both
        parts ascending. What is behind `count` is meaningless.
    full: [P n] how many need no predicate.
    count: [P n] how many are visited.
    schedule: [P n] the blocks of this side, most visits first: the order in which to start them.
    """

    order: Any
    full: Any
    count: Any
    schedule: Any


@partial(jax.tree_util.register_dataclass, data_fields=("by_query", "by_key"), meta_fields=("block_q", "block_k"))
@dataclass(frozen=True)
class MaskPlan:
    """The visits of blocks of queries, their transpose, and the sizes of the blocks they speak of."""

    by_query: Visits
    by_key: Visits
    block_q: int
    block_k: int


class Tokens(NamedTuple):
    """Positions and segments of both sides, [P T] and [P S], padded to whole blocks; segments are optional.

    Keys that hold nothing have the position `EMPTY`.
    """

    q_positions: Any
    k_positions: Any
    q_segments: Any
    k_segments: Any


def tokens(q_positions: Any, k_positions: Any, q_segments: Any, k_segments: Any, block_q: int, block_k: int) -> Tokens:
    """Pads to whole blocks and marks the keys that no query may see: padding, and slots of a negative segment."""
    xp = _module(q_positions, k_positions, q_segments, k_segments)
    pad = lambda x, block, fill: xp.pad(x, ((0, 0), (0, -x.shape[1] % block)), constant_values=fill)
    k = pad(xp.asarray(k_positions, np.int32), block_k, EMPTY)
    q = pad(xp.asarray(q_positions, np.int32), block_q, 0)
    if q_segments is None:
        return Tokens(q, k, None, None)
    k_of = pad(xp.asarray(k_segments, np.int32), block_k, -1)
    q_of = pad(xp.asarray(q_segments, np.int32), block_q, -1)
    return Tokens(q, xp.where(k_of < 0, EMPTY, k), q_of, k_of)


def mask_plan(mask: Predicate, found: Tokens, length_q: int, block_q: int, block_k: int) -> MaskPlan:
    """The plan of a mask on these tokens, of which the first `length_q` queries are real."""
    xp = _module(found.q_positions, found.k_positions, found.q_segments, found.k_segments)
    kind = _kinds(xp, mask, found, length_q, block_q, block_k)
    return MaskPlan(_visits(xp, kind), _visits(xp, xp.swapaxes(kind, 1, 2)), block_q, block_k)


FULL, PARTIAL, NONE = 0, 1, 2


def _kinds(xp: Any, mask: Predicate, found: Tokens, length_q: int, block_q: int, block_k: int) -> Any:
    """FULL, PARTIAL or NONE for every pair of blocks, [P nq nk]."""
    cut = lambda x, block: x.reshape(x.shape[0], -1, block)
    q, k = cut(found.q_positions, block_q), cut(found.k_positions, block_k)
    real = (np.arange(found.q_positions.shape[1]) < length_q).reshape(1, -1, block_q)
    held = k != EMPTY
    (q0, q1), (k0, k1) = _range(xp, q, real), _range(xp, k, held)
    rows, columns = lambda x: x[:, :, None], lambda x: x[:, None, :]
    some, every = mask.tile(rows(q0), rows(q1), columns(k0), columns(k1))
    some = some & columns(held.any(-1))
    every = every & columns(held.all(-1))
    if found.q_segments is not None:
        low, high = _range(xp, cut(found.q_segments, block_q), real)
        low_k, high_k = _range(xp, cut(found.k_segments, block_k), held)
        low, high, low_k, high_k = rows(low), rows(high), columns(low_k), columns(high_k)
        some = some & (low <= high_k) & (low_k <= high)
        every = every & (low == high) & (low_k == high_k) & (low == low_k)
    return xp.where(some, xp.where(every, FULL, PARTIAL), NONE).astype(np.int32)


def _range(xp: Any, x: Any, held: Any) -> tuple[Any, Any]:
    """The least and the greatest of each block over the slots that hold something, [P n]; 0 where none does."""
    anything = held.any(-1)
    least = xp.where(held, x, np.iinfo(np.int32).max).min(-1)
    most = xp.where(held, x, np.iinfo(np.int32).min).max(-1)
    return xp.where(anything, least, 0).astype(np.int32), xp.where(anything, most, 0).astype(np.int32)


def _visits(xp: Any, kind: Any) -> Visits:
    """Sorts the blocks of the last axis by kind and index. NumPy tables are cut to the most visits of any block."""
    n = kind.shape[-1]
    order = xp.sort(kind * n + np.arange(n, dtype=np.int32), axis=-1) % n
    count = (kind != NONE).sum(-1, dtype=np.int32)
    full = (kind == FULL).sum(-1, dtype=np.int32)
    schedule = xp.argsort(-count, axis=-1, stable=True).astype(np.int32)
    if xp is np:
        order = order[..., : max(int(count.max()), 1)]
    return Visits(order.astype(np.int32), full, count, schedule)


def _module(*arrays: Any) -> Any:
    """jax.numpy if any array is a jax array (traced ones are), otherwise numpy."""
    return jnp if any(isinstance(x, Array) for x in arrays) else np

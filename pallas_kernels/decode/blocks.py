"""What decoding takes, and the blocks of a cache that it visits.

Queries are few, so what they see is found before the kernel, a bit a query and slot (`code`); any mask is taken whose
heads agree, and blocks of which nothing is seen are not read.

Caches hold the key heads of a token side by side. As "lines", slot s of head h is line s K + h of a matrix; a block is
copied as it lies and every query meets every line of it, those of other heads masked like slots out of sight. On a
matrix unit that costs nothing: a tile of keys is loaded for many queries as for one. Dims that are no multiple of 128,
and heads too few to fill a tile, the TPU's compiler lays out in another order; taken in any other than that, the whole
cache would be copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels.plan import Predicate

QUERIES = 8
"""Queries a row at most: what they see of a slot are the low bits of its code."""

HEAD = 1 << QUERIES
"""A line's code is HEAD * key head + the bits of the queries that see its slot."""

LANES = 128
"""Slots of a block are a multiple of it."""

FORMS = ("lines", "heads", "lanes")
"""How a block of keys lies: [slot * head, dim], [head, slot, dim] or [head, dim, slot]."""


@dataclass(frozen=True)
class Setting:
    """What is known while tracing.

    mask: a predicate of positions (`pallas_kernels.plan.Predicate`), the same for all heads.
    scale: of the products; soft_cap: keeps scores within +-soft_cap.
    dtype: of out.
    value_dim: where `Inputs.v` is None, the first columns of keys that are values.
    """

    mask: Predicate
    scale: float
    soft_cap: float | None
    dtype: Any
    value_dim: int | None = None

    def values(self, inputs: Inputs) -> int:
        """The dim of values."""
        return self.value_dim if inputs.v is None else inputs.v.shape[-1]


class Inputs(NamedTuple):
    """The arrays of B rows of T queries and S slots.

    q: [B T H C].
    k: [B S K C], or pages of L tokens [N L K C].    v: [B S K V] or [N L K V]; None: a part of k (`Setting.value_dim`).
    q_positions: [B T].    k_positions: [B S]; of pages in the order of the table, S = M L.
    q_segments, k_segments: [B T] and [B S] or None: pairs of different ids do not meet, a negative one marks an empty
        slot.
    slopes, sinks: [H] or None: of ALiBi, and scores of keys of value 0.
    k_scale, v_scale: factors of stored numbers, of k's shape without C, or 1 in place of slots or heads; None is 1.
    pages: [B M] the pages of each row, in the order of their tokens; None where rows have slots of their own. Numbers
        that are no pages may stand where no query sees anything.
    """

    q: Any
    k: Any
    v: Any
    q_positions: Any
    k_positions: Any
    q_segments: Any = None
    k_segments: Any = None
    slopes: Any = None
    sinks: Any = None
    k_scale: Any = None
    v_scale: Any = None
    pages: Any = None

    @property
    def slots(self) -> int:
        """S, of a row."""
        return self.k.shape[1] if self.pages is None else self.k.shape[1] * self.pages.shape[1]


class Blocks(NamedTuple):
    """Of each row, the n blocks of its cache: which are visited, where they lie, and what their lines are.

    order: [B n] the blocks of which some query sees a slot, then the others; both parts ascending.
    count: [B] how many are visited.
    pieces: [B n P] the pages of each block, or its first slot (P = 1).
    told: [B n F block/128 128] float32, of each slot: its code; K factors of keys, and K of values; how far its
        position is behind the row's first query. The last three where they are needed.
    """

    order: Array
    count: Array
    pieces: Array
    told: Array


def cut(inputs: Inputs, block: int) -> tuple[Inputs, Inputs | None]:
    """(what the kernel takes, the slots that are left): pages are filled up to whole blocks with one that no query
    sees, and of other caches fewer than 128 slots are left, since transfers have that grain."""
    if inputs.pages is None:
        left = inputs.slots % LANES
        return (
            _some(inputs, 0, inputs.slots - left),
            _some(inputs, inputs.slots - left, inputs.slots) if left else None,
        )
    over = -inputs.slots % block
    if not over:
        return inputs, None
    B, S = inputs.k_positions.shape
    grow = lambda x, by, fill: jnp.pad(x, ((0, 0), (0, by)), constant_values=fill)
    k_segments = jnp.zeros((B, S), jnp.int32) if inputs.k_segments is None else inputs.k_segments
    found = inputs._replace(
        pages=grow(inputs.pages, over // inputs.k.shape[1], 0),
        k_positions=grow(inputs.k_positions, over, 0),
        q_segments=jnp.zeros_like(inputs.q_positions) if inputs.q_segments is None else inputs.q_segments,
        k_segments=grow(k_segments, over, -1),
    )
    return found, None


def _some(inputs: Inputs, start: int, stop: int) -> Inputs:
    """Some slots; the kernel's part keeps keys and values whole, for a part of them would be a copy."""
    some = lambda x: None if x is None else x[:, start:stop]
    found = inputs._replace(k_positions=some(inputs.k_positions), k_segments=some(inputs.k_segments))
    factor = lambda x: x if x is None or x.shape[1] == 1 else some(x)
    found = found._replace(k_scale=factor(inputs.k_scale), v_scale=factor(inputs.v_scale))
    return found._replace(k=some(inputs.k), v=some(inputs.v)) if start else found


def blocks_of(setting: Setting, inputs: Inputs, block: int) -> Blocks:
    """The blocks of what the kernel takes (`cut`). Where the slots do not fill the last one it begins earlier, and what
    it shares with the one before is masked in it."""
    length = inputs.k_positions.shape[1]
    count = -(-length // block)
    again = count * block - length
    split = _splitter(length, block)
    codes = split(code(setting, inputs))
    if again:
        codes = codes.at[:, -1, :again].set(0)
    visited = (codes > 0).any(-1)
    return Blocks(
        jnp.argsort(~visited, axis=-1, stable=True).astype(jnp.int32),
        visited.sum(-1, dtype=jnp.int32),
        _pieces(inputs, block, count, length),
        _told(inputs, split, codes),
    )


def code(setting: Setting, inputs: Inputs) -> Array:
    """[B S], bit t tells whether query t sees the slot."""
    rows, columns = lambda x: x[:, :, None], lambda x: x[:, None, :]
    seen = setting.mask(rows(inputs.q_positions), columns(inputs.k_positions))
    if inputs.q_segments is not None:
        k_segments = columns(inputs.k_segments)
        seen = seen & (rows(inputs.q_segments) == k_segments) & (k_segments >= 0)
    bits = jnp.arange(inputs.q.shape[1], dtype=jnp.int32)[:, None]
    return (seen.astype(jnp.int32) << bits).sum(1, dtype=jnp.int32)


def _splitter(length: int, block: int) -> Callable[[Array], Array]:
    """[B S ...] to blocks [B n X ...] of which the last ends with the slots."""
    count = -(-length // block)

    def split(x: Array) -> Array:
        if length % block:
            x = jnp.concatenate([x[:, : (count - 1) * block], x[:, length - block :]], axis=1)
        return x.reshape(x.shape[0], count, block, *x.shape[2:])

    return split


def _pieces(inputs: Inputs, block: int, count: int, length: int) -> Array:
    B = inputs.q.shape[0]
    if inputs.pages is not None:
        return _real(inputs).reshape(B, count, -1)
    first = jnp.minimum(jnp.arange(count, dtype=jnp.int32) * block, length - block)
    return jnp.broadcast_to(first[:, None], (B, count, 1))


def _real(inputs: Inputs) -> Array:
    """The table, with pages that exist."""
    return jnp.clip(inputs.pages.astype(jnp.int32), 0, inputs.k.shape[0] - 1)


def _told(inputs: Inputs, split: Callable[[Array], Array], codes: Array) -> Array:
    heads = inputs.k.shape[2]
    found = [codes[..., None]]
    for factor in (inputs.k_scale, inputs.v_scale):
        if factor is not None:
            found.append(jnp.broadcast_to(split(of_slots(inputs, factor)), (*codes.shape, heads)))
    if inputs.slopes is not None:
        found.append(split(inputs.k_positions - inputs.q_positions[:, :1])[..., None])
    rows = [jnp.swapaxes(x, 2, 3).astype(jnp.float32).reshape(*x.shape[:2], x.shape[3], -1, LANES) for x in found]
    return jnp.concatenate(rows, axis=2)


def of_slots(inputs: Inputs, factor: Array) -> Array:
    """Factors of numbers as [B S #K]."""
    length, (B, S) = inputs.k.shape[1], inputs.k_positions.shape
    if inputs.pages is None:
        return jnp.broadcast_to(factor, (B, S, factor.shape[2]))
    factor = jnp.broadcast_to(factor, (factor.shape[0], length, factor.shape[2]))
    return factor[_real(inputs)].reshape(B, S, -1)


def wanted(inputs: Inputs, form: str) -> Array:
    """[B T H 4] float32, of each query: the bits of a code that concern it, what they are if it sees the line, its
    slope, and its position behind the row's first query."""
    (B, T, H, _), heads = inputs.q.shape, inputs.k.shape[2]
    bit = (1 << jnp.arange(T))[:, None]
    head = HEAD * (jnp.arange(H) // (H // heads)) if form == "lines" else jnp.zeros(H, jnp.int32)
    slopes = jnp.zeros(H) if inputs.slopes is None else inputs.slopes
    behind = (inputs.q_positions - inputs.q_positions[:, :1])[..., None]
    each = lambda x: jnp.broadcast_to(x, (B, T, H)).astype(jnp.float32)
    return jnp.stack([each(bit + HEAD * (HEAD - 1)), each(bit + head), each(slopes), each(behind)], -1)


def spread(heads: int, form: str) -> tuple[Array, Array]:
    """How 128 slots become lines: [128 X] bfloat16, 1 where a line is of a slot, and each line's head [1 X] float32."""
    lines = jnp.arange(LANES * (heads if form == "lines" else 1), dtype=jnp.int32)
    slot, head = (lines // heads, lines % heads) if form == "lines" else (lines, jnp.zeros_like(lines))
    of_slot = (slot == jnp.arange(LANES)[:, None]).astype(jnp.bfloat16)
    return of_slot, head.astype(jnp.float32)[None]


def grouped(x: Array, heads: int, form: str, fill: float = 0) -> Array:
    """[B T H c] as [B g R c]: the queries of a group meet the same lines. R is a multiple of 16, the rows of a tile."""
    B, T, H, c = x.shape
    x = x.reshape(B, T, heads, H // heads, c).swapaxes(1, 2).reshape(B, 1 if form == "lines" else heads, -1, c)
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % 16), (0, 0)), constant_values=fill)


def by_token(x: Array, T: int, H: int, heads: int) -> Array:
    """The inverse of `grouped`: [... g R c] as [... T H c]."""
    *lead, g, _, c = x.shape
    x = x[..., : T * H // g, :].reshape(*lead, heads, T, H // heads, c)
    return jnp.moveaxis(x, -3, -4).reshape(*lead, T, H, c)


def view(x: Array, form: str) -> Array:
    """[A L K C] as [A 1 L*K C], [A K L C] or [A K C L]: for the TPU's compiler the same memory, where `form` fits."""
    A, L, K, C = x.shape
    if form == "lines":
        return x.reshape(A, 1, L * K, C)
    return jnp.transpose(x, (0, 2, 1, 3) if form == "heads" else (0, 2, 3, 1))


def merged(out: Array, lse: Array, sinks: Array | None) -> tuple[Array, Array]:
    """(out [B T H V], lse [B T H]) over all keys, from parts [B n T H V] and [B n T H] of them, and sinks [H]."""
    top = lse.max(1)
    top = top if sinks is None else jnp.maximum(top, sinks)
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(lse - top[:, None])
    total = weights.sum(1) if sinks is None else weights.sum(1) + jnp.exp(sinks - top)
    safe = jnp.where(total == 0, 1, total)
    out = (out * weights[..., None]).sum(1) / safe[..., None]
    return out, jnp.where(total == 0, -jnp.inf, top + jnp.log(safe))

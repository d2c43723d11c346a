"""Windows of tokens inside documents, wherever these lie in a row, and a state that keeps one summary of each.

A grid of windows starts anew with every document: window n covers positions n stride to n stride + length - 1 of it,
and is finished with its last token. A row numbers its windows in the order in which they finish; those of a document
follow each other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxlong.core.state import EMPTY


class Windows(NamedTuple):
    """The windows that T tokens finish, N = ceil(T / stride) at most, and what they know of those before.

    ends: which of the tokens ends each; the first ones are `held`, the others are no windows.
    first: the row's number of the first window of a token's document (that it finishes or will).
    finished: how many windows of the row are finished with a token.
    """

    ends: Int[Array, "B N"]
    held: Bool[Array, "B N"]
    first: Int[Array, "B T"]
    finished: Int[Array, "B T"]


def windows(
    positions: Int[Array, "B T"], *, length: int, stride: int, before: Int[Array, "B"] | None = None
) -> Windows:
    """Windows of `length` tokens every `stride` tokens, stride <= length, from positions that count from 0.

    Args:
        before: how many the row had finished before these tokens; None is 0.
    """
    over = positions + 1 - length
    ends = (over >= 0) & (over % stride == 0)
    finished = jnp.cumsum(ends, axis=1, dtype=jnp.int32) + (0 if before is None else before[:, None])
    first = finished - jnp.where(over >= 0, over // stride + 1, 0)
    count = -(-positions.shape[1] // stride)
    index = jax.vmap(lambda row: jnp.flatnonzero(row, size=count))(ends).astype(jnp.int32)
    held = jnp.arange(count) < ends.sum(1)[:, None]
    return Windows(index, held, first, finished)


def read_windows(x: Array, ends: Int[Array, "B N"], length: int) -> Array:
    """The tokens of windows: `[B, S, ...] -> [B, N, length, ...]`, around a ring of S slots.

    Args:
        ends: the slot of each window's last token, not yet modulo S.
    """
    slots = (ends[..., None] + jnp.arange(1 - length, 1)) % x.shape[1]
    return jax.vmap(lambda row, index: row.at[index].get(mode="promise_in_bounds"))(x, slots)


def sum_by_blocks(
    weights: Float[Array, "B T K M"],
    first: Int[Array, "B T"],
    finished: Int[Array, "B T"],
    *,
    length: int,
    stride: int,
    block: int,
    blocks: int,
) -> Float[Array, "B T K N"]:
    """For each of the first N blocks of a query's document, the sum of weights of windows that share a token with it.

    Args:
        weights: of the row's windows; number n in slot n % M. Only finished ones of the query's document count.
        first, finished: see `Windows`.
        length, stride: of the windows. block: tokens of a block. blocks: N.
    """
    count = weights.shape[-1]
    window = jnp.arange(count, dtype=first.dtype)  # of the query's document
    own = jnp.take_along_axis(weights, ((first[..., None] + window) % count)[:, :, None], axis=-1)
    own = jnp.where((window < (finished - first)[..., None])[:, :, None], own, 0)

    start = np.arange(blocks)[:, None] * block
    index = -((length - 1 - start) // stride) + np.arange((block + length - 2) // stride + 1)
    overlap = (index >= 0) & (index < count) & (index * stride < start + block)
    return jnp.where(overlap, own[..., np.clip(index, 0, count - 1)], 0).sum(-1)


class Summaries(NamedTuple):
    """What is kept of finished windows: number n of a row is in slot n % M.

    values: a tuple of arrays [B, M, ...].
    segment_ids: whose window it is, EMPTY for none.
    count: windows finished so far.
    """

    values: Any
    segment_ids: Int[Array, "B M"]
    count: Int[Array, "B"]

    @classmethod
    def empty(cls, batch: int, slots: int, *arrays: tuple[tuple[int, ...], Any]) -> Summaries:
        """For each of `arrays`, (shape, dtype), zeros [batch, slots, *shape]."""
        return cls(
            values=tuple(jnp.zeros((batch, slots, *shape), dtype) for shape, dtype in arrays),
            segment_ids=jnp.full((batch, slots), EMPTY, jnp.int32),
            count=jnp.zeros((batch,), jnp.int32),
        )

    @classmethod
    def of(cls, found: Windows, segment_ids: Int[Array, "B T"], *values: Array) -> Summaries:
        """Those of `found` alone, from values [B, N, ...]."""
        ids = jnp.take_along_axis(segment_ids, found.ends, axis=1)
        return cls(values, jnp.where(found.held, ids, EMPTY), found.held.sum(1, dtype=jnp.int32))

    def push(self, new: Summaries) -> Summaries:
        """Appends new ones, overwriting the oldest when full."""
        slots, most = self.segment_ids.shape[1], new.segment_ids.shape[1]
        index = (self.count[:, None] + jnp.arange(most)) % slots
        index = jnp.where(new.segment_ids == EMPTY, slots, index)  # outside: not written
        rows = jnp.arange(index.shape[0])[:, None]
        write = lambda buffer, x: buffer.at[rows, index].set(x.astype(buffer.dtype), mode="drop")
        return Summaries(
            values=tuple(map(write, self.values, new.values)),
            segment_ids=write(self.segment_ids, new.segment_ids),
            count=self.count + new.count,
        )

    def holds(self, tokens: int) -> bool:
        """True: mixers keep a slot for every window that their `max_len` tokens can end."""
        return True

    def mark(self) -> Array:
        return self.count

    def rewind(self, mark: Array) -> Summaries:
        slot = jnp.arange(self.segment_ids.shape[-1])
        return self._replace(segment_ids=jnp.where(slot < mark[..., None], self.segment_ids, EMPTY), count=mark)

    def since(self, mark: Array, tokens: int) -> tuple[Array, ...]:
        """All slots, those of other windows as zeros: how many tokens end one is not known."""
        slot = jnp.arange(self.segment_ids.shape[-1])
        new = (slot >= mark[..., None]) & (slot < self.count[..., None])
        spread = lambda x: new.reshape(*new.shape, *[1] * (x.ndim - new.ndim))
        return tuple(jnp.where(spread(x), x, 0) for x in self.values)

    def numbers(self) -> Int[Array, "B M"]:
        """The number of the window in each slot; negative where there is none."""
        slots, last = self.segment_ids.shape[1], self.count[:, None] - 1
        return last - (last - jnp.arange(slots)) % slots

"""State pytrees: what a mixer keeps between calls. Passed in, returned, never mutated."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.types import BadInput

EMPTY = -1
"""Segment id of a slot that holds nothing; no token carries it, so no query attends to it."""


@runtime_checkable
class Appended(Protocol):
    """A state that grows by entries behind each other, so that what it was earlier can be read off what it is.

    Methods also take states that are stacked along leading axes, as those of scanned layers are.
    """

    def holds(self, tokens: int) -> bool:
        """Whether that many tokens fit without overwriting any."""
        ...

    def mark(self) -> Array:
        """How far it is: small, and all that `rewind` needs."""
        ...

    def rewind(self, mark: Array) -> Any:
        """What it was at that mark, as far as a reader or `push` can tell; nothing may be overwritten since."""
        ...

    def since(self, mark: Array, tokens: int) -> tuple[Array, ...]:
        """The floating-point entries that the last `tokens` tokens made, which came after that mark; linear in them."""
        ...


class KeysOnly:
    """As the state of a mixer that `reads_keys`: asks for the sealed cache of the tokens, and mixes nothing.

    A sealed cache holds the keys of a whole row, and `push` adds none: given as the state, any of the row's tokens
    can be mixed on their own.
    """


class KVCache(NamedTuple):
    """Ring buffer of keys and values in which each slot carries its own position and segment.

    `next` counts all tokens pushed; token n lives in slot `n % S`. A cache for a mask that sees `window`
    keys needs `window + longest chunk - 1` slots, since a chunk is written before its queries read. Without `next`,
    None, it is sealed (`KeysOnly`).
    State size: `B * S * (K * (C + V) * itemsize + 8) + 4` bytes.
    """

    k: Float[Array, "B S K C"]
    v: Float[Array, "B S K V"]
    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    next: Int[Array, ""] | None

    @classmethod
    def empty(cls, batch: int, slots: int, heads: int, key_dim: int, value_dim: int, dtype) -> KVCache:
        return cls(
            k=jnp.zeros((batch, slots, heads, key_dim), dtype),
            v=jnp.zeros((batch, slots, heads, value_dim), dtype),
            positions=jnp.zeros((batch, slots), jnp.int32),
            segment_ids=jnp.full((batch, slots), EMPTY, jnp.int32),
            next=jnp.zeros((), jnp.int32),
        )

    def push(
        self,
        k: Float[Array, "B T K C"],
        v: Float[Array, "B T K V"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
    ) -> KVCache:
        """Append T tokens, overwriting the oldest when full. Raises BadInput if T exceeds the slots."""
        if self.next is None:
            return self
        index = _slots(self, k.shape[1])
        return self._replace(
            k=_write(self.k, index, k),
            v=_write(self.v, index, v),
            positions=_write(self.positions, index, positions),
            segment_ids=_write(self.segment_ids, index, segment_ids),
            next=self.next + k.shape[1],
        )

    def holds(self, tokens: int) -> bool:
        return _holds(self, tokens)

    def mark(self) -> Array:
        return self.next

    def rewind(self, mark: Array) -> KVCache:
        return _rewind(self, mark)

    def since(self, mark: Array, tokens: int) -> tuple[Array, ...]:
        return tuple(_entries(x, mark, tokens) for x in (self.k, self.v))


class LatentCache(NamedTuple):
    """The ring buffer of attention whose heads share one vector a token, of which keys and values are made.

    `latent` is that vector; `index` is what a learned selection scores, None where nothing is selected. All else
    is as in `KVCache`. State size: `B * S * ((R + I) * itemsize + 8) + 4` bytes.
    """

    latent: Float[Array, "B S R"]
    index: Float[Array, "B S I"] | None
    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    next: Int[Array, ""] | None

    @classmethod
    def empty(cls, batch: int, slots: int, latent_dim: int, index_dim: int | None, dtype) -> LatentCache:
        return cls(
            latent=jnp.zeros((batch, slots, latent_dim), dtype),
            index=None if index_dim is None else jnp.zeros((batch, slots, index_dim), dtype),
            positions=jnp.zeros((batch, slots), jnp.int32),
            segment_ids=jnp.full((batch, slots), EMPTY, jnp.int32),
            next=jnp.zeros((), jnp.int32),
        )

    def push(
        self,
        latent: Float[Array, "B T R"],
        index: Float[Array, "B T I"] | None,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
    ) -> LatentCache:
        """Append T tokens, overwriting the oldest when full. Raises BadInput if T exceeds the slots."""
        if self.next is None:
            return self
        slots = _slots(self, latent.shape[1])
        return self._replace(
            latent=_write(self.latent, slots, latent),
            index=None if index is None else _write(self.index, slots, index),
            positions=_write(self.positions, slots, positions),
            segment_ids=_write(self.segment_ids, slots, segment_ids),
            next=self.next + latent.shape[1],
        )

    def holds(self, tokens: int) -> bool:
        return _holds(self, tokens)

    def mark(self) -> Array:
        return self.next

    def rewind(self, mark: Array) -> LatentCache:
        return _rewind(self, mark)

    def since(self, mark: Array, tokens: int) -> tuple[Array, ...]:
        return tuple(_entries(x, mark, tokens) for x in (self.latent, self.index) if x is not None)


class ConvTail(NamedTuple):
    """The last `W - 1` inputs of a causal convolution of width W, with their segments."""

    x: Float[Array, "B W D"]
    segment_ids: Int[Array, "B W"]

    @classmethod
    def empty(cls, batch: int, width: int, channels: int, dtype) -> ConvTail:
        return cls(
            x=jnp.zeros((batch, width - 1, channels), dtype),
            segment_ids=jnp.full((batch, width - 1), EMPTY, jnp.int32),
        )


class Recurrent(NamedTuple):
    """A memory into which tokens are folded, and the segment of the last of them.

    `memory` is a float32 array `[B, ...]` or a tuple of such arrays. It belongs to the document
    `segment_ids`: a token of another one starts from nothing.
    """

    memory: Any
    segment_ids: Int[Array, "B"]

    @classmethod
    def empty(cls, batch: int, *shapes: tuple[int, ...]) -> Recurrent:
        """Zeros `[batch, *shape]` for each shape; a tuple of arrays where there are several."""
        arrays = tuple(jnp.zeros((batch, *shape), jnp.float32) for shape in shapes)
        return cls(arrays[0] if len(arrays) == 1 else arrays, jnp.full((batch,), EMPTY, jnp.int32))


def nbytes(state: Any) -> int:
    """Bytes of a state: arrays, or the shapes that `jax.eval_shape(init_state, ...)` gives."""
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(state))


def _slots(cache: KVCache | LatentCache, length: int) -> Int[Array, "T"]:
    """The slots that the next tokens go to."""
    slots = cache.positions.shape[1]
    if length > slots:
        why = f"the cache was made for max_len and max_chunk that give {slots} slots"
        raise BadInput("tokens", length, why, f"at most {slots} at a time")
    return (cache.next + jnp.arange(length)) % slots


def _write(buffer: Array, slots: Int[Array, "T"], new: Array) -> Array:
    return buffer.at[:, slots].set(new.astype(buffer.dtype), unique_indices=True)


def _holds(cache: KVCache | LatentCache, tokens: int) -> bool:
    return cache.positions.shape[-1] >= tokens


def _rewind(cache: Any, mark: Array) -> Any:
    slot = jnp.arange(cache.segment_ids.shape[-1])
    segments = jnp.where(slot < mark[..., None, None], cache.segment_ids, EMPTY)
    return cache._replace(segment_ids=segments, next=mark)


def _entries(buffer: Array, mark: Array, tokens: int) -> Array:
    """`tokens` slots from that one on; caches that are stacked are equally far."""
    return jax.lax.dynamic_slice_in_dim(buffer, mark.reshape(-1)[0], tokens, axis=mark.ndim + 1)

"""A linear memory that tokens read as it was when their chunk of the document began."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from jaxlong.core.state import EMPTY
from jaxlong.ops.attend import Backend
from jaxlong.ops.chunks import join, split, starts
from jaxlong.parallel.manual import vary_alike
from jaxlong.parallel.prefix import Chain, earlier, halo, prefix
from jaxlong.parallel.rows import over_spans, spread

CELL = 512
"""Tokens that are handled together where chunks do not begin with the row, at most a chunk."""


class ChunkMemory(NamedTuple):
    """Sums of k_j v_j^T in float32: `seen` is what the next token reads, `later` what the next chunk will read."""

    seen: Float[Array, "B F D"]
    later: Float[Array, "B F D"]


class Marks(NamedTuple):
    """Where tokens are: the document and the chunk of each, and the chunk of the token that follows the last."""

    document: Int[Array, "B T"]
    chunk: Int[Array, "B T"]
    end: Int[Array, "B"]


def marks(positions: Int[Array, "B T"], resets: Bool[Array, "B T"] | None, chunk: int) -> Marks:
    """Chunks are counted by positions, from each document's start; documents begin at resets, or not (None)."""
    document = jnp.zeros_like(positions) if resets is None else jnp.cumsum(resets.at[:, 0].set(False), axis=1)
    return Marks(document, positions // chunk, (positions[:, -1] + 1) // chunk)


def chunk_memory(
    q: Float[Array, "B T F"],
    k: Float[Array, "B T F"],
    v: Float[Array, "B T D"],
    *,
    chunk: int,
    where: Marks | None = None,
    state: ChunkMemory | None = None,
) -> tuple[Float[Array, "B T D"], ChunkMemory | None]:
    """o_t = q_t sum_j k_j^T v_j over the tokens j of earlier chunks of t's document.

    Linear in T. The backward pass computes the memory again from its ends, so that no copy of it is kept a chunk:
    beyond inputs and outputs, both passes hold a few arrays of the memory's size.

    Args:
        where: from `marks`; None: each row is one whole document, and no state is returned.
        state: the memory of the row's first document before these tokens; None: empty.

    Returns:
        o in float32, and the memory of the last document after the last token.
    """
    if where is not None and state is None:
        zeros = jnp.zeros((q.shape[0], k.shape[-1], v.shape[-1]), jnp.float32)
        state = vary_alike((q, ChunkMemory(zeros, zeros)))[1]
    length = q.shape[1]
    if where is None:  # whole chunks, so that they begin at either end
        q, k, v = (jnp.pad(a, [(0, 0), (0, -length % chunk), (0, 0)]) for a in (q, k, v))
    o, state = _memory(chunk, q, k, v, where, state)
    return o[:, :length], state


def taught(
    x: Float[Array, "B T C"],
    z: Float[Array, "B T F"],
    kernel: Float[Array, "W C"],
    target: Float[Array, "C D"],
    *,
    chunk: int,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
    backend: Backend = Backend(),
) -> Float[Array, "B T D"]:
    """`chunk_memory` of z, z and `chunk_conv(x) target` over the documents of whole rows.

    Where rows lie in spans on several devices (`parallel.prefix`), the convolution gets the tokens on both sides of a
    span, and the memory is a sum whose prefix devices exchange.
    """
    if spread(x.shape[1], backend.layout):
        on_spans = functools.partial(_on_spans, chunk)
        return over_spans(on_spans, (x, z, positions, segment_ids), (kernel, target), layout=backend.layout)[0]
    if segment_ids is None:
        places = jnp.arange(x.shape[1])[None] // chunk
        return chunk_memory(z, z, chunk_conv(x, kernel, jnp.zeros_like(places), places) @ target, chunk=chunk)[0]
    where = marks(positions, starts(segment_ids, segment_ids[:, 0]), chunk)
    v = chunk_conv(x, kernel, where.document, where.chunk) @ target
    return chunk_memory(z, z, v, chunk=chunk, where=where)[0]


def _on_spans(chunk: int, tokens: tuple, shared: tuple[Array, Array], chain: Chain) -> tuple[Array, None]:
    (x, z, positions, ids), (kernel, target) = tokens, shared
    ids = jnp.zeros_like(positions) if ids is None else ids
    where = marks(positions, starts(ids, ids[:, 0]), chunk)
    reach, length = kernel.shape[0] // 2, x.shape[1]
    wide = functools.partial(halo, chain=chain, before=reach, after=reach)
    near = chunk_conv(wide(x), kernel, wide(ids - EMPTY), wide(where.chunk))
    o, own = chunk_memory(z, z, near[:, reach : reach + length] @ target, chunk=chunk, where=where)
    last = earlier(ids[:, -1] - EMPTY, 1, chain) + EMPTY
    flag = lambda rows: rows.astype(jnp.float32)[:, None, None]
    past = Past(*own, flag(last == ids[:, -1]), flag(where.end != where.chunk[:, 0]))
    past = prefix(followed, past, chain)
    old, turned = ids == last[:, None], where.chunk != where.chunk[:, :1]
    only = lambda mask: jnp.where(mask[..., None], z.astype(jnp.float32), 0)
    return o + only(old & ~turned) @ past.seen + only(old & turned) @ past.later, None


class Past(NamedTuple):
    """What a span does to a memory that is read as its chunk found it.

    seen, later: what it adds to what the next token reads, and to what the next chunk will read.
    kept: 1 if no document begins in it.    turned: 1 if a chunk of the first one ends in it.
    """

    seen: Float[Array, "B ..."]
    later: Float[Array, "B ..."]
    kept: Float[Array, "B ..."]
    turned: Float[Array, "B ..."]


def followed(early: Past, late: Past) -> Past:
    """Two spans in a row."""
    seen = late.seen + late.kept * jnp.where(late.turned > 0, early.later, early.seen)
    later = late.later + late.kept * early.later
    return Past(seen, later, early.kept * late.kept, jnp.maximum(early.turned, late.turned))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _memory(
    chunk: int, q: Array, k: Array, v: Array, where: Marks | None, state: ChunkMemory | None
) -> tuple[Array, ChunkMemory | None]:
    return _aligned(chunk, q, k, v) if where is None else _general(chunk, q, k, v, where, state)


def _forward(chunk: int, q: Array, k: Array, v: Array, where: Marks | None, state: ChunkMemory | None):
    return _memory(chunk, q, k, v, where, state), (q, k, v, where, state)


def _backward(chunk: int, saved: tuple, cotangents: tuple) -> tuple:
    """Who reads whom, transposed, is the same memory written from the last token to the first.

    A token's write reaches the later chunks and the state: `later` if its chunk is unfinished, else both of its parts.
    """
    q, k, v, where, state = saved
    do, d_state = cotangents
    flip = lambda *arrays: tuple(jnp.flip(a, 1) for a in arrays)
    turn = lambda memory: jax.tree.map(lambda a: jnp.swapaxes(a, 1, 2), memory)
    back = before = d_state
    if where is not None:
        before = Marks(*flip(where.document, where.chunk), where.chunk[:, 0])
        both = d_state.seen + d_state.later
        unfinished = (where.end == where.chunk[:, -1])[:, None, None]
        back = ChunkMemory(jnp.where(unfinished, d_state.later, both), both)
    walk = lambda q, k, v, where, state: _memory(chunk, q, k, v, where, state)
    dq, _ = walk(do, v, k, where, turn(state))
    dv, start = walk(*flip(k, q, do), before, back)
    dk, _ = walk(*flip(v, do, q), before, turn(back))
    if where is not None:
        start = ChunkMemory(start.later - start.seen, start.seen)
    dk, dv = flip(dk, dv)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, start


_memory.defvjp(_forward, _backward)


def _aligned(chunk: int, q: Array, k: Array, v: Array) -> tuple[Array, None]:
    """Rows that begin with a document, whole chunks at a time."""

    def step(memory: Array, cell: tuple) -> tuple[Array, Array]:
        q, k, v = (a.astype(jnp.float32) for a in cell)
        return memory + jnp.einsum("btf,btd->bfd", k, v), q @ memory

    memory = jnp.zeros((q.shape[0], k.shape[-1], v.shape[-1]), jnp.float32)
    _, o = lax.scan(step, memory, tuple(split(a, chunk) for a in (q, k, v)))
    return join(o, q.shape[1]), None


def _general(chunk: int, q: Array, k: Array, v: Array, where: Marks, state: ChunkMemory) -> tuple[Array, ChunkMemory]:
    """Cells of at most a chunk from anywhere, in either direction of time.

    The document of a cell's first token crosses at most one edge between chunks: its tokens read `seen` before it
    and `later` after it, and all tokens read those of earlier chunks of their document within the cell.
    """
    length = q.shape[1]
    size = min(chunk, length, CELL)
    document, block, end = where
    first = jnp.pad(document[:, 1:] != document[:, :-1], [(0, 0), (1, 0)])
    follow = jnp.concatenate([block[:, 1:], end[:, None]], axis=1)

    def cells(x: Array) -> Array:  # tokens added at the end are like the last one, and empty
        return split(jnp.pad(x, [(0, 0), (0, -length % size)], mode="edge"), size)

    def step(memory: ChunkMemory, cell: tuple) -> tuple[ChunkMemory, Array]:
        q, k, v, document, block, first, follow = cell
        q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
        rows = lambda mask: mask[:, None, None].astype(jnp.float32)
        only = lambda mask: mask[:, :, None].astype(jnp.float32)
        seen, later = (rows(~first[:, 0]) * a for a in memory)
        mine, turned = document == document[:, :1], block != block[:, :1]
        earlier = (document[:, :, None] == document[:, None]) & (block[:, :, None] != block[:, None])
        scores = jnp.tril(jnp.einsum("bif,bjf->bij", q, k) * earlier)
        o = (q * only(mine & ~turned)) @ seen + (q * only(mine & turned)) @ later + scores @ v

        last, follow = document == document[:, -1:], follow[:, -1]
        write = lambda mask: jnp.einsum("btf,btd->bfd", k, v * only(mask))
        kept = rows(mine[:, -1])
        seen = kept * jnp.where(rows(follow != block[:, 0]) > 0, later, seen) + write(last & (block != follow[:, None]))
        return ChunkMemory(seen, kept * later + write(last)), o

    state, o = lax.scan(
        step, state, (*(split(a, size) for a in (q, k, v)), *map(cells, (document, block, first, follow)))
    )
    return join(o, length), state


def chunk_conv(
    x: Float[Array, "B T D"], kernel: Float[Array, "W D"], document: Int[Array, "#B T"], chunk: Int[Array, "#B T"]
) -> Float[Array, "B T D"]:
    """y_t = sum_s kernel_(s + W // 2) * x_(t + s), |s| <= W // 2, over tokens of t's own chunk of its document."""
    reach, length = kernel.shape[0] // 2, x.shape[1]
    pad = lambda a, fill: jnp.pad(a, [(0, 0), (reach, reach)] + [(0, 0)] * (a.ndim - 2), constant_values=fill)
    x, near_document, near_chunk = pad(x, 0), pad(document, -1), pad(chunk, -1)
    y = jnp.zeros(())
    for tap in range(kernel.shape[0]):
        at = slice(tap, tap + length)
        together = (near_document[:, at] == document) & (near_chunk[:, at] == chunk)
        y += jnp.where(together[..., None], x[:, at], 0) * kernel[tap]
    return y

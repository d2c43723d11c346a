"""Log-linear attention: a linear recurrence whose past is kept in log T pieces, the older the longer."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.state import Recurrent
from jaxlong.core.types import BadInput
from jaxlong.ops.attend import Backend
from jaxlong.ops.chunks import join, split
from jaxlong.ops.dense import precision
from jaxlong.parallel.manual import vary_alike
from jaxlong.parallel.prefix import Chain, final, prefix
from jaxlong.parallel.rows import over_spans, spread


def slots_for(levels: int, max_len: int) -> int:
    """Pieces that the tokens before a position below `max_len` may fall into, `levels - 1` at most."""
    return min(levels - 1, max(max_len, 1).bit_length())


def log_linear(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T H C"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H"],
    scales: Float[Array, "B T H L"],
    *,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    chunk: int = 64,
    state: Recurrent | None = None,
    backend: Backend = Backend(),
) -> tuple[Float[Array, "B T H V"], Recurrent]:
    """Linear attention with decay and a factor for each level of a Fenwick tree.

        o_i = sum_(j <= i) scales_i[level(i, j)] exp(b_i - b_j) (q_i . k_j) v_j,  b the cumulated log decay
        level(i, j) = bits(i xor j): 0 is j = i; level l holds the 2^(l-1) tokens before the last l - 1 bits of i,
        if bit l - 1 of i is 1

    By positions in their document, from 0. The last level also takes all that is farther. Memory: piece n is the sum
    of exp(b - b_j) k_j v_j over level n + 1 of the next position. Chunks are walked with the pieces as carry: inside
    one a matrix of scores by level, the rest is one product over all pieces. Tokens in one chunk lie at both sides of
    at most one multiple of it, so a chunk has log2(chunk) + 2 levels inside, wherever documents begin. Float32; the
    backward pass keeps the pieces at every sqrt(T / chunk)-th chunk and recomputes between. Rows that lie in spans on
    several devices (`parallel.prefix`) begin with the text: each span runs twice, for its own pieces and from those
    before it.

    Args:
        segment_ids: documents; None is one document from position 0, which needs less work.
        chunk: a power of 2; the result does not depend on it.
        state: `Recurrent.empty(B, (slots_for(L, max_len), H, C, V))` or what a call returned.
        backend: its layout says how rows lie on the devices of a mesh; with a state they are left to the compiler.

    Returns:
        o in float32, and the state after the last token.

    Raises:
        BadInput: a chunk that is no power of 2, fewer than 2 levels.

    Source: Guo et al. 2025, arXiv 2506.04761.
    """
    if chunk < 1 or chunk & (chunk - 1):
        raise BadInput("chunk", chunk, "the levels halve it", "a power of 2")
    (B, T, H, C), V, L = q.shape, v.shape[-1], scales.shape[-1]
    if L < 2:
        raise BadInput("levels", L, "a token itself and what is before it", "2 or more")
    if state is None and spread(T, backend.layout):
        tokens = (q, k, v, log_decay, scales, positions, segment_ids)
        on_spans = functools.partial(_on_spans, chunk, slots_for(L, T))
        return over_spans(on_spans, tokens, None, layout=backend.layout)
    size = min(chunk, T)
    fine = (size - 1).bit_length()
    aligned = segment_ids is None and state is None
    slots = slots_for(L, T) if state is None else state.memory.shape[1]
    grid = _Grid(fine, min(fine, slots - 1) if aligned else 0, slots, aligned, precision(q.dtype))
    carry = state
    if state is None:
        carry = vary_alike((positions, Recurrent.empty(B, (slots - grid.low, H, C, V))))[1]
    ids = jnp.zeros_like(positions) if segment_ids is None else segment_ids

    group = math.isqrt(-(-T // size))
    blank = [(0, 0), (0, -T % (size * group))]
    floats = (x.astype(jnp.float32) for x in (q, k, v, log_decay, scales))
    arrays = [jnp.pad(x, blank + [(0, 0)] * (x.ndim - 2)) for x in floats]
    arrays += [jnp.pad(x, blank, mode="edge") for x in (positions, ids)]  # what pads repeats the last token without k
    cells = _Chunk(*(x.reshape(-1, group, *x.shape[1:]) for x in (split(x, size) for x in arrays)))
    some = lambda carry, chunks: jax.lax.scan(functools.partial(_step, grid), carry, chunks)
    carry, out = jax.lax.scan(jax.checkpoint(some), carry, cells)
    return join(out.reshape(-1, *out.shape[2:]), T), carry


class _Span(NamedTuple):
    """What a span does to the pieces at its entry: those up to `top` unite there, all fade, its own are added.

    Only if its last token is of the same document. Of nothing, all are zero.
    """

    memory: Float[Array, "B n H C V"]
    fade: Float[Array, "B H"]
    top: Int[Array, "B"]
    end: Int[Array, "B"]


def _on_spans(chunk: int, slots: int, tokens: tuple, _: None, chain: Chain) -> tuple[Array, Recurrent]:
    q, k, v, log_decay, scales, positions, ids = tokens
    ids = jnp.zeros_like(positions) if ids is None else ids
    run = lambda state: log_linear(
        q, k, v, log_decay, scales, positions=positions, segment_ids=ids, chunk=chunk, state=state
    )
    empty = vary_alike((ids, Recurrent.empty(len(q), (slots, *q.shape[2:], v.shape[-1]))))[1]
    top = jnp.minimum(_bits((positions[:, -1] + 1) ^ positions[:, 0]), slots) - 1
    after = run(empty)[1]
    before = prefix(_joined, _Span(after.memory, jnp.exp(log_decay.sum(1)), top, after.segment_ids), chain)
    out, after = run(Recurrent(before.memory, before.end))
    return out, final(after, chain)


def _joined(early: _Span, late: _Span) -> _Span:
    same = early.end == late.end
    piece = jnp.arange(early.memory.shape[1])
    fade = jnp.where(same[:, None], late.fade, 0)
    memory = _united(early.memory, piece, late.top[:, None]) * fade[:, None, :, None, None] + late.memory
    return _Span(memory, early.fade * fade, jnp.maximum(early.top, late.top), late.end)


def _united(memory: Float[Array, "B n H C V"], piece: Int[Array, "n"], top: Int[Array, "B 1"]) -> Array:
    """Pieces up to `top` unite there; those above stay."""
    wide = lambda mask: mask[..., None, None, None]
    return jnp.where(wide(piece > top), memory, jnp.where(wide(piece == top), jnp.cumsum(memory, axis=1), 0))


@dataclass(frozen=True)
class _Grid:
    """What is static: 2**fine positions hold a chunk; pieces low..slots-1 exist; aligned chunks begin at its edges."""

    fine: int
    low: int
    slots: int
    aligned: bool
    exact: jax.lax.Precision | None

    def place(self, bit: Int[Array, "..."]) -> Int[Array, "..."]:
        """The piece for tokens that first differ in that bit."""
        return jnp.clip(bit, self.low, self.slots - 1)

    def einsum(self, formula: str, *arrays: Array) -> Array:
        return jnp.einsum(formula, *arrays, precision=self.exact)


class _Chunk(NamedTuple):
    """Tokens of a chunk; leading axes count chunks."""

    q: Float[Array, "*n B t H C"]
    k: Float[Array, "*n B t H C"]
    v: Float[Array, "*n B t H V"]
    log_decay: Float[Array, "*n B t H"]
    scales: Float[Array, "*n B t H L"]
    positions: Int[Array, "*n B t"]
    segment_ids: Int[Array, "*n B t"]


def _step(grid: _Grid, carry: Recurrent, x: _Chunk) -> tuple[Recurrent, Float[Array, "B t H V"]]:
    b = jnp.cumsum(x.log_decay, axis=1)
    # What passed before a document moves all its sums alike: only its own decays have a gradient.
    same = jnp.tril(x.segment_ids[:, :, None] == x.segment_ids[:, None, :])
    own = jnp.einsum("bij,bjh->bih", same.astype(b.dtype), x.log_decay, precision="highest")
    b = own + jax.lax.stop_gradient(b - own)
    level = _bits(x.positions[:, :, None] ^ x.positions[:, None, :])
    chosen = _chosen(grid, x, level)
    out = _inside(grid, x, b, chosen) + _from_pieces(grid, carry, x, b, level, chosen)
    return _next_pieces(grid, carry, x, b), out


def _chosen(grid: _Grid, x: _Chunk, level: Int[Array, "B t t"]) -> Float[Array, "B H t t"]:
    """scales_i at level(i, j): up to `fine` for pairs in one block, and one level for all that cross its edge."""
    L = x.scales.shape[-1]
    block = (x.positions[:, 0] >> grid.fine) + 1
    crossing = jnp.minimum(grid.fine + _bits(block ^ (block - 1)), L - 1)
    by_head = lambda a: jnp.moveaxis(a, -1, 1)[..., None]
    one = (jnp.arange(L) == crossing[:, None]).astype(jnp.float32)
    chosen = by_head(grid.einsum("bthl,bl->bth", x.scales, one))
    for n in range(grid.fine + 1):
        chosen = jnp.where((level == n)[:, None], by_head(x.scales[..., min(n, L - 1)]), chosen)
    return chosen


def _inside(grid: _Grid, x: _Chunk, b: Float[Array, "B t H"], chosen: Float[Array, "B H t t"]) -> Array:
    """What tokens of the chunk add to each other."""
    ids, rows = x.segment_ids, jnp.moveaxis(b, -1, 1)
    seen = (ids[:, :, None] == ids[:, None, :]) & jnp.tril(jnp.ones(chosen.shape[-2:], bool))
    decay = jnp.exp(jnp.where(seen[:, None], rows[..., :, None] - rows[..., None, :], -jnp.inf))
    scores = grid.einsum("bihc,bjhc->bhij", x.q, x.k) * chosen * decay
    return grid.einsum("bhij,bjhv->bihv", scores, x.v)


def _from_pieces(grid: _Grid, carry: Recurrent, x: _Chunk, b: Array, level: Array, chosen: Array) -> Array:
    """What the pieces add: each keeps its level until the position differs from the first in a higher bit."""
    old = x.segment_ids == carry.segment_ids[:, None]
    stays = jnp.arange(grid.low, grid.slots) + 1 >= level[:, :, :1]
    far = jnp.moveaxis(chosen[..., 0], 1, 2)[..., None]
    factor = jnp.where(stays[:, :, None], x.scales[..., grid.low + 1 : grid.slots + 1], far)
    factor = factor * jnp.exp(jnp.where(old[..., None], b, -jnp.inf))[..., None]
    return grid.einsum("bths,bthc,bshcv->bthv", factor, x.q, carry.memory)


def _next_pieces(grid: _Grid, carry: Recurrent, x: _Chunk, b: Float[Array, "B t H"]) -> Recurrent:
    """The pieces by the position after the chunk, of the last token's document."""
    piece = jnp.arange(grid.low, grid.slots)
    wide = lambda mask: mask[..., None, None, None]
    end, after = x.segment_ids[:, -1], x.positions[:, -1] + 1

    # Old pieces up to the highest bit that changed unite there; those above stay.
    kept = _united(carry.memory, piece, grid.place(_bits(after ^ x.positions[:, 0]) - 1)[:, None])
    left = jnp.exp(jnp.where((end == carry.segment_ids)[:, None], b[:, -1], -jnp.inf))
    memory = kept * left[:, None, :, None, None]

    # Tokens before the last edge share a piece; those behind it have one for each bit below.
    mine = (x.segment_ids == end[:, None])[..., None]
    k = x.k * jnp.exp(jnp.where(mine, b[:, -1:] - b, -jnp.inf))[..., None]
    beyond = x.positions >= (after >> grid.fine << grid.fine)[:, None]
    whole = grid.einsum("bthc,bthv->bhcv", jnp.where(beyond[..., None, None], 0, k), x.v)
    block = jnp.maximum(after >> grid.fine, 1)
    above = grid.place(grid.fine + _bits(block ^ (block - 1)) - 1)[:, None]
    memory += jnp.where(wide(piece == above), whole[:, None], 0)
    if not grid.aligned and grid.fine:
        below = min(grid.fine, grid.slots)
        bit = grid.place(_bits(after[:, None] ^ x.positions) - 1)
        into = ((bit[..., None] == piece[:below]) & beyond[..., None]).astype(jnp.float32)
        memory = memory.at[:, :below].add(grid.einsum("btn,bthc,bthv->bnhcv", into, k, x.v))
    return Recurrent(memory, end)


def _bits(x: Int[Array, "..."]) -> Int[Array, "..."]:
    """The number of bits of a non-negative integer; 0 has none."""
    return 32 - jax.lax.clz(x)

"""Log-linear attention: a linear recurrence whose past is kept in log T pieces, the older the longer."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.state import Recurrent
from jaxlong.core.types import BadInput
from jaxlong.ops.chunks import join, split
from jaxlong.ops.dense import precision


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
) -> tuple[Float[Array, "B T H V"], Recurrent]:
    """Linear attention with decay and a factor for each level of a Fenwick tree.

        o_i = sum_(j <= i) scales_i[level(i, j)] exp(b_i - b_j) (q_i . k_j) v_j,  b the cumulated log decay
        level(i, j) = bits(i xor j): 0 is j = i; level l holds the 2^(l-1) tokens before the last l - 1 bits of i,
        if bit l - 1 of i is 1

    By positions in their document, from 0. The last level also takes all that is farther. Memory: piece n is the sum
    of exp(b - b_j) k_j v_j over level n + 1 of the next position. Chunks are walked with the pieces as carry: inside
    one a matrix of scores by level, the rest is one product over all pieces. Tokens in one chunk lie at both sides of
    at most one multiple of it, so a chunk has log2(chunk) + 2 levels inside, wherever documents begin. Float32; the
    backward pass keeps the pieces at every sqrt(T / chunk)-th chunk and recomputes between.

    Args:
        segment_ids: documents; None is one document from position 0, which needs less work.
        chunk: a power of 2; the result does not depend on it.
        state: `Recurrent.empty(B, (slots_for(L, max_len), H, C, V))` or what a call returned.

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
    exact = precision(q.dtype)
    size = min(chunk, T)
    fine = (size - 1).bit_length()  # levels inside a block of positions that holds a chunk
    aligned = segment_ids is None and state is None
    slots = slots_for(L, T) if state is None else state.memory.shape[1]
    low = min(fine, slots - 1) if aligned else 0  # aligned chunks leave the pieces below empty
    carry = Recurrent.empty(B, (slots - low, H, C, V)) if state is None else state
    ids = jnp.zeros_like(positions) if segment_ids is None else segment_ids

    group = math.isqrt(-(-T // size))
    blank = [(0, 0), (0, -T % (size * group))]
    floats = (x.astype(jnp.float32) for x in (q, k, v, log_decay, scales))
    arrays = [jnp.pad(x, blank + [(0, 0)] * (x.ndim - 2)) for x in floats]
    arrays += [jnp.pad(x, blank, mode="edge") for x in (positions, ids)]  # what pads repeats the last token without k
    cells = tuple(x.reshape(-1, group, *x.shape[1:]) for x in (split(x, size) for x in arrays))

    def levels_inside(scales, pos):
        """level(i, j) of a chunk, and scales_i at it [B H n n]: up to `fine`, or the one that a crossing has."""
        block = (pos[:, 0] >> fine) + 1
        crossing = jnp.minimum(fine + _bits(block ^ (block - 1)), L - 1)
        one = jnp.arange(L) == crossing[:, None]
        level = _bits(pos[:, :, None] ^ pos[:, None, :])
        by_head = lambda x: jnp.moveaxis(x, -1, 1)[..., None]
        chosen = by_head(jnp.einsum("bnhl,bl->bnh", scales, one.astype(jnp.float32), precision=exact))
        for n in range(fine + 1):
            chosen = jnp.where((level == n)[:, None], by_head(scales[..., min(n, L - 1)]), chosen)
        return level, chosen

    def cell(carry: Recurrent, tokens):
        q, k, v, g, scales, pos, ids = tokens
        n = pos.shape[1]
        b = jnp.cumsum(g, axis=1)
        level, chosen = levels_inside(scales, pos)
        seen = (ids[:, :, None] == ids[:, None, :]) & jnp.tril(jnp.ones((n, n), bool))
        rows = jnp.moveaxis(b, -1, 1)
        decay = jnp.exp(jnp.where(seen[:, None], rows[..., :, None] - rows[..., None, :], -jnp.inf))
        scores = jnp.einsum("bihc,bjhc->bhij", q, k, precision=exact) * chosen * decay
        out = jnp.einsum("bhij,bjhv->bihv", scores, v, precision=exact)

        # A piece keeps its level until the position differs from the chunk's first one in a higher bit.
        old = ids == carry.segment_ids[:, None]
        piece = jnp.arange(low, slots)
        stays = piece + 1 >= level[:, :, :1]
        far = jnp.moveaxis(chosen[..., 0], 1, 2)[..., None]
        factor = jnp.where(stays[:, :, None], scales[..., low + 1 : slots + 1], far)
        factor = factor * jnp.exp(jnp.where(old[..., None], b, -jnp.inf))[..., None]
        out += jnp.einsum("bnhs,bnhc,bshcv->bnhv", factor, q, carry.memory, precision=exact)

        # The pieces of the next position: old ones below the highest bit that changed unite there.
        end, after = ids[:, -1], pos[:, -1] + 1
        place = lambda bit: jnp.clip(bit, low, slots - 1)
        spread = lambda mask: mask[..., None, None, None]
        top = place(_bits(after ^ pos[:, 0]) - 1)[:, None]
        united = jnp.where(spread(piece == top), jnp.cumsum(carry.memory, axis=1), 0)
        kept = jnp.where(spread(piece > top), carry.memory, united)
        left = jnp.exp(jnp.where((end == carry.segment_ids)[:, None], b[:, -1], -jnp.inf))
        memory = kept * left[:, None, :, None, None]

        mine = ids == end[:, None]
        k = k * jnp.exp(jnp.where(mine[..., None], b[:, -1:] - b, -jnp.inf))[..., None]
        edge = after >> fine << fine
        beyond = pos >= edge[:, None]
        whole = jnp.einsum("bnhc,bnhv->bhcv", jnp.where(beyond[..., None, None], 0, k), v, precision=exact)
        block = jnp.maximum(after >> fine, 1)
        above = place(fine + _bits(block ^ (block - 1)) - 1)[:, None]
        memory += jnp.where(spread(piece == above), whole[:, None], 0)
        if not aligned and fine:
            bit = place(_bits(after[:, None] ^ pos) - 1)
            into = ((bit[..., None] == piece) & beyond[..., None]).astype(jnp.float32)[..., : min(fine, slots)]
            parts = jnp.einsum("bns,bnhc,bnhv->bshcv", into, k, v, precision=exact)
            memory += jnp.pad(parts, [(0, 0), (0, slots - parts.shape[1])] + [(0, 0)] * 3)
        return Recurrent(memory, end), out

    carry, out = jax.lax.scan(jax.checkpoint(lambda carry, tokens: jax.lax.scan(cell, carry, tokens)), carry, cells)
    return join(out.reshape(-1, *out.shape[2:]), T), carry


def _bits(x: Int[Array, "..."]) -> Int[Array, "..."]:
    """The number of bits of a non-negative integer; 0 has none."""
    return 32 - jax.lax.clz(x)

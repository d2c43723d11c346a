"""What chunk-parallel recurrences share: documents as masks, chunks as an axis, decays without overflow."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int


def starts(segment_ids: Int[Array, "B T"], last: Int[Array, "B"] | None = None) -> Bool[Array, "B T"]:
    """True at the first token of a document; `last` is the segment of the token before these (None: none was)."""
    first = jnp.ones_like(segment_ids[:, :1], bool) if last is None else (segment_ids[:, 0] != last)[:, None]
    return jnp.concatenate([first, segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)


def split(x: Array, chunk: int) -> Array:
    """`[B, T, ...] -> [N, B, chunk, ...]`, the last chunk padded with zeros."""
    batch, length = x.shape[:2]
    count = -(-length // chunk)
    x = jnp.pad(x, [(0, 0), (0, count * chunk - length)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(batch, count, chunk, *x.shape[2:]), 1, 0)


def join(x: Array, length: int) -> Array:
    """`[N, B, chunk, ...] -> [B, length, ...]`, the inverse of `split`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def decayed_scores(
    q: Float[Array, "*B C K"], k: Float[Array, "*B C K"], b: Float[Array, "*B C K"], *, block: int = 16
) -> Float[Array, "*B C C"]:
    """A_ij = sum_c q_ic k_jc exp(b_ic - b_jc) for j <= i, and 0 above the diagonal, for decays of any strength.

    Splitting exp(b_i - b_j) into exp(b_i) exp(-b_j) overflows once a chunk decays by e^-88. Here pairs in
    different blocks of rows split at the first row r of i's block, exp(b_i - b_r) exp(b_r - b_j), where both
    factors are at most 1; pairs in one block keep their difference.

    Args:
        b: cumulated log decays, non-increasing along C.
        block: rows a block.
    """
    length, block = q.shape[-2], min(block, q.shape[-2])
    count = -(-length // block)
    pad = [(0, 0)] * (q.ndim - 2) + [(0, count * block - length), (0, 0)]
    blocks = lambda x, mode: jnp.pad(x, pad, mode=mode).reshape(*x.shape[:-2], count, block, x.shape[-1])
    q, k, b = blocks(q, "constant"), blocks(k, "constant"), blocks(b, "edge")

    lower = jnp.tril(jnp.ones((block, block), bool))[..., None]
    decay = jnp.exp(jnp.where(lower, b[..., :, None, :] - b[..., None, :, :], -jnp.inf))
    own = jnp.einsum("...ic,...jc,...ijc->...ij", q, k, decay)
    if count == 1:
        return own[..., 0, :length, :length]
    row = b[..., :1, :]
    before = jnp.tril(jnp.ones((count, count), bool), -1)[..., None, None]
    rest = jnp.exp(jnp.where(before, row[..., :, None, :, :] - b[..., None, :, :, :], -jnp.inf))
    scores = jnp.einsum("...mic,...njc,...mnjc->...minj", q * jnp.exp(b - row), k, rest)
    scores += own[..., None, :] * jnp.eye(count)[:, None, :, None]
    return scores.reshape(*scores.shape[:-4], count * block, count * block)[..., :length, :length]

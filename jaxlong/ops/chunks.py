"""What chunk-parallel recurrences share: documents as masks, chunks as an axis, decays without overflow."""

from __future__ import annotations

import jax
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
    q: Float[Array, "*B C K"], k: Float[Array, "*B C K"], b: Float[Array, "*B C K"]
) -> Float[Array, "*B C C"]:
    """A_ij = sum_c q_ic k_jc exp(b_ic - b_jc) for j <= i, and 0 above the diagonal, for decays of any strength.

    Splitting exp(b_i - b_j) into exp(b_i) exp(-b_j) overflows once a chunk decays by e^-88. Here the rows are
    halved again and again: a pair that a cut at row r separates is split there, exp(b_i - b_r) exp(b_r - b_j),
    where both factors are at most 1. That is one matrix product and one exp an element at each level.

    Args:
        b: cumulated log decays, finite and non-increasing along C.
    """
    length = q.shape[-2]
    pad = [(0, 0)] * (q.ndim - 2) + [(0, _power_of_two(length) - length), (0, 0)]
    q, k, b = jnp.pad(q, pad), jnp.pad(k, pad), jnp.pad(b, pad, mode="edge")
    return _scores(q, k, b)[..., :length, :length]


def _power_of_two(length: int) -> int:
    """The least power of two that is at least `length`."""
    return 1 << (length - 1).bit_length()


def _halving(q: Array, k: Array, b: Array) -> Array:
    """The scores of a power of two of rows: blocks on the diagonal grow from one row to all."""
    scores = jnp.sum(q * k, axis=-1)[..., None, None]  # [... C 1 1]
    rows = 1
    while rows < q.shape[-2]:
        halves = lambda x, r=rows: jnp.moveaxis(x.reshape(*x.shape[:-2], -1, 2, r, x.shape[-1]), -3, 0)
        first = halves(b)[1][..., :1, :]
        late = halves(q)[1] * jnp.exp(halves(b)[1] - first)
        early = halves(k)[0] * jnp.exp(first - halves(b)[0])
        across = jnp.einsum("...ic,...jc->...ij", late, early)
        top = jnp.concatenate([scores[..., 0::2, :, :], jnp.zeros_like(across)], axis=-1)
        scores = jnp.concatenate([top, jnp.concatenate([across, scores[..., 1::2, :, :]], axis=-1)], axis=-2)
        rows *= 2
    return scores[..., 0, :, :]


def _scores_forward(q: Array, k: Array, b: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _halving(q, k, b), (q, k, b)


def _scores_backward(saved: tuple[Array, Array, Array], d_scores: Array) -> tuple[Array, Array, Array]:
    """b stands beside q as exp(b_i) and beside k as exp(-b_j), so its gradient is q dq - k dk."""
    q, k, b = saved
    _, pull = jax.vjp(lambda q, k: _halving(q, k, b), q, k)
    dq, dk = pull(d_scores)
    return dq, dk, q * dq - k * dk


_scores = jax.custom_vjp(_halving)
_scores.defvjp(_scores_forward, _scores_backward)

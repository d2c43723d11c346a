"""What chunk-parallel recurrences share: documents as masks, chunks as an axis, decays without overflow."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxlong.core.state import EMPTY
from jaxlong.ops.attend import Backend
from jaxlong.parallel.prefix import earlier
from jaxlong.parallel.rows import over_spans, spread


def starts(
    segment_ids: Int[Array, "B T"], last: Int[Array, "B"] | None = None, *, backend: Backend = Backend()
) -> Bool[Array, "B T"]:
    """True at the first token of a document.

    Args:
        last: the segment of the token before these (None: there was none).
        backend: its layout says how rows lie on the devices of a mesh.
    """
    if last is None and spread(segment_ids.shape[1], backend.layout):
        after = lambda ids, _, chain: (starts(ids, earlier(ids[:, -1] - EMPTY, 1, chain) + EMPTY), None)
        return over_spans(after, segment_ids, None, layout=backend.layout)[0]
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


class Documents(NamedTuple):
    """Documents as masks in a chunk of C tokens.

    A token's document index is the count of resets in the chunk up to it: pairs interact where their indices are equal,
    the state at the chunk's entry is seen where the index is 0, and the state at its exit keeps the tokens whose index
    is the last one's.
    """

    pairs: Bool[Array, "*B C C"]  # j <= i in i's document
    old: Bool[Array, "*B C"]  # tokens that continue the entry state
    last: Bool[Array, "*B C"]  # tokens in the exit state
    several: bool  # whether a token may start a document

    @classmethod
    def of(cls, resets: Bool[Array, "*B C"] | None, length: int) -> Documents:
        """Masks of one row for all where no token starts a document."""
        index = jnp.zeros((1, length), jnp.int32) if resets is None else jnp.cumsum(resets, axis=-1)
        pairs = jnp.tril(index[..., :, None] == index[..., None, :])
        return cls(pairs, index == 0, index == index[..., -1:], resets is not None)


def gated_scores(
    q: Float[Array, "*B C K"],
    k: Float[Array, "*B C K"],
    log_decay: Float[Array, "*B C K"],
    pairs: Bool[Array, "*#B C C"] | None = None,
) -> Float[Array, "*B C C"]:
    """A_ij = sum_c q_ic k_jc exp(sum of log_decay_lc over j < l <= i) for pairs (i, j), and 0 elsewhere.

    Splitting the decay at the chunk's first row, exp(b_i) exp(-b_j) with cumulated b, overflows once a chunk
    decays by e^-88. Here the rows are halved again and again: a pair that a cut separates is split there, and
    both factors are at most 1. That is one matrix product and one exp an element at each level, with sums that
    start at the cut and so keep their digits.

    Args:
        log_decay: finite, at most 0.
        pairs: rows i and j <= i of one document; None is all j <= i.
    """
    return all_scores(q[..., None, :, :], k[..., None, :, :], log_decay, pairs)[..., 0, 0, :, :]


def all_scores(
    q: Float[Array, "*B P C K"],
    k: Float[Array, "*B R C K"],
    log_decay: Float[Array, "*B C K"],
    pairs: Bool[Array, "*#B C C"] | None = None,
) -> Float[Array, "*B P R C C"]:
    """`gated_scores` of P kinds of queries with R kinds of keys under the same decays, as larger matrix products."""
    pairs = jnp.tril(jnp.ones((q.shape[-2], q.shape[-2]), bool)) if pairs is None else pairs
    return _scores(q, k, log_decay, pairs)


def decay_matrix(
    log_decay: Float[Array, "*B C"], pairs: Bool[Array, "*#B C C"] | None = None
) -> Float[Array, "*B C C"]:
    """exp(sum of log_decay_l over j < l <= i) for pairs (i, j), and 0 elsewhere; as `gated_scores`."""
    one = jnp.ones_like(log_decay)[..., None]
    return gated_scores(one, one, log_decay[..., None], pairs)


def cumulated(x: Float[Array, "*B C K"], *, reverse: bool = False) -> Float[Array, "*B C K"]:
    """Sums over the rows of a chunk up to each, itself included, or from each on; as a product of matrices."""
    ones = jnp.ones((x.shape[-2], x.shape[-2]), bool)
    return summed(jnp.triu(ones) if reverse else jnp.tril(ones), x)


def summed(rows: Bool[Array, "*#B C C"], x: Float[Array, "*B C K"]) -> Float[Array, "*B C K"]:
    """Row i of the result is the sum of the rows j of x with rows_ij."""
    weights = jnp.broadcast_to(rows, (*x.shape[:-1], x.shape[-2])).astype(x.dtype)  # one a matrix: x is not transposed
    return jnp.matmul(weights, x, precision="highest")


def power_of_two(length: int) -> int:
    """The least power of two that is at least `length`."""
    return 1 << (length - 1).bit_length()


def corner(first: Array, below: Array, second: Array) -> Array:
    """[[first, 0], [below, second]] of matrices `[... R R]`."""
    top = jnp.concatenate([first, jnp.zeros_like(below)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([below, second], axis=-1)], axis=-2)


def _masked_scores(q: Array, k: Array, log_decay: Array, pairs: Array) -> Array:
    """Blocks on the diagonal grow from one row to all, of which there is a power of two."""
    length = q.shape[-2]
    pad = lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, power_of_two(length) - length), (0, 0)])
    q, k, log_decay = pad(q), pad(k), pad(log_decay)
    blocks = lambda x, rows: x.reshape(*x.shape[:-2], -1, rows, x.shape[-1])
    scores = jnp.einsum("...pic,...ric->...pri", q, k)[..., None, None]
    until, after = blocks(log_decay, 1), blocks(jnp.zeros_like(log_decay), 1)  # sums in a block to and from a row
    rows = 1
    while rows < q.shape[-2]:
        (until, late), (early, after) = ((x[..., 0::2, :, :], x[..., 1::2, :, :]) for x in (until, after))
        later = blocks(q, rows)[..., 1::2, :, :] * jnp.exp(late)[..., None, :, :, :]
        earlier = blocks(k, rows)[..., 0::2, :, :] * jnp.exp(early)[..., None, :, :, :]
        below = jnp.einsum("...pnic,...rnjc->...prnij", later, earlier)
        scores = corner(scores[..., 0::2, :, :], below, scores[..., 1::2, :, :])
        first, second = until[..., -1:, :], late[..., -1:, :]
        until = jnp.concatenate([until, first + late], axis=-2)
        after = jnp.concatenate([early + second, after], axis=-2)
        rows *= 2
    return jnp.where(pairs[..., None, None, :, :], scores[..., 0, :length, :length], 0)


def _scores_forward(q: Array, k: Array, log_decay: Array, pairs: Array) -> tuple[Array, tuple[Array, ...]]:
    return _masked_scores(q, k, log_decay, pairs), (q, k, log_decay, pairs)


def _scores_backward(saved: tuple[Array, ...], d_scores: Array) -> tuple[Array, Array, Array, None]:
    """A decay acts on later q and on earlier k, so its gradient sums q dq - k dk over its document, from its row on.

    The diagonal, on which no decay acts, would only add rounding errors to that difference.
    """
    q, k, log_decay, pairs = saved
    _, pull = jax.vjp(lambda q, k: _masked_scores(q, k, log_decay, pairs), q, k)
    dq, dk = pull(jnp.tril(d_scores, -1))
    d_decay = summed(jnp.swapaxes(pairs, -1, -2), (q * dq).sum(-3) - (k * dk).sum(-3))
    own = jnp.diagonal(jnp.where(pairs[..., None, None, :, :], d_scores, 0), axis1=-2, axis2=-1)
    dq += jnp.einsum("...pri,...ric->...pic", own, k)
    return dq, dk + jnp.einsum("...pri,...pic->...ric", own, q), d_decay, None


_scores = jax.custom_vjp(_masked_scores)
_scores.defvjp(_scores_forward, _scores_backward)

"""The delta rule as five steps over chunks, whoever runs them, and its gradient."""

from __future__ import annotations

import functools
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.delta.chunk import CHUNK, LEAST_BETA


class Tokens(NamedTuple):
    """Of a whole number of chunks."""

    q: Array  # [B T H K]
    k: Array  # [B T H K]
    v: Array  # [B T H V]
    g: Array  # [B T H K] log decays, float32, 0 where a document begins; steps take what is below LEAST as LEAST


class Rows(NamedTuple):
    """One number a token, float32."""

    beta: Array  # [B H T] at least LEAST_BETA
    document: Array | None  # [B T] documents begun in the token's chunk up to it; None: none
    enter: Array | None  # [B T] 1 where no document has begun in the chunk up to the token, else 0
    leave: Array | None  # [B T] 1 where none begins in the chunk after it, else 0


class Chunks(NamedTuple):
    """What chunks do with the state S `[V K]` at their entry.

    p = u + S w^T;   o = read S^T + scores p^T;   S becomes S keep + p write
    """

    w: Array  # [B H N C K]
    u: Array  # [B H N V C]
    scores: Array  # [B H N C C]
    read: Array  # [B H N C K]
    write: Array  # [B H N C K]
    keep: Array  # [B H N K] float32
    solve: Array | None  # [B H N C C] (I + A)^-1 diag(beta), for gradients


class Gradients(NamedTuple):
    """Of `Tokens` and of beta `[B H T]`."""

    q: Array
    k: Array
    v: Array
    g: Array
    beta: Array


@runtime_checkable
class Steps(Protocol):
    """The module `twin`, or a `gpu.Kernels`."""

    def intra(self, tokens: Tokens, rows: Rows) -> Chunks: ...

    def states(self, chunks: Chunks, s0: Array) -> tuple[Array, Array, Array]: ...

    def outputs(self, chunks: Chunks, entries: Array, p: Array) -> Array: ...

    def reverse(self, chunks: Chunks, do: Array, ds: Array) -> tuple[Array, Array, Array]: ...

    def gradients(
        self, tokens: Tokens, rows: Rows, chunks: Chunks, entries: Array, p: Array, exits: Array, dp: Array, do: Array
    ) -> Gradients: ...


def chunked(
    steps: Steps,
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    beta: Array,
    s0: Array | None = None,
    resets: Array | None = None,
) -> tuple[Array, Array]:
    """The arguments and results of `ref.reference`, by `steps`; differentiable in all but resets."""
    (batch, length, heads, key_dim), value_dim = k.shape, v.shape[-1]
    g = log_decay.astype(jnp.float32)
    g = jnp.broadcast_to(g if g.ndim == 4 else g[..., None], k.shape)
    documents = (None, None, None)
    if resets is not None:
        g = jnp.where(resets[:, :, None, None], 0, g)
        document = _padded(resets, 1).reshape(batch, -1, CHUNK)
        document = jnp.cumsum(document, axis=-1, dtype=jnp.float32)
        documents = (document, document == 0, document == document[..., -1:])
        documents = tuple(x.astype(jnp.float32).reshape(batch, -1) for x in documents)
    strength = jnp.maximum(jnp.moveaxis(_padded(beta.astype(jnp.float32), 1), 1, 2), LEAST_BETA)
    tokens = Tokens(*(_padded(x, 1) for x in (q, k, v, g)))
    s0 = jnp.zeros((batch, heads, key_dim, value_dim)) if s0 is None else s0.astype(jnp.float32)
    o, s = _rule(steps, tokens, Rows(strength, *documents), jnp.swapaxes(s0, -1, -2))
    return o[:, :length], jnp.swapaxes(s, -1, -2)


def _padded(x: Array, axis: int) -> Array:
    """With zeros up to a whole number of chunks: tokens that change no state."""
    return jnp.pad(x, [(0, -x.shape[axis] % CHUNK if i == axis else 0) for i in range(x.ndim)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rule(steps: Steps, tokens: Tokens, rows: Rows, s0: Array) -> tuple[Array, Array]:
    chunks = steps.intra(tokens, rows)
    entries, p, s = steps.states(chunks, s0)
    return steps.outputs(chunks, entries, p), s


def _forward(steps: Steps, tokens: Tokens, rows: Rows, s0: Array) -> tuple[tuple[Array, Array], tuple]:
    return _rule(steps, tokens, rows, s0), (tokens, rows, s0)


def _backward(steps: Steps, saved: tuple[Tokens, Rows, Array], cotangents: tuple[Array, Array]) -> tuple:
    """The tokens are all that is kept: chunks and states come again, then a pass against the order of time."""
    (tokens, rows, s0), (do, ds) = saved, cotangents
    chunks = steps.intra(tokens, rows)
    entries, p, _ = steps.states(chunks, s0)
    exits, dp, ds0 = steps.reverse(chunks, do, ds)
    found = steps.gradients(tokens, rows, chunks, entries, p, exits, dp, do)
    return Tokens(*found[:4]), Rows(found.beta, *jax.tree.map(jnp.zeros_like, rows[1:])), ds0


_rule.defvjp(_forward, _backward)

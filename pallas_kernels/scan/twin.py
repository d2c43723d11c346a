"""The kernels' algorithm in plain jax.numpy: the same blocks and the same order, token by token within a block."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.scan.step import Token, advance, read, retreat

BLOCK = 128
"""Tokens of a block: the state at its entry is all that is kept from forward to backward."""


def scan(
    x: Array,
    dt: Array,
    a: Array,
    b: Array,
    c: Array,
    d: Array,
    h0: Array | None = None,
    resets: Array | None = None,
) -> tuple[Array, Array]:
    """The results of `ref.reference`, differentiable in all but resets."""
    (batch, length, width), states = x.shape, a.shape[1]
    h0 = jnp.zeros((batch, width, states)) if h0 is None else h0.astype(jnp.float32)
    column = lambda array: jnp.swapaxes(_blocks(array), -1, -2)
    keeps = None if resets is None else 1.0 - _blocks(resets[..., None])
    tokens = Token(_blocks(x), _blocks(dt), column(b), column(c), keeps)
    run = jax.vmap(_row, in_axes=(0, None, None, 0))
    y, h = run(tokens, a.astype(jnp.float32).T, d.astype(jnp.float32)[None], jnp.swapaxes(h0, 1, 2))
    return y.reshape(batch, -1, width)[:, :length].astype(x.dtype), jnp.swapaxes(h, 1, 2)


def _blocks(array: Array) -> Array:
    """`[B T D] -> [B M R 1 D]`, float32; what is added changes no state."""
    array = jnp.pad(array.astype(jnp.float32), [(0, 0), (0, -array.shape[1] % BLOCK), (0, 0)])
    return array.reshape(array.shape[0], -1, BLOCK, 1, array.shape[2])


@jax.custom_vjp
def _row(tokens: Token, a: Array, d: Array, h: Array) -> tuple[Array, Array]:
    """y `[M R 1 D]` and the last state `[N D]` of one row."""
    (y, h), _ = _row_forward(tokens, a, d, h)
    return y, h


def _row_forward(tokens: Token, a: Array, d: Array, h: Array) -> tuple[tuple[Array, Array], tuple]:
    def block(h: Array, tokens: Token) -> tuple[Array, tuple[Array, Array]]:
        after, states = _states(tokens, a, h)
        return after, (h, jax.vmap(read, in_axes=(0, None, 0))(tokens, d, states))

    last, (entries, y) = jax.lax.scan(block, h, tokens)
    return (y, last), (tokens, a, d, entries)


def _row_backward(kept: tuple, cotangents: tuple[Array, Array]) -> tuple[Token, Array, Array, Array]:
    tokens, a, d, entries = kept
    dy, dh = cotangents

    def block(carry: tuple, block: tuple) -> tuple[tuple, Token]:
        tokens, entry, dy = block
        states = _states(tokens, a, entry)[1]
        before = jnp.concatenate([entry[None], states[:-1]])

        def step(carry: tuple, token: tuple) -> tuple[tuple, Token]:
            dh, da, dd = carry
            token, before, after, dy = token
            dh, of = retreat(token, a, d, before, after, dy, dh)
            keeps = None if token.keeps is None else jnp.zeros_like(token.keeps)
            return (dh, da + of.a, dd + of.d), Token(*of[:4], keeps)

        return jax.lax.scan(step, carry, (tokens, before, states, dy), reverse=True)

    start = (dh, jnp.zeros_like(a), jnp.zeros_like(d))
    (dh, da, dd), found = jax.lax.scan(block, start, (tokens, entries, dy), reverse=True)
    return found, da, dd, dh


_row.defvjp(_row_forward, _row_backward)


def _states(tokens: Token, a: Array, h: Array) -> tuple[Array, Array]:
    """The state after a block, and after each of its tokens."""

    def step(h: Array, token: Token) -> tuple[Array, Array]:
        h = advance(token, a, h)
        return h, h

    return jax.lax.scan(step, h, tokens)

"""One token forward and backward, which the kernels and their twin share: states `[N D]`, channels last."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class Token(NamedTuple):
    """A token of one row, float32."""

    x: Array  # [1 D]
    dt: Array  # [1 D]
    b: Array  # [N 1]
    c: Array  # [N 1]
    keeps: Array | None  # [1 1] 0 where a document begins, else 1; None: 1


class Gradient(NamedTuple):
    """Of a token, and what it adds to those of all."""

    x: Array  # [1 D]
    dt: Array  # [1 D]
    b: Array  # [N 1]
    c: Array  # [N 1]
    a: Array  # [N D]
    d: Array  # [1 D]


def advance(token: Token, a: Array, h: Array) -> Array:
    """The state after a token; a `[N D]`."""
    return _decay(token, a) * h + (token.dt * token.x) * token.b


def read(token: Token, d: Array, h: Array) -> Array:
    """y `[1 D]`, from the state after the token; d `[1 D]`."""
    return (h * token.c).sum(0, keepdims=True) + d * token.x


def retreat(
    token: Token, a: Array, d: Array, before: Array, after: Array, dy: Array, dh: Array
) -> tuple[Array, Gradient]:
    """The gradient of the state before a token and its own, from dy `[1 D]` and that of the state after it."""
    dh = dh + dy * token.c
    decay = _decay(token, a)
    d_exponent = dh * before * decay
    du = (dh * token.b).sum(0, keepdims=True)
    return dh * decay, Gradient(
        x=du * token.dt + d * dy,
        dt=du * token.x + (d_exponent * a).sum(0, keepdims=True),
        b=(dh * (token.dt * token.x)).sum(1, keepdims=True),
        c=(after * dy).sum(1, keepdims=True),
        a=d_exponent * token.dt,
        d=dy * token.x,
    )


def _decay(token: Token, a: Array) -> Array:
    decay = jnp.exp(token.dt * a)
    return decay if token.keeps is None else decay * token.keeps

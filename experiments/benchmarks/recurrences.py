"""Recurrences one token at a time: what the chunked forms are timed against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

HEADS, DIM = 4, 64


class Rival(NamedTuple):
    """A recurrence over tokens and the chunked form of the same, both (inputs...) -> outputs [B T H V]."""

    inputs: Callable[[int], tuple]
    tokens: Callable[..., Any]
    chunked: Callable[..., Any]


def rivals() -> dict[str, Rival]:
    """By name of the mixer whose core it is."""
    import jax.numpy as jnp

    from jaxlong.ops.delta import delta_rule, generalized_delta_rule
    from jaxlong.ops.scan import linear_attention

    def delta(s, q, k, v, g, beta):
        s = jnp.exp(g)[..., None] * s
        s = s + beta[..., None, None] * k[..., None] * (v - read(s, k))[..., None, :]
        return s, read(s, q)

    def generalized(s, r, k, v, g, a, b):
        s = jnp.exp(g)[..., None] * s + b[..., None] * read(s, a)[..., None, :] + k[..., None] * v[..., None, :]
        return s, read(s, r)

    def linear(s, q, k, v, g):
        s = jnp.exp(g)[..., None, None] * s + k[..., None] * v[..., None, :]
        return s, read(s, q)

    read = lambda s, q: jnp.einsum("bhkv,bhk->bhv", s, q)
    by_channel = lambda g: jnp.broadcast_to(g[..., None], (*g.shape, DIM))
    return {
        "kda": Rival(_kda, over_tokens(delta), lambda *xs: delta_rule(*xs)[0]),
        "gated_delta_net": Rival(
            _gated_delta_net,
            over_tokens(lambda s, q, k, v, g, beta: delta(s, q, k, v, by_channel(g), beta)),
            lambda *xs: delta_rule(*xs)[0],
        ),
        "mamba2": Rival(_mamba2, over_tokens(linear), lambda *xs: linear_attention(*xs)[0]),
        "rwkv7": Rival(_rwkv7, over_tokens(generalized), lambda *xs: generalized_delta_rule(*xs)[0]),
    }


def over_tokens(step: Callable[..., tuple[Any, Any]]) -> Callable[..., Any]:
    """A scan of `step(state, token's inputs...) -> (state, output)` over arrays [B T H ...]."""
    import jax
    import jax.numpy as jnp

    def run(*arrays):
        first = lambda x: jnp.moveaxis(x, 1, 0)
        s0 = jnp.zeros((arrays[0].shape[0], HEADS, DIM, DIM))
        _, o = jax.lax.scan(lambda s, xs: step(s, *xs), s0, tuple(map(first, arrays)))
        return jnp.moveaxis(o, 0, 1)

    return run


def _normal(length: int, count: int, dim: int | None = DIM) -> list:
    import jax

    shape = (1, length, HEADS) if dim is None else (1, length, HEADS, dim)
    return [jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), count)]


def _unit(x):
    import jax.numpy as jnp

    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _qkv(length: int) -> tuple:
    q, k, v = _normal(length, 3)
    return _unit(q), _unit(k), v


def _gates(length: int, dim: int | None = None):
    """Log decays of 0.97 a token on average."""
    import jax

    return -0.03 * jax.nn.softplus(_normal(length, 1, dim)[0])


def _kda(length: int) -> tuple:
    import jax

    return *_qkv(length), _gates(length, DIM), jax.nn.sigmoid(_normal(length, 2, None)[1])


def _gated_delta_net(length: int) -> tuple:
    import jax

    return *_qkv(length), _gates(length), jax.nn.sigmoid(_normal(length, 2, None)[1])


def _mamba2(length: int) -> tuple:
    return *_qkv(length), _gates(length)


def _rwkv7(length: int) -> tuple:
    q, k, v = _qkv(length)
    return q, k, v, _gates(length, DIM), -k, 0.5 * k

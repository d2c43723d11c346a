"""Blockwise feed-forward: a token-wise function over a long sequence, a block of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Shaped

from jaxlong.parallel.manual import auto_mesh, vary_alike
from jaxlong.parallel.tokens import gathered, token_map


def feed_forward(
    fn: Callable[[Any, Float[Array, "B b D"]], Float[Array, "B b E"]],
    weights: Any,
    x: Float[Array, "B T D"],
    *,
    block: int,
    names: Any = None,
) -> Float[Array, "B T E"]:
    """`fn(weights, x)` for a token-wise `fn`, with its inner activations held for one block of tokens only.

    Blockwise parallel transformer (Liu and Abbeel 2023), section 3. Every block is computed again in the backward
    pass, so the memory of a wide hidden layer is that of `block` tokens of each row instead of T.

    Under a mesh (`jax.set_mesh`) a device takes blocks of its own tokens. It gathers the weights in the dtype of x
    first, and their gradients, summed over all blocks in float32, cross devices once.

    Args:
        fn: a pure function that treats each token alone.
        weights: its parameters, a tree of arrays.
        block: tokens of a row to handle at once on a device, at least 1; any length works.
        names: a PartitionSpec of logical names for each weight, by which it lies over the mesh; None is whole everywhere.
    """
    if names is None:
        names = jax.tree.map(lambda w: P(*(None,) * w.ndim), weights)

    def local(x, parts, held):
        x, parts = vary_alike((x, parts))
        whole = jax.tree.map(lambda w, place: gathered(place, x.dtype, w), parts, held)
        T = x.shape[1]
        return join(lax.map(jax.checkpoint(lambda tokens: fn(whole, tokens)), split(x, block)), T)

    return token_map(local, x, weights, names, mesh=auto_mesh())


def split(x: Shaped[Array, "B T *rest"], block: int, *, fill: float | None = None) -> Shaped[Array, "n B m *rest"]:
    """Cuts T into n blocks of m <= `block` tokens, n apart: block j holds tokens j, j + n, j + 2n, ...

    Blocks of neighbours would belong to one device each where T is sharded, and a loop over them would leave the
    others waiting for its data. Strided blocks hold an equal part of every device's tokens: nothing moves.
    The end is padded with `fill`, or else with copies of the last token: zeros can be worse than any token (the
    gradient of a norm).
    """
    B, T, *rest = x.shape
    n = -(-T // block)
    if T % n:
        pad = [(0, 0), (0, -T % n)] + [(0, 0)] * len(rest)
        x = jnp.pad(x, pad, mode="edge") if fill is None else jnp.pad(x, pad, constant_values=fill)
    return jnp.moveaxis(x.reshape(B, -1, n, *rest), 2, 0)


def join(blocks: Shaped[Array, "n B m *rest"], length: int) -> Shaped[Array, "B T *rest"]:
    """The inverse of `split`."""
    n, B, m, *rest = blocks.shape
    whole = jnp.moveaxis(blocks, 0, 2).reshape(B, m * n, *rest)
    return whole if length == m * n else whole[:, :length]

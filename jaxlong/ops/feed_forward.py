"""Functions of single tokens over a long sequence, a block of tokens at a time."""

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
        names: a PartitionSpec of logical names for each weight, by which it lies over the mesh; None: nowhere in parts.
    """
    if names is None:
        names = jax.tree.map(lambda w: P(*(None,) * w.ndim), weights)

    def local(x, parts, held):
        x, parts = vary_alike((x, parts))
        whole = jax.tree.map(lambda w, place: gathered(place, x.dtype, w), parts, held)
        T = x.shape[1]
        return join(lax.map(jax.checkpoint(lambda tokens: fn(whole, tokens)), split(x, block)), T)

    return token_map(local, x, weights, names, mesh=auto_mesh())


def by_queries(
    fn: Callable[[Any], Float[Array, "B b D"]], rows: Any, *, block: int, policy: Callable | None = None
) -> Float[Array, "B T D"]:
    """`fn(rows)` for a function of queries, a block of neighbouring tokens at a time.

    Blockwise parallel transformer (Liu and Abbeel, arXiv 2305.19370, algorithm 1): `fn` may attend to keys that it
    closes over, add what it takes, and go through a feed-forward layer; of all that only `rows` and the result exist
    for more than one block. Each block is computed again in the backward pass, where the gradients of weights and keys
    add up from block to block.

    Args:
        fn: a pure function that treats each token alone, given what it closes over.
        rows: a tree of arrays [B, T, ...].
        block: tokens of a row to handle at once, at least 1; any length works, blocks shrink to fit it.
        policy: what is kept for the backward pass all the same.
    """
    length = jax.tree.leaves(rows)[0].shape[1]
    n = -(-length // block)
    size = -(-length // n)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, n * size - length)] + [(0, 0)] * (x.ndim - 2), mode="edge")
        return jnp.moveaxis(x.reshape(len(x), n, size, *x.shape[2:]), 1, 0)

    blocks = lax.map(jax.checkpoint(fn, policy=policy, prevent_cse=False), jax.tree.map(cut, rows))
    return jnp.moveaxis(blocks, 0, 1).reshape(blocks.shape[1], n * size, -1)[:, :length]


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

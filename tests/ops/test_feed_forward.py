"""Blockwise feed-forward: the same function, at any length, with the memory of one block."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import assert_same

from jaxlong.ops.feed_forward import feed_forward, join, split


def mlp(weights, x):
    """With a norm whose gradient is not finite at 0."""
    x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    return jax.nn.silu(x @ weights[0]) @ weights[1]


@pytest.mark.parametrize(("T", "block"), [(1, 4), (7, 3)])
def test_the_same_values_and_gradients(T, block):
    random = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.float32)
    x, goal, weights = normal(2, T, 8), normal(2, T, 6), (normal(8, 32), normal(32, 6))
    whole = lambda weights, x: ((mlp(weights, x) - goal) ** 2).sum()
    blocks = lambda weights, x: ((feed_forward(mlp, weights, x, block=block) - goal) ** 2).sum()
    got, want = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(weights, x) for f in (blocks, whole))
    assert_same(got, want, 2e-6)


@pytest.mark.parametrize(("T", "block"), [(1, 1), (7, 3), (12, 4), (12, 5), (3, 9)])
def test_blocks_hold_every_token_once_and_a_share_of_every_stretch(T, block):
    x = jnp.arange(2 * T).reshape(2, T)
    blocks = split(x, block)
    assert blocks.shape[2] <= block
    np.testing.assert_array_equal(join(blocks, T), x)
    n = blocks.shape[0]
    np.testing.assert_array_equal(blocks[0, 0], x[0, ::n])


@pytest.mark.usefixtures("compile_well")
def test_memory_is_that_of_a_block():
    T, D, F = 16384, 16, 1024
    x, up, down = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, T, D), (D, F), (F, D)))

    def temporary(block):
        loss = lambda x, *weights: (feed_forward(mlp, weights, x, block=block) ** 2).sum()
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, up, down).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert 8 * temporary(512) <= temporary(T)

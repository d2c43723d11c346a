"""Gradients a chunk at a time: equal to those of whole rows, in little memory; draws of chunks right in the mean."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlong.core.mask import sliding
from jaxlong.core.types import BadInput, Batch
from jaxlong.layers.mlp import SwiGLU
from jaxlong.layers.moe import MoE
from jaxlong.mixers import GQA, KDA, MIXERS, MLA, NSA, Mamba2, Routing, RWKVChannelMix
from jaxlong.model import LM, Layer, init_params
from jaxlong.parallel.mesh import make_mesh, shard_batch
from jaxlong.train.chunked import Bernoulli, WithoutReplacement, chosen_gradient, seco, spaco
from jaxlong.train.grads import accumulated, full, next_token_loss
from jaxlong.train.state import TrainState
from jaxlong.train.step import make_step

pytestmark = pytest.mark.usefixtures("compile_fast")

ROWS, LENGTH = 2, 22


def small(*pattern, **fields):
    defaults = {"vocab": 32, "width": 16, "depth": len(pattern), "mlp": SwiGLU(hidden=16)}
    return LM(pattern=pattern, **(defaults | fields))


def example(name, case=None):
    cases = MIXERS[name].examples()
    return cases[case or next(iter(cases))]


FULL = GQA(heads=4, kv_heads=2, head_dim=8)
WINDOW = example("gqa", "window_conv")
MODELS = {
    "gqa": small(FULL, depth=2, tied=True),
    "window": small(WINDOW),
    "mla": small(example("mla"), soft_cap=3.0),
    "kda": small(example("kda")),
    "mamba2": small(example("mamba2")),
    "hybrid": small(example("kda"), FULL, before=(WINDOW,), after=(Layer(example("mla"), None),), depth=4, remat="full"),
}


def batch(rows=ROWS, length=LENGTH, seed=0):
    """Documents of several lengths, other ones in each row; weights that differ, some 0."""
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(0, 32, (2, rows, length), np.int32)
    cuts = [np.sort(rng.choice(np.arange(1, length), 2, replace=False)) for _ in range(rows)]
    segments = np.stack([1 + (np.arange(length)[:, None] >= cut).sum(1) for cut in cuts]).astype(np.int32)
    starts = np.stack([np.concatenate([[0], cut])[row - 1] for cut, row in zip(cuts, segments, strict=True)])
    positions = (np.arange(length) - starts).astype(np.int32)
    weights = rng.uniform(0.5, 2, (rows, length)) * (rng.random((rows, length)) < 0.9)
    return jax.tree.map(jnp.asarray, Batch(tokens, targets, positions, segments, weights.astype(np.float32)))


def params_of(model):
    """Parameters none of which hides behind its initial zero."""
    leaves, tree = jax.tree.flatten(jax.jit(lambda key: init_params(model, key))(jax.random.key(0)))
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(tree, [leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


def largest(tree):
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def same(got, want, tolerance=1e-6):
    """Each leaf to `tolerance` of the largest of all gradients, and 30 times that of its own largest."""
    top = largest(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * top)
        np.testing.assert_allclose(x, y, rtol=0, atol=30 * tolerance * max(largest(y), 1e-3 * top))


def agree(model, data, chunk, **loss):
    params = params_of(model)
    want, told = jax.jit(full(next_token_loss(model, chunk=8, **loss)))(params, data)
    got, also = jax.jit(seco(model, chunk=chunk, loss_chunk=8, **loss))(params, data)
    same(got, want)
    assert told.keys() == also.keys()
    for name in told:
        np.testing.assert_allclose(also[name], told[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_seco_equals_the_full_gradient(name):
    """Packed documents, uneven weights, z-loss, and a length that the chunk does not divide."""
    agree(MODELS[name], batch(), 5, z_loss=0.01)


OTHERS = [
    (name, case) for name, cls in MIXERS.items() for case in cls.examples() if not hasattr(cls, "exceptions")
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case"), OTHERS, ids=lambda x: x)
def test_seco_for_every_mixer(name, case):
    agree(small(example(name, case), depth=2), batch(), 6)

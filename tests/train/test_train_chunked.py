"""Gradients a chunk at a time: equal to those of whole rows, in little memory; draws of chunks right in the mean."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlong.core.types import BadInput, Batch
from jaxlong.layers.mlp import SwiGLU
from jaxlong.layers.moe import MoE
from jaxlong.mixers import GQA, MIXERS
from jaxlong.model import LM, init_params
from jaxlong.parallel.mesh import make_mesh, shard_batch
from jaxlong.train.chunked import Bernoulli, WithoutReplacement, chosen_gradient, seco, spaco
from jaxlong.train.grads import Drawing, accumulated, full, next_token_loss
from jaxlong.train.state import TrainState
from jaxlong.train.step import make_step

ROWS, LENGTH = 2, 22


def small(*pattern, **fields):
    defaults = {"vocab": 32, "width": 16, "depth": len(pattern), "mlp": SwiGLU(hidden=16)}
    return LM(pattern=pattern, **(defaults | fields))


def example(name, case=None):
    cases = MIXERS[name].examples()
    return cases[case or next(iter(cases))]


FULL = GQA(heads=4, kv_heads=2, head_dim=8)
WINDOW, LATENT = example("gqa", "window_conv"), example("mla")
MODELS = {
    "attention": small(FULL, WINDOW, LATENT, tied=True, soft_cap=3.0),
    "hybrid": small(example("mamba2"), FULL, before=(LATENT,), depth=3, remat="full"),
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


@functools.cache
def params_of(model):
    """Random ones, none of which hides behind an initial zero."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), shapes)


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


LOSSES = ("dsa", "routing")  # with losses of their own, over all tokens
EVERY = [(name, case) for name in MIXERS if name not in LOSSES for case in MIXERS[name].examples()]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case"), EVERY, ids=lambda x: x)
def test_seco_for_every_mixer(name, case):
    agree(small(example(name, case), depth=2), batch(), 6)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 22, 40])
def test_chunks_of_one_token_and_of_the_whole_row(chunk):
    agree(small(FULL, WINDOW, example("mamba2")), batch(), chunk)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rwkv_channel_mix", "in_place_ttt"])
def test_feed_forward_layers_that_look_back(name):
    agree(small(FULL, mlp=example(name)), batch(), 6)


@pytest.mark.slow
def test_bfloat16_adds_up_the_gradient_of_the_caches_in_float32():
    """Activations of 8 bits in 32 chunks: no further from float32 than the whole row in one is."""
    model, data = small(FULL, LATENT, dtype="bfloat16"), batch(length=64)
    params = params_of(model)
    loss = lambda model: jax.jit(full(next_token_loss(model, chunk=8)))(params, data)[0]
    want, whole = loss(model.clone(dtype="float32")), loss(model)
    chunks = jax.jit(seco(model, chunk=2, loss_chunk=8))(params, data)[0]
    away = lambda tree: optax.tree.norm(jax.tree.map(jnp.subtract, tree, want))
    assert away(chunks) < 1.2 * away(whole)


@pytest.mark.slow
def test_micro_batches_and_a_mesh():
    model, data = small(FULL, example("kda")), batch(rows=8)
    grad_fn = accumulated(seco(model, chunk=6, loss_chunk=8), 2)
    params = params_of(model)
    want, _ = jax.jit(full(next_token_loss(model, chunk=8)))(params, data)
    same(jax.jit(grad_fn)(params, data)[0], want)
    mesh = make_mesh("data=2,seq=2,tensor=2")
    with jax.set_mesh(mesh):
        split = jax.jit(grad_fn)(params, shard_batch(jax.tree.map(np.asarray, data), mesh))
    same(split[0], want)


# Of k = 4 chunks every selection, weighted by its probability, against the exact gradient.
K, CHUNK = 4, 4
SELECTIONS = [jnp.array(s) for s in itertools.product([False, True], repeat=K)]
DRAWN = small(FULL, example("mamba2"))


@pytest.fixture(scope="module")
def of_draw():
    """The gradient as a function of a draw, and the exact one."""
    params, data = params_of(DRAWN), batch(length=16)
    run = jax.jit(chosen_gradient(DRAWN, chunk=CHUNK, loss_chunk=8))
    exact = jax.jit(seco(DRAWN, chunk=CHUNK, loss_chunk=8))(params, data)
    return functools.partial(run, params, data), exact


def bias(of_draw, sampling, selections, weights):
    """Of the mean, relative to the exact gradient."""
    run, (exact, _) = of_draw
    away = jax.tree.map(lambda x: -np.asarray(x, np.float64), exact)
    for selected, weight in zip(selections, weights, strict=True):
        away = jax.tree.map(lambda t, g, w=weight: t + w * np.asarray(g), away, run(sampling.chosen(selected))[0])
    square = lambda tree: sum(float(np.square(leaf).sum()) for leaf in jax.tree.leaves(tree))
    return (square(away) / square(exact)) ** 0.5


@pytest.mark.thorough
@pytest.mark.parametrize("rate", [0.5, 0.25])
def test_bernoulli_is_unbiased(of_draw, rate):
    weights = [rate ** int(s.sum()) * (1 - rate) ** int((~s).sum()) for s in SELECTIONS]
    assert sum(weights) == 1
    assert bias(of_draw, Bernoulli(rate), SELECTIONS, weights) < 1e-6


def test_the_papers_form_is_biased(of_draw):
    pairs = [s for s in SELECTIONS if s.sum() == 2]
    assert 0.3 < bias(of_draw, WithoutReplacement(2), pairs, [1 / 6] * 6) < 0.8


def test_all_chunks_are_the_exact_gradient(of_draw):
    run, (exact, metrics) = of_draw
    grads, told = run(Bernoulli(1.0).chosen(SELECTIONS[-1]))
    same(grads, exact)
    assert told.pop("chunks") == 4 and told.keys() == metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(told[name], value, rtol=1e-6)


def test_no_chunk_is_no_gradient_and_still_a_loss(of_draw):
    run, (_, metrics) = of_draw
    grads, told = run(Bernoulli(0.5).chosen(SELECTIONS[0]))
    assert largest(grads) == 0
    np.testing.assert_allclose(told["loss"], metrics["loss"], rtol=1e-6)


def test_a_step_draws_by_its_number():
    """Another selection each step, the same one again for the same step; micro-batches draw for themselves."""
    params, data, seen = params_of(DRAWN), batch(length=16), []
    grad_fn = spaco(DRAWN, chunk=CHUNK, sampling=Spy(seen), seed=3)
    start = TrainState.create(params, optax.sgd(0.1))
    for call in (
        lambda: grad_fn(params, data, 5),
        lambda: grad_fn(params, data),
        lambda: make_step(grad_fn, optax.sgd(0.1))(start, data),
        lambda: make_step(grad_fn, optax.sgd(0.1))(dataclasses.replace(start, step=start.step + 5), data),
    ):
        with pytest.raises(Asked):
            call()
    assert (seen[0] == seen[3]).all() and (seen[1] == seen[2]).all() and (seen[0] != seen[1]).any()
    assert isinstance(accumulated(grad_fn, 2), Drawing)


class Asked(Exception):
    pass


@dataclasses.dataclass(frozen=True)
class Spy(Bernoulli):
    """A way to draw that notes the key, and goes no further."""

    rate: Any

    def __post_init__(self):
        pass

    def draw(self, key, chunks):
        self.rate.append(jax.random.key_data(key))
        raise Asked


def test_what_is_drawn():
    keys = jax.random.split(jax.random.key(0), 400)
    some = jax.vmap(lambda key: Bernoulli(0.25).draw(key, 8).selected)(keys)
    assert abs(float(some.mean()) - 0.25) < 0.03 and len(np.unique(some.sum(1))) > 3
    fixed = jax.vmap(lambda key: WithoutReplacement(3).draw(key, 8).selected)(keys)
    assert (fixed.sum(1) == 3).all() and (abs(fixed.mean(0) - 3 / 8) < 0.1).all()
    draw = WithoutReplacement(2, max_factor=2.0).chosen(jnp.arange(8) < 2)
    assert (draw.loss, draw.state) == (1.0, 2.0)
    assert WithoutReplacement(2).chosen(jnp.arange(8) < 2).state == 4.0
    assert Bernoulli(0.25).chosen(jnp.arange(8) < 2)[1:] == (4.0, 4.0)


REFUSED = {
    r"^train.chunk: 0: a chunk holds at least one token; 1 or more$": lambda: seco(small(FULL), chunk=0),
    r"^sampling.rate: 0: .*; above 0, at most 1$": lambda: Bernoulli(0),
    r"^sampling.count: 0: draws nothing; 1 or more$": lambda: WithoutReplacement(0),
    r"^sampling.max_factor: 0.5: .*; 1 or more, or None$": lambda: WithoutReplacement(1, 0.5),
    r"^sampling.count: 5: a row has 4 chunks; 4 at most$": lambda: WithoutReplacement(5).draw(jax.random.key(0), 4),
    r"^model.mtp: 1: .*; 0 for": lambda: abstract(small(FULL, mtp=1)),
    r"^model: balance: .*; layers without": lambda: abstract(small(FULL, mlp=MoE(8, 4, 2, balance=0.1))),
    r"^model: indexer_kl: .*; layers without": lambda: abstract(small(example("dsa"))),
    r"^model: centroids: .*; layers without": lambda: abstract(small(example("routing"))),
}


@pytest.mark.parametrize("line", REFUSED)
def test_refused_in_one_line(line):
    with pytest.raises(BadInput, match=line):
        REFUSED[line]()


def abstract(model, chunk=4):
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return jax.eval_shape(seco(model, chunk=chunk), params, batch(length=16))


def test_reports_of_layers_are_means_over_chunks():
    _, metrics = abstract(small(FULL, mlp=MoE(8, 4, 2)))
    assert {"expert_load", "router_entropy", "loss", "nll", "accuracy", "weight"} == metrics.keys()


def test_numbers_that_only_grow_are_kept_once():
    """Kept for every chunk: nothing as long as the row. Windows become rings as long as the row where that is less."""
    model = small(FULL, example("gqa", "window"), example("nsa"))
    length = 4096
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    data = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, length), x.dtype), batch())
    jaxpr = jax.make_jaxpr(seco(model, chunk=64))(shapes, data)
    kept = [v.aval for eqn in jaxpr.eqns if eqn.primitive.name == "scan" for v in eqn.outvars]
    assert max(x.size for x in kept if x.shape and x.shape[0] == length // 64) <= length * 64


@pytest.mark.slow
def test_memory_is_a_tenth_of_a_full_step():
    """Temporaries of the compiled programs at 8192 tokens in chunks of 64: 4 layers of width 64, full causal
    attention, everything float32."""
    model = LM(vocab=256, width=64, depth=4, pattern=(GQA(heads=4, kv_heads=2, head_dim=16),), mlp=SwiGLU(hidden=256))
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    data = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, 8192), x.dtype), batch())
    temporary = lambda fn: jax.jit(fn).lower(shapes, data).compile().memory_analysis().temp_size_in_bytes
    whole = temporary(full(next_token_loss(model)))
    chunks = temporary(seco(model.clone(remat="full"), chunk=64))
    assert chunks <= whole / 10, (chunks, whole)

"""A step moves everything, or nothing: not a bit, if any number is not finite."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import train_toy as toy
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlong.train.grads import full
from jaxlong.train.optim import AdamW, Constant, Muon, make_optimizer
from jaxlong.train.state import TrainState, state_shardings
from jaxlong.train.step import checked_names, make_step


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


ALGORITHMS = (AdamW(), Muon())


@cache
def faulty(algorithm):
    """A step with two more arguments, added to the loss and to one number of the gradient; and a good state."""
    tx = make_optimizer(algorithm, Constant(1e-2), steps=10, axes=toy.AXES)

    def step(state, batch, in_loss, in_grads):
        def grad_fn(params, batch):
            grads, metrics = full(toy.loss_fn)(params, batch)
            grads["layers"]["w"] = grads["layers"]["w"].at[1, 2, 3].add(in_grads)
            return grads, metrics | {"loss": metrics["loss"] + in_loss}

        return make_step(grad_fn, tx, lambda applied: 1.0 / (applied + 1))(state, batch)

    step = jax.jit(step)
    state = TrainState.create(toy.init_params(jax.random.key(0)), tx)
    for index in range(2):
        state, _ = step(state, toy.rows(0, index), 0.0, 0.0)
    return step, state


@pytest.mark.thorough
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("place", ["loss", "gradient of layers.w"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_bad_number_leaves_every_bit(algorithm, place, value):
    step, state = faulty(algorithm)
    faults = (value, 0.0) if place == "loss" else (0.0, value)
    after, metrics = step(state, toy.rows(0, 9), *faults)
    assert bits((after.params, after.opt_state)) == bits((state.params, state.opt_state))
    assert (after.step, after.skipped, after.streak) == (3, 1, 1)
    assert (metrics["skipped"], metrics["streak"]) == (1, 1)
    assert checked_names(state)[metrics["first_bad"]] == place


def test_a_good_step_ends_the_streak():
    step, state = faulty(AdamW())
    for _ in range(2):
        state, _ = step(state, toy.rows(0, 2), np.nan, 0.0)
    assert (state.step, state.skipped, state.streak) == (4, 2, 2)
    state, metrics = step(state, toy.rows(0, 3), 0.0, 0.0)
    assert (state.step, state.skipped, state.streak) == (5, 2, 0)
    assert metrics["first_bad"] == -1


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_training_with_bad_steps_equals_training_without_them(algorithm):
    """Also the schedule does not move on, and the logged rate is the applied one."""
    step, state = faulty(algorithm)
    plain, wanted = step(state, toy.rows(0, 3), 0.0, 0.0)
    for index in range(3):
        state, _ = step(state, toy.rows(0, index), np.inf, 0.0)
    disturbed, metrics = step(state, toy.rows(0, 3), 0.0, 0.0)
    assert bits((plain.params, plain.opt_state)) == bits((disturbed.params, disturbed.opt_state))
    assert metrics["learning_rate"] == wanted["learning_rate"] == np.float32(1 / 3)


def test_an_update_that_overflows_is_skipped():
    tx = optax.chain(optax.scale(-3e38), optax.scale(1e9))
    state = TrainState.create(toy.init_params(jax.random.key(0)), tx)
    after, metrics = jax.jit(make_step(full(toy.loss_fn), tx))(state, toy.rows(0, 0))
    assert bits(after.params) == bits(state.params)
    assert checked_names(state)[metrics["first_bad"]].startswith("new parameter ")


def test_an_optimizer_state_that_overflows_is_skipped():
    tx = optax.scale_by_adam()
    huge = lambda params, batch: (
        jax.tree.map(lambda p: jnp.zeros_like(p).at[0].set(1e18), params),
        {"loss": jnp.float32(1)},
    )
    state = TrainState.create({"w": jnp.ones((4, 4))}, tx)
    state = replace(state, opt_state=state.opt_state._replace(nu={"w": jnp.full((4, 4), 3.4e38)}))
    tx_like_adam = optax.GradientTransformation(
        tx.init, lambda g, s, p: (g, s._replace(nu=jax.tree.map(lambda n: n * 1.1, s.nu)))
    )
    after, metrics = make_step(huge, tx_like_adam)(state, toy.rows(0, 0))
    assert bits((after.params, after.opt_state)) == bits((state.params, state.opt_state))
    assert checked_names(state)[metrics["first_bad"]] == "new optimizer state nu.w"


def test_a_norm_that_overflows_is_skipped():
    tx = optax.sgd(0.0)
    state = TrainState.create({"w": jnp.ones((4,))}, tx)
    grad_fn = lambda params, batch: ({"w": jnp.full((4,), 3e38)}, {"loss": jnp.float32(1)})
    _, metrics = make_step(grad_fn, tx)(state, toy.rows(0, 0))
    assert checked_names(state)[metrics["first_bad"]] == "norm of the gradient"


def test_gradient_norm_is_before_clipping():
    step, state = faulty(AdamW())
    grads, _ = jax.jit(full(toy.loss_fn))(state.params, toy.rows(0, 0))
    _, metrics = step(state, toy.rows(0, 0), 0.0, 50.0)
    grads["layers"]["w"] = grads["layers"]["w"].at[1, 2, 3].add(50.0)
    wanted = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(metrics["grad_norm"], wanted, rtol=1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_moments_are_laid_out_as_their_parameters(algorithm):
    mesh = toy.make_mesh(8)
    tx = make_optimizer(algorithm, Constant(1e-2), steps=10, axes=toy.AXES)
    abstract = jax.eval_shape(lambda: TrainState.create(toy.init_params(jax.random.key(0)), tx))
    specs = {"embed": P("data"), "layers": {"w": P(None, "data"), "scale": P()}, "head": P(None, "data")}
    params = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))
    shardings = state_shardings(abstract, params, NamedSharding(mesh, P()))
    by_shape = {(2, 16, 16): P(None, "data"), (32, 16): P("data"), (16, 32): P(None, "data"), (2, 16): P()}
    for leaf, sharding in zip(jax.tree.leaves(abstract), jax.tree.leaves(shardings), strict=True):
        assert sharding.spec == by_shape.get(leaf.shape, P()), leaf.shape


def test_sharded_step_equals_one_device():
    step = toy.jitted_step()
    runs = []
    for devices in (1, 8):
        mesh = toy.make_mesh(devices)
        state, _ = toy.placed_state(mesh)
        batches, losses = toy.Batches(mesh=mesh), []
        for _ in range(5):
            state, metrics = step(state, next(batches))
            losses.append(float(metrics["loss"]))
        runs.append(losses)
    np.testing.assert_allclose(*runs, rtol=1e-5)

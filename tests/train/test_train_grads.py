"""Micro-batches together are the whole batch, whatever they weigh."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_toy as toy
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlong.core.types import BadInput, Batch
from jaxlong.train.grads import accumulated, full, next_token_loss


@pytest.fixture(scope="module")
def params():
    return jax.jit(toy.init_params)(jax.random.key(1))


@cache
def gradient(steps: int):
    return jax.jit(accumulated(full(toy.loss_fn), steps))


def close(a, b, tolerance=2e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_accumulated_equals_full(params, steps):
    batch = toy.rows(0, 0)
    grads, metrics = gradient(1)(params, batch)
    parts, part_metrics = gradient(steps)(params, batch)
    close(grads, parts)
    assert metrics.keys() == part_metrics.keys() == {"loss", "nll", "weight"}
    close(metrics, part_metrics)


def test_micro_batches_of_unequal_and_zero_weight(params):
    weights = (
        np.random.default_rng(3).random((toy.ROWS, toy.LENGTH), np.float32) ** 4 * np.logspace(-3, 0, toy.ROWS)[:, None]
    )
    weights[1::4] = 0  # one micro-batch of four has no label that counts
    batch = toy.rows(0, 1)._replace(loss_weights=weights.astype(np.float32))
    close(gradient(1)(params, batch), gradient(4)(params, batch))


def test_a_batch_without_labels_gives_zeros(params):
    batch = toy.rows(0, 2)._replace(loss_weights=np.zeros((toy.ROWS, toy.LENGTH), np.float32))
    grads, metrics = gradient(2)(params, batch)
    assert all(not leaf.any() for leaf in jax.tree.leaves(grads))
    assert metrics["loss"] == metrics["weight"] == 0


def test_dtype_of_parameters_is_kept(params):
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    grads, _ = jax.jit(accumulated(full(toy.loss_fn), 2))(params, toy.rows(0, 0))
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}


def test_rows_stay_on_their_devices(params):
    mesh = toy.make_mesh(4)
    batch = jax.device_put(toy.rows(0, 0), NamedSharding(mesh, P("data")))
    split = jax.jit(lambda rows: rows.reshape(4, 2, -1).swapaxes(0, 1) * 2)
    assert "all-to-all" not in split.lower(batch.tokens).compile().as_text()
    replicated = jax.device_put(params, NamedSharding(mesh, P()))
    close(gradient(1)(params, toy.rows(0, 0)), gradient(2)(replicated, batch))


def test_rows_that_do_not_divide(params):
    with pytest.raises(BadInput, match=r"^train.accumulation: 3: does not divide the batch of 8 rows; a divisor$"):
        accumulated(full(toy.loss_fn), 3)(params, toy.rows(0, 0))
    assert accumulated(gradient, 1) is gradient
    with pytest.raises(BadInput, match=r"^train.accumulation: 0: .*1 or more$"):
        accumulated(full(toy.loss_fn), 0)


class Table:
    """A model whose hidden state is a table's row: the loss is then softmax regression."""

    soft_cap, mtp = None, 0

    def apply(self, variables, tokens, *, positions, segment_ids, method, mutable):
        assert method == "features" and "losses" in mutable
        return (variables["params"]["table"][tokens], None), {}

    def head(self, params):
        return params["head"]


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_next_token_loss_against_float64(z_loss):
    rng = np.random.default_rng(0)
    table, head = rng.normal(size=(toy.VOCAB, 8)), rng.normal(size=(8, toy.VOCAB))
    params = {"table": jnp.asarray(table, jnp.float32), "head": jnp.asarray(head, jnp.float32)}
    batch = toy.rows(0, 0)
    loss_fn = next_token_loss(Table(), z_loss=z_loss, chunk=5)
    loss, metrics = loss_fn(params, Batch(*map(jnp.asarray, batch)))

    logits = table[batch.tokens] @ head
    log_z = np.log(np.exp(logits).sum(-1))
    nll = log_z - np.take_along_axis(logits, batch.targets[..., None].astype(int), -1)[..., 0]
    weights = batch.loss_weights.astype(np.float64)
    mean = lambda x: (x * weights).sum() / weights.sum()
    np.testing.assert_allclose(loss, mean(nll + z_loss * log_z**2), rtol=1e-5)
    np.testing.assert_allclose(metrics["nll"], mean(nll), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], mean(logits.argmax(-1) == batch.targets), rtol=1e-5)
    np.testing.assert_allclose(metrics["weight"], weights.sum(), rtol=1e-6)

    empty = batch._replace(loss_weights=jnp.zeros_like(batch.loss_weights))
    grads, metrics = full(loss_fn)(params, Batch(*map(jnp.asarray, empty)))
    assert metrics["loss"] == 0
    assert all(not leaf.any() for leaf in jax.tree.leaves(grads))

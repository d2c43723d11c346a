"""Chunked cross-entropy against float64 NumPy: values, gradients, what does not count, memory, meshes."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import assert_same
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlong.core.types import BadInput
from jaxlong.ops.loss import cross_entropy
from jaxlong.parallel.mesh import make_mesh, partition


def oracle(hidden, head, targets, weights, z_loss, soft_cap):
    """(loss, stats, gradients of hidden, head and weights) in float64."""
    hidden, head, weights = (np.asarray(x, np.float64) for x in (hidden, head, weights))
    targets = np.asarray(targets)
    flat = np.where(weights.reshape(-1, 1) != 0, hidden.reshape(-1, hidden.shape[-1]), 0)
    label, w = np.where(weights != 0, targets, 0).reshape(-1), weights.reshape(-1)
    logits, slope = flat @ head, 1.0
    if soft_cap:
        logits = soft_cap * np.tanh(logits / soft_cap)
        slope = 1 - (logits / soft_cap) ** 2
    top = logits.max(1, keepdims=True)
    lse = (top + np.log(np.exp(logits - top).sum(1, keepdims=True)))[:, 0]
    chosen = logits[np.arange(len(flat)), label]
    per_token = lse - chosen + z_loss * lse**2
    dlogits = np.exp(logits - lse[:, None]) * (1 + 2 * z_loss * lse)[:, None]
    dlogits[np.arange(len(flat)), label] -= 1
    dlogits *= w[:, None] * slope
    right = logits.argmax(1) == label
    stats = (w * (lse - chosen)).sum(), (w * lse**2).sum(), (w * right).sum(), w.sum()
    dweights = np.where(w != 0, per_token, 0).reshape(weights.shape)
    return (w * per_token).sum(), stats, ((dlogits @ head.T).reshape(hidden.shape), flat.T @ dlogits, dweights)


@pytest.fixture(scope="module")
def inputs():
    """Random logits that labels can explain, a tenth of the tokens not counting, and labelled -100."""
    random = np.random.default_rng(0)
    hidden, head = random.standard_normal((4, 24, 16)), random.standard_normal((16, 50))
    logits = hidden @ head
    targets = np.where(random.random((4, 24)) < 0.5, logits.argmax(-1), random.integers(0, 50, (4, 24)))
    weights = np.where(random.random((4, 24)) < 0.1, 0, random.uniform(0.5, 2, (4, 24)))
    targets = np.where(weights == 0, -100, targets)
    as_float = lambda x: jnp.asarray(x, jnp.float32)
    return as_float(hidden), as_float(head), jnp.asarray(targets, jnp.int32), as_float(weights)


def both(hidden, head, targets, weights, **options):
    def objective(hidden, head, weights):
        loss, stats = cross_entropy(hidden, head, targets, weights, **options)
        return loss / 7, (loss, stats)

    gradients, (loss, stats) = jax.grad(objective, argnums=(0, 1, 2), has_aux=True)(hidden, head, weights)
    return loss, tuple(stats), jax.tree.map(lambda x: 7 * x, gradients)


@pytest.mark.parametrize(("chunk", "z_loss", "soft_cap"), [(1024, 0.0, None), (7, 0.01, 5.0), (1, 0.1, None)], ids=str)
def test_equals_numpy(inputs, chunk, z_loss, soft_cap):
    got = jax.jit(lambda *x: both(*x, chunk=chunk, z_loss=z_loss, soft_cap=soft_cap))(*inputs)
    assert_same(got, oracle(*inputs, z_loss, soft_cap), 2e-6)


def test_rows_of_tokens_without_a_batch(inputs):
    hidden, head, targets, weights = inputs
    one = hidden[0], head, targets[0], weights[0]
    assert_same(jax.jit(both)(*one), oracle(*one, 0, None), 2e-6)


def test_without_differentiation_the_same_sums(inputs):
    got = jax.jit(lambda *x: cross_entropy(*x, chunk=5, z_loss=0.1))(*inputs)
    assert_same((got[0], tuple(got[1])), oracle(*inputs, 0.1, None)[:2], 2e-6)


def test_what_does_not_count_may_hold_anything(inputs):
    hidden, head, targets, weights = inputs
    idle = weights == 0
    run = jax.jit(lambda *x: both(*x, chunk=7))
    want = run(*inputs)
    for junk, label in ((jnp.nan, 50), (jnp.inf, 2**31 - 1), (1e30, 3)):
        got = run(jnp.where(idle[..., None], junk, hidden), head, jnp.where(idle, label, targets), weights)
        jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("label", [-1, 50])
def test_a_label_outside_the_vocabulary_that_counts_is_not_hidden(inputs, label):
    hidden, head, targets, weights = inputs
    loss, stats = cross_entropy(hidden, head, targets.at[1, 2].set(label), weights.at[1, 2].set(1.0))
    assert np.isnan(loss)
    assert np.isfinite(stats.weight_sum)


def test_bfloat16_hidden_states_keep_float32_sums(inputs):
    hidden, head, targets, weights = inputs
    hidden, head = hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
    got = jax.jit(lambda *x: both(*x, chunk=7))(hidden, head, targets, weights)
    want = oracle(hidden, head, targets, weights, 0, None)
    assert got[0].dtype == jnp.float32
    assert got[2][0].dtype == got[2][1].dtype == jnp.bfloat16
    assert_same(got[:2], want[:2], 1e-5)
    assert_same(got[2], want[2], 1e-2)


def test_a_chunk_of_no_tokens(inputs):
    with pytest.raises(BadInput, match=r"chunk: 0: .*; 1 or more"):
        cross_entropy(*inputs, chunk=0)


@pytest.mark.usefixtures("compile_well")
def test_memory_is_that_of_one_chunk():
    """Forward and backward at 8192 tokens by 32768 words: a sixteenth of the logits, which take 1 GiB."""
    T, D, V, chunk = 8192, 64, 32768, 128
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((T, D), (D, V), (T,), (T,))]

    def loss(hidden, head, targets, weights):
        return cross_entropy(hidden, head, targets.astype(jnp.int32), weights, chunk=chunk)[0]

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= T * V * 4 // 16


@pytest.mark.parametrize("mesh", [(2, 2, 2, 1, 1), (1, 1, 4, 2, 1)], ids=str)
def test_a_mesh_equals_one_device(inputs, mesh):
    """The head's gradient crosses devices once, not once a chunk."""
    want = oracle(*inputs, 0.1, 5.0)
    mesh = jax.make_mesh(mesh, ("data", "fsdp", "seq", "tensor", "expert"), axis_types=(AxisType.Auto,) * 5)
    by_token, by_head = P(("data", "fsdp"), "seq"), P("fsdp", "tensor")
    specs = [NamedSharding(mesh, spec) for spec in (by_token, by_head, by_token, by_token)]
    inputs = [jax.device_put(x, spec) for x, spec in zip(inputs, specs, strict=True)]
    with jax.set_mesh(mesh):
        run = jax.jit(lambda *x: both(*x, chunk=2, z_loss=0.1, soft_cap=5.0)).lower(*inputs).compile()
    assert_same(run(*inputs), want, 2e-6)
    part = f"f32\\[[0-9]+,{50 // mesh.shape['tensor']}\\]"
    crossings = re.findall(rf"= {part}.* (?:reduce-scatter|all-reduce)\(.*", run.as_text())
    assert len([line for line in crossings if "reduce-scatter" in line]) == 1
    assert not any("while" in line for line in crossings)


@pytest.mark.parametrize(
    ("mesh", "words", "gathered"),
    [("tensor=4", 48, None), ("fsdp=2,tensor=4", 48, (16, 12)), ("tensor=3", 48, None), ("tensor=4", 50, None)],
    ids=str,
)
def test_words_on_several_devices(inputs, mesh, words, gathered):
    """Of a vocabulary that "tensor" divides, logits and the head stay where they are; gathered over "fsdp" alone."""
    hidden, head, targets, weights = inputs
    targets = jnp.where(targets >= 0, targets % words, targets)
    inputs = hidden, head[:, :words], targets, weights
    want = oracle(*inputs, 0.1, 5.0)
    devices = math.prod(map(int, re.findall(r"\d+", mesh)))
    mesh = make_mesh(mesh, jax.devices()[:devices])
    place = lambda x, *names: jax.device_put(x, NamedSharding(mesh, partition(names, x.shape, mesh)))
    rows, row = ("batch", "seq"), lambda x: place(x, "batch", "seq")
    inputs = place(hidden, *rows, None), place(inputs[1], "embed", "vocab"), row(targets), row(weights)
    with jax.set_mesh(mesh):
        run = jax.jit(lambda *x: both(*x, chunk=5, z_loss=0.1, soft_cap=5.0)).lower(*inputs).compile()
        alone = jax.jit(lambda *x: cross_entropy(*x, chunk=5)[0])(*inputs)
    assert_same(run(*inputs), want, 2e-6)
    np.testing.assert_allclose(alone, oracle(*inputs, 0, None)[0], rtol=2e-6)
    if words == 48:
        shapes = re.findall(r"f32\[([\d,]+)\]\S* all-gather", run.as_text())
        assert set(shapes) <= ({",".join(map(str, gathered))} if gathered else set())
        assert not re.findall(r"f32\[\d+,\d+,48\]", run.as_text()), "logits of all words"


def test_a_label_outside_the_vocabulary_on_several_devices(inputs):
    hidden, head, targets, weights = inputs
    with jax.set_mesh(make_mesh("tensor=2,data=4")):
        loss, _ = jax.jit(cross_entropy)(hidden, head, targets.at[1, 2].set(50), weights.at[1, 2].set(1.0))
    assert np.isnan(loss)


def test_sharded_inputs_without_a_mesh_in_context(inputs):
    mesh = jax.make_mesh((2, 4), ("rows", "length"), axis_types=(AxisType.Auto,) * 2)
    specs = [P("rows", "length"), P(), P("rows", "length"), P("rows", "length")]
    sharded = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(inputs, specs, strict=True)]
    run = jax.jit(lambda *x: both(*x, chunk=4)).lower(*sharded).compile()
    assert_same(run(*sharded), oracle(*inputs, 0, None), 2e-6)
    assert not re.findall(r"all-gather|all-to-all|collective-permute", run.as_text())

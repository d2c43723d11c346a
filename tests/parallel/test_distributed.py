"""A whole model on a layout and a strategy equals itself on one device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlong.core.mask import full as all_visible
from jaxlong.core.mask import sliding
from jaxlong.core.types import BadInput, Batch
from jaxlong.layers.mlp import SwiGLU
from jaxlong.mixers import GQA, MLA, DeltaNet
from jaxlong.model import LM, Layer, balanced_layout, distributed, init_params
from jaxlong.parallel.layout import permute, restore
from jaxlong.parallel.mesh import make_mesh
from jaxlong.train.grads import full, next_token_loss

SMALL = GQA(heads=4, kv_heads=2, head_dim=8)
LATENT = MLA(heads=4, kv_rank=8, nope_dim=4, rope_dim=4, value_dim=6)
MODEL = LM(
    vocab=32,
    width=16,
    depth=4,
    before=(Layer(SMALL.clone(mask=sliding(7)), None),),
    pattern=(LATENT, SMALL.clone(kv_heads=1, sinks=True), Layer(SMALL, None)),
    mlp=SwiGLU(hidden=16),
    remat="attn_out",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sequence", "mesh"),
    [
        ("usp", "seq=2,ulysses=2"),
        ("ring", "data=2,seq=4"),
        ("auto", "seq=8"),
    ],
)
def test_a_model_on_zigzag_equals_one_device(sequence, mesh):
    random = np.random.default_rng(0)
    tokens = random.integers(0, 32, (2, 48)).astype(np.int32)
    ids = np.sort(random.integers(0, 3, (2, 48)), axis=1).astype(np.int32)
    at = np.arange(48, dtype=np.int32) - np.array([[np.argmax(row == i) for i in row] for row in ids])
    params = init_params(MODEL, jax.random.key(0))

    def step(model, *batch):
        def loss(params):
            logits, _ = model.apply({"params": params}, batch[0], positions=batch[1], segment_ids=batch[2])
            return (logits**2).mean(), logits

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    batch = tokens, at.astype(np.int32), ids
    gradients, logits = step(MODEL, *map(jnp.asarray, batch))
    mesh = make_mesh(mesh, jax.devices()[: int(np.prod([int(part[-1]) for part in mesh.split(",")]))])
    devices = mesh.shape["seq"] * mesh.shape["ulysses"]
    with jax.set_mesh(mesh):
        placed = [jnp.asarray(permute(x, "zigzag", devices)) for x in batch]
        found, out = step(distributed(MODEL, sequence=sequence, layout="zigzag"), *placed)
    np.testing.assert_allclose(restore(out, "zigzag", devices), logits, atol=2e-6 * np.abs(logits).max() * 4)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5 * np.abs(y).max())


def test_tokens_further_ahead_are_those_of_the_text():
    """Multi-token prediction of a model whose rows lie in zigzag."""
    model = LM(vocab=32, width=16, depth=1, pattern=(SMALL,), mlp=SwiGLU(hidden=16), mtp=2)
    random = np.random.default_rng(1)
    tokens, targets = (random.integers(0, 32, (2, 48)).astype(np.int32) for _ in range(2))
    ids = np.sort(random.integers(0, 3, (2, 48)), axis=1).astype(np.int32)
    at = np.broadcast_to(np.arange(48, dtype=np.int32), (2, 48))
    batch = Batch(tokens, targets, at, ids, random.random((2, 48)).astype(np.float32))
    params = init_params(model, jax.random.key(0))
    grad = lambda model: jax.jit(full(next_token_loss(model, chunk=8)))
    gradients, metrics = grad(model)(params, batch)
    with jax.set_mesh(make_mesh("seq=4", jax.devices()[:4])):
        rows = Batch(*(jnp.asarray(permute(x, "zigzag", 4)) for x in batch))
        found, told = grad(distributed(model, sequence="ring", layout="zigzag"))(params, rows)
    assert told["mtp_nll"] == pytest.approx(float(metrics["mtp_nll"]), rel=1e-6)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5 * np.abs(y).max())


@pytest.mark.parametrize(
    ("pattern", "length", "layout"),
    [
        ((SMALL,), 64, "zigzag"),
        ((SMALL,), 60, "contiguous"),  # does not divide into 8 parts
        ((SMALL.clone(mask=sliding(7)),), 64, "contiguous"),  # reads its neighbours alone
        ((SMALL.clone(mask=all_visible()),), 64, "contiguous"),
        ((DeltaNet(heads=2, head_dim=8), LATENT), 64, "zigzag"),
        ((DeltaNet(heads=2, head_dim=8),), 64, "contiguous"),
    ],
)
def test_layout_that_nobody_asked_for(pattern, length, layout):
    model = MODEL.clone(pattern=pattern, before=(), depth=len(pattern))
    assert balanced_layout(model, length, 4) == layout
    assert balanced_layout(model, length, 1) == "contiguous"


def test_every_mixer_is_told():
    placed = distributed(MODEL, sequence="ring", layout="zigzag")
    assert {(m.backend.sequence, m.backend.layout) for m, _ in placed.blocks} == {("ring", "zigzag")}
    assert distributed(placed, sequence="auto", layout="contiguous") == MODEL


@pytest.mark.parametrize(
    ("sequence", "layout", "line"),
    [
        ("rinf", "zigzag", r"backend.sequence: rinf: .*; did you mean ring\?"),
        ("ring", "zigzg", r"backend.layout: zigzg: .*; did you mean zigzag\?"),
    ],
)
def test_unknown_names(sequence, layout, line):
    with pytest.raises(BadInput, match=f"^{line}$"):
        distributed(MODEL, sequence=sequence, layout=layout)

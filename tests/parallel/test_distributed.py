"""A whole model on a layout and a strategy equals itself on one device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlong.core.mask import sliding
from jaxlong.core.types import BadInput
from jaxlong.layers.mlp import SwiGLU
from jaxlong.mixers import GQA, MLA
from jaxlong.model import LM, Layer, distributed, init_params
from jaxlong.parallel.layout import permute, restore
from jaxlong.parallel.mesh import make_mesh

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


@pytest.mark.parametrize(
    ("sequence", "mesh"),
    [
        ("ring", "data=2,seq=4"),
        ("usp", "seq=2,ulysses=2"),
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

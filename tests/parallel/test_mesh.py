"""Meshes from text, shardings from names, and training on a mesh against training on one device."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlong import run
from jaxlong.config import Experiment, Train
from jaxlong.core.types import BadInput
from jaxlong.data import Data, Packed, Stdlib
from jaxlong.layers.mlp import SwiGLU
from jaxlong.mixers import GQA
from jaxlong.model import LM, init_params
from jaxlong.parallel.mesh import AXES, make_mesh, parse_mesh, partition, shard, shard_batch
from jaxlong.train.hooks import Hook
from jaxlong.train.optim import AdamW, Cosine


def test_parse():
    ones = dict.fromkeys(AXES, 1)
    assert parse_mesh("data=2,fsdp=2,seq=2", 8) == ones | {"data": 2, "fsdp": 2, "seq": 2}
    assert parse_mesh("data=-1", 8) == ones | {"data": 8}
    assert parse_mesh("tensor=2, seq=-1", 8) == ones | {"tensor": 2, "seq": 4}
    assert parse_mesh("", 1) == ones


@pytest.mark.parametrize("spec", ["data=3", "data=16", "seq=-1,data=-1", "dat=8", "data=8,data=1", "data=x", "data=-2"])
def test_parse_refuses(spec):
    with pytest.raises(BadInput, match=r"^mesh: "):
        parse_mesh(spec, 8)


def test_partition_leaves_out_what_does_not_divide():
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    assert partition(("batch", "seq", None), (4, 6, 8), mesh) == P(("data", "fsdp"), None, None)
    assert partition(("batch", "seq"), (2, 6), mesh) == P("data", None)
    assert partition(("batch",), (3,), mesh) == P(None)
    assert partition(("embed", "kv_heads", "head_dim"), (16, 1, 8), mesh) == P("fsdp", None, None)
    assert partition(("embed", "embed"), (16, 16), mesh) == P("fsdp", None)  # an axis shards one dimension


def test_shard_without_a_mesh_does_nothing():
    x = jnp.ones((4, 4))
    assert shard(x, "batch", "seq") is x
    with jax.set_mesh(make_mesh("data=2,seq=4")):
        y = jax.jit(lambda x: shard(x, "batch", "seq"))(x)
    assert y.sharding.spec == P("data", "seq")


def test_shard_batch_places_rows():
    mesh = make_mesh("data=2,fsdp=2,seq=2")
    rows = np.arange(32).reshape(4, 8)
    placed = shard_batch({"tokens": rows}, mesh)["tokens"]
    assert placed.sharding == NamedSharding(mesh, P(("data", "fsdp"), "seq"))
    np.testing.assert_array_equal(placed, rows)


class Losses(Hook):
    def __init__(self):
        self.values = []

    def metrics(self, step, values):
        self.values.append(values["loss"])


def experiment(mesh: str, steps: int = 20) -> Experiment:
    attention = GQA(heads=4, kv_heads=2, head_dim=8, qk_norm=True, conv=3)
    return Experiment(
        model=LM(vocab=256, width=32, depth=2, pattern=(attention,), mlp=SwiGLU(hidden=64)),
        data=Data(length=32, batch=8, mixture=(Packed(Stdlib("heldout")),), threads=0),
        train=Train(
            steps=steps, optimizer=AdamW(), schedule=Cosine(peak=3e-3, warmup=2), loss_chunk=8, save_every=10**6
        ),
        mesh=mesh,
    )


def on(mesh: str, folder, devices: int = 8, steps: int = 20):
    """Losses and parameters of training on the first `devices` devices."""
    losses = Losses()
    params = run.train(experiment(mesh, steps), folder, hooks=(losses,))
    return np.array(losses.values), jax.tree.map(np.asarray, params)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Twenty steps on one device."""
    with pytest.MonkeyPatch.context() as patch:
        first = jax.devices()[:1]
        patch.setattr(run, "make_mesh", lambda spec: make_mesh("data=1", first))
        patch.setattr(run, "validate", lambda experiment, devices: dict.fromkeys(AXES, 1))
        return on("data=-1", tmp_path_factory.mktemp("alone"))


@pytest.mark.thorough
@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,seq=2", "fsdp=2,tensor=2,seq=2"])
def test_twenty_steps_equal_one_device(mesh, alone, tmp_path):
    losses, _ = on(mesh, tmp_path / "run")
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)


def test_parameters_and_optimizer_are_sharded(tmp_path):
    mesh = make_mesh("data=2,fsdp=2,seq=2")
    model = experiment("").model
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    placed = run.param_shardings(model, mesh)
    share = [
        s.shard_shape(leaf.shape) for s, leaf in zip(jax.tree.leaves(placed), jax.tree.leaves(shapes), strict=True)
    ]
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert sum(np.prod(shape) for shape in share) < 0.52 * total

    class Look(Hook):
        def wants(self, step):
            return True

        def state(self, step, state):
            moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 1]
            self.fraction = sum(np.prod(m.sharding.shard_shape(m.shape)) for m in moments) / sum(
                m.size for m in moments
            )

    look = Look()
    run.train(dataclasses.replace(experiment("data=2,fsdp=2,seq=2", 3)), tmp_path / "run", hooks=(look,))
    assert look.fraction < 0.52

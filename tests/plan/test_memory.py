"""Bytes by formula: the published table of caches, and real arrays on a small mesh."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import jax
import pytest

from jaxlong.config import load
from jaxlong.core.types import BadInput
from jaxlong.layers.mlp import SwiGLU
from jaxlong.mixers import GQA, MLA
from jaxlong.model import LM, init_params
from jaxlong.parallel.mesh import make_mesh
from jaxlong.plan import exchange, memory, topology
from jaxlong.run import program, sharded_state

ROOT = Path(__file__).parent.parent.parent
TINY = load(str(ROOT / "configs/tiny.py"))


def llama_70b(kv_heads: int) -> LM:
    """Llama 3.1 70B with as many key heads (Grattafiori et al., arXiv 2407.21783, table 3)."""
    attention = GQA(heads=64, kv_heads=kv_heads, head_dim=128)
    return LM(vocab=128256, width=8192, depth=80, pattern=(attention,), mlp=SwiGLU(hidden=28672), dtype="bfloat16")


DEEPSEEK_V3 = LM(
    vocab=129280, width=7168, depth=61, mlp=None, dtype="bfloat16",
    pattern=(MLA(heads=128, q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128),),
)  # fmt: skip


def test_the_published_cache_of_llama_70b():
    found = memory.cache(llama_70b(8), batch=1, length=131072)
    assert found.values == pytest.approx(42.9e9, rel=0.002)
    assert found.places == 80 * (8 * 131072 + 4)


@pytest.mark.parametrize(
    ("model", "published"),
    [
        pytest.param(llama_70b(64), 2.6e6, id="MHA"),
        pytest.param(llama_70b(8), 328e3, id="GQA"),
        pytest.param(DEEPSEEK_V3, 70e3, id="MLA"),
        pytest.param(llama_70b(1), 41e3, id="MQA"),
    ],
)
def test_the_published_cache_of_a_token(model, published):
    one, two = (memory.cache(model, batch=1, length=n).values for n in (1024, 2048))
    assert (two - one) / 1024 == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("mesh", ["fsdp=2,seq=4", "data=2,seq=2,tensor=2"])
def test_state_is_what_arrays_take(mesh):
    """Parameters and optimizer state on the busiest device, and the live bytes of all."""
    placed = make_mesh(mesh)
    with jax.set_mesh(placed):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, sharded_state(TINY, placed))
        create = lambda key: program(TINY).create(init_params(TINY.model, key))
        state = jax.jit(create, out_shardings=shardings)(jax.random.key(0))
    found = memory.account(TINY, mesh, devices=8, batch=4, length=256)
    for part, tree in ((found.parameters, state.params), (found.optimizer, state.opt_state)):
        shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
        of_device = lambda device: sum(s.data.nbytes for s in shards if s.device == device)  # noqa: B023
        assert {of_device(device) for device in jax.devices()} == {part.chip}
        assert sum(s.data.nbytes for s in shards) == part.total


def test_parameters_lie_in_parts_over_the_sequence_too():
    one, eight = (memory.account(TINY, f"seq={n}", devices=n, batch=1, length=256) for n in (1, 8))
    assert eight.parameters.chip <= 1.02 * one.parameters.chip / 8


def test_what_remat_keeps():
    """Of a row: everything; attention's output and the layers' inputs; the inputs alone."""

    def kept(remat):
        model = TINY.model.clone(remat=remat, depth=8)
        return memory.kept(dataclasses.replace(TINY, model=model), 2, 256)

    none, attended, full = (kept(remat).tokens for remat in ("none", "attn_out", "full"))
    away = kept("offload(block_in)")
    inputs = 8 * 2 * 256 * 128 * 4
    assert full >= inputs
    assert attended - full == pytest.approx(8 * 2 * 256 * (4 * 32 * 4 + 4 * 4), rel=0.1)
    assert none > 2 * attended
    assert (away.tokens, away.host) == (full - inputs, inputs)


@pytest.mark.slow
def test_the_peak_is_near_the_compilers():
    """On this machine's compiler, which keeps what the formula counts and little else."""
    model = TINY.model.clone(remat="full", mlp_block=64, depth=8)
    experiment = dataclasses.replace(TINY, model=model, sequence="ring", layout="contiguous")
    experiment = exchange.at(experiment, "seq=4", devices=4, batch=1, length=8192)
    placed = make_mesh("seq=4", jax.devices()[:4])
    compiled = topology.lower(experiment, placed).compile().memory_analysis()
    compiled = compiled.argument_size_in_bytes + compiled.temp_size_in_bytes
    counted = memory.account(experiment, "seq=4", devices=4, batch=1, length=8192).peak
    assert 0.4 < counted / compiled < 1.5


def test_the_mesh_must_fit():
    with pytest.raises(BadInput, match="mesh: seq=3: multiplies to 3"):
        memory.account(TINY, "seq=3", devices=8, batch=1, length=256)


def test_bytes_of_all_chips_count_copies():
    found = memory.account(TINY, "data=8", devices=8, batch=8, length=256)
    params = jax.eval_shape(lambda: init_params(TINY.model, jax.random.key(0)))
    size = sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert found.parameters == memory.Bytes(size, 8 * size)

"""The cost model: bytes as programs of this machine send them, flops as counted elsewhere, bad chips refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import pytest

from jaxlong.config import load
from jaxlong.core.types import BadInput
from jaxlong.parallel.mesh import make_mesh
from jaxlong.plan import cost, exchange, hlo, topology
from jaxlong.run import flops_per_token

ROOT = Path(__file__).parent.parent.parent
TINY = load(str(ROOT / "configs/tiny.py"))
LLAMA = load(str(ROOT / "configs/llama3_8b.py"))
BIG = {"mesh": "fsdp=4,seq=64", "devices": 256, "batch": 4, "length": 2**20}


def placed(strategy: str, remat: str = "attn_out") -> object:
    return dataclasses.replace(TINY, model=TINY.model.clone(remat=remat), sequence=strategy, layout="contiguous")


@pytest.mark.thorough
@pytest.mark.parametrize(("strategy", "mesh"), [("ring", "seq=4"), ("all_gather", "seq=4"), ("usp", "seq=2,ulysses=2")])
def test_bytes_are_those_of_the_compiled_step(strategy, mesh):
    """Gathers of weights and keys, scattered gradients, hops: all that a device sends, counted and predicted."""
    experiment = exchange.at(placed(strategy), mesh, devices=4, batch=1, length=1024)
    compiled = topology.lower(experiment, make_mesh(mesh, jax.devices()[:4])).compile()
    counted = sum(kind.bytes for kind in hlo.read(compiled.as_text()).collectives.values())
    predicted = cost.step(experiment, "TPU v5", mesh=mesh, devices=4, batch=1, length=1024).sent
    assert 0.6 < sum(predicted.values()) / counted < 1.6


def test_flops_are_those_of_the_run():
    step = cost.step(LLAMA, "TPU v6 lite", **BIG)
    assert step.flops == 4 * 2**20 * flops_per_token(LLAMA.model, 2**20)
    assert step.flops < step.hardware_flops < 4 / 3 * step.flops
    full = dataclasses.replace(LLAMA, model=LLAMA.model.clone(remat="full"))
    assert cost.step(full, "TPU v6 lite", **BIG).hardware_flops == pytest.approx(4 / 3 * step.flops)


def test_at_a_million_tokens_the_ring_hides_and_attention_is_most():
    step = cost.step(dataclasses.replace(LLAMA, sequence="ring"), "TPU v6 lite", **BIG)
    assert step.seconds["attention"] > 5 * step.seconds["products"]
    assert 0.3 < step.mfu < 0.5
    assert step.total == sum(step.seconds.values())


def test_devices_that_nothing_is_known_of():
    with pytest.raises(BadInput, match="device: cpu: its peak is not known; one of TPU v4"):
        cost.step(TINY, "cpu", mesh="seq=2", devices=2, batch=1, length=256)

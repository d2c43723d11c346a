"""TPU systems by name, and training steps compiled for them where the compiler is installed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from jaxlong.config import load
from jaxlong.core.types import BadInput
from jaxlong.plan import topology

ROOT = Path(__file__).parent.parent.parent
TINY = load(str(ROOT / "configs/tiny.py"))


@pytest.mark.parametrize(
    ("name", "chips", "devices"),
    [("v6e:16x16", 256, 256), ("v4:8x8x16", 1024, 1024), ("tpu7x:4x4x4", 64, 128), ("v5p:2x2x1", 4, 4)],
)
def test_systems_by_name(name, chips, devices):
    found = topology.parse(name)
    assert (found.chips, found.devices) == (chips, devices)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("v6:16x16", "topology: v6:16x16: no family 'v6' is known; did you mean v6e?"),
        ("v5e-8", "topology: v5e-8: no family 'v5e-8' is known; did you mean v5e?"),
        ("gpu", "topology: gpu: no family 'gpu' is known; one of v4, v5e, v5p, v6e, tpu7x"),
        ("v6e", "topology: v6e: is no shape of chips; for example v6e:16x16"),
        ("v6e:8*8", "topology: v6e:8*8: is no shape of chips; for example v6e:16x16"),
        ("v5p:16x16", "topology: v5p:16x16: v5p has 3 dimensions; for example v5p:16x16x16"),
        ("v5p:3x3x3", "topology: v5p:3x3x3: hosts hold 2x2x1 chips; nearest: v5p:4x4x3"),
    ],
)
def test_other_names_are_refused_in_a_line(name, line):
    with pytest.raises(BadInput) as error:
        topology.parse(name)
    assert str(error.value) == line


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="the TPU compiler is not installed; pip install"):
        topology.described(topology.parse("v6e:4x4"))


def test_what_does_not_fit_is_a_report():
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (514.00G) exceeds available HBM (15.75G).\nHLO module: jit_f."
    )
    found = topology._refused(RuntimeError(message), topology.parse("v5e:4x4"), 1.0, 2.0)
    assert (found.fits, found.peak_gib, found.hbm_gib, found.compile_s) == (False, 514.0, 15.75, 2.0)
    assert found.error.endswith("(15.75G).")
    with pytest.raises(RuntimeError, match="INTERNAL"):
        topology._refused(RuntimeError("INTERNAL: no"), topology.parse("v5e:4x4"), 1.0, 2.0)


def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_compiled():
    with pytest.raises(BadInput, match="mesh: seq=3: multiplies to 3, but there are 16 devices"):
        topology.compile_step(TINY, topology.parse("v6e:4x4"), mesh="seq=3", batch=1, length=4096)


@pytest.mark.slow
@pytest.mark.parametrize("system", ["v5e:2x4", "v5p:2x2x2", "v6e:2x4"])
def test_a_small_step_compiles_and_its_ring_is_hidden(system):
    pytest.importorskip("libtpu")
    model = TINY.model.clone(remat="full", mlp_block=512)
    experiment = dataclasses.replace(TINY, model=model, sequence="ring", layout="zigzag")
    found = topology.compile_step(experiment, topology.parse(system), mesh="fsdp=2,seq=4", batch=2, length=32768)
    assert found.fits and 0 < found.peak_gib < 1
    assert found.permutes["synchronous"] == 0
    assert found.permutes["hidden"] == found.permutes["asynchronous"] > 0


@pytest.mark.slow
def test_too_long_a_row_is_a_report():
    pytest.importorskip("libtpu")
    model = TINY.model.clone(width=1024)
    experiment = dataclasses.replace(TINY, model=model, sequence="ring", layout="zigzag")
    found = topology.compile_step(experiment, topology.parse("v5e:2x2"), mesh="seq=4", batch=1, length=2**22)
    assert not found.fits
    assert found.peak_gib > found.hbm_gib == 15.75

"""What layouts and strategies cost: work, round trips, and the choice between strategies."""

from __future__ import annotations

import itertools
import logging

import jax
import numpy as np
import pytest

from jaxlong.core.mask import causal, full, sliding
from jaxlong.core.types import BadInput
from jaxlong.parallel.balance import cp_imbalance, critical_path
from jaxlong.parallel.cost import DEVICES, Shape, costs, device, quickest
from jaxlong.parallel.flags import compile_with, recommended_flags
from jaxlong.parallel.halo import window
from jaxlong.parallel.layout import order
from jaxlong.parallel.torus import round_trip
from jaxlong.parallel.ulysses import share_heads


@pytest.mark.parametrize("devices", [1, 2, 3, 7, 8])
def test_critical_path(devices):
    of = lambda layout, mask: critical_path(layout, devices, 128 * devices, mask, 2)
    assert of("zigzag", causal()) <= 1.01
    assert of("contiguous", causal()) == pytest.approx(2 - 1 / devices, rel=0.02)
    assert of("contiguous", full()) == 1
    assert of("contiguous", sliding(16)) == pytest.approx(1, abs=0.05)


def test_critical_path_counts_tiles():
    """Two devices of two blocks: contiguous visits 3 tiles, then 4, of 10 in all."""
    assert critical_path("contiguous", 2, 16, causal(), 4) == 7 / 5
    with pytest.raises(BadInput, match="length: 18: 2 devices hold no whole blocks of 4; nearest: 16"):
        critical_path("contiguous", 2, 18, causal(), 4)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_imbalance_of_packed_rows(layout):
    """Against a count of pairs."""
    ids = np.sort(np.random.default_rng(0).integers(0, 5, (3, 48)), axis=1)
    pairs = (ids[:, :, None] == ids[:, None]) & np.tri(48, dtype=bool)
    work = pairs.sum(2)[:, order(layout, 48, 4)].reshape(3, 4, -1).sum((0, 2))
    assert cp_imbalance(ids, layout, 4) == pytest.approx(work.max() / work.mean())
    assert cp_imbalance(jax.numpy.asarray(ids), layout, 4) == pytest.approx(work.max() / work.mean())


def test_imbalance_of_whole_rows():
    ids = np.ones((1, 800), np.int32)
    assert cp_imbalance(ids, "zigzag", 8) == pytest.approx(1)
    assert cp_imbalance(ids, "contiguous", 8) == pytest.approx(2 - 1 / 8, rel=0.01)


@pytest.mark.parametrize("box", [(2, 2), (4, 8), (3, 4), (1, 4, 4), (3, 3, 2), (4, 4, 4), (2, 3, 1, 2)], ids=str)
def test_round_trips_are_single_links(box):
    coords = list(itertools.product(*map(range, box)))
    walk = np.array(coords)[round_trip(coords)]
    assert len({*map(tuple, walk)}) == len(coords)
    assert (np.abs(walk - np.roll(walk, -1, axis=0)).sum(1) == 1).all()


@pytest.mark.parametrize("coords", [[(0, 0), (0, 1), (1, 0)], [(0, 0)] * 4, [(0,), (1,)], [*np.ndindex(3, 3)]], ids=len)
def test_no_round_trip(coords):
    assert round_trip(coords) is None


@pytest.mark.parametrize(("heads", "kv_heads", "devices"), [(8, 8, 4), (8, 2, 4), (7, 7, 4), (6, 2, 4), (32, 8, 16)])
def test_devices_share_heads(heads, kv_heads, devices):
    """Every query head is somewhere, first come in order, and beside it the key head that it looks at."""
    queries, keys = share_heads(heads, kv_heads, devices)
    each = -(-heads // devices)
    assert queries.shape == (devices, each) and (queries.reshape(-1)[:heads] == np.arange(heads)).all()
    assert each % keys.shape[1] == 0
    looked_at = np.repeat(keys, each // keys.shape[1], axis=1)
    assert (looked_at == queries // (heads // kv_heads)).all()


def test_windows_take_what_they_reach():
    assert window(sliding(9, 2), 16, "contiguous", 4) == (8, 2)
    assert window(sliding(9), 16, "zigzag", 4) == (8, 0)
    assert window(sliding(9) & causal(), 16, "striped", 4) is None
    assert window(sliding(9), 16, None, 4) is None  # nothing is known of the keys' order
    assert window(sliding(49), 16, "contiguous", 4) is None  # the ring sends no more
    assert window(causal(), 16, "contiguous", 4) is None


def shape(**sizes):
    return Shape(**{"batch": 1, "length": 2**18, "heads": 32, "kv_heads": 8, "head_dim": 128} | sizes)


def test_the_cost_model():
    """Volumes by the formulas, for plain multi-head attention in bfloat16."""
    found = costs(shape(kv_heads=32), ring=4, ulysses=2, device=DEVICES["TPU v5"])
    kv = 2**18 * 32 * 256  # elements of all keys and values
    assert found["all_gather"].sent == 7 / 8 * kv * 8
    assert found["ring"].sent == 7 / 8 * kv * 8 + kv / 8 * 4
    assert found["ulysses"].sent == 2 * 7 / 8 * kv / 8 * 2 * 2
    assert found["usp"].sent == 2 * 1 / 2 * kv / 8 * 2 * 2 + (3 * 8 + 4) * kv / 8
    assert found["ring"].flops == found["ulysses"].flops
    assert "usp" not in costs(shape(), ring=8, device=DEVICES["TPU v5"])


def test_auto():
    a_switch, torus = device("NVIDIA H200"), device("TPU v5 lite")
    assert quickest(shape(length=2**14), a_switch, ring=8) == "ulysses"
    assert quickest(shape(length=2**22), torus, ring=256) == "ring"  # keys of all do not fit
    assert quickest(shape(heads=3, kv_heads=3, length=2**20), a_switch, ring=8) == "ring"  # most of 8 would idle
    assert device("a new one") == DEVICES["NVIDIA A100"]
    assert device("TPU v5 lite") != device("TPU v5p")


def test_unknown_compiler_options_are_left_out(caplog):
    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    with caplog.at_level(logging.WARNING):
        assert compile_with(lowered, {"xla_no_such_thing": "true"})(1.0) == 2
    assert caplog.messages == ["xla_no_such_thing: no such compiler option; left out"]
    assert recommended_flags("cuda") == recommended_flags("gpu") != {} == recommended_flags("cpu")

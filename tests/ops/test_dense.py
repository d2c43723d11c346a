"""Dense attention against float64 NumPy, and that NumPy against finite differences."""

from __future__ import annotations

import numpy as np
import pytest
from attention_oracle import MASKS, assert_same, attention, case

from jaxlong.ops.dense import dense

ALL = ("bias", "alibi", "cap", "sinks", "segments")


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("full", {}),
        ("causal", {"T": 20, "S": 33, "V": 8, "features": ("segments",)}),
        ("sliding", {"H": 6, "K": 1, "features": ("row-bias", "cap")}),
        ("dilated", {"K": 4, "features": ALL}),
        ("two-sided", {"T": 1, "S": 20, "features": ("alibi", "sinks")}),
        ("nothing", {"T": 5}),
    ],
)
def test_equals_numpy(name, sizes):
    inputs = case(name, **sizes)
    assert_same(inputs.run(dense), inputs.oracle(), 2e-6)


def test_the_oracle_by_finite_differences():
    inputs = case("dilated", B=1, T=17, H=2, K=1, C=4, features=ALL)
    floats = {name: np.asarray(x, np.float64) for name, x in inputs.floats.items()}
    ints = {name: np.asarray(x) for name, x in inputs.ints.items()}
    dout, dlse = np.asarray(inputs.dout, np.float64), np.asarray(inputs.dlse, np.float64)

    def objective(floats):
        out, lse, _ = attention(**floats, **ints, sees=MASKS["dilated"][1], **inputs.options)
        return (out * dout).sum() + (lse * dlse).sum()

    gradients = inputs.oracle()[1]
    random = np.random.default_rng(1)
    for name, x in floats.items():
        step = 1e-6 * random.standard_normal(x.shape)
        up, down = objective({**floats, name: x + step}), objective({**floats, name: x - step})
        assert abs((up - down) / 2 - (gradients[name] * step).sum()) < 1e-11, name

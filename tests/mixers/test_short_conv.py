"""The gated short convolution against a loop over tokens."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlong.core.types import BadInput
from jaxlong.mixers import ShortConv


def loop(p, x):
    """One row [T D], float64."""
    width, out = p["conv"].shape[0], []
    gates = p.get("gate_bias", np.zeros((2, p["conv"].shape[1])))
    inside = []
    for t in range(len(x)):
        before, after, u = (x[t] @ p["w_in"][:, i] for i in range(3))
        inside.append((before + gates[0]) * u)
        z = p.get("conv_bias", 0) + sum(p["conv"][-1 - j] * inside[t - j] for j in range(min(width, t + 1)))
        out.append(((after + gates[1]) * z) @ p["w_out"])
    return np.array(out)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ShortConv.examples())
@pytest.mark.parametrize("length", [40, 3, 1])
def test_against_a_loop(name, length):
    mixer = ShortConv.examples()[name]
    x = jax.random.normal(jax.random.key(0), (2, length, 12))
    positions = jnp.broadcast_to(jnp.arange(length), (2, length))
    params = nn.unbox(mixer.init(jax.random.key(1), x, positions=positions))["params"]
    params = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(jax.random.key(p.size), p.shape), params)
    y, _ = mixer.apply({"params": params}, x, positions=positions)
    wide = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    want = np.stack([loop(wide, np.asarray(row, np.float64)) for row in x])
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("fields, say", [({"width": 1}, "width: 1"), ({"channels": 0}, "channels: 0")])
def test_bad_input(fields, say):
    with pytest.raises(BadInput, match=say):
        ShortConv(**fields)

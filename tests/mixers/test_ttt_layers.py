"""TTT layers equal the authors' implementation, values and gradients (golden/make_ttt.py)."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlong.core.position import Rope
from jaxlong.core.types import BadInput
from jaxlong.mixers import TTTMLP, TTTLinear

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "ttt.npz")
MIXERS = {
    "linear": TTTLinear(heads=2, head_dim=6, mini_batch=8),
    "linear_mamba": TTTLinear(heads=2, head_dim=4, mini_batch=4, conv=4, gate=True),
    "mlp": TTTMLP(heads=1, head_dim=8),
    "mlp_mamba": TTTMLP(heads=3, head_dim=4, mini_batch=4, base_lr=0.3, conv=4, gate=True),
}


def golden(prefix: str):
    """Arrays whose name begins with the prefix, in float32."""
    return {k.removeprefix(prefix): jnp.asarray(GOLDEN[k], jnp.float32) for k in GOLDEN.files if k.startswith(prefix)}


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1.0, float(np.abs(want).max())))


@pytest.mark.thorough
@pytest.mark.parametrize("name", MIXERS)
def test_the_authors_layer(name):
    arrays, params = golden(f"{name}/"), golden(f"{name}/params/")
    positions = jnp.broadcast_to(jnp.arange(arrays["x"].shape[1]), arrays["x"].shape[:2])

    def loss(params, x):
        y, _ = MIXERS[name].apply({"params": params}, x, positions=positions)
        return (y * arrays["weights"]).sum(), y

    (slopes, slope), y = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, arrays["x"])
    close(y, arrays["y"])
    close(slope, arrays["grad/x"])
    jax.tree.map(close, slopes, golden(f"{name}/grad/params/"))


@pytest.mark.parametrize("field", ["heads", "head_dim", "mini_batch", "expansion", "conv", "base_lr"])
def test_bad_fields(field):
    good = TTTMLP(heads=2, head_dim=4)
    with pytest.raises(BadInput, match=field):
        good.clone(**{field: 1 if field == "conv" else 0})
    with pytest.raises(BadInput, match="rotary_dim"):
        good.clone(position=Rope(rotary_dim=6))

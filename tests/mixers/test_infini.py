"""Infini-attention: the gate between local attention and the memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxlong.core.mask import causal
from jaxlong.core.types import BadInput
from jaxlong.mixers import GQA, InfiniAttention


def setup(mixer, length, width=12, seed=0):
    x = jax.random.normal(jax.random.key(seed), (2, length, width))
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), x.shape[:2])
    params = nn.unbox(jax.jit(mixer.init)(jax.random.key(1), x, positions=positions))["params"]
    return {**params, "beta": jnp.asarray([-1.0, 0.5, 2.0, 0.0])}, x, positions


def test_one_segment_is_local_attention_times_one_minus_the_gate():
    mixer = InfiniAttention(heads=4, kv_heads=2, head_dim=6, segment=9)
    params, x, positions = setup(mixer, 9)
    local = GQA(heads=4, kv_heads=2, head_dim=6, mask=causal())
    shared = {name: params[name] for name in ("wq", "wk", "wv")}
    wo = params["wo"] * (1 - jax.nn.sigmoid(params["beta"]))[:, None, None]
    want = jax.jit(local.apply)({"params": {**shared, "wo": wo}}, x, positions=positions)[0]
    got = jax.jit(mixer.apply)({"params": params}, x, positions=positions)[0]
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("update", ["linear", "delta"])
def test_an_open_gate_reads_the_memory_alone(update):
    """Without positions, a memory of constant values gives that value back: s(q) M / (s(q) z) is their mean."""
    mixer = InfiniAttention(heads=4, kv_heads=2, head_dim=6, segment=3, update=update)
    params, x, positions = setup(mixer, 12)
    x = x.at[:, :, 0].set(1.0)
    wv = jnp.zeros_like(params["wv"]).at[0].set(params["wv"][0])  # values do not depend on the token
    params = {**params, "beta": jnp.full(4, 40.0), "wv": wv}
    got = jax.jit(mixer.apply)({"params": params}, x, positions=positions)[0]
    value = jnp.repeat(wv[0], 2, axis=0)
    want = jnp.einsum("hc,hcd->d", value, params["wo"])
    np.testing.assert_allclose(got[:, 3:6], jnp.broadcast_to(want, (2, 3, 12)), atol=1e-5)
    np.testing.assert_allclose(got[:, :3], 0, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"segment": 0}, "segment: 0: is too small; 1 or more"),
        ({"kv_heads": 3}, r"kv_heads: 3: does not divide heads = 4; one of \[1, 2, 4\]"),
        ({"update": "square"}, "update: square: no such value; one of linear, delta"),
    ],
)
def test_bad_input(fields, line):
    with pytest.raises(BadInput, match=line):
        InfiniAttention(**{"heads": 4, "kv_heads": 2, "head_dim": 6, **fields})


def test_a_state_of_another_shape_is_refused():
    mixer = InfiniAttention(heads=4, kv_heads=2, head_dim=6, segment=3)
    params, x, positions = setup(mixer, 4)
    state = mixer.clone(head_dim=8).init_state(2, 4, width=12, max_chunk=4, dtype=x.dtype)
    with pytest.raises(BadInput, match=r"state\[0\]\.k: float32\[2, 4, 2, 8\]: was made for other inputs"):
        mixer.apply({"params": params}, x, positions=positions, state=state)

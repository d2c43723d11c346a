"""Blockwise attention equals float64 NumPy, dense attention, and itself in another order."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import assert_same, case

from jaxlong.core.types import BadInput
from jaxlong.ops.blockwise import blockwise
from jaxlong.ops.dense import dense

small = partial(blockwise, block_q=16, block_k=24)
ALL = ("bias", "alibi", "cap", "sinks", "segments")


# ---------------------------------------------------------------------------------------------- agreement


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("full", {"T": 1, "S": 1}),
        ("full", {"T": 7, "S": 130, "H": 3, "K": 1, "features": ("row-bias", "sinks")}),
        ("causal", {"T": 130, "H": 8, "K": 2, "V": 8}),
        ("causal", {"T": 1, "S": 63, "K": 1, "features": ("sinks", "segments")}),
        ("causal", {"features": ALL}),
        ("sliding", {}),
        ("two-sided", {"T": 63, "S": 130, "K": 4, "features": ("alibi",)}),
        ("global", {"B": 1, "features": ("segments",)}),
        ("dilated", {"T": 48, "K": 1, "features": ("cap", "bias")}),
        ("nothing", {"T": 7, "features": ("alibi",)}),
    ],
    ids=str,
)
def test_equals_numpy(name, sizes):
    inputs = case(name, **sizes)
    assert_same(inputs.run(small), inputs.oracle(), 2e-6)


def test_equals_dense_in_default_blocks():
    inputs = case("causal", B=1, T=1030, H=2, K=2, C=32)
    assert_same(inputs.run(blockwise), inputs.run(dense), 2e-6)


def test_positions_in_any_order():
    """A permutation of the tokens permutes the results."""
    inputs, shuffled = case("sliding"), case("sliding")
    order = np.random.default_rng(0).permutation(63)
    shuffled.floats = {name: x[:, order] for name, x in inputs.floats.items()}
    shuffled.ints = {name: x[:, order] for name, x in inputs.ints.items()}
    shuffled.dout, shuffled.dlse = inputs.dout[:, order], inputs.dlse[:, order]
    assert_same(shuffled.run(small), jax.tree.map(lambda x: x[:, order], inputs.run(small)), 2e-6)


def test_bfloat16_is_no_worse_than_twice_the_naive_error():
    """FlashAttention's rule: twice the error of plain bfloat16 attention forward, three times for gradients."""
    inputs = case("causal", dtype=jnp.bfloat16, features=("bias", "cap", "sinks", "segments"))

    def naive(q, k, v, *, mask, q_positions, k_positions, q_segments=None, k_segments=None, scale, **features):
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
        scores = jnp.einsum("bthc,bshc->bhts", q, k) * scale
        if (cap := features.get("soft_cap")) is not None:
            scores = cap * jnp.tanh(scores / cap)
        seen = mask(q_positions[:, None, :, None], k_positions[:, None, None, :])
        if q_segments is not None:
            seen &= (q_segments[:, None, :, None] == k_segments[:, None, None]) & (k_segments[:, None, None] >= 0)
        scores = jnp.where(seen, scores + features.get("bias", 0), -1e30)
        sink = features.get("sinks", jnp.full(q.shape[2], -1e30))[None, :, None, None].astype(q.dtype)
        every = jnp.concatenate([scores, jnp.broadcast_to(sink, (*scores.shape[:3], 1))], -1)
        weights = jnp.where(seen, jax.nn.softmax(every, -1)[..., :-1], 0).astype(q.dtype)
        lse = jax.nn.logsumexp(every, -1).astype(jnp.float32).swapaxes(1, 2)
        return jnp.einsum("bhts,bshv->bthv", weights, v), lse

    (want, _), want_gradients = inputs.oracle()
    (got, _), got_gradients = inputs.run(small)
    (plain, _), plain_gradients = inputs.run(naive)
    assert got.dtype == jnp.bfloat16
    error = lambda x, y: np.abs(np.asarray(x, np.float64) - y).max()
    assert error(got, want) <= 2 * error(plain, want)
    for name, exact in want_gradients.items():
        assert error(got_gradients[name], exact) <= 3 * error(plain_gradients[name], exact) + 1e-4, name


def test_a_block_of_no_tokens():
    with pytest.raises(BadInput, match=r"block_q: 0: .*; 1 or more"):
        case("full", T=7).run(partial(blockwise, block_q=0))

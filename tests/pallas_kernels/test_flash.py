"""Flash attention without a GPU: the kernels' algorithm against the oracle, what is refused, and lowering for CUDA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flash_cases import arguments

from jaxlong.core.mask import bigbird, causal, dilated, fixed, full, longformer, prefix, sinks, sliding, strided
from jaxlong.ops import Backend, attend
from jaxlong.ops.dense import dense
from pallas_kernels import flash, hopper
from pallas_kernels.flash import ref, twin

CASES = {
    "causal": (causal(), {}),
    "uneven": (causal(), {"T": 45, "S": 37}),
    "window": (sliding(9) | sinks(2), {}),
    "mixed": (causal(), {"B": 2, "mixed": True}),
    "packed": (causal(), {"B": 2, "packed": True}),
    "soft cap": (causal(), {"soft_cap": 2.0}),
    "slopes": (causal(), {"slopes": True}),
    "sinks": (sliding(5), {"sinks": True}),
    "empty rows": (~causal(), {"H": 4, "K": 2}),
    "heads": (dilated(16, 2), {}),
}


def close(got, want, at=2e-5):
    finite = np.isfinite(want)
    np.testing.assert_array_equal(np.isfinite(got), finite)
    np.testing.assert_allclose(np.where(finite, got, 0), np.where(finite, want, 0), atol=at, rtol=at)


@pytest.mark.thorough
@pytest.mark.parametrize("name", CASES)
def test_the_twin_is_the_oracle(name):
    mask, changes = CASES[name]
    setting, inputs, _, _ = arguments(mask, **changes)
    for got, want in zip(twin.forward(setting, inputs, 16, 8), ref.attention(setting, inputs), strict=True):
        close(got, want)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["causal", "packed", "soft cap", "empty rows"])
def test_the_twin_has_the_oracles_gradients(name):
    mask, changes = CASES[name]
    setting, inputs, dout, dlse = arguments(mask, **changes)

    def run(q, k, v):
        out, lse = ref.attention(setting, inputs._replace(q=q, k=k, v=v))
        return out, jnp.where(lse == -jnp.inf, 0, lse)

    (out, _), pull = jax.vjp(run, inputs.q, inputs.k, inputs.v)
    lse = ref.attention(setting, inputs)[1]
    dlse = jnp.where(lse == -jnp.inf, 0, dlse)
    found = twin.backward(setting, inputs, out, lse, dout, dlse, 16, 8)
    for got, want in zip(found, pull((dout, dlse)), strict=True):
        close(got, want)


@pytest.mark.parametrize("name", ["packed", "slopes", "sinks", "soft cap"])
def test_the_oracle_is_dense_attention(name):
    mask, changes = CASES[name]
    setting, inputs, _, _ = arguments(mask, **changes)
    want = dense(
        inputs.q,
        inputs.k,
        inputs.v,
        mask=mask,
        q_positions=inputs.q_positions,
        k_positions=inputs.k_positions,
        q_segments=inputs.q_segments,
        k_segments=inputs.k_segments,
        alibi_slopes=inputs.slopes,
        soft_cap=setting.soft_cap,
        sinks=inputs.sinks,
    )
    for got, expected in zip(ref.attention(setting, inputs), want, strict=True):
        close(got, expected)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": jnp.float32}, "float32"),
        ({"C": 80, "V": 80}, "dims 80 and 80"),
        ({"scale": -1.0}, "not positive"),
        ({}, "jax|Hopper"),
    ],
)
def test_a_refusal_says_why(changes, reason):
    setting, inputs, _, _ = arguments(causal(), **({"C": 64, "V": 64, "dtype": jnp.bfloat16} | changes))
    assert np.any([word in flash.refusal(setting, inputs) for word in reason.split("|")])


def test_attend_names_the_refusal():
    x = jnp.ones((1, 8, 2, 64), jnp.float32)
    positions = jnp.arange(8, dtype=jnp.int32)[None]
    with pytest.raises(NotImplementedError, match="flash: q, k and v of float32"):
        attend(x, x, x, mask=causal(), q_positions=positions, k_positions=positions, backend=Backend(kernel="flash"))


@pytest.mark.skipif(jax.__version_info__ < hopper.OLDEST_JAX, reason="Mosaic GPU of this jax lacks what kernels use")
@pytest.mark.parametrize("sequence", ["ring", "all_gather", "ulysses"])
@pytest.mark.thorough
def test_sequence_parallel_gradients_lower_for_cuda(sequence, monkeypatch):
    """Types inside `shard_map` say over which axes a value varies; those of a kernel's results must, too."""
    monkeypatch.setattr(flash, "refusal", lambda setting, inputs: None)
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct((2, 1024), jnp.int32)
    backend = Backend(kernel="flash", sequence=sequence)

    def loss(q, k, v, at):
        out = attend(q, k, v, mask=causal(), q_positions=at, k_positions=at, backend=backend)
        return out.astype(jnp.float32).sum()

    with jax.set_mesh(jax.make_mesh((2,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))):
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(
            shape(2, 1024, 4, 128), shape(2, 1024, 2, 128), shape(2, 1024, 2, 128), tokens
        )
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


LOWERED = {
    "causal": (causal(), {}),
    "window": (sliding(4096), {}),
    "packed": (causal(), {"packed": True}),
    "soft cap": (causal(), {"soft_cap": 50.0}),
    "slopes and sinks": (causal(), {"slopes": True, "sinks": True}),
    "float16": (causal(), {"dtype": jnp.float16}),
    "64": (causal(), {"C": 64, "V": 64}),
    "256": (causal(), {"C": 256, "V": 256}),
    "192 and 128": (causal(), {"C": 192, "V": 128}),
    "192 and 128 packed": (causal(), {"C": 192, "V": 128, "packed": True}),
    "256 packed": (causal(), {"C": 256, "V": 256, "packed": True}),
    "groups": (causal(), {"H": 8, "K": 2}),
    "uneven": (causal(), {"T": 1001, "S": 1003}),
    "full": (full(), {}),
    "not": (~causal(), {}),
    "dilated": (dilated(512, 4), {}),
    "strided": (strided(128), {}),
    "fixed": (fixed(128, 16), {}),
    "longformer": (longformer(512, 64), {}),
    "bigbird": (bigbird(3, 1, 3, 64, 0) & causal(), {}),
    "prefix": (prefix(100) & sliding(512, 64), {}),
}


@pytest.mark.skipif(jax.__version_info__ < hopper.OLDEST_JAX, reason="Mosaic GPU of this jax lacks what kernels use")
@pytest.mark.parametrize("name", LOWERED)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.thorough
def test_kernels_lower_for_cuda(direction, name):
    mask, changes = LOWERED[name]
    setting, inputs, dout, dlse = arguments(mask, **({"C": 128, "V": 128, "T": 1024, "dtype": jnp.bfloat16} | changes))
    run = lambda inputs: flash.forward(setting, inputs)
    if direction == "backward":
        run = lambda inputs: flash.backward(setting, inputs, dout, dlse, dout, dlse)
    lower = lambda: jax.jit(run).trace(inputs).lower(lowering_platforms=("cuda",)).as_text()
    if direction == "backward" and inputs.q.shape[-1] > 128:
        with pytest.raises(NotImplementedError, match=r"registers|shared memory"):
            lower()
    else:
        assert "mosaic_gpu" in lower()

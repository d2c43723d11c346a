"""Flash attention on a Hopper GPU: JAX_PLATFORMS=cuda python -m pytest tests/pallas_kernels -m gpu -n0

The rule is FlashAttention's: an error against exact attention of at most twice that of plain attention whose matrices
are rounded to the same type.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flash_cases import arguments

from jaxlong.core.mask import bigbird, causal, dilated, fixed, full, longformer, sinks, sliding, strided
from pallas_kernels import flash
from pallas_kernels.flash import Inputs, ref

pytestmark = pytest.mark.gpu

SEEDS = 60
"""Random inputs of each shape; every third of them with other positions or documents."""

SLOPES = 0.05
"""Relative error allowed in the gradient of slopes: exact arithmetic on an out rounded to bfloat16 leaves 0.03."""

SHAPES = {
    "causal": (causal(), {"T": 640}),
    "uneven": (causal(), {"T": 333, "S": 451}),
    "short": (causal(), {"T": 24, "S": 520}),
    "one query": (sliding(300), {"T": 1, "S": 700, "mixed": True}),
    "window": (sliding(200), {"T": 900}),
    "two-sided": (sliding(65, 64), {"T": 900}),
    "window and sinks": (sliding(200) | sinks(4), {"T": 900, "mixed": True}),
    "mixed": (causal(), {"B": 2, "T": 513, "mixed": True}),
    "packed": (causal(), {"B": 2, "T": 640, "packed": True}),
    "packed, all ways": (full(), {"B": 2, "T": 640, "packed": True, "mixed": True}),
    "soft cap": (causal(), {"T": 640, "soft_cap": 20.0}),
    "slopes": (causal(), {"T": 640, "slopes": True}),
    "slopes and cap": (sliding(250), {"T": 640, "slopes": True, "soft_cap": 20.0, "packed": True}),
    "logits": (sliding(100), {"T": 640, "sinks": True}),
    "empty rows": (~causal(), {"T": 640, "mixed": True}),
    "groups": (causal(), {"B": 2, "T": 640, "H": 8, "K": 2}),
    "one key head": (sliding(300), {"T": 640, "H": 6, "K": 1, "packed": True}),
    "float16": (causal(), {"T": 640, "dtype": jnp.float16}),
    "dims 64": (causal(), {"T": 640, "C": 64, "V": 64}),
    "dims 64 packed": (full(), {"T": 640, "C": 64, "V": 64, "packed": True, "dtype": jnp.float16}),
    "dims 192 and 128": (causal(), {"T": 640, "C": 192, "V": 128}),
    "dims 256": (causal(), {"T": 640, "C": 256, "V": 256, "packed": True}),
    "dilated": (dilated(256, 2), {"T": 1024, "H": 4}),
    "strided": (strided(64), {"T": 1024}),
    "fixed": (fixed(128, 16), {"T": 1024}),
    "longformer": (longformer(200, 10), {"T": 1024}),
    "bigbird": (bigbird(3, 1, 2, 64, 3) & causal(), {"T": 1024}),
    "bigbird mixed": (bigbird(3, 1, 2, 48, 3), {"T": 700, "mixed": True}),
    "other lengths": (causal(), {"T": 129, "S": 1025}),
    "hop": (causal(), {"T": 256, "S": 256}),
    "long": (sliding(1500), {"T": 4096}),
    "batch": (causal(), {"B": 5, "T": 300, "H": 3, "K": 3}),
    "full": (full(), {"T": 384}),
    "full, uneven": (full(), {"T": 385, "S": 127}),
}


def kernels(setting, inputs, dout, dlse):
    out, lse = flash.forward(setting, inputs)
    if inputs.q.shape[-1] > 128:
        return out, lse
    cut = jnp.where(lse == -jnp.inf, 0, dlse)
    dq, dk, dv, dslopes = flash.backward(setting, inputs, out, lse, dout, cut)
    return (out, lse, dq, dk, dv) if dslopes is None else (out, lse, dq, dk, dv, dslopes)


def exact(setting, inputs, dout, dlse, narrow=lambda x: x):
    """The oracle's results and gradients in float32, but for what `narrow` does."""
    wide = flash.Setting(setting.mask, setting.scale, setting.soft_cap, jnp.dtype(jnp.float32))
    names = ["q", "k", "v"] + (["slopes"] if inputs.slopes is not None else [])
    floats = {name: getattr(inputs, name).astype(jnp.float32) for name in names}
    (out, lse), pull = jax.vjp(lambda floats: ref.attention(wide, inputs._replace(**floats), narrow), floats)
    if inputs.q.shape[-1] > 128:
        return out, lse
    grads = pull((dout.astype(jnp.float32), jnp.where(lse == -jnp.inf, 0, dlse)))[0]
    return (out, lse, *(grads[name] for name in names))


@partial(jax.jit, static_argnums=0)
def compare(setting, inputs, dout, dlse):
    """Per result: the error of the kernels, of rounding, and whether both are finite in the same places."""
    found = kernels(setting, inputs, dout, dlse)
    form = jnp.finfo(setting.dtype)  # casts there and back are removed by the compiler
    rounded = exact(setting, inputs, dout, dlse, lambda x: jax.lax.reduce_precision(x, form.nexp, form.nmant))
    told = []
    for got, want, rough in zip(found, exact(setting, inputs, dout, dlse), rounded, strict=True):
        got = got.astype(jnp.float32)
        same = (jnp.isfinite(got) == jnp.isfinite(want)).all()
        norm = lambda x, want=want: jnp.linalg.norm(jnp.where(jnp.isfinite(want), x, 0).ravel())
        told.append((norm(got - want), norm(rough - want), norm(want), same))
    return told


@pytest.mark.parametrize("name", SHAPES)
def test_errors_are_those_of_rounding(name):
    mask, changes = SHAPES[name]
    changes = {"C": 128, "V": 128, "H": 2, "K": 2, "dtype": jnp.bfloat16} | changes
    for seed in range(SEEDS):
        setting, *given = arguments(mask, **changes, seed=seed)
        if seed % 3 == 1:  # peaked weights
            given[0] = given[0]._replace(q=given[0].q * 6)
        for i, (error, rounding, size, same) in enumerate(compare(setting, *given)):
            assert same, (name, seed, i)
            told = f"{name} {seed} {i}: {error:.2e}, of rounding {rounding:.2e}, of {size:.2e}"
            # slopes add up what the narrow out leaves of a row's sum, times the distance
            slack = SLOPES if i == 5 else 2e-4
            assert error <= 2 * rounding + slack * size + 1e-6, told


def test_masked_slots_may_hold_anything():
    """Keys of empty slots and queries' cotangents of empty rows, NaN."""
    setting, inputs, dout, dlse = arguments(
        causal(), B=2, T=640, C=128, V=128, H=2, K=2, dtype=jnp.bfloat16, packed=True, seed=4
    )
    empty = (inputs.k_segments < 0)[..., None, None]
    clean = kernels(setting, inputs, dout, dlse)
    spoiled = inputs._replace(k=jnp.where(empty, jnp.nan, inputs.k), v=jnp.where(empty, jnp.nan, inputs.v))
    for got, want in zip(kernels(setting, spoiled, dout, dlse), clean, strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


def test_a_hundred_runs_give_the_same_bits():
    setting, *given = arguments(sliding(700), B=2, T=2048, C=128, V=128, H=4, K=2, dtype=jnp.bfloat16, packed=True)
    run = jax.jit(partial(kernels, setting))
    first = run(*given)
    for _ in range(100):
        for a, b in zip(run(*given), first, strict=True):
            assert (a == b).all() | jnp.array_equal(a, b, equal_nan=True)


def test_gradients_go_through_the_entry():
    setting, inputs, dout, dlse = arguments(
        sliding(300), T=640, C=128, V=128, H=4, K=2, dtype=jnp.bfloat16, sinks=True, slopes=True
    )

    def loss(attention, floats):
        given = inputs._replace(**floats)
        out, lse = attention(setting, given)
        return (out.astype(jnp.float32) * dout).sum() + (lse * dlse).sum()

    floats = {name: getattr(inputs, name) for name in ("q", "k", "v", "slopes", "sinks")}
    found = jax.jit(jax.grad(partial(loss, flash.attention)))(floats)
    wanted = jax.jit(jax.grad(partial(loss, ref.attention)))(floats)
    for name, want in wanted.items():
        got, want = (np.asarray(x, np.float32) for x in (found[name], want))
        assert np.linalg.norm(got - want) <= 2e-2 * np.linalg.norm(want), name
    assert isinstance(inputs, Inputs)

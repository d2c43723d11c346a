"""The selective scan's kernels: twin and interpreted kernels against the oracle, compiled for TPUs not here."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_compiler import SYSTEMS, compiled_gradient, kernel_calls

from jaxlong.ops.scan import selective_scan
from pallas_kernels import scan
from pallas_kernels.scan import tpu, twin
from pallas_kernels.scan.config import Config, cost, search_space
from pallas_kernels.scan.ref import reference


def draw(length, *, width=20, states=5, batch=1, steps=0.3, dtype=jnp.float32):
    """x, dt, a, b, c, d, h0"""
    keys = jax.random.split(jax.random.key(0), 6)
    normal = lambda key, *shape: jax.random.normal(key, shape)
    dt = steps * jax.nn.softplus(normal(keys[1], batch, length, width))
    a = -jnp.exp(normal(keys[2], width, states))
    b, c = normal(keys[3], 2, batch, length, states)
    d, h0 = normal(keys[4], width), normal(keys[5], batch, width, states)
    return normal(keys[0], batch, length, width).astype(dtype), dt, a, b, c, d, h0


def begins(length, batch=1):
    return jax.random.uniform(jax.random.key(9), (batch, length)) < 0.04


def off(found, wanted):
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def values_and_gradients(run, inputs, resets):
    """y, h and the gradients of a mix of both."""
    to_y, to_h = (jax.random.normal(jax.random.key(5 + i), inputs[6 * i].shape) for i in (0, 1))

    def mixed(*inputs):
        y, h = run(*inputs, resets)
        return (y.astype(jnp.float32) * to_y).sum() + (h * to_h).sum(), (y, h)

    found, (y, h) = jax.jit(jax.grad(mixed, range(7), has_aux=True))(*inputs)
    return y, h, *found


def kernels(**how):
    return lambda *inputs: tpu.scan(Config(128, 128, **({"interpret": True} | how)), *inputs)


CASES = [
    (300, {"batch": 2, "width": 200}, True),
    (1, {}, False),
    (16, {"steps": 30.0}, False),
    (130, {"states": 16, "steps": 3.0}, True),
    (128, {"width": 128, "states": 8}, False),
]


@pytest.mark.thorough
@pytest.mark.parametrize(("length", "how", "documents"), CASES)
@pytest.mark.parametrize("run", [kernels(), twin.scan], ids=["kernels", "twin"])
def test_they_are_the_scan(run, length, how, documents):
    """Values and gradients; with steps of 30 a state decays by exp(-80) and more within a few tokens."""
    inputs = draw(length, **how)
    resets = begins(length, inputs[0].shape[0]) if documents else None
    found, wanted = values_and_gradients(run, inputs, resets), values_and_gradients(reference, inputs, resets)
    for one, other in zip(found, wanted, strict=True):
        assert off(one, other) < 3e-5


def test_16_bits_cost_no_more_than_rounding():
    inputs = draw(140, dtype=jnp.bfloat16)
    wide = (inputs[0].astype(jnp.float32), *inputs[1:])
    found, wanted = values_and_gradients(kernels(), inputs, None), values_and_gradients(reference, wide, None)
    for one, other in zip(found, wanted, strict=True):
        assert off(one, other) < 4e-3


def test_refusals_name_the_reason(monkeypatch):
    x, dt, a, b, c, d, _ = draw(16)
    with pytest.raises(NotImplementedError, match="the default device is no TPU but cpu"):
        scan.selective_scan(x, dt, a, b, c, d)
    with pytest.raises(NotImplementedError, match="x of float16, not bfloat16 or float32"):
        scan.selective_scan(x.astype(jnp.float16), dt, a, b, c, d)
    with pytest.raises(NotImplementedError, match="65 states a channel, more than 64"):
        scan.selective_scan(*draw(16, states=65)[:6])


def test_costs_and_settings():
    assert cost(1, 8, 128, 16, 2).bytes_accessed == 8 * 128 * 8
    assert Config.of(4096, 16) in search_space()
    assert Config.of(4096, 64).lanes == Config.of(64, 16).lanes == 128


def shapes(length, width, states, dtype):
    of_row = lambda dim, dtype=jnp.float32: jax.ShapeDtypeStruct((1, length, dim), dtype)
    rate = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    return of_row(width, dtype), of_row(width), rate(width, states), of_row(states), of_row(states), rate(width)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("width", "states"), [(4096, 16), (200, 3), (1024, 64)])
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_op_compiles_to_kernels(compile_well, system, width, states, dtype):
    found = compiled_gradient(system, selective_scan, shapes(8192, width, states, dtype))
    assert kernel_calls(found) == 2
    assert " while(" not in found.as_text()


@pytest.mark.thorough
@pytest.mark.parametrize("mesh", ["fsdp=2,tensor=2", "seq=4"])
@pytest.mark.parametrize("system", ["v6e:2x2", "v5e:2x2", "v5p:2x2x1"])
def test_every_device_of_a_mesh_runs_them(compile_well, system, mesh):
    """On its rows and channels, or on its spans of a row."""
    row = lambda x: jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype) if len(x.shape) == 3 else x
    given = [row(x) for x in shapes(4096, 512, 16, jnp.bfloat16)]
    assert kernel_calls(compiled_gradient(system, selective_scan, given, mesh)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize(("length", "width"), [(8192, 4096), (131072, 1024), (2**20, 128)])
def test_a_million_tokens_compile(compile_well, system, length, width):
    """No array of a state a token: less than 16 float32 a token and channel exist at once, gradients included."""
    found = compiled_gradient(system, selective_scan, shapes(length, width, 16, jnp.bfloat16))
    assert found.memory_analysis().peak_memory_in_bytes < length * width * 4 * 16

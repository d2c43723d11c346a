"""The delta rule's kernels: their twin against the oracle, gradients too, and what can be checked of them on a CPU."""

import re
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlong.ops.delta import delta_rule
from pallas_kernels import delta, hopper
from pallas_kernels.delta import rule, twin
from pallas_kernels.delta.config import Config, cost
from pallas_kernels.delta.ref import reference

needs_mosaic = pytest.mark.skipif(jax.__version_info__ < hopper.OLDEST_JAX, reason="Mosaic GPU of jax 0.11.2")


def draw(length, *, decay=0.3, heads=2, dims=(32, 16), batch=1, dtype=jnp.float32, repeated=False, scalar=False):
    """q, k, v, log decay, beta and s0; `repeated`: all keys near one, the hard case for the inverse."""
    keys = jax.random.split(jax.random.key(0), 6)
    q, k, v = (jax.random.normal(a, (batch, length, heads, d)) for a, d in zip(keys, (dims[0], *dims), strict=False))
    k = k[:, :1] + 0.05 * k if repeated else k
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    shape = (batch, length, heads) if scalar else k.shape
    g = -decay * jax.nn.softplus(jax.random.normal(keys[3], shape))
    beta = jax.nn.sigmoid(2 * jax.random.normal(keys[4], (batch, length, heads)))
    s0 = jax.random.normal(keys[5], (batch, heads, *dims))
    q, k, v = (x.astype(dtype) for x in (unit(q) * dims[0] ** -0.5, unit(k), v))
    return q, k, v, g, beta, s0


def begins(length, batch=1):
    return jax.random.uniform(jax.random.key(9), (batch, length)) < 0.04


def off(found, wanted):
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def values_and_gradients(run, inputs, resets):
    """o, s and the gradients of a mix of both."""
    to_o = jax.random.normal(jax.random.key(5), inputs[2].shape)
    to_s = 0.1 * jax.random.normal(jax.random.key(6), inputs[5].shape)

    def mixed(*inputs):
        o, s = run(*inputs, resets)
        return (o.astype(jnp.float32) * to_o).sum() + (s * to_s).sum(), (o, s)

    found, (o, s) = jax.jit(jax.grad(mixed, range(6), has_aux=True))(*inputs)
    return o, s, *found


def by_twin(*inputs):
    return rule.chunked(twin, *inputs)


@pytest.mark.thorough
@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize(("decay", "repeated"), [(0.3, False), (0.02, True), (30.0, False)])
@pytest.mark.parametrize("length", [150, 64, 1])
def test_twin_is_the_rule(length, decay, repeated, documents):
    """Values and gradients in float32; a decay of 30 a token adds up to far below -80 within each block."""
    inputs = draw(length, decay=decay, repeated=repeated)
    resets = begins(length) if documents else None
    found, wanted = values_and_gradients(by_twin, inputs, resets), values_and_gradients(reference, inputs, resets)
    for one, other in zip(found, wanted, strict=True):
        assert off(one, other) < 3e-5


@pytest.mark.thorough
@pytest.mark.parametrize("decay", [0.3, 30.0])
def test_16_bits_cost_no_more_than_rounding(decay):
    inputs = draw(192, decay=decay, dtype=jnp.bfloat16)
    wide = tuple(x.astype(jnp.float32) for x in inputs)
    found, wanted = values_and_gradients(by_twin, inputs, None), values_and_gradients(reference, wide, None)
    for one, other in zip(found, wanted, strict=True):
        assert off(one, other) < 8e-3


def test_a_decay_a_head_is_one_for_all_its_channels():
    q, k, v, g, beta, s0 = draw(100, scalar=True)
    for one, other in zip(by_twin(q, k, v, g, beta, s0), reference(q, k, v, g, beta, s0), strict=True):
        assert off(one, other) < 1e-6


def test_the_end_of_the_world_is_finite():
    q, k, v, g, beta, s0 = draw(128, dtype=jnp.bfloat16)
    o, s, *found = values_and_gradients(by_twin, (q, k, v, jnp.full_like(g, -1e4), beta, s0), None)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in (o, s, *found))


def test_refusals_name_the_reason():
    q, k, v, g, beta, _ = draw(64, dims=(128, 128))
    low = lambda x: x.astype(jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="not all bfloat16"):
        delta.delta_rule(q, k, v, g, beta)
    with pytest.raises(NotImplementedError, match="dims 32 and 16"):
        delta.delta_rule(*map(low, draw(64)[:3]), g, beta)
    if jax.default_backend() != "gpu":
        with pytest.raises(NotImplementedError, match=r"no Hopper GPU but cpu|older than"):
            delta.delta_rule(low(q), low(k), low(v), g, beta)


def test_the_op_says_once_why_a_kernel_gives_way(caplog):
    q, k, v, g, beta, s0 = draw(70)
    import_module("jaxlong.ops.attend")._note.cache_clear()
    with caplog.at_level("INFO", logger="jaxlong.ops.attend"):
        for _ in range(2):
            o, _ = delta_rule(q, k, v, g, beta, s0=s0)
    assert sum("pallas: " in line for line in caplog.messages) == 1
    assert off(o, reference(q, k, v, g, beta, s0)[0]) < 1e-5


def test_costs():
    forward, both = cost(1, 1024, 16, 128, 128), cost(1, 1024, 16, 128, 128, backward=True)
    assert both.flops == 3 * forward.flops
    assert forward.bytes_accessed == 1024 * 16 * (4 * 256 + 512 + 4)


@needs_mosaic
def test_gradients_come_in_groups_of_chunks(monkeypatch):
    from pallas_kernels.delta import gpu

    class Grouped:
        intra, states, outputs, reverse = twin.intra, twin.states, twin.outputs, twin.reverse
        gradients = gpu.gradients

    monkeypatch.setattr(gpu, "GROUP", 2)
    inputs, resets = draw(300, batch=2), begins(300, 2)
    grouped = lambda *inputs: rule.chunked(Grouped, *inputs)
    found = values_and_gradients(grouped, inputs, resets)
    for one, other in zip(found, values_and_gradients(by_twin, inputs, resets), strict=True):
        assert off(one, other) < 1e-6


@needs_mosaic
def test_outputs_without_a_gpu():
    """In interpret mode with its race detector; it has no matrix instruction that reads registers, as the others do."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.delta import gpu

    draws = iter(jax.random.split(jax.random.key(2), 4))
    some = lambda *shape: jax.random.normal(next(draws), (1, 1, 2, *shape)).astype(jnp.bfloat16)
    read, scores, entries, p = some(64, 64), some(64, 64), some(64, 64), some(64, 64)
    chunks = rule.Chunks(read, read, scores, read, read, read, None)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        found = gpu.outputs(chunks, entries, p)
    assert off(found, twin.outputs(chunks, entries, p)) < 3e-3


def lowered(run, *inputs):
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
    return jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="kernels for GPUs tell their cost from jax 0.12 on")
def test_kernels_tell_what_they_cost():
    """Products of outputs, for two heads of three chunks: queries with states, scores with what was written."""
    from pallas_kernels.delta.gpu import Kernels

    *inputs, _ = draw(130, dims=(64, 128), dtype=jnp.bfloat16)
    text = str(jax.make_jaxpr(lambda *x: rule.chunked(Kernels(Config()), *x))(*inputs))
    *_, flops = map(int, re.findall(r"CostEstimate\(flops=(\d+)", text))
    assert flops == 2 * 2 * 3 * 64 * 128 * (64 + 64)


@needs_mosaic
@pytest.mark.thorough
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (64, 128)])
def test_lowers_for_cuda(dims, documents, direction):
    """Types, layouts and shared memory of every kernel, without a GPU."""
    from pallas_kernels.delta.gpu import Kernels

    inputs = draw(130, dims=dims, dtype=jnp.bfloat16)
    resets = begins(130) if documents else None
    run = lambda *inputs: rule.chunked(Kernels(Config()), *inputs, resets)
    if direction == "backward":
        text = lowered(lambda *inputs: jax.grad(lambda *x: run(*x)[0].sum(), range(6))(*inputs), *inputs)
    else:
        text = lowered(run, *inputs)
    assert len(re.findall("mosaic_gpu_v2", text)) == 3

"""The delta rule's kernels for TPUs: interpreted against the oracle, and compiled for machines that are not here."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P
from test_delta_kernels import begins, by_twin, draw, off, values_and_gradients
from tpu_compiler import SYSTEMS, compiled_gradient, kernel_calls

from jaxlong.ops.delta import delta_rule
from jaxlong.ops.scan import linear_attention
from pallas_kernels import delta, machine
from pallas_kernels.delta import tpu
from pallas_kernels.delta.config import Blocks
from pallas_kernels.delta.ref import linear, reference


def kernels(chunks=2, **how):
    return lambda *inputs: tpu.chunked(Blocks(chunks, **{"interpret": True} | how), *inputs)


def without_beta(run):
    """Linear attention of the same arrays, queries and keys of one head for all."""
    return lambda q, k, v, g, beta, s0, resets: run(q[:, :, :1], k[:, :, :1], v, g, s0, resets)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("length", "decay", "how", "documents"),
    [
        (300, 0.3, {"batch": 2}, True),
        (1, 0.3, {}, False),
        (64, 0.02, {"repeated": True}, False),
        (150, 30.0, {}, True),
        (192, 0.02, {"repeated": True, "scalar": True}, False),
        (130, 0.3, {"scalar": True, "dims": (8, 24)}, True),
        (400, 30.0, {}, False),
    ],
)
def test_kernels_are_the_rule(length, decay, how, documents):
    """Values and gradients in float32; a decay of 30 a token adds up to far below -80 within each block."""
    inputs = draw(length, decay=decay, **how)
    resets = begins(length, inputs[0].shape[0]) if documents else None
    found, wanted = values_and_gradients(kernels(), inputs, resets), values_and_gradients(reference, inputs, resets)
    for one, other in zip(found, wanted, strict=True):
        assert off(one, other) < 3e-5


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("length", "decay", "how", "documents"),
    [(200, 0.3, {"scalar": True}, True), (130, 0.3, {"batch": 2}, False), (150, 30.0, {}, True), (1, 0.3, {}, False)],
)
def test_without_correction_it_is_linear_attention(length, decay, how, documents):
    """Queries and keys shared by all heads: their gradients are sums."""
    inputs = draw(length, decay=decay, **how)
    resets = begins(length, inputs[0].shape[0]) if documents else None
    run = without_beta(lambda q, k, v, g, s0, resets: kernels()(q, k, v, g, None, s0, resets))
    found, wanted = (values_and_gradients(x, inputs, resets) for x in (run, without_beta(linear)))
    for one, other in zip(found[:6] + found[7:], wanted[:6] + wanted[7:], strict=True):
        assert off(one, other) < 3e-5


def test_16_bits_cost_no_more_than_rounding():
    inputs = draw(192, dtype=jnp.bfloat16)
    wide = tuple(x.astype(jnp.float32) for x in inputs)
    found, twin = values_and_gradients(kernels(), inputs, None), values_and_gradients(by_twin, inputs, None)
    for one, twins, other in zip(found, twin, values_and_gradients(reference, wide, None), strict=True):
        assert off(one, other) < min(8e-3, 2 * off(twins, other) + 1e-3)


@pytest.mark.slow
def test_the_end_of_the_world_is_finite():
    q, k, v, g, beta, s0 = draw(128, dtype=jnp.bfloat16)
    o, s, *found = values_and_gradients(kernels(), (q, k, v, jnp.full_like(g, -1e4), beta, s0), None)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in (o, s, *found))


@pytest.mark.slow
def test_programs_of_one_grid_do_not_race():
    """In the simulator of a TPU, with its race detector and memory that begins as NaN."""
    inputs = draw(130, heads=1, dims=(8, 8))
    how = {"detect_races": True, "uninitialized_memory": "nan"}
    found = values_and_gradients(kernels(interpret=pltpu.InterpretParams(**how)), inputs, None)
    for one, other in zip(found, values_and_gradients(reference, inputs, None), strict=True):
        assert off(one, other) < 3e-5


def test_refusals_name_the_reason(monkeypatch):
    q, k, v, g, beta, _ = draw(64)
    with pytest.raises(NotImplementedError, match="the default device is no TPU but cpu"):
        delta.linear_attention(q, k, v, g)
    monkeypatch.setattr(machine, "platform", lambda: "tpu")
    with pytest.raises(NotImplementedError, match="float16, float32 and float32, not bfloat16 or float32"):
        delta.delta_rule(q.astype(jnp.float16), k, v, g, beta)
    with pytest.raises(NotImplementedError, match="dims 36 and 16 of keys and values, not multiples of 8 up to 256"):
        delta.delta_rule(*draw(64, dims=(36, 16))[:5])
    with pytest.raises(NotImplementedError, match="nothing to do"):
        delta.delta_rule(q[:0], k[:0], v[:0], g[:0], beta[:0])


def shapes(length, heads, dims=(128, 128), dtype=jnp.float32, scalar=False):
    array = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct((1, length, heads, *shape), dtype)
    g = array(dtype=jnp.float32) if scalar else array(dims[0], dtype=jnp.float32)
    return array(dims[0]), array(dims[0]), array(dims[1]), g, array(dtype=jnp.float32)


@pytest.mark.thorough
@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dims", [(128, 128), (128, 256), (256, 256), (64, 128), (8, 24)])
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_op_compiles_to_kernels(compile_well, system, dims, dtype, scalar):
    """One forward, one backward; in float32, as the mixers call it, and with the dims that spans have."""
    found = compiled_gradient(system, delta_rule, shapes(8192, 2, dims, dtype, scalar))
    assert kernel_calls(found) == 2
    assert " while(" not in found.as_text()


@pytest.mark.thorough
@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("groups", [1, 4])
def test_linear_attention_compiles_to_kernels(compile_well, system, groups):
    """The layer of Mamba-2: queries and keys of 128 states, shared by heads of 64 values."""
    _, _, v, g, _ = shapes(8192, 16, (128, 64), jnp.bfloat16, scalar=True)
    few = jax.ShapeDtypeStruct((1, 8192, groups, 128), jnp.bfloat16)
    found = compiled_gradient(system, linear_attention, (few, few, v, g))
    assert kernel_calls(found) == 2
    assert " while(" not in found.as_text()


@pytest.mark.thorough
@pytest.mark.parametrize("op", [delta_rule, linear_attention])
@pytest.mark.parametrize(
    ("mesh", "spec"),
    [
        ("seq=4", P(None, "seq")),
        ("fsdp=2,tensor=2", P("fsdp", None, "tensor")),
        ("fsdp=2,seq=2", P("fsdp", "seq")),
    ],
)
@pytest.mark.parametrize("system", ["v6e:2x2", "v5e:2x2", "v5p:2x2x1"])
def test_every_device_of_a_mesh_runs_them(compile_well, system, mesh, spec, op):
    """On its rows and heads; on its spans of a row, inside the op's own `shard_map`, where values are wider."""
    array = lambda x: jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype)
    given = [array(x) for x in shapes(4096, 4)][: 5 if op is delta_rule else 4]
    assert kernel_calls(compiled_gradient(system, op, given, mesh, spec)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize(("length", "heads"), [(8192, 32), (131072, 16), (2**20, 2)])
def test_a_million_tokens_compile(compile_well, system, length, heads):
    """With fewer bytes than 14 float32 a token and channel: of states, those at the entries of blocks are kept."""
    found = compiled_gradient(system, delta_rule, shapes(length, heads, dtype=jnp.bfloat16))
    tokens = length * heads
    assert found.memory_analysis().peak_memory_in_bytes < tokens * 128 * 4 * 14

"""Flash attention for TPUs without a TPU: the kernels interpreted, lowered, and compiled where libtpu is installed."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flash_cases import arguments
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlong.core.mask import bigbird, causal, dilated, fixed, full, longformer, prefix, sinks, sliding, strided
from jaxlong.ops import Backend, attend
from jaxlong.ops.attend import Local
from jaxlong.parallel.mesh import make_mesh
from jaxlong.parallel.partial import Meta
from jaxlong.parallel.ring import ring
from jaxlong.plan import topology
from pallas_kernels import flash, machine
from pallas_kernels.flash import ref, tpu

INTERPRETED = tpu.Config(256, 128, 128, interpret=True)
"""Blocks that are not alike, and two parts in one of them."""

SHAPES = {
    "causal": (causal(), {"H": 4, "K": 2}),
    "packed": (causal(), {"B": 2, "packed": True}),
    "slopes and cap": (sliding(150), {"slopes": True, "soft_cap": 3.0, "H": 2, "K": 2}),
    "uneven": (causal(), {"T": 150, "S": 391}),
    "few queries": (sliding(300), {"T": 3, "S": 400}),
    "window": (sliding(90), {"T": 520}),
    "window and sinks": (sliding(100) | sinks(4), {"B": 2, "mixed": True}),
    "mixed": (causal(), {"B": 2, "mixed": True}),
    "packed, all ways": (full(), {"B": 2, "packed": True, "mixed": True}),
    "soft cap": (causal(), {"soft_cap": 2.0}),
    "slopes": (causal(), {"slopes": True, "packed": True}),
    "logits": (sliding(100), {"sinks": True}),
    "empty rows": (~causal(), {"H": 4, "K": 2, "mixed": True}),
    "no blocks": (sliding(20), {"T": 600, "S": 70}),
    "one key head": (causal(), {"H": 6, "K": 1}),
    "full": (full(), {}),
    "64": (causal(), {"C": 64, "V": 64}),
    "256": (causal(), {"C": 256, "V": 256, "packed": True}),
    "192 and 128": (causal(), {"C": 192, "V": 128, "H": 3, "K": 3}),
    "80": (causal(), {"C": 80, "V": 80}),
    "dilated": (dilated(128, 3), {"H": 4}),
    "strided": (strided(64), {}),
    "fixed": (fixed(64, 16), {}),
    "longformer": (longformer(100, 10), {}),
    "bigbird": (bigbird(1, 1, 1, 64, 3) & causal(), {"T": 700}),
    "prefix": (prefix(100) & sliding(150, 64), {}),
}


def both(setting, inputs, dout, dlse):
    """Results and gradients of the oracle."""
    names = ["q", "k", "v"] + (["slopes"] if inputs.slopes is not None else [])
    floats = {name: getattr(inputs, name).astype(jnp.float32) for name in names}

    def run(floats):
        out, lse = ref.attention(setting, inputs._replace(**floats))
        return (out, jnp.where(lse == -jnp.inf, 0, lse)), lse

    (out, _), pull, lse = jax.vjp(run, floats, has_aux=True)
    grads = pull((dout.astype(out.dtype), jnp.where(lse == -jnp.inf, 0, dlse)))[0]
    return out, lse, tuple(grads[name] for name in names)


def kernels(setting, inputs, dout, dlse, config=INTERPRETED):
    out, lse = flash.forward(setting, inputs, config)
    grads = flash.backward(setting, inputs, out, lse, dout, dlse, config)
    return out, lse, tuple(x for x in grads if x is not None)


def close(got, want, at=2e-5):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        finite = np.isfinite(y)
        np.testing.assert_array_equal(np.isfinite(x), finite)
        np.testing.assert_allclose(np.where(finite, x, 0), np.where(finite, y, 0), atol=at, rtol=at)


@pytest.mark.thorough
@pytest.mark.parametrize("name", SHAPES)
def test_kernels_are_the_oracle(name):
    mask, changes = SHAPES[name]
    setting, *given = arguments(mask, **({"T": 390, "C": 32, "V": 32} | changes))
    close(jax.jit(partial(kernels, setting))(*given), jax.jit(partial(both, setting))(*given))


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["packed", "causal", "slopes and cap", "192 and 128", "empty rows"])
def test_bfloat16_errs_as_rounding_does(name):
    """FlashAttention's rule: at most twice the error of plain attention whose matrices are rounded."""
    mask, changes = SHAPES[name]
    setting, inputs, dout, dlse = arguments(mask, **({"T": 390, "C": 64, "V": 64, "dtype": jnp.bfloat16} | changes))
    wide = flash.Setting(setting.mask, setting.scale, setting.soft_cap, jnp.dtype(jnp.float32))
    narrow = lambda x: jax.lax.reduce_precision(x, 8, 7)
    want = jax.jit(partial(both, wide))(inputs, dout, dlse)
    found = jax.jit(partial(kernels, setting))(inputs, dout, dlse)
    rough = jax.jit(lambda inputs: ref.attention(wide, inputs, narrow))(inputs)
    size = lambda x: np.linalg.norm(np.where(np.isfinite(x), x, 0).ravel())
    error = lambda x, y: size(np.subtract(x, y, where=np.isfinite(y), out=np.zeros(y.shape, np.float32)))
    assert error(found[0], want[0]) <= 2 * error(rough[0], want[0]) + 1e-6
    assert error(found[1], want[1]) <= 1e-2 * size(want[1])
    for got, exact in zip(found[2], want[2], strict=True):
        assert error(got, exact) <= 0.02 * size(exact)


@pytest.mark.slow
def test_masked_slots_may_hold_anything():
    setting, inputs, dout, dlse = arguments(causal(), B=2, T=300, C=32, V=32, packed=True, seed=4)
    empty = (inputs.k_segments < 0)[..., None, None]
    spoiled = inputs._replace(k=jnp.where(empty, jnp.nan, inputs.k), v=jnp.where(empty, jnp.nan, inputs.v))
    run = jax.jit(partial(kernels, setting))
    for got, want in zip(*(jax.tree.leaves(run(x, dout, dlse)) for x in (spoiled, inputs)), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.slow
def test_mapped_over_a_plan_that_is_shared():
    setting, inputs, _, _ = arguments(causal(), B=3, T=150, C=16, V=16)

    def run(q, k, v, config=INTERPRETED):
        return flash.forward(setting, inputs._replace(q=q, k=k, v=v), config)

    rows = tuple(x[:, None] for x in inputs[:3])
    got = jax.jit(jax.vmap(run))(*rows)
    close([x[:, 0] for x in got], run(*inputs[:3]))
    mapped = jax.vmap(partial(run, config=tpu.Config()))
    assert "@tpu_custom_call" in jax.jit(mapped).trace(*rows).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.slow
def test_hops_of_a_ring_are_one_device(on_tpu, monkeypatch):
    """Values and gradients: hops are merged by their lse, and those of the way back know the whole's."""
    monkeypatch.setattr(flash, "_tpu_config", lambda inputs: tpu.Config(128, 128, 128, interpret=True))
    _, inputs, dout, _ = arguments(sliding(300), T=512, H=4, K=2, C=16, V=16)
    local = Local("flash", sliding(300), 0.25, None)
    of = lambda at: Meta(at, at, heads=jnp.arange(4))

    def hops(q, k, v, at):
        return ring(local, q, k, v, of(at), axis="seq", mask=local.mask)

    def loss(attend, q, k, v, at):
        return (attend(q, k, v, at)[0] * dout).sum()

    split = {"in_specs": P(None, "seq"), "out_specs": P(None, "seq"), "check_vma": False}  # interpreted ones lack types
    around = jax.shard_map(hops, mesh=make_mesh("seq=2", jax.devices()[:2]), **split)
    run = jax.jit(jax.value_and_grad(loss, (1, 2, 3)), static_argnums=0)
    given = *inputs[:3], inputs.q_positions
    close(run(around, *given), run(lambda q, k, v, at: local(q, k, v, of(at)), *given), 1e-4)


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="the interpreter of this jax does not raise on races")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["packed", "no blocks"])
def test_copies_do_not_race(name):
    """The copies that the kernels start themselves, in a simulator that makes them as late as it may."""
    mask, changes = SHAPES[name]
    setting, *given = arguments(mask, **({"T": 300, "C": 16, "V": 16} | changes))
    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait")
    config = tpu.Config(128, 128, 128, interpret=params)
    close(jax.jit(partial(kernels, setting, config=config))(*given), jax.jit(partial(both, setting))(*given))


# ---------------------------------------------------------------------------------------------- programs


@pytest.fixture
def on_tpu(monkeypatch):
    monkeypatch.setattr(machine, "platform", lambda: "tpu")
    monkeypatch.setattr(machine, "kind", lambda: "TPU v6 lite")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": jnp.float16}, "q, k and v of float16, .* not all bfloat16 or all float32"),
        ({"C": 320, "V": 64}, "dims 320 and 64 of keys and values, more than 256"),
        ({"scale": -1.0}, "not positive"),
        ({"T": 1, "S": 40}, "one query is decoding"),
        ({}, "None"),
    ],
)
def test_a_refusal_says_why(on_tpu, changes, reason):
    setting, inputs, _, _ = arguments(causal(), **({"C": 64, "V": 64, "dtype": jnp.bfloat16} | changes))
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(str(flash.refusal(setting, inputs)))


def gradient(backend):
    def loss(q, k, v, at):
        out = attend(q, k, v, mask=causal(), q_positions=at, k_positions=at, backend=backend)
        return out.astype(jnp.float32).sum()

    return jax.value_and_grad(loss, (0, 1, 2))


def test_attend_lowers_to_the_kernels(on_tpu):
    array = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((1, 1024, *dims), dtype)
    given = array(4, 128), array(2, 128), array(2, 128), array(dtype=jnp.int32)
    lowered = jax.jit(gradient(Backend())).trace(*given).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("@tpu_custom_call") == 3


@pytest.fixture
def compiler(compile_well):
    """The TPU compiler; what it has compiled no process without a TPU can load, so it must not be kept for others."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


SYSTEMS = {"v6e": "v6e:2x2", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1"}
"""Four chips each."""


@pytest.mark.thorough
@pytest.mark.parametrize("sequence", ["ring", "auto", "all_gather", "ulysses"])
@pytest.mark.parametrize("mesh", ["fsdp=2,tensor=2", "data=1", "seq=4"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_attend_compiles_to_the_kernels(compiler, system, mesh, sequence):
    """On one chip, on rows and heads split over several, and in rings: nobody has to say that there are kernels."""
    chips = topology.described(topology.parse(SYSTEMS[system]))
    mesh = make_mesh(mesh, chips[: 1 if mesh == "data=1" else 4])
    like = NamedSharding(mesh, P(("data", "fsdp"), "seq"))
    array = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((2, 8192, *dims), dtype, sharding=like)
    given = array(8, 128), array(4, 128), array(4, 128), array(dtype=jnp.int32)
    with jax.set_mesh(mesh):
        program = jax.jit(gradient(Backend(sequence=sequence))).lower(*given).compile()
    assert program.as_text().count('custom_call_target="tpu_custom_call"') >= 3


LONG = {
    "8k": {"T": 8192, "H": 32, "K": 8},
    "128k": {"T": 2**17, "H": 32, "K": 8},
    "1M": {"T": 2**20, "H": 16, "K": 2},
    "8k, MLA": {"T": 8192, "H": 16, "K": 16, "C": 192},
    "128k, MLA": {"T": 2**17, "H": 16, "K": 16, "C": 192},
    "8k, 64": {"T": 8192, "H": 32, "K": 8, "C": 64, "V": 64},
    "8k, 256": {"T": 8192, "H": 16, "K": 4, "C": 256, "V": 256},
    "8k, float32": {"T": 8192, "H": 16, "K": 4, "dtype": jnp.float32},
}
"""Shapes of models."""


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("system", SYSTEMS)
def test_kernels_compile_at_the_shapes_of_models(compiler, system, name, direction):
    """For one chip, arrays as projections may leave them, heads before tokens; no array of tokens by tokens."""
    given = dict(LONG[name])
    if given["T"] == 2**20 and system == "v5e":  # 15.75 GiB: the arrays alone are 16
        given["H"] = 4
    found = compile_kernels(SYSTEMS[system], causal(), direction, **given)
    memory = found.memory_analysis()
    assert memory.temp_size_in_bytes < 1.5 * memory.argument_size_in_bytes + 2**28


MASKS = {
    "window": (sliding(4096), {}),
    "packed": (causal(), {"packed": True}),
    "soft cap, slopes and sinks": (causal(), {"soft_cap": 50.0, "slopes": True, "sinks": True}),
    "uneven": (causal(), {"T": 5001}),
    "full": (full(), {}),
    "not": (~causal(), {}),
    "dilated": (dilated(512, 4), {}),
    "strided": (strided(128), {}),
    "fixed": (fixed(128, 16), {}),
    "longformer": (longformer(512, 64), {}),
    "bigbird": (bigbird(3, 1, 3, 64, 0) & causal(), {}),
    "prefix": (prefix(100) & sliding(512, 64), {}),
    "dims 80": (causal(), {"C": 80, "V": 80}),
}


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_masks_compile(compiler, system, name, direction):
    mask, given = MASKS[name]
    compile_kernels(SYSTEMS[system], mask, direction, **({"T": 4096, "H": 2, "K": 1} | given))


def compile_kernels(
    system,
    mask,
    direction,
    *,
    T,
    H,
    K,
    C=128,
    V=128,
    dtype=jnp.bfloat16,
    packed=False,
    soft_cap=None,
    slopes=False,
    sinks=False,
):
    """One direction alone, compiled for a chip."""
    mesh = make_mesh("data=1", topology.described(topology.parse(system))[:1])
    array = lambda *dims, dtype=dtype: jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, P()))
    of_head = lambda given: array(H, dtype=jnp.float32) if given else None
    tokens = array(1, T, dtype=jnp.int32)
    segments = tokens if packed else None
    q, k, v, dout = array(1, H, T, C), array(1, K, T, C), array(1, K, T, V), array(1, H, T, V)
    heads = array(H, dtype=jnp.int32)
    inputs = flash.Inputs(q, k, v, tokens, tokens, segments, segments, heads, of_head(slopes), of_head(sinks))
    setting = flash.Setting(mask, C**-0.5, soft_cap, jnp.dtype(dtype))
    turn = lambda x: jnp.swapaxes(x, 1, 2)

    def forward(inputs):
        out, lse = flash.forward(setting, inputs._replace(q=turn(inputs.q), k=turn(inputs.k), v=turn(inputs.v)))
        return turn(out), turn(lse)

    def backward(inputs, out, lse, dout):
        inputs = inputs._replace(q=turn(inputs.q), k=turn(inputs.k), v=turn(inputs.v))
        lse = turn(lse)
        *grads, _ = flash.backward(setting, inputs, turn(out), lse, turn(dout), jnp.zeros_like(lse), dtype=dtype)
        return [turn(x) for x in grads]

    with jax.set_mesh(mesh):
        if direction == "forward":
            return jax.jit(forward).lower(inputs).compile()
        return jax.jit(backward).lower(inputs, dout, array(1, H, T, dtype=jnp.float32), dout).compile()

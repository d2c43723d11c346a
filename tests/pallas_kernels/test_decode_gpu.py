"""Decode attention for Hopper GPUs: lowered for CUDA and interpreted anywhere, and on a device

JAX_PLATFORMS=cuda python -m pytest tests/pallas_kernels/test_decode_gpu.py -m gpu -n0
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import arguments

from jaxlong.core.mask import bigbird, causal, full, sinks, sliding
from jaxlong.ops import attend
from pallas_kernels import decode, hopper, machine
from pallas_kernels.decode import Setting, gpu, ref
from pallas_kernels.decode.blocks import code, merged

FLOAT8, FLOAT16, BF16 = jnp.float8_e4m3fn, jnp.float16, jnp.bfloat16
new_jax = pytest.mark.skipif(
    jax.__version_info__ < hopper.OLDEST_JAX, reason="Mosaic GPU of this jax lacks what the kernel uses"
)

CASES = {  # mask, arguments, configuration
    "ring": (causal(), {"held": (2900, 1123)}, {}),
    "no multiple of 8": (causal(), {"S": 3001}, {}),
    "dims 64": (causal(), {"C": 64, "V": 64, "B": 4}, {}),
    "dims 256": (causal(), {"C": 256, "V": 256}, {}),
    "dims 128 and 64": (causal(), {"V": 64}, {}),
    "float16": (causal(), {"dtype": FLOAT16}, {}),
    "empty rows": (causal(), {"held": (0, 3000, 1), "B": 3}, {}),
    "window": (sliding(700), {"T": 3, "sinks": True}, {}),
    "window and first, packed": (sliding(100) | sinks(3), {"B": 3, "packed": True}, {"workers": 1, "stages": 4}),
    "bigbird": (bigbird(3, 1, 2, 64, 3) & causal(), {}, {}),
    "all": (full(), {"S": 64, "H": 8}, {}),
    "cap and slopes": (causal(), {"T": 2, "soft_cap": 20.0, "slopes": True}, {}),
    "one key head": (causal(), {"B": 1, "H": 8, "K": 1, "S": 20000}, {"workers": 1, "stages": 6}),
    "more than 64 queries": (causal(), {"H": 64, "K": 1, "T": 3}, {}),
    "a key head each": (causal(), {"H": 16, "K": 16, "B": 5}, {"stages": 1}),
    "rows of all lengths": (
        causal(),
        {"B": 64, "S": 500, "held": tuple(np.random.default_rng(0).integers(0, 500, 64))},
        {},
    ),
    "pages of 16": (causal(), {"page": 16, "held": (2900, 777)}, {}),
    "pages of 64": (sliding(500), {"page": 64, "held": (2900, 777)}, {}),
    "pages of 128, eight queries": (causal(), {"page": 128, "held": (2900, 777), "T": 8}, {}),
    "int8": (causal(), {"stored": jnp.int8, "held": (2900, 777)}, {}),
    "int8, dims 64": (causal(), {"stored": jnp.int8, "C": 64, "V": 64}, {}),
    "int8, dims 256": (causal(), {"stored": jnp.int8, "C": 256, "V": 256}, {}),
    "int8, pages": (causal(), {"stored": jnp.int8, "page": 32, "held": (2900, 777), "T": 2}, {}),
    "float8": (causal(), {"stored": FLOAT8}, {}),
    "latents": (causal(), {"H": 16, "K": 1, "C": 576, "V": 512, "latent": True, "held": (2900, 777)}, {}),
    "latents, all values": (sliding(900), {"H": 128, "K": 1, "C": 576, "V": 576, "latent": True}, {}),
    "narrow latents in pages": (causal(), {"K": 1, "C": 192, "V": 128, "latent": True, "page": 64, "T": 2}, {}),
    "float8, a factor a page": (sliding(900), {"stored": FLOAT8, "page": 64, "per_page": True}, {}),
}


def case(name, **more):
    """Setting, inputs and configuration."""
    mask, changes, config = CASES[name]
    changes = {"B": 2, "H": 32, "K": 8, "C": 128, "V": 128, "S": 3000, "dtype": BF16} | changes | more
    setting, inputs, _ = arguments(mask, **changes)
    return setting, inputs, gpu.Config(**config) if config else None


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(hopper, "refusal", lambda: None)
    monkeypatch.setattr(machine, "platform", lambda: "cuda")


@new_jax
@pytest.mark.thorough
@pytest.mark.parametrize("name", CASES)
def test_lowers_for_cuda(name, as_on_a_gpu):
    setting, inputs, config = case(name)
    traced = jax.jit(lambda inputs: decode.attention(setting, inputs, config)).trace(inputs)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@new_jax
@pytest.mark.parametrize("queries", [1, 8])
def test_attend_picks_it_for_few_queries(queries, as_on_a_gpu):
    setting, inputs, _ = case("ring", T=queries)
    x = inputs._asdict() | {"mask": setting.mask}
    names = ("mask", "q_positions", "k_positions", "q_segments", "k_segments")
    run = lambda q, k, v: attend(q, k, v, **{name: x[name] for name in names})
    traced = jax.jit(run).trace(inputs.q, inputs.k, inputs.v)
    assert "decode_attention" in traced.lower(lowering_platforms=("cuda",)).as_text()


INTERPRETED = {
    "ring": {"held": (290, 123)},
    "window": {},
    "empty rows": {"held": (0, 304, 1)},
    "cap and slopes": {},
    "more than 64 queries": {"H": 36},
    "pages of 16": {"held": (290, 77)},
    "pages of 128, eight queries": {"held": (290, 77)},
    "int8": {"held": (290, 77)},
    "float8, a factor a page": {},
    "latents": {"held": (290, 77), "K": 1, "C": 576, "V": 512},
    "narrow latents in pages": {"held": (290, 77), "K": 1, "C": 128, "V": 64},
}


@new_jax
@pytest.mark.thorough
@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_it_is_the_oracle(name, monkeypatch):
    """Without matrix instructions that the interpreter lacks; it finds races."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def dot(left, right):
        left, right = (x.astype(jnp.float32) for x in (left, right))
        found = jnp.dot(left, right, precision="highest")
        plgpu.commit_smem()  # matrix instructions read by the way that copies write
        return found

    monkeypatch.setattr(gpu, "product", lambda pairs: sum(dot(left[...], right[...]) for left, right in pairs))
    monkeypatch.setattr(gpu, "added", lambda sums, left, right: sums + dot(left, right[...]))
    setting, inputs, _ = case(
        name, **{"S": 304, "H": 4, "K": 1 if "64" in name else 2, "C": 64, "V": 64} | INTERPRETED[name]
    )
    config = replace(gpu.Config.of(setting, inputs), ctas=3)
    run = lambda inputs: gpu.parts(setting, inputs, config, plgpu.InterpretGPUParams(detect_races=True))
    out, lse = merged(*jax.jit(run)(inputs), inputs.sinks)
    close((out, lse), wanted(setting, inputs))


def wanted(setting, inputs):
    """The oracle, in float32."""
    wide = Setting(setting.mask, setting.scale, setting.soft_cap, jnp.float32, setting.value_dim)
    return jax.jit(lambda inputs: ref.attention(wide, inputs))(inputs)


def close(found, expected):
    """Weights are rounded to 16 bits, and so is out."""
    (out, lse), (want, of_all) = ([np.asarray(x, np.float32) for x in pair] for pair in (found, expected))
    assert np.isfinite(out).all()
    assert np.linalg.norm(out - want) <= 4e-3 * np.linalg.norm(want)
    np.testing.assert_array_equal(np.isfinite(lse), np.isfinite(of_all))
    np.testing.assert_allclose(lse[np.isfinite(lse)], of_all[np.isfinite(lse)], atol=2e-4, rtol=2e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"C": 96, "V": 96}, "dims 96 and 96"),
        ({"dtype": jnp.float32}, "queries of float32"),
        ({"latent": True, "K": 1, "V": 96}, "96 of 128 columns values"),
        ({"latent": True, "K": 1, "stored": jnp.int8}, "latents of int8"),
        ({"page": 24}, "pages of 24 tokens"),
        ({"stored": jnp.int8, "dtype": FLOAT16}, "keys of int8"),
        ({"T": 9}, "9 queries a row"),
        ({"config": gpu.Config(stages=9)}, "9 tiles for each of 2 workers"),
    ],
)
def test_a_refusal_says_why(changes, reason, as_on_a_gpu):
    config = changes.pop("config", None)
    setting, inputs, _ = arguments(**{"C": 128, "V": 128, "dtype": BF16} | changes)
    with pytest.raises(NotImplementedError, match=reason):
        decode.attention(setting, inputs, config)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_oracle(name):
    for seed in range(10):
        setting, inputs, config = case(name, seed=seed)
        close(jax.jit(lambda x, s=setting, c=config: decode.attention(s, x, c))(inputs), wanted(setting, inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ring", "window", "float16", "dims 256"])
def test_what_no_query_sees_may_be_anything(name):
    setting, inputs, config = case(name)
    unseen = (code(setting, inputs) == 0)[..., None, None]
    spoil = lambda x: jnp.where(unseen, jnp.nan, x).astype(x.dtype)
    run = jax.jit(lambda inputs: decode.attention(setting, inputs, config))
    spoiled = run(inputs._replace(k=spoil(inputs.k), v=spoil(inputs.v)))
    for found, clean in zip(spoiled, run(inputs), strict=True):
        np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(clean, np.float32))


@pytest.mark.gpu
def test_a_hundred_runs_give_the_same_bits():
    setting, inputs, _ = case("ring", S=30000, held=(30000, 11230))
    run = jax.jit(lambda inputs: decode.attention(setting, inputs))
    first = run(inputs)
    for _ in range(100):
        for found, other in zip(run(inputs), first, strict=True):
            np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(other, np.float32))

"""Decode attention as the TPU compiler takes it: production shapes fit, caches are not copied, and mixers get there."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest

from jaxlong.core.mask import causal, sliding
from jaxlong.mixers.gqa import GQA
from jaxlong.mixers.mla import MLA
from pallas_kernels import decode
from pallas_kernels.decode import Inputs, Setting

pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
TOPOLOGIES = ("v5e:1x1", "v5p:2x2x1", "v6e:1x1")
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}
MEMORY = {"v5e": 15.75, "v5p": 95.74, "v6e": 31.25}  # GiB
MIB = 2**20
BF16 = jnp.bfloat16


def cache(*, B=8, T=1, H=32, K=8, C=128, V=128, S=131072, stored=BF16, mask=None, extras=(), latent=False):
    """Attention to a ring buffer, and what it takes."""
    shapes = {
        "q": ((B, T, H, C), BF16),
        "k": ((B, S, K, C), stored),
        "v": None if latent else ((B, S, K, V), stored),
        "q_positions": ((B, T), jnp.int32),
        "k_positions": ((B, S), jnp.int32),
        "q_segments": ((B, T), jnp.int32),
        "k_segments": ((B, S), jnp.int32),
    }
    if stored != BF16:
        shapes |= {"k_scale": ((B, S, K), jnp.float32), "v_scale": ((B, S, K), jnp.float32)}
    shapes |= {name: ((H,), jnp.float32) for name in extras}
    setting = Setting(mask or causal(), C**-0.5, None, jnp.dtype(BF16), V if latent else None)
    return lambda given: decode.attention(setting, Inputs(**given)), shapes


def paged(*, B=8, T=1, H=32, K=8, C=128, V=128, S=131072, page=64, stored=BF16, latent=False):
    """Attention to pages, and what it takes."""
    pages = B * S // page
    shapes = {
        "q": ((B, T, H, C), BF16),
        "k": ((pages, page, K, C), stored),
        "v": None if latent else ((pages, page, K, V), stored),
        "pages": ((B, S // page), jnp.int32),
        "lengths": ((B,), jnp.int32),
    }
    if stored != BF16:
        shapes |= {"k_scale": ((pages, 1, K), jnp.float32), "v_scale": ((pages, 1, K), jnp.float32)}
    return lambda given: decode.paged_attention(**given, mask=causal(), value_dim=V if latent else None), shapes


CASES = {
    "gqa": lambda: cache(),
    "mla": lambda: cache(H=128, K=1, C=576, V=512, latent=True),
    "gqa 1M": lambda: cache(S=2**20),
    "mla 1M": lambda: cache(H=128, K=1, C=576, V=512, S=2**20, latent=True),
    "gqa 1M of one row": lambda: cache(B=1, S=2**20),
    "window": lambda: cache(S=4096 + 511, mask=sliding(4096), extras=("sinks",)),
    "alibi": lambda: cache(H=32, K=32, extras=("slopes",)),
    "eight queries": lambda: cache(T=8),
    "mla, eight queries": lambda: cache(T=8, H=128, K=1, C=576, V=512, latent=True),
    "dim 64": lambda: cache(C=64, V=64),
    "dim 256": lambda: cache(C=256, V=256),
    "four key heads": lambda: cache(K=4),
    "three key heads": lambda: cache(H=24, K=3),
    "one key head": lambda: cache(K=1),
    "int8": lambda: cache(stored=jnp.int8),
    "float8": lambda: cache(stored=jnp.float8_e4m3fn, S=2**20),
    "pages of 16": lambda: paged(page=16),
    "pages of 64": lambda: paged(),
    "pages of 128, 1M": lambda: paged(page=128, S=2**20),
    "int8 pages": lambda: paged(page=128, stored=jnp.int8),
    "pages of latents": lambda: paged(H=128, K=1, C=640, V=512, latent=True),
}


@pytest.fixture(autouse=True)
def never_stored():
    """Programs for chips that are not here cannot be read back from the cache of programs."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def mesh_of(topology, monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    from jax.experimental import topologies

    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=chips[:1])


def compiled(run, shapes, mesh):
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    with jax.set_mesh(mesh):
        return jax.jit(run).lower(given).compile()


def rows_that_fit(shapes, chip):
    """As many rows of the batch as leave a quarter of the chip's memory free; a pool of pages is cut likewise."""
    dims = lambda x: () if x is None or (len(x[0]) == 1 and x[0][0] > 8) else x[0]
    size = sum(math.prod(dims(x)) * jnp.dtype(x[1]).itemsize for x in shapes.values() if dims(x))
    batch = shapes["q"][0][0]
    rows = next(n for n in (8, 4, 2, 1) if n <= batch and size * n / batch < 0.75 * MEMORY[chip] * 2**30)
    return {name: ((x[0][0] * rows // batch, *x[0][1:]), x[1]) if dims(x) else x for name, x in shapes.items()}


@pytest.mark.thorough
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", CASES)
def test_compiles_without_a_copy_of_the_cache(name, topology, monkeypatch, compile_well):
    """What the program makes is small: codes, and factors of 8-bit numbers once more, in the kernel's order."""
    run, shapes = CASES[name]()
    shapes = rows_that_fit(shapes, topology.split(":")[0])
    given = {k: None if x is None else jax.ShapeDtypeStruct(*x) for k, x in shapes.items()}
    program = compiled(run, given, mesh_of(topology, monkeypatch))
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 1
    keys = given["k"].size * given["k"].dtype.itemsize
    made = keys // (32 if given["k"].dtype == BF16 else 4)
    assert program.memory_analysis().temp_size_in_bytes < 64 * MIB + made


@pytest.mark.parametrize(
    "mixer",
    [GQA(heads=8, kv_heads=8, head_dim=128), MLA(heads=16, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128)],
    ids=["gqa", "mla"],
)
def test_a_decode_step_of_a_mixer_is_the_kernel(mixer, monkeypatch, compile_well):
    """One token a row through `jaxlong.ops`, for a TPU that is not here; what the cache has is in place."""
    state = jax.eval_shape(lambda: mixer.init_state(2, 32768, width=256, max_chunk=1, dtype=BF16))
    x = jax.ShapeDtypeStruct((2, 1, 256), BF16)
    at = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    init = lambda: mixer.init(jax.random.key(0), jnp.zeros(x.shape, BF16), positions=jnp.zeros(at.shape, at.dtype))
    params = jax.eval_shape(init)
    step = lambda given: mixer.apply(given[0], given[1], positions=given[2], segment_ids=given[2], state=given[3])
    program = compiled(step, (params, x, at, state), mesh_of("v5e:1x1", monkeypatch))
    assert 'custom_call_target="tpu_custom_call"' in program.as_text()

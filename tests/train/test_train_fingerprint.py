"""The fingerprint: its formula, its indifference to the mesh, its sensitivity to every bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_toy as toy
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlong.train.fingerprint import digest, digests

DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "int32", "int8", "uint16", "bool", "int4", "complex64"]


def random(dtype, shape=(6, 10), seed=0):
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 3
    return jnp.asarray(values > 0 if dtype == "bool" else values).astype(dtype)


def oracle(x) -> int:
    """The formula in Python integers."""
    raw = np.asarray(x)
    size = max(raw.dtype.itemsize, 1)
    kind = np.uint32 if size >= 4 else np.dtype(f"uint{8 * size}")
    words = np.frombuffer(np.ascontiguousarray(raw).tobytes(), kind)
    total = 0
    for i, word in enumerate(words):
        h = (int(word) + i * 0x9E3779B9) % 2**32
        h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
        h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
        total += h ^ (h >> 16)
    return total % 2**32


@pytest.mark.parametrize("dtype", [name for name in DTYPES if name != "int4"])
def test_formula(dtype):
    x = random(dtype)
    assert int(digest(x)[0]) == oracle(x)
    assert int(digest(x[:0])[0]) == 0
    assert int(digest(x[2, 3])[0]) == oracle(x[2, 3])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_every_bit_counts(dtype):
    x = np.asarray(random(dtype))
    before = int(digest(jnp.asarray(x))[0])
    raw = np.frombuffer(x.tobytes(), np.uint8)
    rng = np.random.default_rng(1)
    for bit in rng.choice(raw.size * 8, 200, replace=False):
        changed = raw.copy()
        changed[bit // 8] ^= np.uint8(1 << (bit % 8))
        assert int(digest(jnp.asarray(changed.view(x.dtype).reshape(x.shape)))[0]) != before


def test_swaps_and_shifts_count():
    x = random("float32")
    seen = {
        int(digest(y)[0]) for y in (x, x[::-1], x[:, ::-1], jnp.roll(x, 1), jnp.roll(x, 1, axis=0), x.at[0].set(x[1]))
    }
    assert len(seen) == 6


@pytest.mark.parametrize("spec", [P(), P("a"), P(None, "b"), P("a", "b"), P(("a", "b")), P("b", "a")])
def test_independent_of_the_mesh(spec):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    for dtype in ("float32", "bfloat16"):
        x = random(dtype, (16, 24))
        placed = jax.device_put(x, NamedSharding(mesh, spec))
        assert (digest(placed) == digest(x)).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn", "complex64"])
def test_finite(dtype):
    x = random(dtype)
    assert digests([x, x.at[3, 4].set(jnp.nan), jnp.arange(3)])[1] == [True, False, True]


def test_sharded_infinity():
    x = jax.device_put(random("float32", (16, 8)).at[15, 7].set(-jnp.inf), NamedSharding(toy.make_mesh(8), P("data")))
    assert digests([x])[1] == [False]

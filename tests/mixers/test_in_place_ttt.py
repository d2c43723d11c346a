"""In-Place TTT equals the paper's loop over chunks, and before training the feed-forward layer that it replaces."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlong.core.types import BadInput
from jaxlong.layers.mlp import SwiGLU
from jaxlong.mixers import InPlaceTTT

MIXER = InPlaceTTT(width=6, hidden=10, chunk=8, eta=0.3)


def params(mixer, noise: float):
    shapes = mixer.init(jax.random.key(0), jnp.zeros((1, 2, mixer.width)), positions=jnp.zeros((1, 2), jnp.int32))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: np.asarray(a) + noise * rng.normal(size=a.shape), nn.unbox(shapes)["params"])


def inputs(mixer, length: int):
    return np.random.default_rng(1).normal(size=(2, length, mixer.width))


def single(tree):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)


def call(mixer, p, x, segment_ids=None):
    positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    if segment_ids is not None:
        first = np.maximum.accumulate(np.where(np.diff(segment_ids, prepend=-1) != 0, np.arange(x.shape[1]), 0), -1)
        positions = positions - jnp.asarray(first, jnp.int32)
        segment_ids = jnp.asarray(segment_ids, jnp.int32)
    return mixer.apply({"params": p}, x, positions=positions, segment_ids=segment_ids)[0]


def by_chunks(mixer, p, x, xp=np):
    """One document [T D]: apply the weights of the chunk, then add eta V^T Z to them."""
    silu = lambda a: a / (1 + xp.exp(-a))
    z = silu(x @ p["gate"]) * (x @ p["up"])
    w, outs, reach = p["down"].T, [], mixer.conv // 2
    for start in range(0, len(x), mixer.chunk):
        part = slice(start, start + mixer.chunk)
        outs.append(z[part] @ w.T)
        padded = xp.pad(x[part], ((reach, reach), (0, 0)))
        size = len(padded) - 2 * reach
        v = sum(padded[s : s + size] * p["conv_kernel"][s] for s in range(mixer.conv)) @ p["target"]
        w = w + mixer.eta * v.T @ z[part]
    return xp.concatenate(outs)


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1.0, np.abs(want).max()))


@pytest.mark.thorough
@pytest.mark.parametrize("mixer,length", [(MIXER, 29), (MIXER.clone(chunk=3, conv=3, eta=0.1, hidden=4), 20)])
def test_the_loop_over_chunks(mixer, length):
    """Documents alone and packed at an offset; values in double precision."""
    p, x = params(mixer, 0.3), inputs(mixer, length)
    rows = [by_chunks(mixer, p, row) for row in x]
    close(call(mixer, single(p), single(x)), np.stack(rows))
    cut = 11
    want = np.stack([np.concatenate([by_chunks(mixer, p, row[:cut]), by_chunks(mixer, p, row[cut:])]) for row in x])
    segments = np.tile(np.arange(length) >= cut, (2, 1)).astype(int)
    close(call(mixer, single(p), single(x), segments), want)


@pytest.mark.thorough
@pytest.mark.parametrize("mixer,length", [(MIXER, 29), (MIXER.clone(chunk=3, conv=3, eta=0.1, hidden=4), 20)])
def test_gradients_of_the_loop(mixer, length):
    p, x = params(mixer, 0.3), inputs(mixer, length)
    weights = np.random.default_rng(2).normal(size=x.shape)
    with jax.enable_x64(True):
        rows = jax.vmap(lambda p, row: by_chunks(mixer, p, row, jnp), in_axes=(None, 0))
        want = jax.jit(jax.grad(lambda p, x: (rows(p, x) * weights).sum(), (0, 1)))(p, x)
        want = jax.tree.map(np.asarray, want)
    weights = weights.astype(np.float32)
    got = jax.jit(jax.grad(lambda p, x: (call(mixer, p, x) * weights).sum(), (0, 1)))(single(p), single(x))
    jax.tree.map(close, got, want)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("packed", [False, True])
def test_before_training_it_is_the_feed_forward_layer(dtype, packed):
    """The convolution begins at zero; with eta = 0 its training changes nothing. Bit for bit."""
    x = jnp.asarray(inputs(MIXER, 29), dtype)
    p = single(params(MIXER, 0.0))
    segments = np.tile(np.arange(29) >= 11, (2, 1)).astype(int) if packed else None
    base = {name: p[name] for name in ("gate", "up", "down")}
    want = SwiGLU(hidden=10).apply({"params": base}, x)
    assert not p["conv_kernel"].any() and p["target"].any()
    np.testing.assert_array_equal(np.float32(call(MIXER, p, x, segments)), np.float32(want))
    p["conv_kernel"] = p["conv_kernel"] + 1.0
    assert not np.array_equal(np.float32(call(MIXER, p, x, segments)), np.float32(want))
    np.testing.assert_array_equal(np.float32(call(MIXER.clone(eta=0.0), p, x, segments)), np.float32(want))


def test_bad_fields():
    for field, value in dict(width=0, hidden=0, chunk=0, conv=4).items():
        with pytest.raises(BadInput, match=field):
            MIXER.clone(**{field: value})
    with pytest.raises(BadInput, match="width"):
        MIXER.init(jax.random.key(0), jnp.zeros((1, 2, 5)), positions=jnp.zeros((1, 2), jnp.int32))

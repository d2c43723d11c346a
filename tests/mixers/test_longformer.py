"""Longformer: the encoder against transformers, the causal form against a float64 NumPy loop."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from differences import assert_gradients, exact
from flax import linen as nn

from jaxlong.core.mask import sliding
from jaxlong.core.position import NoPE
from jaxlong.core.types import BadInput
from jaxlong.mixers import GQA, LongformerAttention

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "longformer.npz")
SMALL = LongformerAttention(heads=4, kv_heads=2, head_dim=4, window=3, n_global=2, position=NoPE())


def close(got, want, tolerance=1e-5):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1.0, np.abs(want).max()))


def places(length, batch):
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["local", "global", "one"])
@pytest.mark.parametrize("packed", [False, True], ids=["row", "ids"])
def test_equals_transformers(name, packed):
    data = {key.split("/")[1]: GOLDEN[key] for key in GOLDEN.files if key.startswith(name + "/")}
    heads, window, n_global = map(int, data["sizes"])
    batch, length, width = data["x"].shape
    size = width // heads
    mixer = LongformerAttention(heads, heads, size, window, n_global, direction="both", bias=True, position=NoPE())
    shapes = {"w": (width, heads, size), "b": (heads, size)}
    shape_of = lambda key: (heads, size, width) if key == "wo" else shapes[key[0]]
    names = [key for key in data if key[0] in "wb" and key != "weights"]
    params = {key: jnp.asarray(data[key].reshape(shape_of(key)), jnp.float32) for key in names}
    x, weights = (jnp.asarray(data[key], jnp.float32) for key in ("x", "weights"))
    ids = jnp.ones((batch, length), jnp.int32) if packed else None

    def loss(params, x):
        y = mixer.apply({"params": params}, x, positions=places(length, batch), segment_ids=ids)[0]
        return (y * weights).sum(), y

    (d_params, d_x), y = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
    close(y, data["y"])
    close(d_x, data["d_x"])
    largest = max(np.abs(data[f"d_{key}"]).max() for key in names)  # biases of keys have none: softmax ignores them
    for key, got in d_params.items():
        close(got.reshape(data[f"d_{key}"].shape) / largest, data[f"d_{key}"] / largest)


def naive(mixer, params, x):
    """One document [T D], causal, written from section 3.1 of the paper."""
    length, y = len(x), 0
    for h in range(mixer.heads):
        g = h * mixer.kv_heads // mixer.heads
        q, k, v = x @ params["wq"][:, h], x @ params["wk"][:, g], x @ params["wv"][:, g]
        q_, k_, v_ = x @ params["wq_global"][:, h], x @ params["wk_global"][:, g], x @ params["wv_global"][:, g]
        rows = []
        for i in range(length):
            first = i < mixer.n_global
            a, b, c = (q_, k_, v_) if first else (q, k, v)
            seen = [j for j in range(i + 1) if first or j > i - mixer.window or j < mixer.n_global]
            weights = np.exp(b[seen] @ a[i] / np.sqrt(mixer.head_dim))
            rows.append(weights @ c[seen] / weights.sum())
        y = y + np.array(rows) @ params["wo"][h]
    return y


@pytest.mark.thorough
@pytest.mark.parametrize("fields", [{}, {"window": 5, "n_global": 1, "kv_heads": 4}], ids=str)
def test_causal_form_equals_the_loop(fields):
    mixer = SMALL.clone(**fields)
    length = 11
    x, weights = jax.random.normal(jax.random.key(0), (2, 1, length, 8))
    positions = places(length, 1)
    params = nn.unbox(jax.jit(mixer.init)(jax.random.key(1), x, positions=positions))["params"]

    def loss(params, x):
        y = mixer.apply({"params": params}, x, positions=positions)[0]
        return (y * weights).sum(), y

    grads, y = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
    close(y[0], naive(mixer, exact(params), exact(x)[0]))
    assert_gradients(grads, lambda at: (naive(mixer, at[0], at[1][0]) * exact(weights[0])).sum(), (params, x))


@pytest.mark.parametrize("direction", ["causal", "both"])
def test_without_global_tokens_it_is_a_window(direction):
    mixer = LongformerAttention(4, 2, 4, window=4, n_global=0, direction=direction)
    x, positions = jax.random.normal(jax.random.key(0), (2, 9, 8)), places(9, 2)
    params = jax.jit(mixer.init)(jax.random.key(1), x, positions=positions)
    window = GQA(4, 2, 4, mask=sliding(4) if direction == "causal" else sliding(3, 2))
    run = lambda m: jax.jit(functools.partial(m.apply, params))(x, positions=positions)[0]
    close(run(mixer), run(window), 2e-6)


def test_state_does_not_grow_with_length():
    size = lambda n: SMALL.state_bytes(1, n, width=8, max_chunk=4, itemsize=2)
    assert size(100) == size(100_000)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"window": 0}, "window: 0: is too small; 1 or more"),
        ({"n_global": -1}, "n_global: -1: is too small; 0 or more"),
        ({"window": 3, "direction": "both"}, "window: 3: both sides of a window see equally many; even"),
        ({"direction": "back"}, "direction: back: no such value; one of causal, both"),
        ({"kv_heads": 3}, "kv_heads: 3: does not divide heads = 4"),
    ],
)
def test_bad_input(fields, line):
    with pytest.raises(BadInput, match=line):
        SMALL.clone(**fields)


def test_an_encoder_has_no_state():
    mixer = SMALL.clone(window=4, direction="both")
    with pytest.raises(BadInput, match="direction: both: tokens to come would change the past: no state; causal"):
        mixer.init_state(1, 8, width=8, max_chunk=1, dtype=jnp.float32)

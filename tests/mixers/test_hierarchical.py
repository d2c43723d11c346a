"""Hierarchical attention against a float64 NumPy loop over tokens and units."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from differences import assert_gradients, exact
from flax import linen as nn

from jaxlong.core.mask import causal
from jaxlong.core.position import NoPE, Rope
from jaxlong.core.types import BadInput
from jaxlong.mixers import GQA, Hierarchical

WIDTH = 8
SETTINGS = {
    "three": (Hierarchical(4, 2, 4, segment=4, summaries=2, levels=3), 21),
    "four": (Hierarchical(2, 2, 6, segment=2, summaries=1, levels=4, position=NoPE()), 19),
    "two": (Hierarchical(2, 1, 4, segment=6, summaries=3, levels=2, position=Rope(base=100.0)), 20),
}
settings = pytest.mark.parametrize(("mixer", "length"), SETTINGS.values(), ids=SETTINGS)


def setup(mixer, length, batch=2):
    x = jax.random.normal(jax.random.key(0), (batch, length, WIDTH))
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), x.shape[:2])
    params = nn.unbox(jax.jit(mixer.init)(jax.random.key(1), x, positions=positions))["params"]
    return {**params, "bias": jax.random.normal(jax.random.key(2), params["bias"].shape)}, x, positions


def turned(mixer, x, position):
    """x [C] rotated by a position, pairs (n, n + C / 2)."""
    if isinstance(mixer.position, NoPE):
        return x
    half = len(x) // 2
    angle = position * mixer.position.base ** (-np.arange(half) / half)
    a, b = x[:half], x[half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)])


def naive(mixer, params, x):
    """One document [T D], head by head and token by token."""
    length, C, y = len(x), mixer.head_dim, 0
    for h in range(mixer.heads):
        g = h * mixer.kv_heads // mixer.heads
        q, k, v = x @ params["wq"][:, h], x @ params["wk"][:, g], x @ params["wv"][:, g]
        levels = [[([k[t]], [v[t]], t, t) for t in range(length)]]  # keys, values, first and last position
        for level in range(1, mixer.levels):
            fan, below = mixer.segment if level == 1 else mixer.segment // mixer.summaries, levels[-1]
            units = []
            for start in range(0, len(below) - fan + 1, fan):
                part = below[start : start + fan]
                keys, values = (np.array([a for unit in part for a in unit[n]]) for n in range(2))
                weights = np.exp(params["pools"][level - 1, :, g] @ keys.T / np.sqrt(C))
                weights /= weights.sum(1, keepdims=True)
                units.append((weights @ keys, weights @ values, part[0][2], part[-1][3]))
            levels.append(units)
        rows = []
        for i in range(length):
            query, scores, values, covered = turned(mixer, q[i], i), [], [], []
            for level, units in enumerate(levels):
                bias = params["bias"][level - 1, h] if level else 0.0
                own = i - i % mixer.span(level)
                parent = 0 if level == mixer.levels - 1 else i - i % mixer.span(level + 1)
                for keys, content, first, last in units:
                    if parent <= first and (last < own or (last == i and level == 0)):
                        covered += range(first, last + 1)
                        scores += [turned(mixer, key, last) @ query / np.sqrt(C) + bias for key in keys]
                        values += list(content)
            assert sorted(covered) == list(range(i + 1))  # each token of the past at exactly one level
            weights = np.exp(scores)
            rows.append(weights @ np.array(values) / weights.sum())
        y = y + np.array(rows) @ params["wo"][h]
    return y


def close(got, want, tolerance=1e-5):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1.0, np.abs(want).max()))


@pytest.mark.thorough
@settings
def test_equals_the_loop(mixer, length):
    params, x, positions = setup(mixer, length)
    got = jax.jit(mixer.apply)({"params": params}, x, positions=positions)[0]
    close(got, np.stack([naive(mixer, exact(params), row) for row in exact(x)]))


@pytest.mark.thorough
@settings
def test_gradients_equal_differences_of_the_loop(mixer, length):
    params, x, positions = setup(mixer, length, batch=1)
    weights = np.random.default_rng(0).standard_normal(x.shape)
    loss = lambda p, x: (mixer.apply({"params": p}, x, positions=positions)[0] * weights).sum()
    grads = jax.jit(jax.grad(loss, (0, 1)))(params, x)
    assert_gradients(grads, lambda at: (naive(mixer, at[0], at[1][0]) * weights[0]).sum(), (params, x))


def test_a_segment_of_everything_is_full_attention():
    mixer = Hierarchical(4, 2, 4, segment=16, summaries=2, levels=2)
    params, x, positions = setup(mixer, 16)
    full = GQA(4, 2, 4, mask=causal())
    shared = {name: params[name] for name in ("wq", "wk", "wv", "wo")}
    want = jax.jit(full.apply)({"params": shared}, x, positions=positions)[0]
    close(jax.jit(mixer.apply)({"params": params}, x, positions=positions)[0], want, 2e-6)


def test_more_levels_keep_fewer_summaries():
    mixer = Hierarchical(4, 2, 4, segment=8, summaries=2)
    size = lambda levels: mixer.clone(levels=levels).state_bytes(1, 65536, width=8, max_chunk=1, itemsize=2)
    assert size(2) > 2 * size(3) > 4 * size(4) > 8 * size(5) and size(8) < size(2) / 100


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"segment": 1}, "segment: 1: is too small; 2 or more"),
        ({"levels": 1}, "levels: 1: is too small; 2 or more"),
        ({"summaries": 3}, r"summaries: 3: does not divide segment = 8; one of \[1, 2, 4, 8\]"),
        ({"summaries": 8}, "summaries: 8: as many as tokens; at most segment / 2 = 4"),
        ({"kv_heads": 3}, "kv_heads: 3: does not divide heads = 4"),
    ],
)
def test_bad_input(fields, line):
    with pytest.raises(BadInput, match=line):
        Hierarchical(**{"heads": 4, "kv_heads": 2, "head_dim": 4, "segment": 8, "summaries": 2, **fields})


def test_a_state_for_another_pattern_is_refused():
    mixer = Hierarchical(4, 2, 4, segment=8, summaries=2)
    params, x, positions = setup(mixer, 3)
    state = mixer.clone(summaries=4).init_state(2, 64, width=WIDTH, max_chunk=4, dtype=x.dtype)
    with pytest.raises(BadInput, match="was made for other inputs"):
        mixer.apply({"params": params}, x, positions=positions, state=state)

"""The indexer against loops in float64 NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxlong.core.mask import causal, sliding
from jaxlong.core.types import BadInput
from jaxlong.ops.indexer import Sight, float8, index_loss, index_scores, select_by_index
from jaxlong.ops.select import Selection

SCALE = 0.3


def arrays(length: int, seed: int = 0, heads: int = 3, index_heads: int = 2, dim: int = 6) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"q": (heads, 7), "k": (7,), "iq": (index_heads, dim), "w": (index_heads,), "ik": (dim,)}
    return {name: rng.normal(size=(2, length, *shape)) for name, shape in shapes.items()}


def documents(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segments of two documents in a row."""
    first = length // 3
    positions = np.concatenate([np.arange(first), np.arange(length - first)])
    segments = np.repeat([1, 2], [first, length - first])
    return tuple(np.tile(a, (2, 1)).astype(np.int32) for a in (positions, segments))


def seen_at(positions, segments, k_segments=None) -> Sight:
    positions, segments = jnp.asarray(positions), jnp.asarray(segments)
    return Sight(positions, positions, segments, segments if k_segments is None else jnp.asarray(k_segments))


def score(a, b, t, s) -> float:
    heads, dim = a["iq"].shape[2:]
    products = np.maximum(a["iq"][b, t] @ a["ik"][b, s], 0)
    return float(a["w"][b, t] @ products) / np.sqrt(heads * dim)


def divergence(a, b, t, keys) -> float:
    """KL of query t over those keys, one number at a time."""
    target = np.zeros(len(keys))
    for h in range(a["q"].shape[2]):
        weights = np.exp([SCALE * a["q"][b, t, h] @ a["k"][b, s] for s in keys])
        target += weights / weights.sum()
    target /= target.sum()
    index = np.exp([score(a, b, t, s) for s in keys])
    index /= index.sum()
    return float(sum(p * (np.log(p) - np.log(i)) for p, i in zip(target, index, strict=True)))


def visible_keys(positions, segments, b, t, window):
    ahead = positions[b, t] - positions[b]
    return [s for s in range(len(ahead)) if 0 <= ahead[s] < window and segments[b, s] == segments[b, t]]


def loss(a, sight, chosen, mask):
    a = {name: jnp.asarray(x, jnp.float32) for name, x in a.items()}
    return index_loss((a["q"], a["k"]), (a["iq"], a["w"], a["ik"]), sight, chosen, mask=mask, scale=SCALE)


@pytest.mark.thorough
@pytest.mark.parametrize("top_k", [4, None])
@pytest.mark.parametrize("length,window", [(40, 99), (1, 9), (7, 99), (70, 9)])
def test_loss_equals_a_loop(length, window, top_k):
    """Over all visible keys, and over chosen ones; more queries than a block; directional derivatives too."""
    a, (positions, segments) = arrays(length), documents(length)
    mask = causal() if window == 99 else sliding(window)
    sight = seen_at(positions, segments)
    chosen, sets = None, {}
    for b in range(2):
        for t in range(length):
            keys = visible_keys(positions, segments, b, t, window)
            sets[b, t] = keys if top_k is None else sorted(keys, key=lambda s: -score(a, b, t, s))[:top_k]
    if top_k is not None:
        named = select_by_index(
            *(jnp.asarray(a[name], jnp.float32) for name in ("iq", "w", "ik")), sight, mask=mask, heads=3, count=top_k
        )
        chosen = named
        for (b, t), keys in sets.items():
            indices, valid = (np.asarray(x)[b, t, 0] for x in named)
            assert indices[valid].tolist() == keys

    total = lambda a: sum(divergence(a, b, t, keys) * (1 + t % 3) for (b, t), keys in sets.items())
    weights = jnp.asarray(1 + np.arange(length) % 3, jnp.float32)
    learned = {name: a[name] for name in ("iq", "w", "ik")}
    f = lambda x: (loss(a | x, sight, chosen, mask) * weights).sum()
    value, gradient = jax.jit(jax.value_and_grad(f))({k: jnp.asarray(x, jnp.float32) for k, x in learned.items()})
    np.testing.assert_allclose(value, total(a), rtol=1e-5, atol=1e-6)
    if length > 40:
        return  # the loops take long
    rng = np.random.default_rng(1)
    for name in learned:
        step = rng.normal(size=a[name].shape) * 1e-5
        moved = (total(a | {name: a[name] + step}) - total(a | {name: a[name] - step})) / 2
        np.testing.assert_allclose((np.asarray(gradient[name]) * step).sum(), moved, rtol=1e-4, atol=1e-9)


def test_loss_does_not_teach_the_attention():
    a, (positions, segments) = arrays(9), documents(9)
    sight = seen_at(positions, segments)
    f = lambda q, k: loss(a | {"q": q, "k": k}, sight, None, causal()).sum()
    for gradient in jax.grad(f, (0, 1))(jnp.asarray(a["q"], jnp.float32), jnp.asarray(a["k"], jnp.float32)):
        assert not np.asarray(gradient).any()


def test_query_without_keys():
    """Loses nothing, and no NaN reaches the gradient."""
    a, (positions, segments) = arrays(6), documents(6)
    sight = seen_at(positions, segments, np.full_like(segments, -1))
    learned = [jnp.asarray(a[name], jnp.float32) for name in ("iq", "w", "ik")]
    nothing = Selection(jnp.zeros((2, 6, 1, 3), jnp.int32), jnp.zeros((2, 6, 1, 3), bool))
    for chosen in (None, nothing):
        f = lambda *x: loss(a | dict(zip(("iq", "w", "ik"), x, strict=True)), sight, chosen, causal()).sum()  # noqa: B023
        value, gradients = jax.value_and_grad(f, (0, 1, 2))(*learned)
        assert value == 0 and not any(np.asarray(g).any() for g in gradients)


def test_ties_go_to_the_older_key():
    """In a ring whose oldest key lies in the middle, too."""
    q, w, k = jnp.ones((1, 1, 2, 4)), jnp.ones((1, 1, 2)), jnp.ones((1, 6, 4))
    q_positions, positions = jnp.full((1, 1), 9), jnp.asarray([[8, 9, 4, 5, 6, 7]], jnp.int32)
    sight = Sight(q_positions.astype(jnp.int32), positions, None, None)
    chosen = select_by_index(q, w, k, sight, mask=causal(), heads=1, count=3, oldest=jnp.asarray(2))
    assert positions[0][chosen.indices[0, 0, 0]].tolist() == [4, 5, 6]


@pytest.mark.usefixtures("compile_well")
def test_memory_is_of_one_block_of_queries():
    """Of 2048 queries and keys neither all scores of a head nor those of the indexer are held, also backward."""
    length, heads = 2048, 4
    shapes = {"q": (heads, 8), "k": (8,), "iq": (2, 8), "w": (2,), "ik": (8,)}
    a = {name: jax.ShapeDtypeStruct((1, length, *shape), jnp.float32) for name, shape in shapes.items()}
    where = jax.ShapeDtypeStruct((1, length), jnp.int32)
    f = lambda a, where: loss(a, Sight(where, where, None, None), None, causal()).sum()
    compiled = jax.jit(jax.grad(f)).lower(a, where).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < length * length * 4


def test_float8_is_what_the_format_says():
    """Rounded as ml_dtypes rounds, under a power-of-two scale; transformed so that products stay."""
    x = np.random.default_rng(0).normal(size=(5, 256)).astype(np.float32) * np.array([[1e-6, 1e-2, 1, 30, 900]]).T
    hadamard = np.array([[1.0]])
    while len(hadamard) < 256:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    turned = (x.astype(np.float64) @ hadamard / 16).reshape(5, 2, 128)
    largest = np.maximum(np.abs(turned).max(-1, keepdims=True), 1e-4)
    scale = 2.0 ** np.ceil(np.log2(largest / 448))
    want = ((turned / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale).reshape(5, 256)
    got = np.asarray(jax.jit(float8)(x))
    assert (got == want).mean() > 0.999  # the transform is not exact, so a few fall on the other side
    np.testing.assert_allclose(got, want, rtol=0.13, atol=1e-6)
    bfloat16 = np.asarray(float8(jnp.asarray(x, jnp.bfloat16)), np.float32).reshape(5, 2, 128)
    assert (bfloat16 / scale == (bfloat16 / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)).all()
    products = lambda a: a @ a.T
    np.testing.assert_allclose(products(got[2:4]), products(x[2:4]), rtol=0.05, atol=0.05 * 256 * 30)
    gradient = jax.grad(lambda x: (float8(x) * want).sum())(jnp.asarray(x))
    np.testing.assert_allclose(gradient, want @ hadamard / 16, rtol=1e-4, atol=1e-3)
    with pytest.raises(BadInput, match="power of two"):
        float8(jnp.zeros((2, 12)))


def test_float8_finds_most_of_what_float32_finds():
    """Of 1024 random keys of 128 numbers, at least 95 in 100 of the best 64 are the same."""
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((1, 32, 8, 128), (1, 1024, 128)))
    w = jnp.asarray(rng.normal(size=(1, 32, 8)), jnp.float32)
    best = lambda q, k: np.asarray(jax.lax.top_k(index_scores(q, w, k), 64)[1][0])
    pairs = zip(best(q, k), best(float8(q), float8(k)), strict=True)
    recall = np.mean([len(np.intersect1d(a, b)) / 64 for a, b in pairs])
    assert recall >= 0.95, recall

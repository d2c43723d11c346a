"""Selected attention against a float64 loop over queries, and the choice itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlong.core.mask import causal
from jaxlong.core.types import BadInput
from jaxlong.ops.attend import attend_with_lse
from jaxlong.ops.select import (
    Selection,
    attend_selected,
    map_queries,
    sigmoid_relaxation,
    softmax_relaxation,
    straight_through_top_k,
    top_k,
)


def naive(q, k, v, selection, *, mask, q_positions, k_positions, q_segments, k_segments, block, scale, weigh):
    """out, lse in float64, and their gradients for out . weigh[0] + lse . weigh[1], one query and head at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (B, T, H, _), (S, K) = q.shape, k.shape[1:3]
    indices, valid = (np.asarray(x) for x in selection)
    out, lse = np.zeros((B, T, H, v.shape[-1])), np.full((B, T, H), -np.inf)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b, t, h in np.ndindex(B, T, H):
        group, head = h * indices.shape[2] // H, h * K // H
        slots = []
        for start in indices[b, t, group][valid[b, t, group]]:
            for i in range(block):
                slot = (start + i) % S
                if k_positions[b, slot] != k_positions[b, start] + i or k_segments[b, slot] != q_segments[b, t]:
                    break
                if mask(int(q_positions[b, t]), int(k_positions[b, slot])):
                    slots.append(slot)
        if not slots:
            continue
        scores = scale * k[b, slots, head] @ q[b, t, h]
        top = scores.max()
        weights = np.exp(scores - top)
        lse[b, t, h] = top + np.log(weights.sum())
        weights /= weights.sum()
        out[b, t, h] = weights @ v[b, slots, head]
        dscores = weights * (v[b, slots, head] @ weigh[0][b, t, h])
        dscores += weights * (weigh[1][b, t, h] - dscores.sum())
        dq[b, t, h] = scale * dscores @ k[b, slots, head]
        for slot, ds, w in zip(slots, dscores, weights, strict=True):
            dk[b, slot, head] += scale * ds * q[b, t, h]
            dv[b, slot, head] += w * weigh[0][b, t, h]
    return out, lse, (dq, dk, dv)


def rows(B, lengths):
    """Segments and positions of documents side by side."""
    tile = lambda x: jnp.asarray(np.tile(np.concatenate(x), (B, 1)), jnp.int32)
    return tile([np.full(n, i + 1) for i, n in enumerate(lengths)]), tile([np.arange(n) for n in lengths])


CASES = {
    # name: (T, H, K, C, V, groups, n, block, documents, query_block)
    "tokens_shared": (7, 4, 2, 5, 3, 1, 3, 1, (7,), 64),
    "latents": (13, 4, 1, 6, 4, 1, 5, 1, (5, 8), 4),
    "blocks_by_key_head": (17, 4, 2, 4, 4, 2, 2, 4, (9, 1, 7), 5),
    "blocks_by_head": (16, 4, 2, 4, 3, 4, 3, 3, (16,), 8),
    "one": (1, 2, 1, 4, 4, 2, 1, 2, (1,), 64),
}


def case(name):
    T, H, K, C, V, groups, n, block, documents, query_block = CASES[name]
    rng = np.random.default_rng(len(name))
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    q, k, v = normal(2, T, H, C), normal(2, T, K, C), normal(2, T, K, V)
    chosen = np.argsort(rng.normal(size=(2, T, groups, max(T // block, n))), -1)[..., :n] * block % T
    selection = Selection(jnp.asarray(chosen, jnp.int32), jnp.asarray(rng.random(chosen.shape) < 0.8))
    segments, positions = rows(2, documents)
    settings = dict(q_positions=positions, k_positions=positions, q_segments=segments, k_segments=segments)
    settings |= dict(mask=causal(), block=block, scale=0.4)
    return q, k, v, selection, settings, query_block, (rng.normal(size=(2, T, H, V)), rng.normal(size=(2, T, H)))


@pytest.mark.thorough
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    q, k, v, selection, settings, query_block, weigh = case(name)
    want_out, want_lse, want_grads = naive(q, k, v, selection, weigh=weigh, **settings)

    def loss(q, k, v):
        out, lse = attend_selected(q, k, v, selection, query_block=query_block, **settings)
        return (out * weigh[0]).sum() + jnp.where(lse == -jnp.inf, 0, lse * weigh[1]).sum(), (out, lse)

    grads, (out, lse) = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    np.testing.assert_allclose(out, want_out, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse, atol=2e-6)
    assert np.isneginf(lse).any() or name == "one"  # some query sees nothing
    for got, want in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("block", [1, 4])
def test_everything_selected_is_full_attention(block):
    q, k, v, _, settings, _, _ = case("blocks_by_head")
    every = jnp.broadcast_to(jnp.arange(0, 16, block, dtype=jnp.int32), (2, 16, 1, 16 // block))
    selection = Selection(every, jnp.ones(every.shape, bool))
    del settings["block"]
    full = attend_with_lse(q, k, v, **settings)
    chosen = jax.jit(lambda q, k, v: attend_selected(q, k, v, selection, block=block, **settings))(q, k, v)
    for got, want in zip(chosen, full, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_spans_go_around_a_ring():
    """Slots of a cache that holds tokens 5 to 12 in a ring of 8: span 7 is at slots 7, 0, 1."""
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.normal(size=(1, 13, 1, 4)), jnp.float32) for _ in range(2))
    order = np.array([8, 9, 10, 11, 12, 5, 6, 7])
    query = jnp.asarray(rng.normal(size=(1, 1, 2, 4)), jnp.float32)
    settings = dict(mask=causal(), q_positions=jnp.array([[12]]), block=3)
    choose = lambda slot: Selection(jnp.full((1, 1, 1, 1), slot, jnp.int32), jnp.ones((1, 1, 1, 1), bool))
    straight = jnp.arange(13, dtype=jnp.int32)[None]
    want = attend_selected(query, k, v, choose(7), k_positions=straight, **settings)
    ring = attend_selected(query, k[:, order], v[:, order], choose(7), k_positions=straight[:, order], **settings)
    for a, b in zip(ring, want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_is_not_seen_changes_nothing():
    """NaN in keys of the future and of other documents, in values and in gradients."""
    q, k, v, selection, settings, query_block, _ = case("latents")
    run = jax.jit(lambda q, k, v: attend_selected(q, k, v, selection, query_block=query_block, **settings))
    part = slice(0, 5)
    clean = run(q, k, v)[0][:, part]
    spoilt = [x.at[:, 5:].set(jnp.nan) for x in (k, v)]
    np.testing.assert_array_equal(run(q, *spoilt)[0][:, part], clean)
    grad = jax.jit(jax.grad(lambda q, k, v: run(q, k, v)[0][:, part].sum(), (0, 1, 2)))
    for a, b in zip(grad(q, *spoilt), grad(q, k, v), strict=True):
        np.testing.assert_array_equal(a[:, part], b[:, part])


def test_top_k_takes_the_lower_of_equals_and_only_what_is_allowed():
    scores = jnp.array([[[[0.0, 2.0, -0.0, 2.0, jnp.inf], [1.0, 1.0, 1.0, 1.0, 1.0], [3.0, 2.0, 1.0, 0.0, 5.0]]]])
    allowed = jnp.array([[[[1, 1, 1, 1, 0], [0, 1, 0, 1, 1], [0, 0, 0, 1, 0]]]], bool)
    indices, valid = top_k(scores, 3, allowed)
    np.testing.assert_array_equal(indices[0, 0, :2], [[1, 3, 0], [1, 3, 4]])
    np.testing.assert_array_equal(valid[0, 0], [[1, 1, 1], [1, 1, 1], [1, 0, 0]])
    assert indices[0, 0, 2, 0] == 3
    assert top_k(scores, 9, allowed).indices.shape[-1] == 5
    np.testing.assert_array_equal(top_k(jnp.array([[[[-0.0, 0.0]]]]), 1, jnp.ones((1, 1, 1, 2), bool)).indices, 0)
    assert not jax.grad(lambda s: top_k(s, 2, allowed).valid.sum().astype(float) + 0 * s.sum())(scores).any()


def test_map_queries_is_the_function():
    x = jnp.arange(22.0).reshape(2, 11)
    f = lambda pair: (jnp.sin(pair[0]), pair[1])
    for got, want in zip(map_queries(f, (x, None), block=4), f((x, None)), strict=True):
        assert (want is None and got is None) or np.allclose(got, want)
    np.testing.assert_allclose(
        jax.grad(lambda x: map_queries(f, (x, None), block=4)[0].sum())(x), jnp.cos(x), rtol=1e-6
    )


@pytest.mark.parametrize("relaxation", [sigmoid_relaxation, softmax_relaxation])
def test_straight_through(relaxation):
    scores = jnp.array([[0.3, -1.0, 2.0, 0.3], [5.0, 4.0, -3.0, 0.0]])
    weights = jnp.array([[1.0, -2.0, 0.5, 3.0], [0.3, 1.0, 2.0, -1.0]])
    hard = lambda s: straight_through_top_k(s, 2, temperature=0.7, relaxation=relaxation)
    np.testing.assert_array_equal(hard(scores), [[1, 0, 1, 0], [1, 1, 0, 0]])
    got = jax.jit(jax.grad(lambda s: (hard(s) * weights).sum()))(scores)
    s, w, kept = np.asarray(scores, np.float64) / 0.7, np.asarray(weights), np.asarray(hard(scores))
    if relaxation is sigmoid_relaxation:
        p = 1 / (1 + np.exp(-s))
        want = w * p * (1 - p) / 0.7
    else:
        p = np.exp(s) * kept
        p /= p.sum(-1, keepdims=True)
        want = p * (w - (p * w).sum(-1, keepdims=True)) / 0.7
    np.testing.assert_allclose(got, want, atol=1e-6)
    np.testing.assert_array_equal(straight_through_top_k(scores, 9), 1)


def test_refuses():
    q, k, v, selection, settings, _, _ = case("tokens_shared")
    with pytest.raises(BadInput, match="3 groups of heads"):
        attend_selected(q, k, v, jax.tree.map(lambda x: jnp.repeat(x, 3, 2), selection), **settings)
    with pytest.raises(BadInput, match="multiple of the 2 key heads"):
        attend_selected(q[:, :, :3], k, v, selection, **settings)
    with pytest.raises(BadInput, match="given for one side only"):
        attend_selected(q, k, v, selection, **(settings | dict(k_segments=None)))
    with pytest.raises(BadInput, match="temperature"):
        straight_through_top_k(q, 1, temperature=0.0)

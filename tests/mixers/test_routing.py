"""Routing attention against float64 loops, its centroids' gradient, and the laws it keeps with a state."""

from __future__ import annotations

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sparse_oracle import WIDTH, best, check, random_params, rotate, single, softmax_attention, with_state

from jaxlong.core.position import NoPE, Rope
from jaxlong.core.types import BadInput
from jaxlong.mixers import Routing

MIXERS = Routing.examples()
every_mixer = pytest.mark.parametrize("name", MIXERS)


def project(mixer, params, x):
    """Rotated q, k and v [T H C] of one document, and the scores of routed queries and keys [T R N]."""
    L, C = mixer.local, mixer.head_dim
    turn = lambda a: np.stack([rotate(row, t) for t, row in enumerate(a)]) if isinstance(mixer.position, Rope) else a
    q, k, v = (np.einsum("td,dhc->thc", x, params[name]) for name in ("wq", "wk", "wv"))
    routed = [q[:, L:], q[:, L:] if mixer.shared else k[:, L:]]
    routed = [a - a.mean(-1, keepdims=True) for a in routed]
    units = [a / np.sqrt((a * a).sum(-1, keepdims=True) + 1e-6) for a in routed]
    scores = [np.einsum("trc,rnc->trn", a, params["centroids"]) for a in units]
    q = np.concatenate([q[:, :L], units[0] * C**0.5], axis=1)
    k = np.concatenate([k[:, :L], units[1] * C**0.5], axis=1)
    return turn(q), turn(k), v, *scores


def near(mixer, q, k, v):
    """The local heads [T L C]."""
    o = np.zeros((len(q), mixer.local, mixer.head_dim))
    for t, h in np.ndindex(*o.shape[:2]):
        seen = slice(max(0, t - mixer.window + 1), t + 1)
        o[t, h] = softmax_attention(q[t, h], k[seen, h], v[seen, h])
    return o


def attend_to(mixer, q, k, v, t, h, seen):
    """Token t of head h over the tokens `seen`; itself only as the last resort if keys are queries."""
    if mixer.shared:
        seen = [j for j in seen if j != t] or [t]
    return softmax_attention(q[t, h], k[seen, h], v[seen, h])


def naive_whole(mixer, params, x):
    """A row that is one document, as in training: the best tokens of each cluster."""
    q, k, v, q_scores, k_scores = project(mixer, params, x)
    L, T = mixer.local, len(x)
    far, count = np.zeros((T, mixer.heads - L, mixer.head_dim)), np.zeros((T, mixer.heads - L, 1))
    for r, c in np.ndindex(mixer.heads - L, mixer.clusters):
        queries, keys = (best(s[:, r, c], mixer.members) for s in (q_scores, k_scores))
        for t in queries:
            far[t, r] += attend_to(mixer, q, k, v, t, L + r, sorted(j for j in keys if j <= t))
            count[t, r] += 1
    o = np.concatenate([near(mixer, q, k, v), far / np.maximum(count, 1)], axis=1)
    return np.einsum("thc,hcd->td", o, params["wo"])


def naive_recent(mixer, params, x):
    """A document with a state: the last members of a token's own cluster."""
    q, k, v, q_scores, k_scores = project(mixer, params, x)
    L, T = mixer.local, len(x)
    far = np.zeros((T, mixer.heads - L, mixer.head_dim))
    for t, r in np.ndindex(*far.shape[:2]):
        cluster = q_scores[t, r].argmax()
        members = [j for j in range(t + 1) if k_scores[j, r].argmax() == cluster]
        far[t, r] = attend_to(mixer, q, k, v, t, L + r, members[-mixer.members :])
    o = np.concatenate([near(mixer, q, k, v), far], axis=1)
    return np.einsum("thc,hcd->td", o, params["wo"])


@pytest.mark.thorough
@every_mixer
@pytest.mark.parametrize("length", [14, 3])
def test_whole_rows(name, length):
    check(MIXERS[name], partial(naive_whole, MIXERS[name]), (length,), directions=1, still=("centroids",))


@pytest.mark.thorough
@every_mixer
def test_with_a_state(name):
    mixer = MIXERS[name].clone(members=3)
    check(mixer, partial(naive_recent, mixer), (9, 1, 6), directions=1, still=("centroids",), run=with_state)


def inputs(length, seed=2):
    return jax.random.normal(jax.random.key(seed), (2, length, WIDTH))


@functools.cache
def chunked(name, sizes):
    """A function of parameters, x, positions and segments that feeds x in chunks."""
    mixer = MIXERS[name]

    @jax.jit
    def run(params, x, positions, segments):
        state = mixer.init_state(2, x.shape[1], width=WIDTH, max_chunk=max(sizes), dtype=x.dtype)
        outs = []
        for end in np.cumsum(sizes):
            part = slice(end - sizes[len(outs)], end)
            y, state = mixer.apply(
                {"params": params},
                x[:, part],
                positions=positions[:, part],
                segment_ids=segments[:, part],
                state=state,
            )
            outs.append(y)
        return jnp.concatenate(outs, axis=1)

    return run


def row(*lengths):
    """Positions and segments of documents side by side."""
    tile = lambda parts: jnp.asarray(np.tile(np.concatenate(parts), (2, 1)), jnp.int32)
    return tile([np.arange(n) for n in lengths]), tile([np.full(n, i) for i, n in enumerate(lengths)])


def params_of(name):
    return single(random_params(MIXERS[name], np.random.default_rng(1)))


@every_mixer
def test_with_a_state_the_future_changes_nothing(name):
    run, params, x, other = chunked(name, (12,)), params_of(name), inputs(12), inputs(12, seed=3)
    for cut in (1, 7, 11):
        changed = jnp.concatenate([x[:, :cut], other[:, cut:]], axis=1)
        a, b = run(params, x, *row(12)), run(params, changed, *row(12))
        np.testing.assert_array_equal(a[:, :cut], b[:, :cut])
        assert not np.array_equal(a[:, cut:], b[:, cut:])


@pytest.mark.slow
@every_mixer
def test_chunks_equal_other_chunks(name):
    x, weigh = inputs(4), inputs(4, seed=4)

    def results(*sizes):
        def loss(params, x):
            y = chunked(name, sizes)(params, x, *row(4))
            return (y * weigh).sum(), y

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params_of(name), x)

    once = results(4)
    for other in (results(1, 1, 1, 1), results(2, 1, 1)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), other, once)


@pytest.mark.thorough
@every_mixer
def test_packed_documents_equal_separate_ones_with_a_state(name):
    lengths, params, x = (4, 1, 4), params_of(name), inputs(9)
    together = chunked(name, (9,))(params, x, *row(*lengths))
    in_pieces = chunked(name, (3, 1, 5))(params, x, *row(*lengths))
    np.testing.assert_allclose(in_pieces, together, atol=1e-5)
    ends = np.cumsum(lengths)
    for start, end in zip(ends - lengths, ends, strict=True):
        alone = chunked(name, (int(end - start),))(params, x[:, start:end], *row(end - start))
        np.testing.assert_allclose(together[:, start:end], alone, atol=1e-5)


@every_mixer
def test_descent_moves_centroids_as_a_moving_average(name):
    mixer, decay = MIXERS[name].clone(commitment=0.3, rate=0.1), 0.9
    params, x = random_params(mixer, np.random.default_rng(1)), np.random.default_rng(2).normal(size=(2, 8, WIDTH))

    def loss(params, x):
        _, sown = mixer.apply({"params": params}, x, positions=row(8)[0], mutable=["losses"])
        (value,) = sown["losses"]["centroids"]
        return value

    value, (grads, dx) = jax.jit(jax.value_and_grad(loss, (0, 1)))(single(params), single(x))

    def naive(x):
        far = 0.0
        totals = np.zeros_like(params["centroids"])
        scores, units = [], []
        for document in x:
            q, k, _, *both = project(mixer.clone(position=NoPE()), params, document)
            for a, s in list(zip((q, k), both, strict=True))[: 1 if mixer.shared else 2]:
                scores.append(s)
                units.append(a[:, mixer.local :] / mixer.head_dim**0.5)
        for s, a in zip(scores, units, strict=True):
            for t, r in np.ndindex(*a.shape[:2]):
                c = s[t, r].argmax()
                far += ((a[t, r] - params["centroids"][r, c]) ** 2).sum()
                totals[r, c] += a[t, r]
        return 0.3 * far / (len(units) * units[0].shape[0] * units[0].shape[1]), totals

    want, totals = naive(x)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    norm = np.linalg.norm(totals, axis=-1, keepdims=True)
    mean = np.where(norm > 0, totals / np.where(norm > 0, norm, 1), params["centroids"])
    moved = params["centroids"] - grads["centroids"]
    np.testing.assert_allclose(moved, decay * params["centroids"] + (1 - decay) * mean, atol=1e-6)
    along = np.random.default_rng(3).normal(size=x.shape)
    slope = (naive(x + 1e-6 * along)[0] - naive(x - 1e-6 * along)[0]) / 2e-6
    np.testing.assert_allclose((dx * along).sum(), slope, rtol=1e-3)


def test_an_unused_centroid_stays():
    mixer = MIXERS["shared"].clone(clusters=40)
    params = single(random_params(mixer, np.random.default_rng(1)))
    loss = lambda p: mixer.apply({"params": p}, inputs(4), positions=row(4)[0], mutable=["losses"])[1]
    grad = jax.jit(jax.grad(lambda p: loss(p)["losses"]["centroids"][0]))(params)["centroids"]
    moved = np.abs(grad).max(-1) > 0
    assert 0 < moved.sum(1).max() <= 8


def test_refuses():
    with pytest.raises(BadInput, match="local: 4: leaves no head to route"):
        Routing(4, 8, local=4)
    for field in ("clusters", "members", "window"):
        with pytest.raises(BadInput, match=field):
            Routing(4, 8, local=2, **{field: 0})

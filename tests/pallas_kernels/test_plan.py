"""Mask plans: what is visited is what can be seen; and predicates on tiles are the masks themselves."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlong.core.mask import (
    bigbird,
    causal,
    dilated,
    fixed,
    full,
    longformer,
    prefix,
    sinks,
    sliding,
    strided,
)
from pallas_kernels.plan import mask_plan, tokens
from pallas_kernels.predicate import on_tile

MASKS = {
    "causal": causal(),
    "full": full(),
    "window": sliding(11),
    "two-sided": sliding(9, 5),
    "sinks": sliding(10) | sinks(3),
    "prefix": prefix(13),
    "dilated": dilated(24, 3),
    "strided": strided(7),
    "fixed": fixed(8, 2),
    "longformer": longformer(9, 3) & causal(),
    "bigbird": bigbird(3, 1, 2, 8, 5),
    "not": ~causal(),
}
T, S, BLOCK_Q, BLOCK_K = 52, 76, 16, 8


def layouts():
    """name -> positions of queries and keys [2 T], [2 S]."""
    rows = np.random.default_rng(0)
    mixed = lambda n: np.stack([rows.permutation(n), rows.permutation(n)]).astype(np.int32)
    plain = lambda n, start=0: np.broadcast_to(np.arange(start, start + n, dtype=np.int32), (2, n))
    return {
        "plain": (plain(T), plain(S)),
        "hop": (plain(T, 40), plain(S, 8)),
        "mixed": (mixed(T), mixed(S)),
    }


def documents(seed):
    """Segments of queries and keys, some key slots of them empty."""
    rows = np.random.default_rng(seed)
    of = lambda n: np.cumsum(rows.random((2, n)) < 0.08, axis=1).astype(np.int32)
    k = of(S)
    return of(T), np.where(rows.random(k.shape) < 0.1, -1, k)


def seen(mask, q, k, segments):
    found = np.broadcast_to(mask(q[:, :, None], k[:, None, :]), (2, T, S))
    if segments is not None:
        found = found & (segments[0][:, :, None] == segments[1][:, None, :]) & (segments[1] >= 0)[:, None, :]
    padded = np.zeros((2, -(-T // BLOCK_Q) * BLOCK_Q, -(-S // BLOCK_K) * BLOCK_K), bool)
    padded[:, :T, :S] = found
    return padded


def by_tile(pairs):
    B, t, s = pairs.shape
    return pairs.reshape(B, t // BLOCK_Q, BLOCK_Q, s // BLOCK_K, BLOCK_K).swapaxes(2, 3)


def build(mask, q, k, segments, xp):
    q_segments, k_segments = (None, None) if segments is None else map(xp.asarray, segments)
    held = tokens(xp.asarray(q), xp.asarray(k), q_segments, k_segments, BLOCK_Q, BLOCK_K)
    return mask_plan(mask, held, T, BLOCK_Q, BLOCK_K)


def lists(visits, b, i):
    order, full_, count = (np.asarray(x)[b, i] for x in (visits.order, visits.full, visits.count))
    return order[:full_].tolist(), order[full_:count].tolist()


@pytest.mark.parametrize("layout", ["plain", "hop", "mixed"])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("name", MASKS)
def test_visits_cover_what_is_seen(name, packed, layout):
    mask, (q, k) = MASKS[name], layouts()[layout]
    segments = documents(3) if packed else None
    plan, pairs = build(mask, q, k, segments, np), by_tile(seen(mask, q, k, segments))
    real = by_tile(np.broadcast_to(np.arange(pairs.shape[1] * BLOCK_Q)[:, None] < T, (2, 64, 80)))
    for b in range(2):
        kinds = np.zeros(pairs.shape[1:3], int)
        for i in range(kinds.shape[0]):
            whole, some = lists(plan.by_query, b, i)
            assert whole == sorted(set(whole)) and some == sorted(set(some)) and not set(whole) & set(some)
            kinds[i, whole], kinds[i, some] = 2, 1
            for j in range(kinds.shape[1]):
                if kinds[i, j] == 2:
                    assert (pairs[b, i, j] | ~real[b, i, j]).all(), (i, j)
                if kinds[i, j] == 0:
                    assert not pairs[b, i, j].any(), (i, j)
        for j in range(kinds.shape[1]):
            whole, some = lists(plan.by_key, b, j)
            assert whole == np.flatnonzero(kinds[:, j] == 2).tolist()
            assert some == np.flatnonzero(kinds[:, j] == 1).tolist()
    for visits in (plan.by_query, plan.by_key):
        counts = np.take_along_axis(visits.count, visits.schedule, -1)
        assert (np.diff(counts) <= 0).all()
        assert (np.sort(visits.schedule) == np.arange(visits.schedule.shape[1])).all()


def test_causal_blocks_are_exactly_those_on_and_under_the_diagonal():
    positions = np.arange(1024, dtype=np.int32)[None]
    plan = mask_plan(causal(), tokens(positions, positions, None, None, 128, 128), 1024, 128, 128)
    assert plan.by_query.full.tolist() == [list(range(8))]
    assert plan.by_query.count.tolist() == [list(range(1, 9))]
    assert plan.by_key.count.tolist() == [list(range(8, 0, -1))]
    window = mask_plan(sliding(256), tokens(positions, positions, None, None, 128, 128), 1024, 128, 128)
    assert window.by_query.order.shape[-1] == 3  # as wide as the most visits


@pytest.mark.parametrize("name", ["causal", "bigbird", "longformer"])
def test_traced_plans_are_the_static_ones(name):
    (q, k), segments = layouts()["mixed"], documents(1)
    static = build(MASKS[name], q, k, segments, np)
    traced = jax.jit(lambda q, k, segments: build(MASKS[name], q, k, segments, jnp))(q, k, segments)
    for b in range(2):
        for side in ("by_query", "by_key"):
            blocks = getattr(static, side).count.shape[1]
            for i in range(blocks):
                assert lists(getattr(static, side), b, i) == lists(getattr(traced, side), b, i)


def test_no_array_of_tokens_by_tokens():
    def build_long(positions):
        return mask_plan(sliding(300) | sinks(4), tokens(positions, positions, None, None, 128, 128), 8192, 128, 128)

    jaxpr = str(jax.make_jaxpr(build_long)(jnp.zeros((1, 8192), jnp.int32)))
    largest = max(math.prod(map(int, shape.split(","))) for shape in re.findall(r"\w\[([\d,]+)\]", jaxpr))
    assert largest <= 2 * 8192


@pytest.mark.parametrize("keys_axis", [1, 0])
@pytest.mark.parametrize("name", MASKS)
def test_predicates_on_tiles_are_the_masks(name, keys_axis):
    mask, rows = MASKS[name], np.random.default_rng(2)
    q, k = jnp.asarray(rows.integers(0, 90, 32), jnp.int32), jnp.asarray(rows.integers(0, 90, 24), jnp.int32)
    for head in (0, 1, 5):
        found = on_tile(mask, q, k, jnp.int32(head), keys_axis)
        want = np.broadcast_to(mask(q[:, None], k[None, :], head), (32, 24))
        np.testing.assert_array_equal(found, want if keys_axis else want.T)


def test_rows_and_columns_stay_vectors():
    """Of BigBird's hashes none is computed on a whole tile."""
    vectors = jax.ShapeDtypeStruct((64,), jnp.int32), jax.ShapeDtypeStruct((128,), jnp.int32)
    jaxpr = str(jax.make_jaxpr(lambda q, k: on_tile(MASKS["bigbird"], q, k, jnp.int32(0)))(*vectors))
    tiles = re.findall(r":\w+\[64,128\] = (\w+)", jaxpr)
    assert tiles and not {"mul", "rem", "shift_right_logical"} & set(tiles)


def test_a_predicate_that_reduces_is_refused():
    mask = lambda q, k, h: (q + k).sum(1, keepdims=True) > q
    with pytest.raises(NotImplementedError, match="reduce"):
        on_tile(mask, jnp.arange(4, dtype=jnp.int32), jnp.arange(4, dtype=jnp.int32), jnp.int32(0))

"""Windows of documents against a loop over tokens, in one call and in pieces."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlong.core.state import EMPTY
from jaxlong.ops.spans import Summaries, read_windows, sum_by_blocks, windows

GRIDS = [(1, 1), (4, 4), (5, 2), (3, 1)]  # length, stride
ROWS = [(13,), (3, 1, 9), (1, 1, 1, 10), (6, 7)]  # documents of a row


def row_of(documents):
    """Positions, segments."""
    return np.concatenate([np.arange(n) for n in documents]), np.repeat(np.arange(len(documents)), documents)


def naive(documents, length, stride):
    """(document, first token) of each window in the order of ends, by trying every token."""
    positions, segments = row_of(documents)
    found = []
    for end in range(len(positions)):
        start = end - length + 1
        if start >= 0 and segments[start] == segments[end] and positions[start] % stride == 0:
            found.append((segments[end], start))
    return found


@pytest.mark.parametrize("length,stride", GRIDS)
@pytest.mark.parametrize("pieces", [(13,), (1,) * 13, (6, 2, 5)], ids=str)
def test_windows_of_packed_documents(length, stride, pieces):
    positions, segments = (jnp.asarray(np.stack(a), jnp.int32) for a in zip(*map(row_of, ROWS), strict=True))
    tokens = jnp.broadcast_to(jnp.arange(13, dtype=jnp.int32), positions.shape)
    state = Summaries.empty(len(ROWS), -(-13 // stride), ((length,), jnp.int32))
    firsts, totals = [], []

    @jax.jit
    def feed(state, at, positions, segments):
        found = windows(positions, length=length, stride=stride, before=state.count)
        new = Summaries.of(found, segments, read_windows(tokens, at + found.ends, length))
        return state.push(new), found.first, found.finished

    for at, size in zip(np.cumsum((0, *pieces)), pieces, strict=False):
        part = slice(at, at + size)
        state, first, finished = feed(state, at, positions[:, part], segments[:, part])
        firsts.append(first)
        totals.append(finished)
    firsts, totals = np.concatenate(firsts, 1), np.concatenate(totals, 1)
    for b, documents in enumerate(ROWS):
        want = naive(documents, length, stride)
        assert state.count[b] == len(want)
        np.testing.assert_array_equal(state.segment_ids[b, : len(want)], [s for s, _ in want])
        np.testing.assert_array_equal(state.segment_ids[b, len(want) :], EMPTY)
        for values, (_, start) in zip(state.values[0][b], want, strict=False):
            np.testing.assert_array_equal(values, range(start, start + length))
        for t in range(13):
            assert totals[b, t] == sum(start + length - 1 <= t for _, start in want)
            assert firsts[b, t] == sum(s < segments[b, t] for s, _ in want)
    np.testing.assert_array_equal(jnp.maximum(state.numbers(), EMPTY) >= 0, state.segment_ids >= 0)


def test_summaries_keep_the_newest():
    state = Summaries.empty(1, 3, ((), jnp.float32))
    for n in range(5):
        state = state.push(Summaries((jnp.full((1, 1), float(n)),), jnp.ones((1, 1), jnp.int32), jnp.array([1])))
    np.testing.assert_array_equal(state.values[0], [[3, 4, 2]])
    np.testing.assert_array_equal(state.numbers(), [[3, 4, 2]])


@pytest.mark.parametrize("length,stride,block", [(4, 2, 3), (3, 3, 2), (2, 1, 5), (6, 2, 2)])
def test_sums_over_windows_that_overlap_a_block(length, stride, block):
    weights = np.random.default_rng(0).random((1, 13, 2, 13))
    for documents in ROWS:
        positions, segments = row_of(documents)
        found = windows(jnp.asarray(positions, jnp.int32)[None], length=length, stride=stride)
        got = sum_by_blocks(
            jnp.asarray(weights, jnp.float32),
            found.first,
            found.finished,
            length=length,
            stride=stride,
            block=block,
            blocks=-(-13 // block),
        )
        want = np.zeros(got.shape)
        for t in range(13):
            for i, (segment, start) in enumerate(naive(documents, length, stride)):
                if segment == segments[t] and start + length - 1 <= t:
                    meets = {(start + j - (t - positions[t])) // block for j in range(length)}
                    want[0, t][:, list(meets)] += weights[0, t, :, i, None]
        np.testing.assert_allclose(got, want, atol=1e-5)

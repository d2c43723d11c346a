"""States: a ring buffer that holds the last tokens, and the size of what it holds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlong.core.state import EMPTY, ConvTail, KVCache, nbytes
from jaxlong.core.types import BadInput

B, K, C, V = 2, 3, 4, 5


def tokens(start: int, length: int):
    """Recognizable k, v, positions and segments of tokens start..start + length - 1 of every row."""
    n = np.arange(start, start + length)
    row = 1000.0 * np.arange(B)[:, None, None, None]
    k = jnp.asarray(row + n[None, :, None, None] + np.zeros((B, length, K, C)), jnp.float32)
    v = jnp.asarray(-row - n[None, :, None, None] + np.zeros((B, length, K, V)), jnp.float32)
    positions = jnp.asarray(np.tile(n % 7, (B, 1)), jnp.int32)
    return k, v, positions, jnp.asarray(np.tile(n // 7, (B, 1)), jnp.int32)


def pushed(slots: int, chunks: list[int]) -> KVCache:
    cache, start = KVCache.empty(B, slots, K, C, V, jnp.float32), 0
    for length in chunks:
        cache, start = cache.push(*tokens(start, length)), start + length
    return cache


def test_an_empty_cache_holds_nothing():
    cache = KVCache.empty(B, 6, K, C, V, jnp.bfloat16)
    assert cache.k.dtype == cache.v.dtype == jnp.bfloat16
    assert int(cache.next) == 0
    np.testing.assert_array_equal(cache.segment_ids, np.full((B, 6), EMPTY))
    assert EMPTY < 0  # ids of tokens are not negative, so no query matches


@pytest.mark.parametrize("chunks", [[1], [3], [6], [2, 2], [4, 4], [1] * 20, [5, 1, 6, 2], [6, 6, 6]])
def test_a_cache_holds_the_last_tokens_each_in_its_slot(chunks):
    slots, total = 6, sum(chunks)
    cache = pushed(slots, chunks)
    assert int(cache.next) == total
    k, v, positions, segments = (np.asarray(x) for x in tokens(0, total))
    for n in range(max(total - slots, 0), total):
        slot = n % slots
        np.testing.assert_array_equal(cache.k[:, slot], k[:, n])
        np.testing.assert_array_equal(cache.v[:, slot], v[:, n])
        np.testing.assert_array_equal(cache.positions[:, slot], positions[:, n])
        np.testing.assert_array_equal(cache.segment_ids[:, slot], segments[:, n])
    untouched = np.arange(slots) >= total
    np.testing.assert_array_equal(np.asarray(cache.segment_ids)[:, untouched], EMPTY)


def test_any_split_into_chunks_gives_the_same_cache():
    whole, split = pushed(8, [8, 3]), pushed(8, [1, 4, 2, 3, 1])
    jax.tree.map(np.testing.assert_array_equal, whole, split)


def test_push_returns_a_new_cache_in_the_dtype_of_the_old():
    empty = KVCache.empty(B, 4, K, C, V, jnp.bfloat16)
    cache = empty.push(*tokens(0, 3))
    assert cache.k.dtype == jnp.bfloat16
    assert int(empty.next) == 0 and int(cache.next) == 3
    np.testing.assert_array_equal(empty.segment_ids, np.full((B, 4), EMPTY))


def test_a_window_is_complete_with_window_plus_chunk_minus_one_slots():
    """After a chunk is written, every query of it finds all the `window` keys it may see; one slot less loses one."""
    window, chunk = 5, 4
    for slots, complete in ((window + chunk - 1, True), (window + chunk - 2, False)):
        cache = pushed(slots, [chunk] * 6)
        held = {int(n) for n in np.asarray(cache.k)[0, :, 0, 0]}
        queries = range(5 * chunk, 6 * chunk)
        assert complete == all(set(range(i - window + 1, i + 1)) <= held for i in queries)


def test_push_compiles_once_and_carries_gradients():
    cache = KVCache.empty(B, 6, K, C, V, jnp.float32)
    step = jax.jit(KVCache.push)
    scanned, _ = jax.lax.scan(
        lambda state, token: (state.push(*(x[:, None] for x in token)), None),
        cache,
        jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens(0, 11)),
    )
    for n in range(11):
        cache = step(cache, *tokens(n, 1))
    assert step._cache_size() == 1
    jax.tree.map(np.testing.assert_array_equal, cache, scanned)

    k, *rest = tokens(0, 6)
    kept = jax.grad(lambda k: pushed(6, [4]).push(k, *rest).k.sum())(k)
    np.testing.assert_array_equal(kept, np.ones(k.shape))
    first = jax.grad(lambda k: KVCache.empty(B, 6, K, C, V, jnp.float32).push(k, *rest).push(*tokens(6, 4)).k.sum())(k)
    np.testing.assert_array_equal(first[:, :4], np.zeros_like(first[:, :4]))  # overwritten
    np.testing.assert_array_equal(first[:, 4:], np.ones_like(first[:, 4:]))


def test_a_chunk_longer_than_the_cache_is_refused():
    with pytest.raises(BadInput, match=r"tokens: 7: .* 6 slots; at most 6"):
        pushed(6, [7])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nbytes_is_the_formula_of_shapes_and_of_arrays(dtype):
    slots = 17
    make = lambda: KVCache.empty(B, slots, K, C, V, dtype)
    expected = B * slots * (K * (C + V) * jnp.dtype(dtype).itemsize + 8) + 4
    assert nbytes(make()) == nbytes(jax.eval_shape(make)) == expected


def test_nbytes_of_other_states():
    tail = ConvTail.empty(B, 4, 10, jnp.bfloat16)
    assert tail.x.shape == (B, 3, 10)
    np.testing.assert_array_equal(tail.segment_ids, np.full((B, 3), EMPTY))
    assert nbytes(tail) == B * 3 * (10 * 2 + 4)
    assert nbytes({"a": tail, "b": (None, tail)}) == 2 * nbytes(tail)
    assert nbytes(()) == 0

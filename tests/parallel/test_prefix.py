"""Spans on several devices: the plain functions in one's own shard_map, against whole rows on one device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxlong.parallel.layout import order, permute, restore
from jaxlong.parallel.prefix import Chain, dense, diagonal, earlier, final, halo, hand_on, moved, prefix

B, SPAN = 2, 3
devices_and_layouts = pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
counts = pytest.mark.parametrize("sizes", [(1,), (3,), (5,), (7,), (2, 3), (8,)], ids=str)


def on_devices(function, sizes, layout, *arrays):
    """`function(chain, *spans)` in a shard_map of one's own, over rows in the order of the text."""
    names, n = ("x", "y")[: len(sizes)], int(np.prod(sizes))
    chain, mesh = Chain(names, layout), Mesh(np.array(jax.devices()[:n]).reshape(sizes), names)

    def part(*arrays):
        out, end = function(chain, *map(chain.cut, arrays))
        return jax.tree.map(lambda x: x.reshape(B, -1, *x.shape[2:]), out), end

    split = jax.shard_map(part, mesh=mesh, in_specs=P(None, names), out_specs=(P(None, names), P()))
    out, end = jax.jit(split)(*(permute(x, layout, n) for x in arrays))
    return jax.tree.map(lambda x: restore(x, layout, n), out), end


def length(sizes, layout):
    return SPAN * int(np.prod(sizes)) * (2 if layout == "zigzag" else 1)


def numbers(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def every_token(x, t):
    """A number of a span for each of its tokens."""
    return jnp.broadcast_to(x[:, None], (x.shape[0], t, *x.shape[1:]))


@counts
@devices_and_layouts
def test_prefix_of_affine_maps(sizes, layout):
    """The state before each span, and after the last, as a loop over tokens finds them."""
    T = length(sizes, layout)
    a, s = numbers(B, T, 2, 2) / 2, numbers(B, T, 2, 3)

    def spans(chain, a, s):
        tokens = jnp.concatenate([s, a], axis=-1)
        own = tokens[:, 0]
        for t in range(1, SPAN):
            own = dense(own, tokens[:, t])
        before = prefix(dense, own, chain)
        return every_token(before[..., :3], SPAN), final(dense(before, own)[..., :3], chain)

    got, end = on_devices(spans, sizes, layout, a, s)
    state, want = np.zeros((B, 2, 3)), []
    for t in range(T):
        want += [state] if t % SPAN == 0 else want[-1:]
        state = a[:, t].astype(np.float64) @ state + s[:, t]
    np.testing.assert_allclose(got, np.stack(want, axis=1), atol=2e-6)
    np.testing.assert_allclose(end, state, atol=2e-6)


@counts
@devices_and_layouts
def test_a_state_handed_on_is_what_a_prefix_finds(sizes, layout):
    T = length(sizes, layout)

    def spans(chain, a, s):
        step = lambda tokens, h: lax.scan(lambda h, t: (t[0] * h + t[1], None), h, jax.tree.map(turn, tokens))[0]
        turn = lambda x: jnp.moveaxis(x, 1, 0)
        handed = hand_on(step, (a, s), jnp.zeros_like(s[:, 0]), chain)
        found = prefix(diagonal, (jnp.prod(a, axis=1), step((a, s), jnp.zeros_like(s[:, 0]))), chain)[1]
        return (every_token(handed, SPAN), every_token(found, SPAN)), None

    (handed, found), _ = on_devices(spans, sizes, layout, numbers(B, T, 2), numbers(B, T, 2)[::-1].copy())
    assert np.abs(handed).max() > 0 or sizes == (1,)
    np.testing.assert_allclose(handed, found, atol=2e-6)


@counts
@devices_and_layouts
@pytest.mark.parametrize("before,after", [(2, 0), (0, 1), (3, 3), (7, 4), (100, 0)])
def test_halo_is_the_text_around_a_span(sizes, layout, before, after):
    """Also where it is wider than a span, or than the row."""
    T = length(sizes, layout)
    x = numbers(B, T, 1)
    around = lambda chain, x: (every_token(halo(x, chain, before=before, after=after), SPAN), None)
    got, _ = on_devices(around, sizes, layout, x)
    wide = np.pad(x, [(0, 0), (before, after), (0, 0)])
    for t in range(T):
        start = t // SPAN * SPAN
        np.testing.assert_array_equal(got[:, t], wide[:, start : start + before + SPAN + after])


@counts
@devices_and_layouts
def test_spans_move_to_the_order_of_the_text(sizes, layout):
    T, n = length(sizes, layout), int(np.prod(sizes))
    x = numbers(B, T, 1)
    row_order = lambda chain, x: (moved(x, chain.places, chain), None)
    got, _ = on_devices(row_order, sizes, layout, x)
    np.testing.assert_array_equal(permute(np.asarray(got), layout, n), x)
    assert len(order(layout, T, n)) == T


def test_gradients_go_back_to_the_spans_that_gave():
    """Weights of what each span gets from the two before it."""
    weights = numbers(B, 18, 1)
    got = jax.grad(lambda x: (on_devices(lambda c, x: (earlier(x, 2, c), None), (3,), "zigzag", x)[0] * weights).sum())(
        jnp.asarray(numbers(B, 18, 1))
    )
    np.testing.assert_array_equal(got, np.pad(weights[:, 6:], [(0, 0), (0, 6), (0, 0)]))

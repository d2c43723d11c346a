"""Test-time training in the dual form equals gradient descent token by token, in values, gradients and state."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlong.ops.chunks import starts
from jaxlong.ops.ttt import FastWeights, Layer, ttt

DEPTHS = {"linear": 1, "mlp": 2}
every_depth = pytest.mark.parametrize("depth", DEPTHS.values(), ids=DEPTHS)


def make(length: int, depth: int, *, batch=2, heads=2, dim=6, mini_batch=8, seed=0):
    """Inputs (q, k, v, lr), learned (coef, norm, layers); float64, of sizes that make every term count."""
    rng = np.random.default_rng(seed)
    q, k, v = rng.normal(size=(3, batch, length, heads, dim))
    lr = rng.uniform(0.02, 0.2, (batch, length, heads))
    coef = np.maximum(1 / np.arange(1, mini_batch + 1) + 0.1 * rng.normal(size=mini_batch), 0)
    norm = (1 + 0.2 * rng.normal(size=(heads, dim)), 0.2 * rng.normal(size=(heads, dim)))
    widths = [dim] + [2 * dim] * (depth - 1) + [dim]
    layers = tuple(
        Layer(0.5 * rng.normal(size=(heads, m, n)), 0.2 * rng.normal(size=(heads, n)))
        for m, n in itertools.pairwise(widths)
    )
    return [q, k, v, lr], (coef, norm, layers)


def by_tokens(inputs, learned, resets):
    """Each head of each row alone, one token after the other; the inner gradient is jax.grad of the loss."""

    def normed(z, scale, shift):
        return (z - z.mean()) / jnp.sqrt(jnp.mean((z - z.mean()) ** 2) + 1e-6) * scale + shift

    def net(layers, x):
        for layer in layers[:-1]:
            x = jax.nn.gelu(x @ layer.w + layer.b, approximate=True)
        return x @ layers[-1].w + layers[-1].b

    def row(q, k, v, lr, resets, coef, norm, layers):
        fresh = (layers, jax.tree.map(jnp.zeros_like, layers), 0)
        either = lambda first, a, b: jax.tree.map(lambda a, b: jnp.where(first, a, b), a, b)

        def token(carry, xs):
            q, k, v, lr, first = xs
            entry, total, place = either(first, fresh, carry)
            loss = lambda w: 0.5 * jnp.sum((normed(net(w, k), *norm) - (v - k)) ** 2)
            total = jax.tree.map(lambda s, g: s + lr * g, total, jax.grad(loss)(entry))
            now = jax.tree.map(lambda w, s: w - coef[place] * s, entry, total)
            o = q + normed(net(now, q), *norm)
            return either(place == len(coef) - 1, (now, fresh[1], 0), (entry, total, place + 1)), o

        (entry, total, _), o = jax.lax.scan(token, fresh, (q, k, v, lr, resets))
        return o, FastWeights(entry, total)

    heads = jax.vmap(row, in_axes=(1, 1, 1, 1, None, None, 0, 0), out_axes=(1, 0))
    return jax.vmap(heads, in_axes=(0, 0, 0, 0, 0, None, None, None))(*inputs, resets, *learned)


def op(inputs, learned, positions=None, resets=None, state=None):
    coef, norm, layers = learned
    return ttt(*inputs, coef=coef, norm=norm, layers=layers, positions=positions, resets=resets, state=state)


def marks(lengths, batch=2):
    """Positions in documents of those lengths side by side, and where they begin."""
    segments = jnp.asarray(np.tile(np.repeat(np.arange(len(lengths)), lengths), (batch, 1)), jnp.int32)
    positions = np.tile(np.concatenate([np.arange(n) for n in lengths]), (batch, 1))
    return jnp.asarray(positions, jnp.int32), starts(segments)


def single(tree):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)


@functools.partial(jax.jit, static_argnums=0)
def value_and_grads(f, inputs, learned, *where):
    """o, the state, and gradients of a weighted sum of o with respect to everything."""
    weights = np.random.default_rng(9).normal(size=inputs[0].shape)

    def loss(inputs, learned):
        o, state = f(inputs, learned, *where)
        return (o * weights.astype(o.dtype)).sum(), (o, state)

    grads, (o, state) = jax.grad(loss, (0, 1), has_aux=True)(inputs, learned)
    return o, state, grads


def close(got, want, tolerance=1e-5):
    def compare(a, b):
        b = np.asarray(b, np.float64)
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=tolerance * max(1.0, np.abs(b).max()))

    jax.tree.map(compare, got, want)


def expected(inputs, learned, lengths):
    with jax.enable_x64(True):
        double = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (inputs, learned))
        resets = marks(lengths, inputs[0].shape[0])[1]
        return jax.tree.map(np.asarray, value_and_grads(by_tokens, *double, resets))


@pytest.mark.thorough
@every_depth
@pytest.mark.parametrize("length,sizes", [(24, {}), (65, dict(mini_batch=4, dim=8, batch=1))], ids=str)
def test_whole_documents(length, sizes, depth):
    """Without positions; the last mini-batch may be unfinished, and cells are added to make whole groups."""
    inputs, learned = make(length, depth, **sizes)
    want = expected(inputs, learned, (length,))
    o, state, grads = value_and_grads(op, *single((inputs, learned)))
    assert state is None
    close((o, grads), (want[0], want[2]))
    for part in (1, 7) if depth == 1 else ():
        close(op([a[:, :part] for a in single(inputs)], single(learned))[0], want[0][:, :part])


@pytest.mark.thorough
@every_depth
@pytest.mark.parametrize("lengths", [(3, 10, 1, 1, 9), (24,), (8, 8, 8), (1, 2) * 8])
def test_documents_at_any_offset(lengths, depth):
    """Documents that begin anywhere and end in any place of a mini-batch; the last one's state."""
    inputs, learned = make(24, depth, seed=1)
    want = expected(inputs, learned, lengths)
    close(value_and_grads(op, *single((inputs, learned)), *marks(lengths)), want)


@every_depth
@pytest.mark.parametrize("sizes", [(1,) * 24, (6,) * 4, (12, 12)], ids=str)
def test_continuing_from_a_state(sizes, depth):
    """Any split continues an unfinished mini-batch."""
    inputs, learned = make(24, depth, seed=1)
    want = expected(inputs, learned, (24,))
    inputs, learned = single((inputs, learned))
    step, state, outs, start = jax.jit(op), FastWeights.fresh(learned[2], 2), [], 0
    for size in sizes:
        part = slice(start, start + size)
        positions = jnp.broadcast_to(jnp.arange(start, start + size), (2, size))
        o, state = step([a[:, part] for a in inputs], learned, positions, None, state)
        outs.append(o)
        start += size
    close((jnp.concatenate(outs, axis=1), state), want[:2])


def test_a_reset_drops_the_state():
    inputs, learned = single(make(24, 1, seed=1))
    junk = jax.tree.map(lambda w: w + 1.0, FastWeights.fresh(learned[2], 2))
    close(op(inputs, learned, *marks((24,)), junk), op(inputs, learned, *marks((24,))), 0.0)


def test_without_learning_the_network_stays():
    (q, k, v, lr), learned = single(make(24, 1))
    still = op([q, k, v, lr * 0], learned)[0]
    close(op([q, k * 3, v * 5, lr], (learned[0] * 0, *learned[1:]))[0], still)
    close(op([q[:, 9:10], k[:, :1], v[:, :1], lr[:, :1] * 0], learned)[0], still[:, 9:10])


@every_depth
def test_long_and_fast_learning_stays_finite(depth):
    (q, k, v, lr), learned = single(make(4096, depth, batch=1, heads=1, dim=4, mini_batch=16))
    o, _, grads = value_and_grads(op, [q, k, v, lr * 10], learned)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves((o, grads)))

"""The delta rules against a float64 loop over tokens, their gradients against a scan over tokens."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlong.ops.delta import delta_rule, generalized_delta_rule

BATCH, HEADS, KEY, VALUE = 2, 2, 6, 5
every_kind = pytest.mark.parametrize("kind", ["head", "channel", "generalized"])


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def inputs(kind, length, seed=0, strength=1.0, sizes=(BATCH, HEADS, KEY, VALUE)):
    """Arguments of the op of that kind, float32, and an entry state."""
    rng = np.random.default_rng(seed)
    batch, heads, key, value = sizes
    shape = (batch, length, heads)
    q, k = unit(rng.normal(size=(*shape, key))), unit(rng.normal(size=(*shape, key)))
    v = rng.normal(size=(*shape, value))
    decay = -strength * rng.uniform(size=shape if kind == "head" else (*shape, key)) ** 3
    if kind == "generalized":
        rate = rng.uniform(size=(*shape, key))
        arguments = (q, unit(rng.normal(size=k.shape)), v, decay, -k, k * rate)
    else:
        arguments = (q, k, v, None if kind == "none" else decay, rng.uniform(0.1, 1.9, shape))
    s0 = rng.normal(size=(batch, heads, key, value))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (arguments, s0))


def documents(length, at):
    return jnp.asarray(np.tile(np.isin(np.arange(length), at), (BATCH, 1)))


@functools.partial(jax.jit, static_argnames=("kind", "chunk"))
def run(kind, arguments, s0=None, resets=None, chunk=16):
    op = generalized_delta_rule if kind == "generalized" else delta_rule
    return op(*arguments, s0=s0, resets=resets, chunk=chunk)


in_fours, in_chunks_of_64 = (functools.partial(run, chunk=chunk) for chunk in (4, 64))


def loop(kind, arguments, s0, resets=None):
    """One token after the other in float64 NumPy: outputs and all states."""
    arguments = [None if x is None else np.asarray(x, np.float64) for x in arguments]
    q, k, v, decay = arguments[:4]
    s, outputs, states = np.asarray(s0, np.float64), [], []
    for t in range(q.shape[1]):
        if resets is not None:
            s = np.where(np.asarray(resets)[:, t, None, None, None], 0, s)
        alpha = (
            1.0
            if kind == "none"
            else np.exp(decay[:, t, :, :, None] if decay.ndim == 4 else decay[:, t, :, None, None])
        )
        column = lambda x, t=t: x[:, t, :, :, None]
        row = lambda x, t=t: x[:, t, :, None, :]
        if kind == "generalized":
            a, b = arguments[4:]
            s = alpha * s + column(b) @ (row(a) @ s) + column(k) @ row(v)
        else:
            beta = arguments[4][:, t, :, None, None]
            erase = np.eye(s.shape[-2]) - beta * (column(k) @ row(k))
            s = erase @ (alpha * s) + beta * (column(k) @ row(v))
        outputs.append((row(q) @ s)[:, :, 0])
        states.append(s)
    return np.stack(outputs, 1), np.stack(states, 1)


def scanned(kind, arguments, s0, resets=None):
    """The same recurrence by lax.scan, to be differentiated."""
    q, k, v, decay, *rest = arguments
    decay = jnp.zeros(q.shape[:3]) if decay is None else decay
    decay = decay if decay.ndim == 4 else decay[..., None]
    resets = jnp.zeros(q.shape[:2], bool) if resets is None else resets

    def step(s, x):
        q, k, v, decay, reset, *rest = x
        s = jnp.where(reset[:, None, None, None], 0, s)
        read = lambda key, s: jnp.einsum("bhk,bhkv->bhv", key, s)
        write = lambda key, value: key[..., None] * value[..., None, :]
        faded = jnp.exp(decay)[..., None] * s
        if kind == "generalized":
            s = faded + write(rest[1], read(rest[0], s)) + write(k, v)
        else:
            s = faded + write(k, rest[0][..., None] * (v - read(k, faded)))
        return s, read(q, s)

    s, o = jax.lax.scan(step, s0, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, decay, resets, *rest)))
    return jnp.moveaxis(o, 0, 1), s


def close(got, want, tolerance=1e-5):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1.0, np.abs(want).max()))


@pytest.mark.thorough
@every_kind
@pytest.mark.parametrize("length", [65, 7, 1])
def test_equals_the_loop(kind, length):
    arguments, s0 = inputs(kind, length)
    o, s = run(kind, arguments, s0)
    want, states = loop(kind, arguments, s0)
    close(o, want)
    close(s, states[:, -1])


@pytest.mark.thorough
@every_kind
@pytest.mark.parametrize("at", [[1, 2, 20], [], [0], [15, 16, 39]], ids=str)
def test_resets(kind, at):
    """At the first token, side by side, at a chunk's first and last token, at the last token of all."""
    arguments, s0 = inputs(kind, 40)
    resets = documents(40, at)
    o, s = run(kind, arguments, s0, resets)
    want, states = loop(kind, arguments, s0, resets)
    close(o, want)
    close(s, states[:, -1])


@pytest.mark.thorough
@every_kind
@pytest.mark.parametrize("chunk", [3, 1, 100])
def test_any_chunk_gives_the_same(kind, chunk):
    arguments, s0 = inputs(kind, 40)
    resets = documents(40, [5, 30])
    jax.tree.map(close, run(kind, arguments, s0, resets, chunk), run(kind, arguments, s0, resets))


def test_starts_from_nothing():
    arguments, s0 = inputs("head", 7)
    jax.tree.map(close, run("head", arguments), run("head", arguments, 0 * s0))


@functools.partial(jax.jit, static_argnames=("of", "kind"))
def gradients(of, kind, arguments, s0, resets, weights):
    def loss(arguments, s0):
        o, s = of(kind, arguments, s0, resets)
        return (o * weights).sum() + (s * s).sum(), (o, s)

    return jax.grad(loss, (0, 1), has_aux=True)(arguments, s0)


@pytest.mark.thorough
@every_kind
@pytest.mark.parametrize("length,at", [(11, [3, 8, 9]), (11, []), (1, [0])], ids=str)
def test_gradients_equal_those_of_a_scan_over_tokens(kind, length, at):
    arguments, s0 = inputs(kind, length)
    weights = np.random.default_rng(1).normal(size=(BATCH, length, HEADS, VALUE))
    got, want = (gradients(of, kind, arguments, s0, documents(length, at), weights) for of in (in_fours, scanned))
    jax.tree.map(close, got, want)


@pytest.mark.thorough
@every_kind
def test_long_and_strongly_decayed(kind):
    """4096 tokens whose decay goes far below e^-88 in a chunk: finite, and equal to the loop everywhere."""
    weights = np.random.default_rng(1).normal(size=(1, 4096, 1, 16))
    for strength in (1.0, 40.0):
        arguments, s0 = inputs(kind, 4096, strength=strength, sizes=(1, 1, 16, 16))
        slopes, (o, s) = gradients(in_chunks_of_64, kind, arguments, s0, None, weights)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(slopes))
        want, states = loop(kind, arguments, s0)
        close(o, want)
        close(s, states[:, -1])


def test_repeated_keys():
    """The same key for 256 tokens with beta = 1: the state holds the last value alone."""
    (_, k, v, _, _), s0 = inputs("none", 256)
    k = jnp.broadcast_to(k[:, :1], k.shape)
    o, s = run("none", (k, k, v, None, jnp.ones(k.shape[:3])), s0, chunk=64)
    close(o, v)
    close(jnp.einsum("bhk,bhkv->bhv", k[:, -1], s), v[:, -1])


def test_limits():
    """A decay equal in all channels is one a head; none is 0; orthonormal keys, beta 1: linear attention."""
    (q, k, v, decay, beta), s0 = inputs("head", 40)
    wide = jnp.broadcast_to(decay[..., None], k.shape)
    head = run("head", (q, k, v, decay, beta), s0)
    jax.tree.map(close, run("channel", (q, k, v, wide, beta), s0), head)
    jax.tree.map(close, run("head", (q, k, v, 0 * decay, beta), s0), run("none", (q, k, v, None, beta), s0))
    a = -beta[..., None] * jnp.exp(wide) * k
    jax.tree.map(close, run("generalized", (q, k, beta[..., None] * v, wide, a, k), s0), head)

    k = jnp.broadcast_to(jnp.eye(KEY)[None, :, None], (BATCH, KEY, HEADS, KEY))
    q, v = q[:, :KEY], v[:, :KEY]
    weights = jnp.tril(jnp.einsum("bihk,bjhk->bhij", q, k))
    o, _ = run("none", (q, k, v, None, jnp.ones((BATCH, KEY, HEADS))), chunk=4)
    close(o, jnp.einsum("bhij,bjhv->bihv", weights, v))


def test_types():
    arguments, s0 = inputs("head", 9)
    o, s = run("head", jax.tree.map(lambda x: x.astype(jnp.bfloat16), arguments), s0)
    assert o.dtype == jnp.bfloat16 and s.dtype == jnp.float32

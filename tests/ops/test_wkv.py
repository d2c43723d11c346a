"""RWKV-4's weighted average against a loop over tokens in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlong.ops.wkv import wkv

BATCH, WIDTH = 2, 5


def loop(k, v, log_decay, bonus, resets, s0=None):
    """Each token's weights over all of its document, normalised by their largest; and the sums to date."""
    k, v, log_decay, bonus = (np.asarray(x, np.float64) for x in (k, v, log_decay, bonus))
    o, sums = np.zeros(k.shape), np.zeros((*k.shape, 3))
    for row in range(k.shape[0]):
        logits = np.zeros((0, k.shape[2])) if s0 is None else np.asarray(s0[2], np.float64)[row : row + 1]
        weights = np.ones_like(logits) if s0 is None else np.asarray(s0[1], np.float64)[row : row + 1]
        values = np.zeros_like(logits) if s0 is None else np.asarray(s0[0], np.float64)[row : row + 1]
        for t in range(k.shape[1]):
            if resets[row, t]:
                logits, weights, values = logits[:0], weights[:0], values[:0]
            now = np.concatenate([logits, (k[row, t] + bonus)[None]])
            logits = np.concatenate([logits + log_decay, k[row, t][None]])
            weights = np.concatenate([weights, np.ones((1, k.shape[2]))])
            values = np.concatenate([values, v[row, t][None]])
            p = np.exp(now - now.max(axis=0))
            o[row, t] = (p * values).sum(axis=0) / (p * weights).sum(axis=0)
            p = np.exp(logits - logits.max(axis=0))
            sums[row, t] = np.stack([(p * values).sum(0), (p * weights).sum(0), logits.max(axis=0)], axis=-1)
    return o, sums[:, -1]


def recurrence(k, v, log_decay, bonus, resets):
    """The plain recurrence, without the largest logit."""

    def step(sums, token):
        k, v, reset = token
        num, den = (jnp.where(reset[:, None], 0, x) for x in sums)
        now, kept = jnp.exp(k + bonus), jnp.exp(k)
        o = (num + now * v) / (den + now)
        return (num * jnp.exp(log_decay) + kept * v, den * jnp.exp(log_decay) + kept), o

    zero = jnp.zeros_like(k[:, 0])
    return jnp.moveaxis(jax.lax.scan(step, (zero, zero), tuple(jnp.moveaxis(x, 1, 0) for x in (k, v, resets)))[1], 0, 1)


def inputs(length, spread=1.0, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    k, v = (jax.random.normal(key, (BATCH, length, WIDTH)) * s for key, s in zip(keys, (spread, 1.0), strict=False))
    log_decay = -jnp.exp(jax.random.normal(keys[2], (WIDTH,)) * 1.5)
    return k, v, log_decay, jax.random.normal(keys[3], (WIDTH,))


def edges(length):
    """Documents that start at other tokens in each row; the first token of a row starts one."""
    resets = np.zeros((BATCH, length), bool)
    resets[:, 0] = True
    resets[0, [n for n in (3, 4, 38) if n < length]] = True
    resets[1, [n for n in (5, 63) if n < length]] = True
    return jnp.asarray(resets)


@pytest.mark.parametrize("length", [1, 7, 40, 65])
@pytest.mark.parametrize("spread", [1.0, 40.0])
def test_equals_the_loop(length, spread):
    tokens, resets = inputs(length, spread), edges(length)
    o, (num, den, peak) = wkv(*tokens, resets=resets, chunk=16)
    want, sums = loop(*tokens, resets)
    np.testing.assert_allclose(o, want, atol=1e-5)
    scale = np.exp(np.asarray(peak, np.float64) - sums[..., 2])
    np.testing.assert_allclose(num * scale, sums[..., 0], atol=1e-5 * (1 + abs(sums[..., 0]).max()))
    np.testing.assert_allclose(den * scale, sums[..., 1], atol=1e-5 * (1 + abs(sums[..., 1]).max()))


def test_continues_from_a_state():
    tokens = inputs(40, 10.0)
    k, v, *rest = tokens
    _, s0 = wkv(k[:, :13], v[:, :13], *rest, chunk=4)
    resets = edges(27).at[:, 0].set(False)
    o, _ = wkv(k[:, 13:], v[:, 13:], *rest, s0=s0, resets=resets, chunk=8)
    np.testing.assert_allclose(o, loop(k[:, 13:], v[:, 13:], *rest, resets, s0)[0], atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 16, 64, 1000])
def test_any_chunk(chunk):
    tokens, resets = inputs(40), edges(40)
    want, sums = wkv(*tokens, resets=resets, chunk=40)
    got, others = wkv(*tokens, resets=resets, chunk=chunk)
    np.testing.assert_allclose(got, want, atol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), others, sums)


@pytest.mark.parametrize("length", [7, 40])
def test_gradients(length):
    tokens, resets = inputs(length), edges(length)
    weights = jax.random.normal(jax.random.key(9), tokens[0].shape)
    grads = lambda f: jax.jit(jax.grad(lambda tokens: (f(*tokens) * weights).sum()))(tokens)
    got = grads(lambda *tokens: wkv(*tokens, resets=resets, chunk=16)[0])
    want = grads(lambda *tokens: recurrence(*tokens, resets))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, abs(np.asarray(b)).max()))


def test_gradients_through_the_state():
    k, v, *rest = inputs(20)
    weights = jax.random.normal(jax.random.key(9), (BATCH, 8, WIDTH))

    def halves(k, v):
        _, sums = wkv(k[:, :12], v[:, :12], *rest, chunk=5)
        return wkv(k[:, 12:], v[:, 12:], *rest, s0=sums, chunk=3)[0]

    grads = lambda f: jax.jit(jax.grad(lambda k, v: (f(k, v) * weights).sum(), (0, 1)))(k, v)
    for a, b in zip(grads(halves), grads(lambda k, v: wkv(k, v, *rest)[0][:, 12:]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_long_and_strongly_decayed_stays_finite():
    """Keys of about 1 and about 1000 beside decays of 80000, 4000 and 0.4 over the row."""
    key, other = jax.random.split(jax.random.key(0))
    k = jax.random.normal(key, (1, 4096, 6)) * jnp.array([1.0, 1, 1, 1000, 1000, 1000])
    v = jax.random.normal(other, k.shape)
    log_decay, bonus = jnp.array([-20, -1, -1e-4] * 2), jnp.zeros(6)

    def total(*tokens):
        o = wkv(*tokens)[0]
        return o.sum(), o

    (_, o), grads = jax.value_and_grad(total, (0, 1, 2, 3), has_aux=True)(k, v, log_decay, bonus)
    assert all(bool(jnp.isfinite(x).all()) for x in (o, *grads))
    assert bool((jnp.abs(o) <= jnp.abs(v).max()).all())


def test_without_decay_and_bonus_it_is_a_causal_softmax():
    k, v, *_ = inputs(9)
    zero = jnp.zeros(WIDTH)
    p = jnp.exp(k)
    np.testing.assert_allclose(wkv(k, v, zero, zero)[0], jnp.cumsum(p * v, 1) / jnp.cumsum(p, 1), atol=1e-6)

"""Diagonal recurrences against float64 loops over tokens, in values and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlong.ops.scan import linear_attention, linear_scan, phase_scan, selective_scan

B, H, K, V = 2, 4, 5, 6
DECAYS = {"none": None, "scalar": (H,), "channel": (H, K)}


def single(x):
    return None if x is None else jnp.asarray(x, bool if x.dtype == bool else jnp.float32)


def close(got, want, tolerance=3e-6):
    want = np.asarray(want, np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1e-30, np.abs(want).max()))


def attention_inputs(length, kind, *, groups=H, bonus=False, strength=1.0, seed=0):
    """q, k, v, log decay, bonus, state and resets, in float64."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape)
    decay = None if DECAYS[kind] is None else -strength * np.exp(draw(B, length, *DECAYS[kind]))
    return (
        draw(B, length, groups, K),
        draw(B, length, groups, K),
        draw(B, length, H, V),
        decay,
        draw(H, K) if bonus else None,
        draw(B, H, K, V),
        rng.random((B, length)) < 0.15,
    )


def token(s, q, k, v, g, resets, bonus, xp):
    """One token of the recurrence as it is written."""
    s = xp.where(resets[:, None, None, None], 0.0, s)
    update = k[..., :, None] * v[..., None, :]
    read = s if bonus is None else s + bonus[..., None] * update
    if g is not None:
        s = s * xp.exp(g if g.ndim == 3 else g[..., None])[..., None]
    s = s + update
    return s, xp.einsum("bhk,bhkv->bhv", q, s if bonus is None else read)


def token_by_token(q, k, v, g, bonus, s, resets):
    q, k = (np.repeat(x, H // x.shape[2], axis=2) for x in (q, k))
    outs = []
    for t in range(q.shape[1]):
        s, o = token(s, q[:, t], k[:, t], v[:, t], None if g is None else g[:, t], resets[:, t], bonus, np)
        outs.append(o)
    return np.stack(outs, axis=1), s


def token_scan(q, k, v, g, bonus, s, resets):
    """The same in JAX, for gradients."""
    q, k = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (q, k))
    inputs = tuple(None if x is None else jnp.moveaxis(x, 1, 0) for x in (q, k, v, g, resets))
    s, o = jax.lax.scan(lambda s, x: token(s, *x, bonus, jnp), s, inputs)
    return jnp.moveaxis(o, 0, 1), s


def chunked(q, k, v, g, bonus, s, resets, chunk=16):
    return linear_attention(q, k, v, g, bonus=bonus, s0=s, resets=resets, chunk=chunk)


@pytest.mark.thorough
@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("kind", DECAYS)
def test_linear_attention(kind, bonus):
    for length, groups, chunk, strength in ((1, 4, 64, 1.0), (7, 1, 64, 20.0), (40, 2, 16, 1.0), (65, 4, 64, 20.0)):
        case = attention_inputs(length, kind, groups=groups, bonus=bonus, strength=strength)
        got = jax.jit(chunked, static_argnums=7)(*map(single, case), chunk)
        for a, b in zip(got, token_by_token(*case), strict=True):
            close(a, b)


def test_queries_and_keys_may_differ_in_heads():
    q, _, v, g, _, s, resets = attention_inputs(9, "channel")
    k = attention_inputs(9, "channel", groups=1)[1]
    case = (q, k, v, g, None, s, resets)
    for a, b in zip(chunked(*map(single, case)), token_by_token(*case), strict=True):
        close(a, b)


@pytest.mark.thorough
@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("kind", DECAYS)
def test_gradients_of_linear_attention(kind, bonus):
    case = tuple(map(single, attention_inputs(20, kind, groups=2, bonus=bonus, strength=0.3)))
    rng = np.random.default_rng(1)
    weights = single(rng.standard_normal((B, 20, H, V))), single(rng.standard_normal((B, H, K, V)))
    parts = [i for i, x in enumerate(case[:6]) if x is not None]
    loss = lambda op: lambda *case: sum((a * w).sum() for a, w in zip(op(*case), weights, strict=True))
    got = jax.jit(jax.grad(loss(lambda *case: chunked(*case, chunk=8)), parts))(*case)
    want = jax.jit(jax.grad(loss(token_scan), parts))(*case)
    for a, b in zip(got, want, strict=True):
        close(a, b, 1e-5)


@pytest.mark.parametrize("kind", DECAYS)
def test_result_does_not_depend_on_the_chunk(kind):
    case = tuple(map(single, attention_inputs(65, kind, bonus=kind != "none")))
    whole, parts = (jax.jit(chunked, static_argnums=7)(*case, chunk) for chunk in (65, 3))
    for a, b in zip(parts, whole, strict=True):
        close(a, b)


@pytest.mark.thorough
@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("kind", ["scalar", "channel"])
def test_strong_decay_over_4096_tokens(kind, bonus):
    """Log decays near -50 a token beside weak ones: finite, right, and so are the gradients."""
    q, k, v, g, u, _, resets = attention_inputs(4096, kind, bonus=bonus, strength=20.0)
    g[:, ::2] *= 1e-3
    case = tuple(map(single, (q, k, v, g, u, None, resets)))
    assert np.cumsum(g, axis=1)[:, 63].max() < -80
    o, s = jax.jit(chunked, static_argnums=7)(*case, 64)
    want, last = token_by_token(q, k, v, g, u, np.zeros((B, H, K, V)), resets)
    # one sum of a head's decays is added up exactly; channels take differences of sums near -3000
    tolerance = 1e-5 if kind == "scalar" else 1e-4
    close(o, want, tolerance)
    close(s, last, tolerance)
    parts = [i for i, x in enumerate(case[:5]) if x is not None]
    grads = jax.jit(jax.grad(lambda *case: jnp.square(chunked(*case, chunk=64)[0]).sum(), parts))(*case)
    assert all(jnp.isfinite(grad).all() and jnp.any(grad != 0) for grad in grads)


def test_bfloat16_keeps_float32_inside():
    case = tuple(map(single, attention_inputs(65, "scalar", strength=0.01)))
    low = [x.astype(jnp.bfloat16) for x in case[:3]]
    o, s = chunked(*low, *case[3:])
    want, last = chunked(*[x.astype(jnp.float32) for x in low], *case[3:])
    assert o.dtype == jnp.bfloat16 and s.dtype == jnp.float32
    np.testing.assert_array_equal(s, last)
    np.testing.assert_array_equal(o, want.astype(jnp.bfloat16))


def test_sums_of_decays_are_not_left_to_low_precision():
    for kind, at_least in (("scalar", 1), ("channel", 2)):
        case = tuple(map(single, attention_inputs(4, kind)))
        assert str(jax.make_jaxpr(chunked)(*case)).count("Precision.HIGHEST") >= at_least


# limits ---------------------------------------------------------------------------------------------------


def test_constant_scalar_decay_is_retention():
    q, k, v, *_ = attention_inputs(40, "none")
    gamma = 1 - 2.0 ** (-5 - np.arange(H))
    distance = np.arange(40)[:, None] - np.arange(40)[None, :]
    decay = np.where(distance >= 0, gamma[:, None, None] ** np.maximum(distance, 0), 0.0)
    want = np.einsum("bihk,bjhk,hij,bjhv->bihv", q, k, decay, v)
    g = np.broadcast_to(np.log(gamma), (B, 40, H))
    close(linear_attention(*map(single, (q, k, v, g)), chunk=16)[0], want)


def test_kinds_of_decay_agree():
    """No decay is zero decay, and a channel decay that is the same for all channels is a scalar one."""
    q, k, v, g, *_ = map(single, attention_inputs(40, "scalar"))
    spread = lambda g: jnp.repeat(g[..., None], K, axis=-1)
    close(linear_attention(q, k, v, spread(g))[0], linear_attention(q, k, v, g)[0])
    plain = linear_attention(q, k, v)[0]
    close(linear_attention(q, k, v, 0 * g)[0], plain)
    close(linear_attention(q, k, v, spread(0 * g))[0], plain)


# elementwise ----------------------------------------------------------------------------------------------


def elementwise_inputs(length, shape, seed=0):
    rng = np.random.default_rng(seed)
    decay = np.exp(-np.exp(2 * rng.standard_normal((B, length, *shape))))
    decay[:, 1::3] = 0.0
    update = rng.standard_normal((B, length, *shape))
    return decay, update, rng.standard_normal((B, *shape)), rng.random((B, length)) < 0.15


def scan_by_token(decay, update, h, resets, xp=np):
    def step(h, decay, update, resets):
        return decay * xp.where(resets.reshape(-1, *[1] * (h.ndim - 1)), 0.0, h) + update

    if xp is np:
        outs = [h := step(h, decay[:, t], update[:, t], resets[:, t]) for t in range(decay.shape[1])]
        return np.stack(outs, axis=1)
    inputs = tuple(jnp.moveaxis(x, 1, 0) for x in (decay, update, resets))
    return jnp.moveaxis(jax.lax.scan(lambda h, x: (step(h, *x),) * 2, h, inputs)[1], 0, 1)


@pytest.mark.parametrize("length,chunk,shape", [(1, 64, (3,)), (7, 64, ()), (40, 16, (3,)), (65, 64, (2, 3))])
def test_linear_scan(length, chunk, shape):
    case = elementwise_inputs(length, shape)
    states, last = jax.jit(lambda d, u, h, r: linear_scan(d, u, h0=h, resets=r, chunk=chunk))(*map(single, case))
    want = scan_by_token(*case)
    close(states, want)
    close(last, want[:, -1])


def test_gradients_of_linear_scan():
    *case, resets = map(single, elementwise_inputs(20, (3,)))
    weights = single(np.random.default_rng(1).standard_normal((B, 20, 3)))
    ours = lambda d, u, h: (linear_scan(d, u, h0=h, resets=resets, chunk=8)[0] * weights).sum()
    naive = lambda d, u, h: (scan_by_token(d, u, h, resets, xp=jnp) * weights).sum()
    for a, b in zip(jax.grad(ours, (0, 1, 2))(*case), jax.grad(naive, (0, 1, 2))(*case), strict=True):
        close(a, b)


def selective_inputs(length, width=3, states=4, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape)
    dt, a = np.exp(draw(B, length, width)), -np.exp(draw(width, states))
    b, c, h = draw(B, length, states), draw(B, length, states), draw(B, width, states)
    return draw(B, length, width), dt, a, b, c, draw(width), h, rng.random((B, length)) < 0.15


def selective_by_token(x, dt, a, b, c, d, h, resets, xp=np):
    decay, update = xp.exp(dt[..., None] * a), (dt * x)[..., None] * b[:, :, None, :]
    states = scan_by_token(decay, update, h, resets, xp)
    return xp.einsum("btdn,btn->btd", states, c) + d * x, states[:, -1]


def selective(x, dt, a, b, c, d, h, resets, chunk):
    return selective_scan(x, dt, a, b, c, d, h0=h, resets=resets, chunk=chunk)


@pytest.mark.parametrize("length,chunk", [(1, 64), (7, 64), (40, 16), (65, 64), (65, 3)])
def test_selective_scan(length, chunk):
    case = selective_inputs(length)
    got = jax.jit(selective, static_argnums=8)(*map(single, case), chunk)
    for a, b in zip(got, selective_by_token(*case), strict=True):
        close(a, b)


def test_gradients_of_selective_scan():
    case = tuple(map(single, selective_inputs(20)))
    rng = np.random.default_rng(1)
    weights = single(rng.standard_normal((B, 20, 3))), single(rng.standard_normal((B, 3, 4)))
    loss = lambda op: lambda *case: sum((a * w).sum() for a, w in zip(op(*case), weights, strict=True))
    got = jax.jit(jax.grad(loss(lambda *case: selective(*case, 8)), range(7)))(*case)
    want = jax.jit(jax.grad(loss(lambda *case: selective_by_token(*case, xp=jnp)), range(7)))(*case)
    for a, b in zip(got, want, strict=True):
        close(a, b, 1e-5)


def test_selective_scan_under_strong_decay():
    case = [single(x) for x in selective_inputs(4096)]
    case[1] = 20 * case[1]
    y, h = jax.jit(selective, static_argnums=8)(*case, 64)
    grads = jax.jit(jax.grad(lambda *c: jnp.square(selective(*c, 64)[0]).mean(), range(7)))(*case)
    assert all(jnp.isfinite(x).all() for x in (y, h, *grads))


@pytest.mark.parametrize("length,chunk", [(1, 64), (7, 64), (65, 16)])
def test_phases(length, chunk):
    rng = np.random.default_rng(0)
    turn, phase, resets = rng.standard_normal((B, length, 3)), rng.random((B, 3)), rng.random((B, length)) < 0.1
    want = scan_by_token(np.ones_like(turn), turn, phase, resets)
    phases, last = phase_scan(single(turn), phase0=single(phase), resets=single(resets), chunk=chunk)
    close(jnp.exp(1j * phases).real, np.cos(want))
    close(jnp.sin(last), np.sin(want[:, -1]))
    assert (last >= 0).all() and (last < 2 * np.pi).all()


def test_phases_stay_exact_over_a_long_row():
    phases, _ = jax.jit(phase_scan)(jnp.full((1, 2**16, 1), 3.0))
    want = 3.0 * np.arange(1, 2**16 + 1, dtype=np.float64)
    np.testing.assert_allclose(np.cos(phases[0, :, 0]), np.cos(want), atol=1e-2)

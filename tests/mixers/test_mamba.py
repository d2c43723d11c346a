"""Mamba and Mamba-2 against transformers (golden/make_mamba.py), Mamba-3 against a loop over tokens."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import FOLDER, check_function, check_layer, group

from jaxlong.core.types import BadInput
from jaxlong.mixers import Mamba, Mamba2, Mamba3
from jaxlong.ops.scan import linear_attention, selective_scan

GOLDEN = np.load(FOLDER / "mamba.npz")


def columns(weight, *sizes):
    """The maps side by side in a weight [outputs inputs], transposed."""
    return np.split(weight.T, np.cumsum(sizes)[:-1], axis=1)


@pytest.mark.parametrize("name,states,rank", [("even", 4, 2), ("odd", 5, 3)])
def test_mamba_equals_transformers(name, states, rank):
    case, gradients = group(GOLDEN, f"mamba/{name}/")
    inner, width = case["A_log"].shape[0], case["conv1d.weight"].shape[-1]

    def convert(case):
        wu, wz = columns(case["in_proj.weight"], inner, inner)
        wr, wb, wc = columns(case["x_proj.weight"], rank, states, states)
        return {
            "wu": wu,
            "wz": wz,
            "wr": wr,
            "wb": wb,
            "wc": wc,
            "conv": case["conv1d.weight"][:, 0].T,
            "conv_bias": case["conv1d.bias"],
            "w_step": case["dt_proj.weight"].T,
            "step_bias": case["dt_proj.bias"],
            "a_log": case["A_log"],
            "d": case["D"],
            "wo": case["out_proj.weight"].T,
        }

    mixer = Mamba(inner=inner, state_dim=states, conv=width, step_rank=rank, chunk=8)
    check_layer(mixer, convert, case, gradients)


@pytest.mark.thorough
@pytest.mark.parametrize("name,heads,states,groups", [("even", 2, 4, 1), ("odd", 4, 5, 2)])
def test_mamba2_equals_transformers(name, heads, states, groups):
    case, gradients = group(GOLDEN, f"mamba2/{name}/")
    width, dim = case["x"].shape[-1], case["norm.weight"].size // heads

    def convert(case):
        inner, maps = heads * dim, groups * states
        wz, wu, wb, wc, step = columns(case["in_proj.weight"], inner, inner, maps, maps, heads)
        return {
            "wz": wz.reshape(width, heads, dim),
            "wu": wu.reshape(width, heads, dim),
            "wb": wb.reshape(width, groups, states),
            "wc": wc.reshape(width, groups, states),
            "w_step": step,
            "step_bias": case["dt_bias"],
            "conv": case["conv1d.weight"][:, 0].T,
            "conv_bias": case["conv1d.bias"],
            "a_log": case["A_log"],
            "d": case["D"],
            "norm_scale": case["norm.weight"].reshape(heads, dim),
            "wo": case["out_proj.weight"].T.reshape(heads, dim, width),
        }

    conv = case["conv1d.weight"].shape[-1]
    mixer = Mamba2(heads=heads, head_dim=dim, state_dim=states, groups=groups, conv=conv, chunk=8)
    check_layer(mixer, convert, case, gradients)


def test_selective_scan_equals_transformers():
    case, gradients = group(GOLDEN, "selective/")

    def function(x, dt, a, b, c, d):
        x, dt, b, c = (part.swapaxes(1, 2) for part in (x, dt, b, c))
        y, h = selective_scan(x, jax.nn.softplus(dt), -jnp.exp(a), b, c, d, chunk=8)
        return y.swapaxes(1, 2), h

    check_function(function, ("x", "dt", "a", "b", "c", "d"), case, gradients)


def test_chunk_scan_equals_transformers():
    case, gradients = group(GOLDEN, "chunked/")

    def function(x, dt, a, b, c, d, s0):
        step = jax.nn.softplus(dt)
        decay = -step * jnp.exp(a)
        o, s = linear_attention(c, b, step[..., None] * x, decay, s0=s0.swapaxes(2, 3), chunk=8)
        return o + d[:, None] * x, s.swapaxes(2, 3)

    check_function(function, ("x", "dt", "a", "b", "c", "d", "s0"), case, gradients)


# Mamba-3 ------------------------------------------------------------------------------------------------------------


def mamba3_by_token(p, x, angles):
    """The layer of arXiv 2603.15569 (SISO) in float64: the recurrence as it is written, one token after another."""
    heads, dim = p["wv"].shape[1:]
    softplus = lambda a: np.log1p(np.exp(a))
    sigmoid = lambda a: 1 / (1 + np.exp(-a))
    repeat = heads // p["wb"].shape[1]

    def norm(name, role, x):
        mapped = np.einsum("bd,dgn->bgn", x, p[name])
        mapped = mapped / np.sqrt((mapped**2).mean(-1, keepdims=True) + 1e-6) * p[f"{role}_norm"]
        return np.repeat(mapped, repeat, axis=1) + p[f"{role}_bias"]

    def turn(a, theta):
        out = a.copy()
        for i in range(angles):
            cos, sin = np.cos(theta[..., i]), np.sin(theta[..., i])
            out[..., 2 * i] = a[..., 2 * i] * cos - a[..., 2 * i + 1] * sin
            out[..., 2 * i + 1] = a[..., 2 * i] * sin + a[..., 2 * i + 1] * cos
        return out

    batch = x.shape[0]
    theta = np.zeros((batch, heads, angles))
    h = np.zeros((batch, heads, dim, p["k_norm"].size))
    last = np.zeros_like(h)
    outs = []
    for t in range(x.shape[1]):
        u = x[:, t]
        dt = softplus(u @ p["w_step"] + p["step_bias"])
        raw = u @ p["wa"]
        rate = -np.maximum(np.where(raw >= 0, 1 + raw, 1 / (1 - np.minimum(raw, 0))), 1e-4)
        alpha, trap = np.exp(dt * rate), sigmoid(u @ p["wl"])
        theta = (theta + math.pi * np.tanh(u @ p["wt"])[:, None] * dt[..., None]) % (2 * math.pi)
        k, q = turn(norm("wb", "k", u), theta), turn(norm("wc", "q", u), theta)
        v, z = np.einsum("bd,dhp->bhp", u, p["wv"]), np.einsum("bd,dhp->bhp", u, p["wz"])
        new = v[..., :, None] * k[..., None, :]
        weigh = lambda a: a[..., None, None]
        h = weigh(alpha) * h + weigh((1 - trap) * dt * alpha) * last + weigh(trap * dt) * new
        last = new
        y = (np.einsum("bhpn,bhn->bhp", h, q) + p["d"][:, None] * v) * z * sigmoid(z)
        outs.append(np.einsum("bhp,hpd->bd", y, p["wo"]))
    return np.stack(outs, axis=1)


@pytest.mark.thorough
@pytest.mark.parametrize("length,heads,groups,fraction", [(21, 2, 1, 0.5), (10, 4, 2, 1.0)])
def test_mamba3_equals_the_loop(length, heads, groups, fraction):
    mixer = Mamba3(heads=heads, head_dim=3, state_dim=8, groups=groups, rotary_fraction=fraction, chunk=8)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, length, 7))
    positions = jnp.broadcast_to(jnp.arange(length), (2, length))
    shapes = jax.eval_shape(lambda: mixer.init(jax.random.key(0), jnp.zeros((2, 1, 7)), positions=positions[:, :1]))
    params = {name: rng.standard_normal(box.value.shape) * 0.5 for name, box in shapes["params"].items()}
    weights = rng.standard_normal(x.shape)
    naive = lambda params, x: mamba3_by_token(params, x, int(8 * fraction) // 2)

    def loss(params, x):
        y = mixer.apply({"params": params}, x, positions=positions)[0]
        return (y * weights.astype(np.float32)).sum(), y

    single = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (params, x))
    (_, y), (grads, of_x) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*single)
    np.testing.assert_allclose(y, naive(params, x), atol=1e-5 * np.abs(y).max())

    def along(got, up, down):
        """A slope along a direction, against central differences of the loop."""
        want = ((naive(*up) - naive(*down)) * weights).sum() / 2
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-9)

    for name, at in params.items():
        step = 1e-5 * rng.standard_normal(at.shape)
        got = (np.asarray(grads[name]) * step).sum()
        along(got, ({**params, name: at + step}, x), ({**params, name: at - step}, x))
    step = 1e-5 * rng.standard_normal(x.shape)
    along((np.asarray(of_x) * step).sum(), (params, x + step), (params, x - step))


@pytest.mark.slow
def test_mamba3_with_the_euler_rule_and_no_turns_is_a_decayed_sum():
    """l = 1 leaves k_t v_t^T alone, and zero angles turn nothing: linear attention with keys dt k."""
    mixer = Mamba3(heads=2, head_dim=3, state_dim=4, chunk=8)
    x = jax.random.normal(jax.random.key(0), (1, 11, 5))
    positions = jnp.arange(11)[None]
    params = jax.tree.map(
        lambda box: box.value,
        mixer.init(jax.random.key(1), x, positions=positions)["params"],
        is_leaf=lambda leaf: hasattr(leaf, "names"),
    )
    x = x.at[..., 0].set(1.0)
    params |= {"wt": 0 * params["wt"], "wl": (0 * params["wl"]).at[0].set(100.0), "d": 0 * params["d"]}
    y, _ = mixer.apply({"params": params}, x, positions=positions)
    step = jax.nn.softplus(x @ params["w_step"] + params["step_bias"])
    raw = x @ params["wa"]
    decay = -step * jnp.where(raw >= 0, 1 + raw, 1 / (1 - jnp.minimum(raw, 0)))
    maps = {}
    for name, role in (("wb", "k"), ("wc", "q")):
        mapped = jnp.einsum("btd,dgn->btgn", x, params[name])
        maps[role] = mapped / jnp.sqrt(jnp.square(mapped).mean(-1, keepdims=True) + 1e-6) + params[f"{role}_bias"]
    v, z = (jnp.einsum("btd,dhp->bthp", x, params[name]) for name in ("wv", "wz"))
    o, _ = linear_attention(maps["q"], step[..., None] * maps["k"], v, decay)
    np.testing.assert_allclose(y, jnp.einsum("bthp,hpd->btd", o * jax.nn.silu(z), params["wo"]), atol=2e-6)


# fields -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mixer,fields,line",
    [
        (Mamba, {"inner": 0}, "inner: 0: is too small; 1 or more"),
        (Mamba, {"inner": 8, "conv": 1}, "conv: 1: is too small; 2 or more"),
        (Mamba, {"inner": 8, "chunk": 0}, "chunk: 0: is too small; 1 or more"),
        (Mamba2, {"heads": 4, "groups": 3}, "groups: 3: does not divide heads = 4; one of [1, 2, 4]"),
        (Mamba2, {"heads": 4, "step_limit": (1.0, 1.0)}, "step_limit: (1.0, 1.0): is no range"),
        (Mamba3, {"heads": 4, "state_dim": 2}, "rotary_fraction: 0.5: turns no pair of 2 dimensions"),
        (Mamba3, {"heads": 4, "groups": 3}, "groups: 3: does not divide heads = 4; one of [1, 2, 4]"),
    ],
)
def test_bad_fields(mixer, fields, line):
    with pytest.raises(BadInput) as error:
        mixer(**fields)
    assert str(error.value).startswith(line)

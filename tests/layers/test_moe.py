"""Mixture of experts against a float64 loop over tokens; balance; routing moves by its own rule."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from jaxlong.core.types import BadInput
from jaxlong.layers.moe import MoE
from jaxlong.ops.experts import _sorted
from jaxlong.parallel.mesh import make_mesh
from jaxlong.train.optim import AdamW, Constant, make_optimizer

WIDTH = 6
CASES = {
    "softmax": MoE(hidden=5, experts=4, top_k=2),
    "deepseek": MoE(
        hidden=4, experts=8, top_k=3, shared=2, router="sigmoid", scale=2.446, bias_rate=0.01, balance=0.001
    ),
    "one": MoE(hidden=3, experts=1, top_k=1, normalize=False),
}


def made(layer, shape=(2, 7, WIDTH)):
    x = jax.random.normal(jax.random.key(0), shape)
    params = nn.unbox(layer.init(jax.random.key(1), x))["params"]
    if "selection_bias" in params:
        params["selection_bias"] = 0.3 * jax.random.normal(jax.random.key(2), (layer.experts,))
    return params, x


def swiglu(x, gate, up, down):
    a = x @ gate
    return (a / (1 + np.exp(-a)) * (x @ up)) @ down


def naive(layer, params, x):
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    out = np.zeros(x.shape)
    for index in np.ndindex(x.shape[:2]):
        token = np.asarray(x[index], np.float64)
        logits = token @ p["router"]
        exp = np.exp(logits - logits.max())
        s = exp / exp.sum() if layer.router == "softmax" else 1 / (1 + np.exp(-logits))
        chosen = np.argsort(-(s + p.get("selection_bias", 0)), kind="stable")[: layer.top_k]
        total = s[chosen].sum() if layer.normalize else 1.0
        for e in chosen:
            out[index] += layer.scale * s[e] / total * swiglu(token, p["gate"][e], p["up"][e], p["down"][e])
        if layer.shared:
            out[index] += swiglu(token, *(p["shared"][n] for n in ("gate", "up", "down")))
    return out


@pytest.mark.thorough
@pytest.mark.parametrize("name", CASES)
def test_against_a_loop_over_tokens(name):
    layer = CASES[name]
    params, x = made(layer)
    want = naive(layer, params, x)
    np.testing.assert_allclose(layer.apply({"params": params}, x), want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.slow
def test_gradients_against_differences():
    layer = CASES["deepseek"]
    params, x = made(layer, (1, 5, WIDTH))
    weights = np.random.default_rng(3).normal(size=x.shape)
    grads = jax.grad(lambda p, x: (layer.apply({"params": p}, x) * weights).sum(), (0, 1))(params, x)
    rng = np.random.default_rng(4)
    for name in ("gate", "up", "down", "router"):
        along = rng.normal(size=params[name].shape)
        moved = lambda h, n=name, a=along: params | {n: np.asarray(params[n], np.float64) + h * a}
        slope = (naive(layer, moved(1e-6), x) - naive(layer, moved(-1e-6), x)) * weights / 2e-6
        np.testing.assert_allclose((grads[0][name] * along).sum(), slope.sum(), rtol=2e-4)
    along = rng.normal(size=x.shape)
    at = lambda h: naive(layer, params, np.asarray(x, np.float64) + h * along)
    np.testing.assert_allclose((grads[1] * along).sum(), ((at(1e-6) - at(-1e-6)) * weights).sum() / 2e-6, rtol=2e-4)


def test_what_it_tells():
    layer = CASES["deepseek"]
    params, x = made(layer)
    _, told = layer.apply({"params": params}, x, mutable=["losses", "metrics"])
    assert 0 < float(told["metrics"]["router_entropy"][0]) <= 1
    assert float(told["losses"]["selection_bias"][0]) == 0
    s = 1 / (1 + np.exp(-np.asarray(x.reshape(-1, WIDTH), np.float64) @ np.asarray(params["router"])))
    chosen = np.argsort(-(s + np.asarray(params["selection_bias"])), axis=1, kind="stable")[:, : layer.top_k]
    share = np.bincount(chosen.ravel(), minlength=8) / chosen.size
    want = layer.balance * 8 * (share * s.mean(0) / s.mean(0).sum()).sum()
    np.testing.assert_allclose(told["losses"]["balance"][0], want, rtol=1e-5)
    np.testing.assert_allclose(told["metrics"]["expert_load"][0], share.max() * 8, rtol=1e-6)


def test_the_bias_brings_balance():
    """Only the bias moves, by its rate a step, until a router that prefers one expert spreads its tokens."""
    layer = CASES["deepseek"].clone(bias_rate=0.004, balance=0.0)
    params, x = made(layer, (4, 64, WIDTH))
    params["router"] = params["router"] * 0.1
    params["selection_bias"] = jnp.zeros(layer.experts).at[0].set(0.3)
    tx = make_optimizer(AdamW(weight_decay=0.5), Constant(peak=1.0), steps=100, clip=1e-3)
    state = tx.init({"selection_bias": params["selection_bias"]})

    @jax.jit
    def step(bias, state):
        def loss(bias):
            _, told = layer.apply({"params": params | bias}, x, mutable=["losses", "metrics"])
            return told["losses"]["selection_bias"][0], told["metrics"]["expert_load"][0]

        (_, load), grads = jax.value_and_grad(loss, has_aux=True)(bias)
        updates, state = tx.update(grads, state, bias)
        return optax.apply_updates(bias, updates), state, load, updates

    bias, loads = {"selection_bias": params["selection_bias"]}, []
    for _ in range(120):
        bias, state, load, updates = step(bias, state)
        loads.append(float(load))
    assert loads[0] > 2.5 and loads[-1] < 1.4
    np.testing.assert_allclose(np.abs(updates["selection_bias"]).max(), 0.004, rtol=1e-5)


@pytest.mark.parametrize(
    "change,say",
    [
        ({"top_k": 0}, "top_k: 0"),
        ({"top_k": 9}, "1 to 8"),
        ({"router": "tanh"}, "softmax, sigmoid"),
        ({"experts": 0}, "experts: 0"),
    ],
)
def test_refused(change, say):
    with pytest.raises(BadInput, match=say):
        CASES["deepseek"].clone(**change)


@pytest.mark.parametrize("mesh", ["fsdp=2,seq=4", "seq=2,expert=4", "fsdp=2,expert=2,tensor=2"])
@pytest.mark.parametrize("name", ["softmax", "deepseek"])
def test_a_mesh_equals_one_device(name, mesh):
    """Each device its own tokens, and along "expert" its own experts."""
    layer = CASES[name]
    params, x = made(layer, (2, 8, WIDTH))
    goal = jax.random.normal(jax.random.key(3), x.shape)
    loss = lambda params, x: ((layer.apply({"params": params}, x) - goal) ** 2).sum()
    run = lambda: jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x)
    want = run()
    with jax.set_mesh(make_mesh(mesh)):
        got = run()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, want)


@pytest.mark.parametrize("most", [6, 2**30])  # one integer a pair, and two where one has no room
def test_sorted_as_numpy_sorts(most):
    number = np.random.default_rng(0).integers(0, 7, 50)
    np.testing.assert_array_equal(_sorted(jnp.asarray(number, jnp.int32), most), np.argsort(number, stable=True))

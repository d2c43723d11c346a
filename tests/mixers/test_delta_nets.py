"""Delta networks against transformers' layers, their rule against flash-linear-attention (golden/make_delta.py)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlong.core.types import BadInput
from jaxlong.mixers import KDA, DeltaNet, GatedDeltaNet
from jaxlong.ops.delta import delta_rule, generalized_delta_rule

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "delta.npz")


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def group(prefix):
    return {name.removeprefix(prefix): GOLDEN[name] for name in GOLDEN.files if name.startswith(prefix)}


def gradients_in(case):
    return {name.removeprefix("grad."): x for name, x in case.items() if name.startswith("grad.")}


@pytest.mark.thorough
@pytest.mark.parametrize("shape", ["small", "long"])
@pytest.mark.parametrize("rule", ["delta", "gated", "kda", "generalized"])
def test_rule_equals_flash_linear_attention(rule, shape):
    case = group(f"op/{rule}/{shape}/")

    def loss(given):
        q, k, v, decay, s0 = (given.get(name) for name in ("q", "k", "v", "decay", "s0"))
        if rule == "generalized":
            o, s = generalized_delta_rule(q, k, v, decay, given["a"], given["b"], s0=s0, chunk=32)
        else:
            o, s = delta_rule(q, k, v, decay, given["beta"], s0=s0, chunk=32)
        return (o * case["cotangent"]).sum() + (s * s).sum(), (o, s)

    want = gradients_in(case)
    gradients, (o, s) = jax.jit(jax.grad(loss, has_aux=True))({name: case[name] for name in want})
    close(o, case["o"])
    close(s, case["s"])
    jax.tree.map(close, gradients, want)


def gated_delta_net_params(case, mixer):
    """The mixer's parameters, or their gradients, from a layer of Qwen3-Next, whose rows are grouped by key head."""
    key, value, groups = mixer.head_dim, mixer.value_dim, mixer.key_heads
    qkvz = case["in_proj_qkvz.weight"]
    qkvz = qkvz.reshape(groups, -1, qkvz.shape[-1])
    each = mixer.heads // groups * value
    q, k, v, z = np.split(qkvz, np.cumsum([key, key, each]), axis=1)
    beta, step = np.split(case["in_proj_ba.weight"].reshape(groups, -1, qkvz.shape[-1]), 2, axis=1)
    by_head = lambda rows, size: rows.reshape(-1, size, rows.shape[-1]).transpose(2, 0, 1)
    return {
        **{"wq": by_head(q, key), "wk": by_head(k, key), "wv": by_head(v, value), "wz": by_head(z, value)},
        **{"w_beta": by_head(beta, 1)[..., 0], "w_step": by_head(step, 1)[..., 0]},
        **{"conv": case["conv1d.weight"][:, 0].T, "step_bias": case["dt_bias"], "a_log": case["A_log"]},
        **{"norm": case["norm.weight"], "wo": case["out_proj.weight"].T.reshape(mixer.heads, value, -1)},
    }


def kda_params(case, mixer):
    """The same from a layer of Kimi Linear."""
    size, weight = (mixer.heads, mixer.head_dim), lambda name: case[f"{name}.weight"].T
    to_heads = lambda name: weight(name).reshape(-1, *size)
    return {
        **{f"w{n}": to_heads(f"{n}_proj") for n in "qkv"},
        **{"decay_down": weight("forget_gate.f_a_proj"), "decay_up": to_heads("forget_gate.f_b_proj")},
        **{"gate_down": weight("g_a_proj"), "gate_up": to_heads("g_b_proj"), "w_beta": weight("b_proj")},
        **{"step_bias": case["forget_gate.dt_bias"].reshape(size), "a_log": case["forget_gate.A_log"].reshape(-1)},
        **{"conv": case["conv1d.weight"][:, 0].T, "norm": case["o_norm.weight"]},
        "wo": weight("o_proj").reshape(*size, -1),
    }


LAYERS = {
    "gated_delta_net/small": GatedDeltaNet(4, 4, 6, key_heads=2),
    "gated_delta_net/long": GatedDeltaNet(3, 8, 4, key_heads=1, chunk=32),
    "kda/small": KDA(2, 4),
    "kda/long": KDA(3, 6, chunk=32),
    "kda/bounded": KDA(2, 5, lower_bound=-5.0),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", LAYERS)
def test_layer_equals_transformers(name):
    case, mixer = group(f"layer/{name}/"), LAYERS[name]
    params_in = kda_params if name.startswith("kda") else gated_delta_net_params
    positions = jnp.broadcast_to(jnp.arange(case["x"].shape[1]), case["x"].shape[:2])

    def loss(params, x):
        y, _ = mixer.apply({"params": params}, x, positions=positions)
        return (y * case["cotangent"]).sum(), y

    grads, y = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params_in(case, mixer), case["x"])
    close(y, case["y"])
    want = gradients_in(case)
    # a scan over tokens is off by up to 1.3e-5 too: the gradient of a decay rate is a small sum of large terms
    jax.tree.map(lambda a, b: close(a, b, 2e-5), grads, (params_in(want, mixer), want["x"]))


@pytest.mark.parametrize("negative", [False, True])
def test_delta_net_equals_a_loop(negative):
    """float64 NumPy, token after token, from the inputs on."""
    mixer = DeltaNet(4, 6, 3, key_heads=2, conv=3, negative_eigenvalues=negative, chunk=8)
    rng = np.random.default_rng(0)
    x, positions = rng.normal(size=(1, 20, 10)), jnp.arange(20)[None]
    shapes = jax.eval_shape(lambda: mixer.init(jax.random.key(0), jnp.asarray(x, jnp.float32), positions=positions))
    p = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape) * 0.5, shapes["params"])
    p = {name: leaf.value for name, leaf in p.items()}
    y, _ = jax.jit(lambda p, x: mixer.apply({"params": p}, x, positions=positions))(
        *jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (p, x))
    )

    flat = np.concatenate([(x[0] @ p[n].reshape(10, -1)) for n in ("wq", "wk", "wv")], axis=-1)
    sigmoid = lambda a: 1 / (1 + np.exp(-a))
    s, want = np.zeros((4, 6, 3)), []
    for t in range(20):
        taps = [flat[t - 2 + j] * p["conv"][j] if t - 2 + j >= 0 else 0 * flat[t] for j in range(3)]
        q, k, v = np.split(sum(taps) * sigmoid(sum(taps)), [12, 24])
        q, k = (np.repeat(a.reshape(2, 6), 2, axis=0) for a in (q, k))
        q, k = (a / np.sqrt((a * a).sum(-1, keepdims=True) + 1e-6) for a in (q, k))
        beta = sigmoid(x[0, t] @ p["w_beta"]) * (2 if negative else 1)
        for h in range(4):
            s[h] += beta[h] * np.outer(k[h], v.reshape(4, 3)[h] - k[h] @ s[h])
        o = np.einsum("hk,hkv->hv", q, s) / np.sqrt(6)
        o = o / np.sqrt((o * o).mean(-1, keepdims=True) + 1e-6) * p["norm"]
        want.append(np.einsum("hv,hvd->d", o, p["wo"]))
    close(y[0], np.stack(want))


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: DeltaNet(heads=0), "heads: 0: is too small; 1 or more"),
        (lambda: KDA(heads=4, chunk=0), "chunk: 0: is too small; 1 or more"),
        (lambda: KDA(heads=4, conv=1), "conv: 1: is too small; 2 or more"),
        (lambda: GatedDeltaNet(heads=4, key_heads=3), r"key_heads: 3: does not divide heads = 4; one of \[1, 2, 4\]"),
        (lambda: KDA(heads=4, rank=0), "rank: 0: is too small; 1 or more"),
        (lambda: KDA(heads=4, lower_bound=0.0), "lower_bound: 0.0: is no log decay; below 0, or None"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(BadInput, match=f"^{message}$"):
        make()

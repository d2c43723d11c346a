"""RWKV-7 against the rwkv package, and its recurrence against flash-linear-attention (golden/make_rwkv7.py)."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlong.core.types import BadInput
from jaxlong.mixers import RWKV7, RWKVChannelMix
from jaxlong.ops.delta import generalized_delta_rule

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "rwkv7.npz")
HEADS, SIZE, HIDDEN = 2, 8, 24
RWKV = RWKV7(HEADS, SIZE, decay_rank=5, rate_rank=4, value_rank=3, gate_rank=6, chunk=8)
CHANNEL = RWKVChannelMix(HIDDEN, gate=False)


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def group(prefix):
    return {name.removeprefix(prefix): jnp.asarray(GOLDEN[name]) for name in GOLDEN.files if name.startswith(prefix)}


def gradients_in(case):
    return {key.removeprefix("grad."): x for key, x in case.items() if key.startswith("grad.")}


def time_params(case, turned=False):
    """The mixer's parameters, or their gradients; `turned` are projections [outputs inputs], as in checkpoints."""
    split = lambda name: case[name].reshape(-1, HEADS, SIZE)
    weight = lambda name: case[f"{name}.weight"].T if turned else case[f"{name}.weight"]
    values = "v" if "v1" in case else ""
    return {
        **{f"mu_{n}": case[f"x_{n}"] for n in "rwkvag"},
        **{f"{n}0": split(f"{n}0")[0] for n in "wa" + values},
        **{f"{n}1": case[f"{n}1"] for n in "wag" + values},
        **{f"{n}2": split(f"{n}2") for n in "wag" + values},
        **{n: split(n)[0] for n in ("k_k", "k_a", "r_k")},
        **{f"w{n[0]}": weight(n).reshape(-1, HEADS, SIZE) for n in ("receptance", "key", "value")},
        "wo": weight("output").reshape(HEADS, SIZE, -1),
        "norm_scale": split("ln_x.weight")[0],
        "norm_bias": split("ln_x.bias")[0],
    }


def channel_params(case, turned=False):
    weight = lambda name: case[f"{name}.weight"].T if turned else case[f"{name}.weight"]
    return {"mu_k": case["x_k"], "wk": weight("key"), "wv": weight("value")}


def positions_of(x):
    return jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])


@jax.jit
def mix(params, x, first, state=None):
    return RWKV.apply({"params": params}, x, first, positions=positions_of(x), state=state, method="mix")


def test_model_equals_the_rwkv_package():
    """Two layers of a checkpoint, channel mixing included, from tokens to logits."""
    p = group("model/")

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    x = norm(p["emb.weight"], "blocks.0.ln0")[p["tokens"]][None]
    first = RWKV.no_values(x)
    for i in range(2):
        block = {key.removeprefix(f"blocks.{i}."): value for key, value in p.items()}
        part = lambda kind, block=block: {k.removeprefix(kind): v for k, v in block.items() if k.startswith(kind)}
        params = {"v0": jnp.zeros((1, 16)), "v1": jnp.zeros((16, 3)), "v2": jnp.zeros((3, 16)), **part("att.")}
        y, _, first = mix(time_params(params, turned=True), norm(x, f"blocks.{i}.ln1"), first)
        x += y
        params = {"params": channel_params(part("ffn."), turned=True)}
        x += CHANNEL.apply(params, norm(x, f"blocks.{i}.ln2"), positions=positions_of(x))[0]
    close((norm(x, "ln_out") @ p["head.weight"].T)[0], p["logits"])


def test_layers_equal_the_rwkv_package():
    """Gradients too, through the values that the second layer takes from the first."""
    case = group("time/")
    layer = lambda i, of: {key.removeprefix(f"{i}."): x for key, x in of.items() if key.startswith(f"{i}.")}
    own = {"v0": jnp.ones((1, 16)), "v1": jnp.ones((16, 3)), "v2": jnp.ones((3, 16))}  # without effect below
    params = [time_params(own | layer(0, case)), time_params(layer(1, case))]

    def loss(params, x):
        y0, _, first = mix(params[0], x[0], None)
        y1, _, first = mix(params[1], x[1], first)
        y = jnp.concatenate([y0, y1])
        return (y * case["cotangent"]).sum(), y

    x = [case["0.x"][None], case["1.x"][None]]
    (_, y), (of_params, of_x) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)
    close(y, case["y"])
    for i in range(2):
        want = layer(i, gradients_in(case))
        close(of_x[i][0], want["x"])
        for key, gradient in time_params(want).items():
            close(of_params[i][key], gradient)
    assert not any(of_params[0][key].any() for key in own)


def test_channel_mixing_equals_the_rwkv_package():
    case = group("channel/")

    def loss(params, x):
        y = CHANNEL.apply({"params": params}, x[None], positions=jnp.arange(x.shape[0])[None])[0][0]
        return (y * case["cotangent"]).sum(), y

    params = channel_params(case)
    (_, y), (of_params, of_x) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, case["x"])
    close(y, case["y"])
    close(of_x, case["grad.x"])
    jax.tree.map(close, of_params, channel_params(gradients_in(case)))


def test_recurrence_equals_fla():
    case, names = group("op/"), ("r", "k", "v", "log_decay", "a", "b")
    heads_second = lambda x: jnp.moveaxis(x, 1, 2)
    f = lambda *inputs: generalized_delta_rule(*(heads_second(x) for x in inputs), chunk=8)
    inputs = tuple(case[name] for name in names)
    o, s = f(*inputs)
    close(heads_second(o), case["y"])
    close(s, case["state"])
    argnums = tuple(range(len(names)))
    grads = jax.grad(lambda *inputs: (heads_second(f(*inputs)[0]) * case["cotangent"]).sum(), argnums)(*inputs)
    for name, gradient in zip(names, grads, strict=True):
        close(gradient, case[f"grad.{name}"])


def layer_params(seed, layers=None):
    """Random parameters; with an axis of layers in front where `layers` are asked for."""
    x = jnp.zeros((1, 2, 12))
    params = nn.unbox(jax.jit(RWKV.init)(jax.random.key(0), x, positions=jnp.zeros((1, 2), jnp.int32))["params"])
    leaves, tree = jax.tree.flatten(params)
    front = () if layers is None else (layers,)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    pairs = zip(leaves, keys, strict=True)
    return jax.tree.unflatten(tree, [leaf + 0.2 * jax.random.normal(key, front + leaf.shape) for leaf, key in pairs])


@pytest.mark.slow
def test_first_layer_is_left_as_it_is():
    x, params = jax.random.normal(jax.random.key(1), (2, 9, 12)), layer_params(2)
    apply = jax.jit(lambda mixer, p: mixer.apply({"params": p}, x, positions=positions_of(x))[0], static_argnums=0)
    y = apply(RWKV, params)
    for first in (None, RWKV.no_values(x)):
        other, _, first = mix(params, x, first)
        np.testing.assert_array_equal(other, y)
        assert first.known and bool(jnp.isfinite(first.v).all())
    rest = {key: value for key, value in params.items() if key not in ("v0", "v1", "v2")}
    np.testing.assert_array_equal(apply(RWKV.clone(value_residual=False), rest), y)


def test_values_travel_through_a_scan_over_layers():
    x, params = jax.random.normal(jax.random.key(1), (2, 9, 12)), layer_params(2, layers=3)

    def layer(carry, params):
        x, first = carry
        y, _, first = mix(params, x, first)
        return (x + y, first), None

    (scanned, _), _ = jax.jit(lambda p: jax.lax.scan(layer, (x, RWKV.no_values(x)), p))(params)
    carry = (x, None)
    for i in range(3):
        carry, _ = layer(carry, jax.tree.map(lambda p, i=i: p[i], params))
    np.testing.assert_allclose(scanned, carry[0], atol=1e-5)
    alone, _ = layer((x, None), jax.tree.map(lambda p: p[0], params))
    assert float(jnp.abs(layer((alone[0], None), jax.tree.map(lambda p: p[1], params))[0][0] - carry[0]).max()) > 1e-3


@pytest.mark.slow
def test_chunks_equal_the_whole_with_values_of_another_layer():
    x, params = jax.random.normal(jax.random.key(1), (2, 2, 9, 12)), (layer_params(2), layer_params(3))

    def both(part, states):
        y0, s0, first = mix(params[0], x[0][:, part], None, states[0])
        y1, s1, _ = mix(params[1], x[1][:, part], first, states[1])
        return jnp.stack([y0, y1]), (s0, s1)

    whole, _ = both(slice(0, 9), (None, None))
    states = (RWKV.init_state(2, 9, width=12, max_chunk=5, dtype=x.dtype),) * 2
    parts = []
    for part in (slice(0, 5), slice(5, 6), slice(6, 9)):
        y, states = both(part, states)
        parts.append(y)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=2), whole, atol=1e-5)


@pytest.mark.slow
def test_long_and_strongly_decayed_stays_finite():
    """Every channel at the fastest decay, 0.607 a token, or at none; keys that repeat."""
    mixer = RWKV7(heads=1, head_dim=4, decay_rank=2, rate_rank=2, gate_rank=2, value_residual=False)
    x = jnp.tile(jax.random.normal(jax.random.key(0), (1, 64, 4)), (1, 64, 1))
    positions = positions_of(x)
    params = nn.unbox(jax.jit(mixer.init)(jax.random.key(1), x, positions=positions)["params"])
    params |= {"w0": jnp.array([[30.0, 30.0, -30.0, 0.0]]), "a0": jnp.full((1, 4), 30.0)}
    f = lambda params, x: jnp.square(mixer.apply({"params": params}, x, positions=positions)[0]).sum()
    value, grads = jax.jit(jax.value_and_grad(f, (0, 1)))(params, x)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((value, grads)))


@pytest.mark.parametrize("field", ["heads", "head_dim", "decay_rank", "rate_rank", "value_rank", "gate_rank", "chunk"])
def test_bad_fields(field):
    with pytest.raises(BadInput, match=rf"^{field}: 0: is too small; 1 or more$"):
        RWKV7(**{"heads": 2, "head_dim": 4, field: 0})

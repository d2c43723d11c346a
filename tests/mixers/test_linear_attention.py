"""Linear attention, RetNet, Lightning attention and GLA against public implementations (golden/make_linear.py)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import FOLDER, check_function, check_layer, group

from jaxlong.core.position import Rope
from jaxlong.core.types import BadInput
from jaxlong.mixers import GLA, LinearAttention
from jaxlong.mixers.linear_attention import lightning_decay, retnet_decay
from jaxlong.ops.scan import linear_attention

GOLDEN = np.load(FOLDER / "linear.npz")
both = pytest.mark.parametrize("name", ["even", "odd"])


@pytest.mark.thorough
@both
@pytest.mark.parametrize("kind", ["simple_gla", "gla"])
def test_gated_forms_equal_fla(kind, name):
    case, gradients = group(GOLDEN, f"{kind}/{name}/")
    scale = case["q"].shape[-1] ** -0.5
    function = lambda q, k, v, g, s0: linear_attention(q * scale, k, v, g, s0=s0, chunk=8)
    check_function(function, ("q", "k", "v", "g", "s0"), case, gradients)


@both
def test_retention_equals_fla(name):
    case, gradients = group(GOLDEN, f"retention/{name}/")
    scale, heads = case["q"].shape[-1] ** -0.5, case["q"].shape[2]
    g = jnp.broadcast_to(jnp.asarray(retnet_decay(heads), jnp.float32), case["q"].shape[:3])
    check_function(lambda q, k, v: linear_attention(q * scale, k, v, g, chunk=8), ("q", "k", "v"), case, gradients)


@both
def test_normalised_attention_equals_fla(name):
    """The whole mixer between projections that pass through."""
    case, gradients = group(GOLDEN, f"linear_attn/{name}/")
    batch, length, heads, keys = case["q"].shape
    values = case["v"].shape[-1]
    mixer = LinearAttention(heads=heads, head_dim=keys, value_dim=values, chunk=8)
    width = heads * (2 * keys + values)
    eye = jnp.eye(width)
    cut = heads * keys
    params = {
        "wq": eye[:, :cut].reshape(width, heads, keys),
        "wk": eye[:, cut : 2 * cut].reshape(width, heads, keys),
        "wv": eye[:, 2 * cut :].reshape(width, heads, values),
        "wo": eye[: heads * values].reshape(heads, values, width),
    }

    def function(q, k, v):
        x = jnp.concatenate([part.reshape(batch, length, -1) for part in (q, k, v)], axis=-1)
        y, _ = mixer.apply({"params": params}, x, positions=jnp.zeros((batch, length), jnp.int32))
        return y[..., : heads * values].reshape(v.shape), None

    check_function(function, ("q", "k", "v"), case, gradients)


@pytest.mark.parametrize("name,heads,layer", [("first", 3, 0), ("third", 2, 2)])
def test_lightning_attention_equals_transformers(name, heads, layer):
    case, gradients = group(GOLDEN, f"lightning/{name}/")
    width, dim = case["x"].shape[-1], case["norm.weight"].size // heads
    mixer = LinearAttention(
        heads=heads,
        head_dim=dim,
        feature="identity",
        decay=lightning_decay(heads, layer, 4),
        activation="silu",
        norm="all",
        gate="sigmoid",
        scale=1.0,
        chunk=8,
    )

    def convert(case):
        q, k, v = np.moveaxis(case["qkv_proj.weight"].T.reshape(width, heads, 3, dim), 2, 0)
        return {
            "wq": q,
            "wk": k,
            "wv": v,
            "wg": case["output_gate.weight"].T.reshape(width, heads, dim),
            "wo": case["out_proj.weight"].T.reshape(heads, dim, width),
            "norm_scale": case["norm.weight"].reshape(heads, dim),
        }

    check_layer(mixer, convert, case, gradients)


# GLA has no layer that runs without triton: its layer against a loop, its recurrence against fla above --------------


def gla_by_token(p, x, dim, temperature):
    """The layer of arXiv 2312.06635 in float64, one token after another."""
    sigmoid = lambda a: 1 / (1 + np.exp(-a))
    q, k, v, z = (np.einsum("btd,dhc->bthc", x, p[name]) for name in ("wq", "wk", "wv", "wg"))
    logits = np.einsum("btr,rhc->bthc", x @ p["w_decay1"], p["w_decay2"]) + p["decay_bias"]
    decay = sigmoid(logits) ** (1 / temperature)
    s, outs = np.zeros((x.shape[0], *k.shape[2:], v.shape[-1])), []
    for t in range(x.shape[1]):
        s = decay[:, t, :, :, None] * s + k[:, t, :, :, None] * v[:, t, :, None, :]
        o = np.einsum("bhc,bhcv->bhv", q[:, t], s) * dim**-0.5
        o = o / np.sqrt((o**2).mean(-1, keepdims=True) + 1e-6) * p["norm_scale"]
        outs.append(np.einsum("bhv,hvd->bd", o * z[:, t] * sigmoid(z[:, t]), p["wo"]))
    return np.stack(outs, axis=1)


@pytest.mark.thorough
@pytest.mark.parametrize("length,heads,dim", [(23, 2, 6), (9, 3, 4)])
def test_gla_layer(length, heads, dim):
    mixer = GLA(heads=heads, head_dim=dim, value_dim=5, gate_rank=3, temperature=2.0, chunk=8)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, length, 7))
    positions = jnp.broadcast_to(jnp.arange(length), (2, length))
    shapes = jax.eval_shape(lambda: mixer.init(jax.random.key(0), jnp.zeros((2, 1, 7)), positions=positions[:, :1]))
    params = {name: rng.standard_normal(box.value.shape) * 0.5 for name, box in shapes["params"].items()}
    single = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    weights = rng.standard_normal(x.shape)

    def loss(params, x):
        y = mixer.apply({"params": params}, x, positions=positions)[0]
        return (y * weights.astype(np.float32)).sum(), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(single, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, gla_by_token(params, x, dim, 2.0), atol=1e-5)
    for name, at in params.items():  # along a random direction of each parameter, by central differences
        step = 1e-5 * rng.standard_normal(at.shape)
        up, down = ((gla_by_token({**params, name: at + d}, x, dim, 2.0) * weights).sum() for d in (step, -step))
        np.testing.assert_allclose((np.asarray(grads[name]) * step).sum(), (up - down) / 2, rtol=2e-4, atol=1e-9)


# fields -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields,line",
    [
        ({"chunk": 0}, "chunk: 0: is too small; 1 or more"),
        ({"value_dim": 0}, "value_dim: 0: is too small; 1 or more"),
        ({"feature": "exp"}, "feature: exp: no such value; one of elu, relu, identity"),
        ({"decay": "fast"}, "decay: fast: no such value; one of retnet, lightning"),
        ({"decay": (-1.0,)}, "decay: (-1.0,): is no log decay a head; 2 numbers, 0 or less"),
        ({"decay": (-1.0, 0.5)}, "decay: (-1.0, 0.5): is no log decay a head; 2 numbers, 0 or less"),
        ({"conv": 1}, "conv: 1: is no width of a convolution; 0 for none, or 2 or more"),
        ({"position": Rope()}, "position: Rope: turns elu features negative; feature='identity'"),
    ],
)
def test_bad_fields(fields, line):
    with pytest.raises(BadInput) as error:
        LinearAttention(**{"heads": 2, "head_dim": 4, **fields})
    assert str(error.value) == line


@pytest.mark.parametrize("field,value", [("temperature", 0.0), ("conv", -1), ("gate_rank", 0), ("chunk", 0)])
def test_bad_fields_of_gla(field, value):
    with pytest.raises(BadInput, match=f"^{field}: {value}: "):
        GLA(**{"heads": 2, "head_dim": 4, field: value})


@pytest.mark.slow
def test_relu_features_that_are_all_zero_divide_by_no_zero():
    mixer = LinearAttention(heads=1, head_dim=2, feature="relu")
    x = jnp.zeros((1, 3, 4))
    positions = jnp.arange(3)[None]
    params = mixer.init(jax.random.key(0), x, positions=positions)
    y, slopes = jax.value_and_grad(lambda x: mixer.apply(params, x, positions=positions)[0].sum())(x)
    assert y == 0 and jnp.isfinite(slopes).all()

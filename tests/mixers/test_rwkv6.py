"""RWKV-6 against the rwkv package, and its recurrence against flash-linear-attention (golden/make_rwkv6.py)."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlong.core.types import BadInput
from jaxlong.mixers import RWKV6
from jaxlong.ops.scan import linear_attention

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "rwkv6.npz")


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def group(prefix):
    return {name.removeprefix(prefix): jnp.asarray(GOLDEN[name]) for name in GOLDEN.files if name.startswith(prefix)}


def params_of(case, heads, size):
    """The mixer's parameters, or their gradients, from those of a checkpoint."""
    split = lambda name: case[name].reshape(-1, heads, size)
    return {
        **{f"mu_{n}": case[f"time_maa_{n}"] for n in "xwkvrg"},
        "mix1": case["time_maa_w1"].reshape(heads * size, 5, -1),
        "mix2": case["time_maa_w2"],
        "w0": case["time_decay"][..., 0],
        "w1": case["time_decay_w1"],
        "w2": split("time_decay_w2"),
        "bonus": case["time_faaaa"][..., 0],
        **{f"w{n[0]}": split(f"{n}.weight") for n in ("receptance", "key", "value", "gate")},
        "wo": case["output.weight"].reshape(heads, size, -1),
        "norm_scale": split("ln_x.weight")[0],
        "norm_bias": split("ln_x.bias")[0],
    }


@pytest.mark.thorough
@pytest.mark.parametrize("name,heads,size", [("even", 2, 8), ("wide", 3, 4)])
def test_layer_equals_the_rwkv_package(name, heads, size):
    case = group(f"{name}/")
    params = params_of(case, heads, size)
    mixer = RWKV6(heads, size, mix_rank=params["mix1"].shape[2], decay_rank=params["w1"].shape[1], chunk=16)
    positions = jnp.arange(case["x"].shape[0])[None]

    def loss(params, x):
        y = x + mixer.apply({"params": params}, x[None], positions=positions)[0][0]
        return (y * case["cotangent"]).sum(), y

    (_, y), (of_params, of_x) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, case["x"])
    close(y, case["y"])
    close(of_x, case["grad.x"])
    want = params_of({key.removeprefix("grad."): x for key, x in case.items() if key.startswith("grad.")}, heads, size)
    jax.tree.map(close, of_params, want)


def test_recurrence_equals_fla():
    case = group("op/")
    heads_second = lambda x: jnp.moveaxis(x, 1, 2)
    f = lambda r, k, v, w, u: linear_attention(*(heads_second(x) for x in (r, k, v, w)), bonus=u, chunk=8)
    inputs = tuple(case[name] for name in ("r", "k", "v", "log_decay", "u"))
    o, s = f(*inputs)
    close(heads_second(o), case["y"])
    close(s, case["state"])
    grads = jax.grad(lambda *inputs: (heads_second(f(*inputs)[0]) * case["cotangent"]).sum(), (0, 1, 2, 3, 4))(*inputs)
    for name, gradient in zip(("r", "k", "v", "log_decay", "u"), grads, strict=True):
        close(gradient, case[f"grad.{name}"])


@pytest.mark.slow
def test_long_and_strongly_decayed_stays_finite():
    mixer = RWKV6(heads=1, head_dim=4, mix_rank=2, decay_rank=2)
    x = jax.random.normal(jax.random.key(0), (1, 4096, 4))
    positions = jnp.arange(4096)[None]
    params = nn.unbox(jax.jit(mixer.init)(jax.random.key(1), x, positions=positions)["params"])
    params |= {"w0": jnp.array([[3.0, 1.0, -2.0, -8.0]])}  # 20, 2.7, 0.1 and 0.0003 a token
    f = lambda params, x: jnp.square(mixer.apply({"params": params}, x, positions=positions)[0]).sum()
    value, grads = jax.jit(jax.value_and_grad(f, (0, 1)))(params, x)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((value, grads)))


@pytest.mark.parametrize("field", ["heads", "head_dim", "mix_rank", "decay_rank", "chunk"])
def test_bad_fields(field):
    with pytest.raises(BadInput, match=rf"^{field}: 0: is too small; 1 or more$"):
        RWKV6(**{"heads": 2, "head_dim": 4, field: 0})

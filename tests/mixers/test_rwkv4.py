"""RWKV-4 against transformers: its layers, and its average alone (golden/make_rwkv4.py)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlong.core.types import BadInput
from jaxlong.mixers import RWKV4, RWKVChannelMix
from jaxlong.ops.wkv import wkv

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "rwkv4.npz")


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1e-3, np.abs(want).max()))


def group(prefix):
    return {name.removeprefix(prefix): GOLDEN[name] for name in GOLDEN.files if name.startswith(prefix)}


def att_params(case):
    shares = {f"mu_{n[0]}": 1 - case[f"time_mix_{n}"][0, 0] for n in ("key", "value", "receptance")}
    weights = {f"w{n[0]}": case[f"{n}.weight"].T for n in ("key", "value", "receptance", "output")}
    return {**shares, **weights, "decay": case["time_decay"], "bonus": case["time_first"]}


def ffn_params(case):
    shares = {f"mu_{n[0]}": 1 - case[f"time_mix_{n}"][0, 0] for n in ("key", "receptance")}
    return {**shares, **{f"w{n[0]}": case[f"{n}.weight"].T for n in ("key", "value", "receptance")}}


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["even", "wide"])
@pytest.mark.parametrize("kind", ["att", "ffn"])
def test_layer_equals_transformers(name, kind):
    case = group(f"{name}/{kind}.")
    convert = att_params if kind == "att" else ffn_params
    params = convert(case)
    mixer = RWKV4(hidden=params["wk"].shape[1], chunk=8) if kind == "att" else RWKVChannelMix(params["wk"].shape[1])
    positions = jnp.broadcast_to(jnp.arange(case["x"].shape[1]), case["x"].shape[:2])

    def loss(params, x):
        y = mixer.apply({"params": params}, x, positions=positions)[0]
        return (y * case["cotangent"]).sum(), y

    (_, y), (of_params, of_x) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, case["x"])
    close(y, case["y"])
    close(of_x, case["grad.x"])
    want = convert({key.removeprefix("grad."): value for key, value in case.items() if key.startswith("grad.")})
    for key, gradient in of_params.items():
        close(gradient, want[key] - 1 if key.startswith("mu_") else want[key])  # mu = 1 - time_mix


def test_average_equals_transformers():
    case = group("wkv/")
    f = lambda decay, bonus, k, v: wkv(k, v, -jnp.exp(decay), bonus, chunk=8)
    inputs = tuple(jnp.asarray(case[name]) for name in ("decay", "bonus", "k", "v"))
    o, (num, den, peak) = f(*inputs)
    close(o, case["y"])
    close(num / den, case["state.0"] / case["state.1"])
    close(jnp.log(den) + peak, np.log(case["state.1"]) + case["state.2"])
    grads = jax.grad(lambda *inputs: (f(*inputs)[0] * case["cotangent"]).sum(), (0, 1, 2, 3))(*inputs)
    for name, gradient in zip(("decay", "bonus", "k", "v"), grads, strict=True):
        close(gradient, case[f"grad.{name}"])


@pytest.mark.parametrize("field", ["hidden", "chunk"])
def test_bad_fields(field):
    with pytest.raises(BadInput, match=f"^{field}: 0: is too small; 1 or more$"):
        RWKV4(**{"hidden": 4, field: 0})


def test_channel_mix_needs_a_hidden_size():
    with pytest.raises(BadInput, match=r"^hidden: 0: "):
        RWKVChannelMix(hidden=0)


def test_state_of_another_width():
    mixer, x = RWKV4(hidden=4), jnp.zeros((1, 2, 6))
    state = mixer.init_state(1, 8, width=5, max_chunk=2, dtype=x.dtype)
    with pytest.raises(BadInput, match=r"^state"):
        mixer.init(jax.random.key(0), x, positions=jnp.zeros((1, 2), jnp.int32), state=state)

"""Recorded cases: values and gradients of public implementations, and how they are compared."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

FOLDER = Path(__file__).parent.parent / "golden"


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1e-3, np.abs(want).max()))


def group(golden, prefix):
    """The arrays of a case, and its gradients, by name."""
    case = {name.removeprefix(prefix): golden[name] for name in golden.files if name.startswith(prefix)}
    gradients = {name.removeprefix("grad."): case.pop(name) for name in list(case) if name.startswith("grad.")}
    return case, gradients


def check_layer(mixer, convert, case, gradients):
    """Values, and gradients of x and of each parameter; `convert` is linear, so it serves gradients too."""
    positions = jnp.broadcast_to(jnp.arange(case["x"].shape[1]), case["x"].shape[:2])

    def loss(params, x):
        y = mixer.apply({"params": params}, x, positions=positions)[0]
        return (y * case["cotangent"]).sum(), y

    params = jax.tree.map(jnp.asarray, convert(case))
    (_, y), (of_params, of_x) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, case["x"])
    close(y, case["y"])
    close(of_x, gradients["x"])
    want = convert(gradients)
    assert of_params.keys() == want.keys()
    for name, gradient in of_params.items():
        close(gradient, want[name])


def check_function(function, names, case, gradients):
    """Values, the last state where it is recorded, and gradients of the inputs `names`."""
    inputs = tuple(jnp.asarray(case[name]) for name in names)

    def loss(*inputs):
        y, state = function(*inputs)
        return (y * case["cotangent"]).sum(), (y, state)

    (_, (y, state)), grads = jax.jit(jax.value_and_grad(loss, range(len(names)), has_aux=True))(*inputs)
    close(y, case["y"])
    if "state" in case:
        close(state, case["state"])
    for name, gradient in zip(names, grads, strict=True):
        close(gradient, gradients[name])

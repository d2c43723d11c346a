"""Mixers on rows that lie in spans on several devices equal one device, values and gradients, on any layout."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from jaxlong.mixers import MIXERS
from jaxlong.ops.attend import Backend
from jaxlong.parallel.layout import permute, restore
from jaxlong.parallel.mesh import AXES

WIDTH = 12
CASES = {name: next(iter(cls.examples().values())) for name, cls in MIXERS.items()}
ROWS = {  # devices: documents of two packed rows, with edges at and off those of spans
    8: ((6, 13, 5, 24), (1, 2, 21, 24)),
    3: ((8, 3, 1, 36), (17, 15, 8, 8)),
    5: ((4, 7, 29), (20, 1, 19)),
    7: ((3, 8, 31), (22, 1, 19)),
}


@functools.cache
def params_of(name: str):
    mixer = CASES[name]
    init = lambda key: mixer.init(key, jnp.zeros((1, 3, WIDTH)), positions=jnp.zeros((1, 3), jnp.int32))
    params = nn.unbox(jax.jit(init)(jax.random.key(0)))["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf + 0.2 * rng.normal(size=leaf.shape), leaf.dtype), params)


def rows(devices: int):
    """Inputs, weights of the outputs, and positions and segments of packed documents and of a document a row."""
    documents = ROWS[devices]
    length = sum(documents[0])
    x, weights = np.random.default_rng(2).normal(size=(2, 2, length, WIDTH)).astype(np.float32)
    segments = np.stack([np.repeat(np.arange(1, len(row) + 1), row) for row in documents]).astype(np.int32)
    places = np.stack([np.concatenate([np.arange(n) for n in row]) for row in documents]).astype(np.int32)
    count = np.tile(np.arange(length, dtype=np.int32), (2, 1))
    return x, weights, {"packed": (places, segments), "whole": (count, None)}


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(name, layout, params, x, weights, where):
    """Outputs for packed and for whole rows, and the gradients of their weighted sum."""
    mixer = CASES[name].clone(backend=Backend(layout=layout))

    def loss(params, x):
        call = lambda places, ids: mixer.apply({"params": params}, x, positions=places, segment_ids=ids)[0]
        y = {kind: call(*given) for kind, given in where.items()}
        return sum((out * weights).sum() for out in y.values()), y

    gradients, y = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    return y, gradients


@functools.cache
def alone(name: str, devices: int):
    return run(name, "contiguous", params_of(name), *rows(devices))


def mesh_of(devices: int) -> Mesh:
    sizes = [devices if axis == "seq" else 1 for axis in AXES]
    return Mesh(np.array(jax.devices()[:devices]).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spread(name: str, layout: str, devices: int):
    order = lambda a: None if a is None else permute(a, layout, devices)
    x, weights, where = rows(devices)
    where = {kind: tuple(map(order, given)) for kind, given in where.items()}
    with jax.set_mesh(mesh_of(devices)):
        y, (d_params, d_x) = run(name, layout, params_of(name), order(x), order(weights), where)
    back = lambda a: restore(a, layout, devices)
    return jax.tree.map(back, y), (d_params, back(d_x))


def distance(got, want) -> float:
    """The largest difference over the largest value."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.abs(got - want).max() / max(1.0, np.abs(want).max()))


def agrees(name: str, layout: str, devices: int):
    (y, gradients), (got, got_gradients) = alone(name, devices), spread(name, layout, devices)
    assert all(distance(a, b) < 2e-6 for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(y), strict=True))
    pairs = zip(jax.tree.leaves(got_gradients), jax.tree.leaves(gradients), strict=True)
    assert all(distance(a, b) < 2e-5 for a, b in pairs)


KINDS = ["kda", "gla", "mamba"]
"""A mixer of each kind of summary, for the default run."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in KINDS else pytest.mark.slow) for n in CASES])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_eight_devices_equal_one(name, layout):
    agrees(name, layout, 8)

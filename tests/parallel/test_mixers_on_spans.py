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
    """Outputs and sown losses for packed and for whole rows, and the gradients of their weighted sum."""
    mixer = CASES[name].clone(backend=Backend(layout=layout))

    def loss(params, x):
        def call(places, ids):
            where = {"positions": places, "segment_ids": ids}
            (out, _), sown = mixer.apply({"params": params}, x, **where, mutable=["losses"])
            return out, sown.get("losses", {})

        y = {kind: call(*given) for kind, given in where.items()}
        total = sum((out * weights).sum() + sum(jax.tree.leaves(sown)) for out, sown in y.values())
        return total, ({kind: out for kind, (out, _) in y.items()}, [sown for _, sown in y.values()])

    gradients, (y, losses) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    return y, losses, gradients


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
    params = params_of(name)  # on one device: not under a mesh, which would hold them
    with jax.set_mesh(mesh_of(devices)):
        y, losses, (d_params, d_x) = run(name, layout, params, order(x), order(weights), where)
    back = lambda a: restore(a, layout, devices)
    return jax.tree.map(back, y), losses, (d_params, back(d_x))


def distance(got, want) -> float:
    """The largest difference over the largest value, or over 1."""
    far = lambda a, b: float(np.abs(np.subtract(a, b, dtype=np.float64)).max() / max(1.0, np.abs(b).max()))
    return max(map(far, jax.tree.leaves(got), jax.tree.leaves(want)), default=0.0)


DEFAULT = [("short_conv", "zigzag", 8), ("moba", "zigzag", 8), ("rwkv_channel_mix", "contiguous", 8)]
"""Quick ones, for the run by default; the ops that the others are made of are in `test_ops_on_spans`."""

cases = [(name, layout, 8) for name in CASES for layout in ("contiguous", "zigzag")]
cases += [(name, layout, n) for n in (3, 5, 7) for name, layout in (("kda", "zigzag"), ("gqa", "contiguous"))]
cases += [("mamba3", "zigzag", 3), ("infini", "zigzag", 5), ("ttt_linear", "zigzag", 3), ("nsa", "zigzag", 7)]


@pytest.mark.parametrize(
    "name,layout,devices", [pytest.param(*case, marks=() if case in DEFAULT else pytest.mark.slow) for case in cases]
)
def test_devices_equal_one(name, layout, devices):
    got, want = spread(name, layout, devices), alone(name, devices)
    assert distance(got[:2], want[:2]) < 2e-6
    assert distance(got[2], want[2]) < 2e-5

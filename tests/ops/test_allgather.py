"""Attention over a mesh of eight devices equals attention on one."""

from __future__ import annotations

import math
import re
from functools import partial
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import assert_same, case
from jax.sharding import AxisType

from jaxlong.core.mask import causal
from jaxlong.core.types import BadInput
from jaxlong.ops import Backend, attend, attend_with_lse
from jaxlong.ops.blockwise import blockwise

AXES = ("data", "fsdp", "seq", "tensor", "expert")
small = partial(attend_with_lse, backend=Backend("blockwise"))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    module = import_module("jaxlong.ops.attend")
    monkeypatch.setattr(module, "KERNELS", module.KERNELS | {"blockwise": partial(blockwise, block_q=16, block_k=16)})


def on(*shape):
    return jax.set_mesh(jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 5))


@pytest.mark.parametrize(
    ("mesh", "name", "sizes"),
    [
        ((2, 1, 2, 2, 1), "dilated", {"T": 64, "features": ("bias", "alibi", "cap", "sinks", "segments")}),
        ((1, 2, 4, 1, 1), "causal", {"T": 64, "B": 1, "features": ("row-bias",)}),  # one row for two devices
        ((1, 1, 4, 2, 1), "causal", {"T": 1, "S": 64, "features": ("segments",)}),  # decoding
        ((1, 1, 8, 1, 1), "sliding", {"T": 16, "S": 63}),  # a cache that eight devices cannot divide
    ],
    ids=str,
)
def test_a_mesh_equals_one_device(mesh, name, sizes):
    inputs = case(name, **sizes)
    with on(*mesh):
        got = inputs.run(small)
    assert_same(got, inputs.oracle(), 2e-6)


def test_scanned_layers_under_a_mesh():
    """With remat: the same values and gradients, keys gathered once a pass, and no mask larger than a tile."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((2, 128, 2, 16)), jnp.float32)
    weights = jnp.asarray(random.standard_normal((3, 16, 16)) / 4, jnp.float32)
    positions = jnp.tile(jnp.arange(128, dtype=jnp.int32), (2, 1))

    def step():
        @jax.checkpoint
        def layer(x, w):
            at = {"q_positions": positions, "k_positions": positions}
            return x + attend(x @ w, x @ w, x, mask=causal(), **at, backend=Backend("blockwise", "all_gather")), None

        return jax.jit(jax.value_and_grad(lambda weights, x: (jax.lax.scan(layer, x, weights)[0] ** 2).mean()))

    want = step()(weights, x)
    with on(2, 1, 4, 1, 1):
        assert_same(step()(weights, x), want, 2e-6)
        jaxpr = str(step().trace(weights, x).jaxpr)
    masks = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"bool\[([\d,]+)\]", jaxpr)]
    assert max(masks) == 2 * 16 * 16
    assert len(re.findall(r"\breduce_scatter\[", jaxpr)) == 1  # of dk and dv, side by side


def test_heads_that_the_mesh_cannot_divide():
    with on(1, 1, 2, 4, 1), pytest.raises(BadInput, match=r"key heads: 2: .* 4 devices .*; a multiple of 4"):
        case("causal", T=64).run(small)


def test_left_to_the_compiler():
    """sequence="none", or a mesh without a sequence axis: the plain function, whatever the mesh."""
    inputs = case("causal", T=64)

    def program(backend, mesh):
        with on(*mesh):
            run = lambda floats: inputs.run(partial(attend_with_lse, backend=backend), floats)
            return str(jax.make_jaxpr(run)(inputs.floats))

    assert "shard_map" in program(Backend("dense"), (2, 1, 2, 2, 1))
    assert "shard_map" not in program(Backend("dense", "none"), (2, 1, 2, 2, 1))
    assert "shard_map" not in program(Backend("dense"), (2, 2, 1, 2, 1))

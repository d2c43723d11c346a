"""Kernels are programs of one device: what each device of a mesh gets of rows, heads and channels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlong.ops import delta, scan
from jaxlong.parallel.mesh import make_mesh
from jaxlong.parallel.rows import over_rows
from pallas_kernels import machine
from pallas_kernels.delta import ref as delta_ref
from pallas_kernels.scan import ref as scan_ref

SHAPES = {
    "delta": ((2, 6, 4, 8), (2, 6, 4, 8), (2, 6, 4, 5), (2, 6, 4, 8), (2, 6, 4), (2, 4, 8, 5)),
    "linear": ((2, 6, 1, 8), (2, 6, 2, 8), (2, 6, 4, 5), (2, 6, 4), (2, 4, 8, 5)),
    "groups that stay whole": ((2, 6, 3, 8), (2, 6, 1, 8), (2, 6, 6, 5), (2, 6, 6), (2, 6, 8, 5)),
    "selective": ((2, 6, 8), (2, 6, 8), (8, 3), (2, 6, 3), (2, 6, 3), (8,), (2, 8, 3)),
}


def arrays(name):
    keys = jax.random.split(jax.random.key(0), len(SHAPES[name]))
    return [-0.3 * jax.random.uniform(key, shape) for key, shape in zip(keys, SHAPES[name], strict=True)]


def op(name):
    run = {"delta": delta.delta_rule, "selective": scan.selective_scan}.get(name, scan.linear_attention)
    of_state = "h0" if name == "selective" else "s0"
    return lambda *xs, resets: run(*xs[:-1], **{of_state: xs[-1]}, resets=resets)


@pytest.fixture
def oracles(monkeypatch):
    """Stand where the kernels do on a TPU."""
    monkeypatch.setattr(machine, "platform", lambda: "tpu")
    monkeypatch.setattr(delta, "platform", lambda: "tpu")
    monkeypatch.setattr(delta.kernels, "_tpu_refusal", lambda *xs: None)
    with_state = lambda run: lambda *xs, s0, resets: run(*xs, s0, resets)
    monkeypatch.setattr(delta.kernels, "delta_rule", with_state(delta_ref.reference))
    monkeypatch.setattr(delta.kernels, "linear_attention", with_state(delta_ref.linear))
    of_scan = lambda *xs, h0, resets: scan_ref.reference(*xs, h0, resets)
    monkeypatch.setattr(scan.scan_kernels, "selective_scan", of_scan)


@pytest.mark.parametrize("name", SHAPES)
def test_devices_compute_the_whole(oracles, name):
    """Values and gradients of rows on two devices, heads or channels on two."""
    given, resets = arrays(name), jnp.arange(12).reshape(2, 6) % 4 == 1

    def loss(*xs):
        o, s = op(name)(*xs, resets=resets)
        return (o**2).sum() + (s**3).sum(), (o, s)

    run = jax.jit(jax.grad(loss, range(len(given)), has_aux=True))
    wanted = run(*given)
    with jax.set_mesh(make_mesh("fsdp=2,tensor=2", jax.devices()[:4])):
        found = jax.jit(jax.grad(loss, range(len(given)), has_aux=True))(*given)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), found, wanted)


def test_inside_some_axes_there_is_no_place_for_a_kernel():
    part = lambda x: over_rows(lambda x: (x,), (x,), (("batch",),), like=(0,))[0]
    with jax.set_mesh(make_mesh("fsdp=2,tensor=2", jax.devices()[:4])):
        spec = jax.sharding.PartitionSpec("fsdp")
        inside = jax.shard_map(part, in_specs=spec, out_specs=spec, axis_names={"fsdp"})
        with pytest.raises(NotImplementedError, match="some axes of its mesh only"):
            jax.jit(inside)(jnp.zeros(4))

"""On either side of `jax.shard_map`: which axes split a dimension, and arrays of one type within."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType

SEQUENCE = ("seq", "ulysses")
"""The mesh axes that split a sequence, the outer one first: device r * U + u holds the (r * U + u)-th part of a row."""


def auto_mesh() -> AbstractMesh | None:
    """The mesh of `jax.set_mesh`, if the program is still one over all its devices: inside `shard_map` it is not."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if set(mesh.axis_types) == {AxisType.Auto} else None


def require_one_device() -> None:
    """For kernels, which are programs of one device.

    Raises:
        NotImplementedError: the compiler divides the program that is being traced over several devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = (size for size, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True) if kind != AxisType.Manual)
    if (count := math.prod(sizes)) > 1:
        raise NotImplementedError(f"the program is one over {count} devices, not inside shard_map")


def axis_sizes(mesh: AbstractMesh, axes: tuple[str, ...]) -> tuple[int, ...]:
    """The sizes of mesh axes, 1 for those that the mesh lacks."""
    return tuple(mesh.shape.get(axis, 1) for axis in axes)


def sequence_devices(sizes: Mapping[str, int]) -> int:
    """Devices that share a row, of a mesh with these sizes of axes (`parse_mesh`)."""
    return math.prod(sizes[axis] for axis in SEQUENCE)


def dividing(mesh: AbstractMesh, axes: tuple[str, ...], size: int) -> tuple[str, ...]:
    """The mesh axes of more than one device, as many of the first as divide the size together."""
    axes = tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1)
    while size % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return axes


def vary_alike(tree: Any) -> Any:
    """Inside `jax.shard_map`, makes every array vary over all axes over which any of them does.

    The carry of a loop must have one type throughout, and so must a cotangent and its primal. Adding a zero made from
    the others does it on every version of JAX, and its transpose sums the gradient over the axes that were added.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return tree
    zero = sum(lax.full_like(x, 0, jnp.int32, shape=()) for x in jax.tree.leaves(tree))
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), tree)

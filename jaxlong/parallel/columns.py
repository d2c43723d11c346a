"""Matrices whose columns lie on several devices, and reductions over all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import AbstractMesh


@dataclass(frozen=True)
class Columns:
    """Inside `jax.shard_map`: a device's equal part of the columns, in the order of the devices of `axis`.

    With `axis` None a device has all columns, and everything here returns what it is given.
    """

    axis: str | None = None

    @classmethod
    def of(cls, mesh: AbstractMesh | None, axis: str, columns: int) -> Columns:
        """All columns on each device, where the mesh has no such axis of more than one or it does not divide them."""
        size = 1 if mesh is None else mesh.shape.get(axis, 1)
        return cls(axis if size > 1 and columns % size == 0 else None)

    def count(self, here: int) -> int:
        """Of all columns, if each device has `here`."""
        return here if self.axis is None else here * jax.sharding.get_abstract_mesh().shape[self.axis]

    def first(self, here: int) -> Array | int:
        """Number of the device's first column."""
        return 0 if self.axis is None else here * lax.axis_index(self.axis)

    def max(self, x: Array) -> Array:
        return x if self.axis is None else lax.pmax(x, self.axis)

    def sum(self, tree: Any) -> Any:
        return tree if self.axis is None else lax.psum(tree, self.axis)

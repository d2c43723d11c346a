"""Parameters on their way into a product: each device gathers what lies in parts on all of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax import Array
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from jaxlong.parallel.manual import SEQUENCE, auto_mesh
from jaxlong.parallel.mesh import partition

TOKENS = ("data", "fsdp", *SEQUENCE)
"""The mesh axes over which tokens are split."""


def whole(w: Float[Array, "*shape"], names: tuple[str | None, ...], dtype: Any) -> Float[Array, "*shape"]:
    """A parameter in `dtype`, whole along the mesh axes that split tokens, for a product of the compiler's.

    Left to itself the compiler may send activations round instead, or take a product in as many slices of the weight
    as there are devices. The gradient goes back to where the parameter lies as soon as it is there.

    Args:
        names: logical names of its dimensions.
    """
    mesh = auto_mesh()
    return w.astype(dtype) if mesh is None else _whole(names, dtype, mesh, w)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _whole(names: tuple[str | None, ...], dtype: Any, mesh: AbstractMesh, w: Array) -> Array:
    tokenless = lambda entry: tuple(axis for axis in _axes(entry) if axis not in TOKENS)
    spec = P(*map(tokenless, partition(names, w.shape, mesh)))
    return jax.lax.with_sharding_constraint(w.astype(dtype), spec)


def _whole_fwd(names, dtype, mesh, w):
    return _whole(names, dtype, mesh, w), jax.numpy.zeros((0,), w.dtype)


def _whole_bwd(names, dtype, mesh, like, dw):
    return (jax.lax.with_sharding_constraint(dw, partition(names, dw.shape, mesh)).astype(like.dtype),)


_whole.defvjp(_whole_fwd, _whole_bwd)


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()

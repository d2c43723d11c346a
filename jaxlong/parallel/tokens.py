"""Token-wise work over a mesh: each device takes its own tokens, and gathers the weights that all tokens share.

Weights lie in parts, over the batch and sequence axes too. A device gathers what it needs whole, in the dtype in which
it computes; gradients are added up over its tokens first, cross devices once, in float32, and each part goes back to
where it lies.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Shaped

from jaxlong.parallel.manual import SEQUENCE, dividing
from jaxlong.parallel.mesh import partition
from jaxlong.parallel.partial import wide

Local = Callable[[Any, Any, Any], Any]
"""`(tokens, shared, held) -> result` on the arrays of one device: its tokens, its parts of what is shared, and for each
part a PartitionSpec that says by which axes `gather` makes it whole."""


def token_map(
    local: Local, tokens: Any, shared: Any, names: Any, *, mesh: AbstractMesh | None, also: tuple[str, ...] = ()
) -> Any:
    """`local(tokens, shared, held)`, a tree of arrays [B, T, ...], where each device has its own tokens.

    The batch is split over "data" and "fsdp", the length over "seq" and "ulysses"; the other axes stay with the
    compiler.

    Args:
        tokens: a tree of arrays [B, T, ...].
        shared: a tree of arrays that all tokens use.
        names: the logical names of their dimensions, a PartitionSpec for each, by which they lie.
        mesh: None runs `local` here, on whole arrays.
        also: other mesh axes, along which `local` works on a part of what is shared and never gathers it; its result
            is alike on all of their devices.
    """
    split = _split(tokens, mesh)
    return _over_tokens(local, tokens, shared, names, mesh, split, also)


def token_sum(
    local: Local, tokens: Any, shared: Any, names: Any, *, mesh: AbstractMesh | None, also: tuple[str, ...] = ()
) -> Any:
    """`local(tokens, shared, held)`, a tree of sums over tokens, added up over the mesh; else as `token_map`."""
    split = _split(tokens, mesh)
    axes = split[0] + split[1]
    total = lambda *args: lax.psum(local(*args), axes) if axes else local(*args)
    return _over_tokens(total, tokens, shared, names, mesh, split, also, out=P())


def _split(tokens: Any, mesh: AbstractMesh | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The mesh axes of batch and length."""
    B, T = jax.tree.leaves(tokens)[0].shape[:2]
    return ((), ()) if mesh is None else (dividing(mesh, ("data", "fsdp"), B), dividing(mesh, SEQUENCE, T))


def _over_tokens(local: Local, tokens, shared, names, mesh, split, also, out: P | None = None) -> Any:
    axes = split[0] + split[1]
    place = lambda over: lambda name, x: _held(tuple(name), x, mesh, over)
    by_name = lambda over: jax.tree.map(place(over), names, shared, is_leaf=lambda node: isinstance(node, P))
    held = by_name(axes)
    if not axes + also:
        return local(tokens, shared, held)
    return jax.shard_map(
        lambda tokens, shared: local(tokens, shared, held),
        mesh=mesh,
        in_specs=(P(*split), by_name(axes + also)),
        out_specs=P(*split) if out is None else out,
        axis_names={*axes, *also},
    )(tokens, shared)


def _held(names: tuple[str | None, ...], x: Array, mesh: AbstractMesh | None, axes: tuple[str, ...]) -> P:
    """How an array lies over some of the mesh's axes."""
    if not axes:
        return P()
    groups = ((entry,) if isinstance(entry, str) else entry or () for entry in partition(names, x.shape, mesh))
    return P(*(tuple(axis for axis in group if axis in axes) for group in groups))


def gather(x: Shaped[Array, "*part"], held: P) -> Shaped[Array, "*whole"]:
    """The array of which each device holds a part."""
    for dimension, axes in enumerate(held):
        if axes:
            x = lax.all_gather(x, axes, axis=dimension, tiled=True)
    return x


def scatter(x: Float[Array, "*whole"], held: P) -> Float[Array, "*part"]:
    """A device's part of the sum over the devices that `gather` asks; its transpose."""
    for dimension, axes in enumerate(held):
        if axes:
            x = lax.psum_scatter(x, axes, scatter_dimension=dimension, tiled=True)
    return x


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def gathered(held: P, dtype: Any, x: Float[Array, "*part"]) -> Float[Array, "*whole"]:
    """`gather` with `dtype` on the way; gradients are summed in float32. The result has the dtype of x."""
    return gather(x.astype(dtype), held).astype(x.dtype)


gathered.defvjp(
    lambda held, dtype, x: (gathered(held, dtype, x), None),
    lambda held, dtype, _, dx: (scatter(wide(dx), held).astype(dx.dtype),),
)

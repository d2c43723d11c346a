"""The plainest sequence parallelism: devices share out tokens and gather what they need whole.

Attention gathers keys, for any mask and any layout, since masks see positions: a device holds all keys and values of
its batch rows and heads while it computes, and their gradients go back by a reduce-scatter. A sum over tokens gathers
the arrays that all tokens share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from jaxlong.core.types import BadInput


class Meta(NamedTuple):
    """What attention takes beside q, k and v, and what is cut along with them."""

    q_positions: Int[Array, "B T"]
    k_positions: Int[Array, "B S"]
    q_segments: Int[Array, "B T"] | None
    k_segments: Int[Array, "B S"] | None
    heads: Int[Array, "H"]
    bias: Float[Array, "#B #H #T #S"] | None
    alibi_slopes: Float[Array, "H"] | None
    sinks: Float[Array, "H"] | None


Local = Callable[[Array, Array, Array, Meta], tuple[Array, Array]]
"""`(q, k, v, meta) -> (out, lse)` on the arrays of one device."""


def sequence_attention(
    local: Local,
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K V"],
    meta: Meta,
    *,
    mesh: AbstractMesh,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """`local` over a mesh: batch over "data" and "fsdp", length over "seq", heads over "tensor".

    An axis that does not divide its dimension is left out: all its devices then do the same work. So a single query
    (decoding) runs on every device of "seq", over the whole cache.

    Raises:
        BadInput: the key heads are not a multiple of "tensor".
    """
    tensor = "tensor" if mesh.shape.get("tensor", 1) > 1 else None
    if tensor and k.shape[2] % mesh.shape[tensor]:
        why = f"not divisible by the {mesh.shape[tensor]} devices of the mesh axis tensor"
        raise BadInput("key heads", k.shape[2], why, f"a multiple of {mesh.shape[tensor]}")
    batch = _dividing(mesh, ("data", "fsdp"), q.shape[0])
    q_length = _dividing(mesh, ("seq",), q.shape[1])
    k_length = _dividing(mesh, q_length, k.shape[1])  # without a part of the queries there is nothing to gather for
    rows, columns, by_head = P(batch, q_length), P(batch, k_length), P(tensor)
    bias = None if meta.bias is None else P(*_unless_shared(meta.bias, (batch, tensor, q_length, None)))
    specs = Meta(rows, columns, rows, columns, by_head, bias, by_head, by_head)
    specs = Meta(*(None if array is None else spec for array, spec in zip(meta, specs, strict=True)))

    def part(q, k, v, meta):
        whole = lambda x: lax.all_gather(x, k_length, axis=1, tiled=True) if k_length and x is not None else x
        meta = meta._replace(k_positions=whole(meta.k_positions), k_segments=whole(meta.k_segments))
        return local(q, whole(k), whole(v), meta)

    return jax.shard_map(
        part,
        mesh=mesh,
        in_specs=(P(batch, q_length, tensor), P(batch, k_length, tensor), P(batch, k_length, tensor), specs),
        out_specs=P(batch, q_length, tensor),
    )(q, k, v, meta)


def token_sum(
    local: Callable[[Any, Any], Any], tokens: Any, shared: Any, *, mesh: AbstractMesh, split: P | None = None
) -> Any:
    """`local(tokens, shared)`, a tree of sums over tokens, added up over a mesh.

    Each device sums over its part of the batch ("data" and "fsdp") and of the length ("seq"); the other axes stay with
    the compiler. Gradients of what is shared are added up across devices once, however often `local` uses it.

    Args:
        tokens: a tree of arrays [B, T, ...].
        shared: a tree of arrays that all tokens use.
        split: how those are cut over other mesh axes, if `local` works on a part of them.
    """
    B, T = jax.tree.leaves(tokens)[0].shape[:2]
    batch, length = _dividing(mesh, ("data", "fsdp"), B), _dividing(mesh, ("seq",), T)
    split = P() if split is None else split
    axes = {*batch, *length, *filter(None, split)}
    if not axes:
        return local(tokens, shared)
    return jax.shard_map(
        lambda tokens, shared: lax.psum(local(tokens, shared), batch + length),
        mesh=mesh,
        in_specs=(P(batch, length), split),
        out_specs=P(),
        axis_names=axes,
    )(tokens, shared)


def auto_mesh() -> AbstractMesh | None:
    """The mesh of `jax.set_mesh`, if the program is still one over all its devices: inside `shard_map` it is not."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if set(mesh.axis_types) == {AxisType.Auto} else None


def vary_alike(tree: Any) -> Any:
    """Inside `jax.shard_map`, makes every array vary over all axes over which any of them does.

    The carry of a loop must have one type throughout, and so must a cotangent and its primal. Adding a zero made from
    the others does it on every version of JAX, and its transpose sums the gradient over the axes that were added.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return tree
    zero = sum(lax.full_like(x, 0, jnp.int32, shape=()) for x in jax.tree.leaves(tree))
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), tree)


def _dividing(mesh: AbstractMesh, axes: tuple[str, ...], size: int) -> tuple[str, ...]:
    """The mesh axes of more than one device, as many of the first as divide the size together."""
    axes = tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1)
    while size % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return axes


def _unless_shared(x: Array, axes: tuple) -> list:
    """Drops the axes of dimensions of size 1, over which x is broadcast."""
    return [None if size == 1 else axis for size, axis in zip(x.shape, axes, strict=True)]

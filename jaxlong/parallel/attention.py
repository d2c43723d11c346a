"""Attention over a mesh: who holds what, and the strategy by which devices share keys.

    all_gather  each device gathers all keys
    ring        keys go round, behind the attention                         (the neighbours' alone, for windows)
    ulysses     tokens are exchanged for heads
    usp         ulysses over the mesh axis "ulysses", a ring over "seq"
    auto        the quickest of these, by `jaxlong.parallel.cost`

Each is a function `(local, q, k, v, meta, *, axis)` too, for use in one's own `jax.shard_map`.
"""

from __future__ import annotations

import math
from functools import partial

import jax
from jax import Array
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from jaxlong.core.mask import Mask
from jaxlong.core.types import BadInput
from jaxlong.parallel import cost
from jaxlong.parallel.allgather import all_gather
from jaxlong.parallel.halo import halo, window
from jaxlong.parallel.manual import SEQUENCE, axis_sizes, dividing
from jaxlong.parallel.partial import Local, Meta
from jaxlong.parallel.ring import ring
from jaxlong.parallel.ulysses import ulysses

STRATEGIES = ("all_gather", "ring", "ulysses", "usp")


def sequence_attention(
    local: Local,
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S K M"],
    v: Float[Array, "B S K V"] | None,
    meta: Meta,
    *,
    mesh: AbstractMesh,
    mask: Mask,
    strategy: str = "auto",
    layout: str = "contiguous",
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """`local` over a mesh: batch over "data" and "fsdp", length over "seq" and "ulysses", heads over "tensor".

    With "auto" an axis that does not divide its dimension is left out: all its devices then do the same work. So a
    single query (decoding) runs on every device, over the whole cache, with any strategy.

    Args:
        mask: what `local` shows.
        layout: the order of the tokens, if queries and keys are the same ones: if their positions are the same array.

    Raises:
        BadInput: the key heads are neither one nor a multiple of "tensor", or the lengths are none of the axes'.
    """
    tensor = "tensor" if mesh.shape.get("tensor", 1) > 1 else None
    batch = dividing(mesh, ("data", "fsdp"), q.shape[0])
    axes = dividing(mesh, SEQUENCE, q.shape[1])
    shared = axes == dividing(mesh, axes, k.shape[1])  # else every device of these axes holds all keys
    if strategy != "auto" and q.shape[1] > 1:
        _require_split(mesh, strategy, q.shape[1], k.shape[1])
    keys_by_head = _divided(tensor, mesh, k.shape[2])
    same = meta.q_positions is meta.k_positions
    if same:
        meta = meta._replace(k_positions=None)

    rows, columns, by_head = P(batch, axes), P(batch, axes if shared else None), P(tensor)
    bias = None if meta.bias is None else P(*_unless_shared(meta.bias, (batch, tensor, axes, None)))
    weights = None if meta.weights is None else tuple(P(None, tensor) for _ in meta.weights)
    specs = Meta(rows, columns, rows, columns, by_head, bias, by_head, by_head, weights)
    specs = Meta(*(None if array is None else spec for array, spec in zip(meta, specs, strict=True)))
    of_keys = P(*columns, keys_by_head)
    step = local
    if axes and shared:
        step = _step(local, q, k, v, meta, mesh, mask, axes, strategy, layout if same else None)

    def part(q, k, v, meta):
        return step(q, k, v, meta._replace(k_positions=meta.q_positions) if same else meta)

    return jax.shard_map(
        part,
        mesh=mesh,
        in_specs=(P(batch, axes, tensor), of_keys, None if v is None else of_keys, specs),
        out_specs=P(batch, axes, tensor),
    )(q, k, v, meta)


def _step(local, q, k, v, meta, mesh, mask, axes, strategy, layout):
    """What a device does with its part."""
    length, devices = q.shape[1], math.prod(axis_sizes(mesh, axes))
    layout = layout if meta.bias is None else None  # a bias has columns for whole devices
    around = lambda axis, n, layout: _around(local, mask, axis, length // n, n, layout)
    if strategy == "auto":
        windowed = around(axes, devices, layout)
        if windowed.func is halo:
            return windowed
        strategy = _quickest(q, k, v, mesh, mask, axes, layout)
    if strategy == "usp" and len(axes) == 2:  # zigzag's parts are mixed once a group of devices has exchanged them
        outer = around("seq", mesh.shape["seq"], layout if layout == "contiguous" else None)
        return partial(ulysses, outer, axis="ulysses")
    if strategy == "usp":
        strategy = "ring" if axes == ("seq",) else "ulysses"
    if strategy == "ring":
        return around(axes, devices, layout)
    return partial({"all_gather": all_gather, "ulysses": ulysses}[strategy], local, axis=axes)


def _around(local, mask, axis, length, devices, layout) -> partial:
    """A ring; or, of a window that reaches less far, what is around a device in the text."""
    near = window(mask, length, layout, devices)
    if near is None:
        return partial(ring, local, axis=axis, mask=mask)
    return partial(halo, local, axis=axis, layout=layout, before=near[0], after=near[1])


def _quickest(q, k, v, mesh, mask, axes, layout) -> str:
    """The strategy that the cost model prefers for what one device of the other axes computes."""
    B, T, H, C = q.shape
    tensor, (seq, inner) = mesh.shape.get("tensor", 1), axis_sizes(mesh, SEQUENCE)
    rows = math.prod(axis_sizes(mesh, dividing(mesh, ("data", "fsdp"), B)))
    shape = cost.Shape(
        batch=B // rows,
        length=max(T, k.shape[1]),
        heads=H // tensor,
        kv_heads=max(1, k.shape[2] // tensor),
        head_dim=C,
        value_dim=0 if v is None else v.shape[-1],
        key_dim=k.shape[-1],
        itemsize=q.dtype.itemsize,
        causal=mask.ahead() is not None,
        layout=layout or "contiguous",
    )
    sizes = (seq, inner) if len(axes) == 2 else (math.prod(axis_sizes(mesh, axes)), 1)
    device = cost.device(mesh.abstract_device.device_kind if mesh.abstract_device else "unknown")
    return cost.quickest(shape, device, ring=sizes[0], ulysses=sizes[1])


def _require_split(mesh: AbstractMesh, strategy: str, queries: int, keys: int) -> None:
    """Refuses lengths of which a strategy that was asked for would leave devices the same work."""
    axes = tuple(axis for axis in SEQUENCE if mesh.shape.get(axis, 1) > 1)
    devices = math.prod(axis_sizes(mesh, axes))
    for name, length in (("queries", queries), ("keys", keys)):
        if length % devices:
            why = f"{length} {name} do not split over the {devices} devices of {' and '.join(axes)}"
            near = max(1, round(length / devices)) * devices
            raise BadInput("backend.sequence", strategy, why, f"nearest: {near}, or auto")


def _divided(tensor: str | None, mesh: AbstractMesh, heads: int) -> str | None:
    """The axis that splits key heads: one head goes to all of its devices."""
    if tensor and heads > 1 and heads % mesh.shape[tensor]:
        why = f"not divisible by the {mesh.shape[tensor]} devices of the mesh axis tensor"
        raise BadInput("key heads", heads, why, f"a multiple of {mesh.shape[tensor]}")
    return tensor if heads > 1 else None


def _unless_shared(x: Array, axes: tuple) -> list:
    """Drops the axes of dimensions of size 1, over which x is broadcast."""
    return [None if size == 1 else axis for size, axis in zip(x.shape, axes, strict=True)]

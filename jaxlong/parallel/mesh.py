"""Device meshes, the one table of sharding rules, and which rows of a batch a process reads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlong.core.types import BadInput
from jaxlong.parallel.torus import round_trip

AXES = ("data", "fsdp", "seq", "ulysses", "tensor", "expert")
"""Every mesh has all six axes; the ones not asked for have size 1, so one table of rules serves all.

"seq" and "ulysses" split the sequence together; "ulysses" is the inner one, for the quicker links.
"""

RULES: Mapping[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "seq": ("seq", "ulysses"),
    "embed": ("fsdp", "seq", "ulysses"),  # a dimension of every matrix: parameters lie in parts over all of them
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "experts": "expert",
    "layers": None,
}
"""Logical axis name (written beside each parameter) -> mesh axis or axes."""


def parse_mesh(spec: str, devices: int) -> dict[str, int]:
    """Sizes of all axes from `"data=2,fsdp=-1"`; one -1 takes what is left of `devices`.

    Raises:
        BadInput: unknown or repeated axis, a size that is no positive integer, or a product that is not
            the number of devices.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, spec.replace(" ", "").split(",")):
        name, _, size = part.partition("=")
        if name not in AXES:
            raise BadInput("mesh", spec, f"unknown axis '{name}'", f"axes are {', '.join(AXES)}")
        if name in sizes:
            raise BadInput("mesh", spec, f"axis '{name}' is given twice", "each axis once")
        try:
            sizes[name] = int(size)
        except ValueError:
            raise BadInput("mesh", spec, f"'{part}' is not axis=size", "for example data=2,seq=4") from None
        if sizes[name] < 1 and sizes[name] != -1:
            raise BadInput("mesh", spec, f"size {sizes[name]} of '{name}'", "1 or more, or -1 for what is left")
    inferred = [name for name, size in sizes.items() if size == -1]
    if len(inferred) > 1:
        raise BadInput("mesh", spec, f"-1 is given for {' and '.join(inferred)}", "one -1 at most")
    known = math.prod(size for size in sizes.values() if size != -1)
    if inferred:
        if devices % known:
            raise BadInput("mesh", spec, f"{known} does not divide {devices} devices", _nearest(known, devices))
        sizes[inferred[0]] = devices // known
    elif known != devices:
        raise BadInput(
            "mesh", spec, f"multiplies to {known}, but there are {devices} devices", "use -1 to infer a size"
        )
    return {name: sizes.get(name, 1) for name in AXES}


def _nearest(known: int, devices: int) -> str:
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    return f"the nearest product that divides is {min(divisors, key=lambda n: abs(n - known))}"


def make_mesh(spec: str = "data=-1", devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the six axes of `AXES` from `"data=2,fsdp=2,seq=2"` (see `parse_mesh`).

    Axes are of type Auto: the compiler places collectives, except in the functions of `jaxlong.parallel`. Chips of a
    torus follow each other along "seq" from neighbour to neighbour and back, where their coordinates allow it.
    """
    devices = jax.devices() if devices is None else devices
    sizes, types = parse_mesh(spec, len(devices)), (AxisType.Auto,) * len(AXES)
    # Two axes may share a dimension of the torus, as those of fsdp=4,seq=64 do on 16 x 16.
    grid = create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    mesh = Mesh(grid, AXES, axis_types=types)
    ring = np.moveaxis(mesh.devices, AXES.index("seq"), 0).reshape(sizes["seq"], -1)[:, 0]
    if not all(hasattr(chip, "coords") for chip in ring):
        return mesh
    order = round_trip([(*chip.coords, getattr(chip, "core_on_chip", 0)) for chip in ring])
    return mesh if order is None else Mesh(mesh.devices.take(order, AXES.index("seq")), AXES, axis_types=types)


def partition(names: Sequence[str | None], shape: Sequence[int], mesh: Any) -> P:
    """The PartitionSpec of an array whose dimensions carry logical names.

    A mesh axis is left out where it does not divide the dimension, or already shards an earlier one.
    """
    used: set[str] = set()
    entries = []
    for name, size in zip(names, shape, strict=True):
        rule = RULES[name] if name is not None else None
        axes = (rule,) if isinstance(rule, str) else (rule or ())
        kept: list[str] = []
        for axis in axes:
            devices = mesh.shape.get(axis, 1)
            if devices > 1 and axis not in used and size % (devices * _size(mesh, kept)) == 0:
                kept.append(axis)
        used.update(kept)
        entries.append(tuple(kept) if len(kept) > 1 else kept[0] if kept else None)
    return P(*entries)


def _size(mesh: Any, axes: Sequence[str]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def shard(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrain an activation by logical names; does nothing without a context mesh (`jax.set_mesh`)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return x
    return jax.lax.with_sharding_constraint(x, partition(names, x.shape, mesh))


class Share(NamedTuple):
    """Part `index` of `count` equal parts of the rows of a batch."""

    index: int
    count: int


def row_share(devices: np.ndarray, process: int) -> Share:
    """The rows that a process must read: those that its devices hold, where these are equal parts of the batch.

    Processes that hold other parts of the same rows (along the sequence, say) read the same ones. Where the rows
    of two processes overlap in part, or are no equal neighbouring parts, every process reads all.

    Args:
        devices: a mesh's, in the order of `AXES`.
        process: `process_index` of some of them.
    """
    blocks = devices.reshape(devices.shape[0] * devices.shape[1], -1)
    holders = [frozenset(device.process_index for device in block) for block in blocks]
    runs = [(who, sum(1 for _ in run)) for who, run in itertools.groupby(holders)]
    alike = len({length for _, length in runs}) == 1
    apart = sum(len(who) for who, _ in runs) == len(frozenset().union(*holders))
    if not (alike and apart):
        return Share(0, 1)
    return Share(next(i for i, (who, _) in enumerate(runs) if process in who), len(runs))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Place this process's rows (NumPy `[rows, T]` leaves, its `row_share`) as global arrays over batch and seq axes.

    Raises:
        BadInput: the rows do not split over the data and fsdp axes although they are read in parts.
    """
    share = row_share(mesh.devices, jax.process_index())

    def place(rows: np.ndarray) -> jax.Array:
        count, shape = rows.shape[0], (rows.shape[0] * share.count, *rows.shape[1:])
        sharding = NamedSharding(mesh, partition(("batch", "seq"), shape, mesh))
        if share.count > 1 and sharding.shard_shape(shape)[0] * mesh.shape["data"] * mesh.shape["fsdp"] != shape[0]:
            blocks = mesh.shape["data"] * mesh.shape["fsdp"]
            raise BadInput("data.batch", shape[0], f"does not split over data * fsdp = {blocks}", "a multiple of it")

        def part(index: tuple[slice, ...]) -> np.ndarray:
            first, last, _ = index[0].indices(shape[0])
            return rows[(slice(first - share.index * count, last - share.index * count), *index[1:])]

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(place, batch)

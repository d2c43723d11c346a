"""Device meshes, the one table of sharding rules, and start-up of many processes."""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

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

log = logging.getLogger(__name__)


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


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Place this process's rows (NumPy `[rows, T]` leaves) as global arrays over the batch and seq axes."""

    def place(rows: np.ndarray) -> jax.Array:
        global_shape = (rows.shape[0] * jax.process_count(), *rows.shape[1:])
        sharding = NamedSharding(mesh, partition(("batch", "seq"), global_shape, mesh))
        return jax.make_array_from_process_local_data(sharding, rows, global_shape)

    return jax.tree.map(place, batch)


def init_distributed(timeout: int = 300, warn_after: int = 30) -> None:
    """Join the other processes of a job, if the environment says that there are any.

    Recognises Cloud TPU, SLURM, Open MPI and GKE as `jax.distributed.initialize` does, and the variables
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. A single process returns at once.

    Args:
        timeout: seconds to wait for all processes.
        warn_after: seconds after which a warning says who is awaited.

    Raises:
        BadInput: a variable is missing, or not all processes came in time.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    given = {name: os.environ.get(name) for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")}
    missing = [name for name, value in given.items() if value is None]
    if jax.distributed.is_initialized():
        return
    if len(missing) == len(given):
        if _launcher():
            _initialize({}, "the job's launcher", timeout, warn_after)
        return
    if missing:
        raise BadInput(missing[0], "unset", "the other JAX_ variables of a multi-process job are set", "set all three")
    try:
        arguments = {
            "coordinator_address": address,
            "num_processes": int(given["JAX_NUM_PROCESSES"]),
            "process_id": int(given["JAX_PROCESS_ID"]),
        }
    except ValueError:
        raise BadInput(
            "JAX_PROCESS_ID", f"{given['JAX_PROCESS_ID']} of {given['JAX_NUM_PROCESSES']}", "not integers"
        ) from None
    _initialize(arguments, f"{address} ({given['JAX_NUM_PROCESSES']} processes)", timeout, warn_after)


def _launcher() -> bool:
    """Whether a known launcher started several processes."""
    tpu_workers = os.environ.get("TPU_WORKER_HOSTNAMES", "").count(",") + 1
    tasks = (os.environ.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
    return tpu_workers > 1 or "MEGASCALE_NUM_SLICES" in os.environ or any(int(n) > 1 for n in tasks)


def _initialize(arguments: dict[str, Any], where: str, timeout: int, warn_after: int) -> None:
    """Join, under timers of our own: where JAX gives up, it aborts the process with a stack trace."""
    awaited = "was the same command started on every host, and is the port open?"
    if arguments.get("process_id"):
        _await_coordinator(arguments["coordinator_address"], where, timeout)
    timers = [
        threading.Timer(warn_after, log.warning, ("still waiting for the other processes at %s: %s", where, awaited)),
        threading.Timer(timeout, _give_up, (where, timeout, awaited)),
    ]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        jax.distributed.initialize(**arguments, initialization_timeout=timeout + 60)
    except (RuntimeError, ValueError) as error:
        raise BadInput("jax.distributed", where, str(error).splitlines()[0], awaited) from None
    finally:
        for timer in timers:
            timer.cancel()


def _await_coordinator(address: str, where: str, timeout: int) -> None:
    """Wait until something listens at the coordinator's address."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise BadInput("JAX_COORDINATOR_ADDRESS", address, "is no address", "host:port of process 0")
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                why = f"process 0 did not answer within {timeout} s ({error})"
                raise BadInput("JAX_COORDINATOR_ADDRESS", where, why, "start process 0 there; open the port") from None
            time.sleep(0.2)


def _give_up(where: str, timeout: int, awaited: str) -> None:
    log.critical("%s", BadInput("jax.distributed", where, f"not all processes joined within {timeout} s", awaited))
    os._exit(2)  # the main thread waits inside JAX and cannot be interrupted

"""Training steps compiled for TPU systems that are not there: do they fit, and does the ring hide its transfers.

    topology = parse("v6e:16x16")
    report = compile_step(experiment, topology, mesh="fsdp=4,seq=64", batch=4, length=2**20)
    report.fits, report.peak_gib

The TPU compiler is a package (`pip install libtpu`, the version that belongs to jaxlib's) and runs on any machine. It
says what a program needs and how it is scheduled, never how long it takes.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxlong.config import Experiment, validate
from jaxlong.core.types import BadInput, Batch
from jaxlong.parallel.flags import compile_with
from jaxlong.parallel.mesh import make_mesh, partition
from jaxlong.plan import hlo
from jaxlong.plan.exchange import at
from jaxlong.run import jitted, program, sharded_state

GIB = 2**30

ENVIRONMENT: Mapping[str, str] = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",  # of no consequence for what is described
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # several processes may compile at once
}
"""Keeps libtpu from asking for a machine, from writing logs, and from locking others out."""


class Family(NamedTuple):
    """TPU systems of one kind.

    Fields:
        kind: JAX's `device_kind`.    dimensions: of its torus.    hosts: chips of a host, along each dimension.
        cores: JAX devices a chip.    hbm: GiB a device that the compiler lets a program use, by its own messages.
    """

    kind: str
    dimensions: int
    hosts: tuple[int, ...]
    cores: int
    hbm: float
    options: Mapping[str, str] = {}


FAMILIES: Mapping[str, Family] = {
    "v4": Family("TPU v4", 3, (2, 2, 1), 1, 31.25, {"chip_config_name": "megacore"}),
    "v5e": Family("TPU v5 lite", 2, (1, 1), 1, 15.75),
    "v5p": Family("TPU v5", 3, (2, 2, 1), 1, 95.74),
    "v6e": Family("TPU v6 lite", 2, (1, 1), 1, 31.25),
    "tpu7x": Family("TPU7x", 3, (2, 2, 1), 2, 94.75),
}


class Topology(NamedTuple):
    """A TPU system by name: `v6e:16x16` is 256 chips of TPU v6e."""

    name: str
    family: Family
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        return self.chips * self.family.cores


def parse(name: str) -> Topology:
    """A system from its name, `family:AxB` or `family:AxBxC`.

    Raises:
        BadInput: no such family, or a shape that no such system has.
    """
    kind, _, shape = name.partition(":")
    if kind not in FAMILIES:
        near = difflib.get_close_matches(kind, FAMILIES, n=1)
        allowed = f"did you mean {near[0]}?" if near else f"one of {', '.join(FAMILIES)}"
        raise BadInput("topology", name, f"no family '{kind}' is known", allowed)
    family = FAMILIES[kind]
    example = "x".join(["16", "16", "16"][: family.dimensions])
    if not re.fullmatch(r"\d+(x\d+)*", shape):
        raise BadInput("topology", name, "is no shape of chips", f"for example {kind}:{example}")
    sides = tuple(map(int, shape.split("x")))
    if len(sides) != family.dimensions or min(sides) < 1:
        raise BadInput("topology", name, f"{kind} has {family.dimensions} dimensions", f"for example {kind}:{example}")
    if any(side % host for side, host in zip(sides, family.hosts, strict=True)):
        near = "x".join(str(max(1, round(side / host)) * host) for side, host in zip(sides, family.hosts, strict=True))
        hosts = "x".join(map(str, family.hosts))
        raise BadInput("topology", name, f"hosts hold {hosts} chips", f"nearest: {kind}:{near}")
    return Topology(name, family, sides)


def described(topology: Topology) -> list[Any]:
    """The devices of a system, as far as the compiler has to know them.

    Raises:
        BadInput: the compiler is not installed, or knows no such system.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise BadInput("topology", topology.name, "the TPU compiler is not installed", "pip install 'jaxlong[tpu]'")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        system = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **topology.family.options)
    except (RuntimeError, ValueError) as error:
        why = str(error).splitlines()[0][:160]
        raise BadInput(
            "topology", topology.name, f"the compiler knows no such system ({why})", "another shape"
        ) from None
    return list(system.devices)


@dataclass(frozen=True)
class Report:
    """What the compiler said of a training step. Sizes are GiB a device; None where it did not come to that.

    Fields:
        fits: whether the program was made; the compiler refuses one that needs more than `hbm_gib`.
        peak_gib: the most that exists at once, or what was asked for if it does not fit (a part of it, as reported).
        error: its message, first line.
        collectives: by kind: sites in the program, runs a step, GB sent a step by each device (`jaxlong.plan.hlo`).
        permutes: synchronous, asynchronous, and those among the latter with computation between start and end.
        kernels: calls of Pallas kernels in the program; where there are none, attention is loops of plain JAX.
    """

    fits: bool
    hbm_gib: float
    peak_gib: float | None = None
    argument_gib: float | None = None
    temporary_gib: float | None = None
    host_gib: float | None = None
    lower_s: float = 0.0
    compile_s: float = 0.0
    error: str = ""
    collectives: dict[str, dict[str, float]] = field(default_factory=dict)
    permutes: dict[str, int] = field(default_factory=dict)
    unread_loops: int = 0
    kernels: int = 0


def compile_step(
    experiment: Experiment,
    topology: Topology,
    *,
    mesh: str,
    batch: int,
    length: int,
    options: Mapping[str, str] | None = None,
) -> Report:
    """Compile the whole training step, state donated, for `batch` rows of `length` tokens; no array is made.

    Args:
        mesh: sizes of axes over the system's devices, as in `parse_mesh`.
        options: of the compiler; unknown ones are left out with a warning.

    Raises:
        BadInput: mesh, batch, length or heads do not fit one another, told before compilation.
    """
    experiment = at(experiment, mesh, devices=topology.devices, batch=batch, length=length)
    validate(experiment, topology.devices)
    began = time.perf_counter()
    lowered = lower(experiment, make_mesh(mesh, described(topology)))
    lowering = time.perf_counter() - began
    began = time.perf_counter()
    try:
        compiled = compile_with(lowered, options or {})
    except jax.errors.JaxRuntimeError as error:
        return _refused(error, topology, lowering, time.perf_counter() - began)
    seconds = time.perf_counter() - began
    memory, said = compiled.memory_analysis(), hlo.read(compiled.as_text())
    traffic = {
        kind: {"sites": found.sites, "runs": found.runs, "GB": round(found.bytes / 1e9, 3)}
        for kind, found in sorted(said.collectives.items())
    }
    return Report(
        fits=True,
        hbm_gib=topology.family.hbm,
        peak_gib=memory.peak_memory_in_bytes / GIB,
        argument_gib=memory.argument_size_in_bytes / GIB,
        temporary_gib=memory.temp_size_in_bytes / GIB,
        host_gib=memory.host_temp_size_in_bytes / GIB,
        lower_s=lowering,
        compile_s=seconds,
        collectives=traffic,
        permutes=dataclasses.asdict(said.permutes),
        unread_loops=said.unread,
        kernels=said.kernels,
    )


def lower(experiment: Experiment, mesh: Any) -> Any:
    """The training step on a mesh whose devices need not exist, lowered with shapes in place of arrays."""
    shape = (experiment.data.batch, experiment.data.length)
    place = NamedSharding(mesh, partition(("batch", "seq"), shape, mesh))
    rows = lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    batch = Batch(*(rows(jnp.int32) for _ in range(4)), rows(jnp.float32))
    step = program(experiment).step  # outside: nothing can be computed on devices that are only described
    with jax.set_mesh(mesh):
        state = sharded_state(experiment, mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        return jitted(step, shardings).lower(state, batch)


def _refused(error: Exception, topology: Topology, lowering: float, seconds: float) -> Report:
    """An out-of-memory is a result; anything else is none."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        raise error
    asked = re.search(r"\((\d+(?:\.\d+)?)G\)", text) or re.search(r"Used (\d+(?:\.\d+)?)G", text)
    has = re.search(r"available HBM \((\d+(?:\.\d+)?)G\)", text) or re.search(r"of (\d+(?:\.\d+)?)G hbm", text)
    return Report(
        fits=False,
        hbm_gib=float(has[1]) if has else topology.family.hbm,
        peak_gib=float(asked[1]) if asked else None,
        lower_s=lowering,
        compile_s=seconds,
        error=text.splitlines()[0],
    )

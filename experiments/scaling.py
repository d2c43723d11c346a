"""What meshes, strategies and lengths do to a training step, without the machine that would run it.

    python -m experiments.scaling --config=configs/llama3_8b.py --meshes="fsdp=2,seq=4;seq=8" \\
        --lengths=4096,8192 --out=runs/scaling
    python -m experiments.scaling --config=configs/llama3_8b.py --meshes="fsdp=4,seq=64;seq=256" \\
        --lengths=131072,1048576 --topology=v6e:16x16 --out=runs/scaling
    python -m experiments.scaling --config=configs/llama3_8b.py --meshes="seq=256" --longest \\
        --topology=v5e:16x16 --out=runs/longest

Without a topology each mesh is one of simulated CPU devices, where a small version of the model is compared with one
device (errors of loss and gradients) and timed: times of a simulation, which say nothing about accelerators. With one,
the TPU compiler (`pip install libtpu`) compiles the full training step, each row in a process of its own with a time
limit. `--longest` finds the longest row that fits: from the length that the formulas say, or the one given, in steps
that double, then by bisection.

Beside that every row has what `jaxlong.plan` counts without compiling: bytes a chip, flops, bytes sent, and the
predicted step time and MFU on the topology's chips (--chip names others), which nobody measured.

Writes rows.jsonl, a line as soon as a row is done: started again, the script makes only those that are missing. Then
scaling.md, memory.png and mfu.png from all rows of the file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli
from experiments.benchmarks import scaling_report
from experiments.benchmarks.simulated import devices_of
from jaxlong.config import Experiment, load, validate
from jaxlong.core.types import BadInput
from jaxlong.parallel.layout import parts
from jaxlong.parallel.manual import sequence_devices
from jaxlong.parallel.mesh import parse_mesh
from jaxlong.plan import memory, topology
from jaxlong.plan.cost import KINDS
from jaxlong.plan.exchange import at
from jaxlong.train.checkpoint import check_workdir

FLAGS = flags.FlagValues()
flags.DEFINE_string("config", None, "Python file of an experiment; --config.path.to.field=value", flag_values=FLAGS)
flags.DEFINE_string("meshes", None, "meshes, separated by semicolons: fsdp=4,seq=64;seq=256", flag_values=FLAGS)
flags.DEFINE_list("lengths", [], "tokens of a row", flag_values=FLAGS)
flags.DEFINE_integer("batch", 0, "rows; 0 is one for each group of devices that shares a row", flag_values=FLAGS)
flags.DEFINE_list("strategies", ["ring"], "how devices share keys: names of Backend.sequence", flag_values=FLAGS)
flags.DEFINE_string("layout", "zigzag", "order of a row's tokens on devices", flag_values=FLAGS)
flags.DEFINE_string("topology", None, "compile for this TPU system: v6e:16x16, v4:8x8x16, ...", flag_values=FLAGS)
flags.DEFINE_string("chip", "v5p", "chips of the prediction, without a topology", flag_values=FLAGS)
flags.DEFINE_bool(
    "longest",
    False,
    "find the longest row that fits, near each length or near what the formulas say",
    flag_values=FLAGS,
)
flags.DEFINE_float("precision", 0.125, "of --longest: the last step, as a share of the length", flag_values=FLAGS)
flags.DEFINE_integer("limit", 1800, "seconds of a row", flag_values=FLAGS)
flags.DEFINE_string("out", None, "folder of the results", flag_values=FLAGS)

BLOCK = 512
"""Tokens of a device's part of which `--longest` tries multiples: odd parts make programs of many odd loops."""

FINISHED = ("ok", "does not fit")
"""Rows that are not made again; those that failed or took too long are."""


def main(overrides: Sequence[tuple[str, str]]) -> None:
    for name, example in (("config", "configs/llama3_8b.py"), ("meshes", "seq=8"), ("out", "runs/scaling")):
        cli.required(FLAGS, name, f"--{name}={example}")
    out = Path(FLAGS.out)
    check_workdir(out)
    points = list(_points(overrides))
    out.mkdir(parents=True, exist_ok=True)
    rows = Rows(out / "rows.jsonl")
    for point in points:
        if FLAGS.longest:
            _longest(rows, point, overrides)
        else:
            _row(rows, point, overrides)
    sys.stdout.write(scaling_report.write(out, rows.all))


def _points(overrides: Sequence[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """What each row is of, all checked before the first is made."""
    experiment = cli.apply_overrides(load(FLAGS.config), None, overrides)
    system = None if FLAGS.topology is None else topology.parse(FLAGS.topology)
    if FLAGS.longest and system is None:
        raise BadInput("longest", True, "only a compiler says what fits", "--topology=v5e:16x16")
    if FLAGS.chip not in KINDS:
        raise BadInput("chip", FLAGS.chip, "is not known", f"one of {', '.join(KINDS)}")
    for mesh in filter(None, (part.strip() for part in FLAGS.meshes.split(";"))):
        sizes = parse_mesh(mesh, system.devices if system else devices_of(mesh))
        batch = FLAGS.batch or sizes["data"] * sizes["fsdp"]
        for strategy in FLAGS.strategies:
            placed = dataclasses.replace(experiment, sequence=strategy, layout=FLAGS.layout)
            guess = FLAGS.longest and not FLAGS.lengths
            for length in [_by_formula(placed, mesh, system, batch)] if guess else _lengths():
                everyone = math.prod(sizes.values())
                validate(at(placed, mesh, devices=everyone, batch=batch, length=length), everyone)
                yield {
                    "config": FLAGS.config,
                    "overrides": [list(pair) for pair in overrides],
                    "topology": FLAGS.topology,
                    "chip": FLAGS.chip if system is None else FLAGS.topology.partition(":")[0],
                    "mesh": mesh,
                    "strategy": strategy,
                    "layout": FLAGS.layout,
                    "batch": batch,
                    "length": length,
                }


def _lengths() -> list[int]:
    try:
        lengths = [int(n) for n in FLAGS.lengths]
    except ValueError:
        raise BadInput("lengths", FLAGS.lengths, "not integers", "131072,1048576") from None
    if not lengths:
        raise BadInput("lengths", "unset", "is needed", "--lengths=131072,1048576")
    return lengths


class Rows:
    """The rows of a file, each there as soon as it is made."""

    def __init__(self, path: Path):
        self.path = path
        text = path.read_text() if path.exists() else ""
        self.all = [json.loads(line) for line in text.splitlines() if _whole(line)]

    def find(self, point: Mapping[str, Any]) -> dict[str, Any] | None:
        """The finished row of a point."""
        same = lambda row: row["point"] == point and row["status"] in FINISHED
        return next((row for row in reversed(self.all) if same(row)), None)

    def add(self, row: dict[str, Any]) -> None:
        ends = not self.path.exists() or self.path.read_bytes()[-1:] in (b"", b"\n")
        with self.path.open("a") as file:  # the last line may be half of one, if its writer was stopped
            file.write(("" if ends else "\n") + json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.all.append(row)


def _whole(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _row(rows: Rows, point: dict[str, Any], overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The row of a point, made if the file lacks it."""
    found = rows.find(point)
    if found is None:
        _tell(point, "...")
        found = _made(point, overrides)
        rows.add(found)
    _tell(point, found["status"])
    return found


def _made(point: dict[str, Any], overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """A row by a process of its own, which may run out of time or memory."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder) / "row.json"
        command = [sys.executable, "-m", "experiments.benchmarks.scaling_row", f"--config={point['config']}"]
        command += [f"--config.{path}={text}" for path, text in overrides]
        command += [f"--point={json.dumps(point)}", f"--to={to}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=FLAGS.limit, env=_environment(point))
        except subprocess.TimeoutExpired:
            return {"point": point, "status": "out of time", "error": f"stopped after {FLAGS.limit} s"}
        if to.exists():
            return json.loads(to.read_text())
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return {"point": point, "status": "failed", "error": lines[-1][:500], "seconds": time.monotonic() - began}


def _environment(point: Mapping[str, Any]) -> dict[str, str]:
    """CPU devices for a simulation, as many as the mesh has."""
    count = devices_of(point["mesh"]) if point["topology"] is None else 1
    simulated = f"--xla_force_host_platform_device_count={count}"
    patient = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{simulated} {patient}"}


def _longest(rows: Rows, point: dict[str, Any], overrides: Sequence[tuple[str, str]]) -> None:
    """From a length near it: steps up while it fits, or down until it does, each twice the last; then bisects."""
    fits = lambda length: _row(rows, point | {"length": length}, overrides)["status"] == "ok"
    sizes = parse_mesh(point["mesh"], topology.parse(point["topology"]).devices)
    unit = BLOCK * parts(point["layout"], sequence_devices(sizes))
    whole = lambda length: max(unit, round(length / unit) * unit)
    low = high = point["length"]
    step = whole(FLAGS.precision * low)
    if fits(low):
        while fits(high := low + step):
            low, step = high, 2 * step
    else:
        while (low := max(0, high - step)) and not fits(low):
            high, step = low, 2 * step
    while low and high - low > whole(FLAGS.precision * low):
        middle = low + whole((high - low) / 2)
        low, high = (middle, high) if fits(middle) else (low, middle)


def _by_formula(experiment: Experiment, mesh: str, system: topology.Topology, batch: int) -> int:
    """The length at which `jaxlong.plan.memory` says that a device is full: what a row takes grows with its length."""
    sizes = parse_mesh(mesh, system.devices)
    unit = BLOCK * parts(FLAGS.layout, sequence_devices(sizes))
    lengths = (unit, 4 * unit)
    where = {"devices": system.devices, "batch": batch, "kind": system.family.kind}
    peaks = [memory.account(experiment, mesh, length=length, **where).peak for length in lengths]
    a_token = (peaks[1] - peaks[0]) / (lengths[1] - lengths[0])
    room = system.family.hbm * topology.GIB - peaks[0]
    return max(unit, math.floor((lengths[0] + room / a_token) / unit) * unit)


def _tell(point: Mapping[str, Any], what: str) -> None:
    names = ("topology", "mesh", "strategy", "batch", "length")
    sys.stderr.write("  ".join(f"{name} {point[name]}" for name in names if point[name] is not None) + f": {what}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS))

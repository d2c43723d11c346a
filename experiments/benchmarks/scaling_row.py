"""One row of `experiments.scaling`, in a process of its own: compiled for a TPU system, or run on simulated devices."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli
from experiments.benchmarks import simulated
from jaxlong.config import Experiment, load
from jaxlong.parallel.mesh import parse_mesh
from jaxlong.plan import cost, memory, topology
from jaxlong.run import count_params

FLAGS = flags.FlagValues()
flags.DEFINE_string("config", None, "Python file of an experiment; --config.path.to.field=value", flag_values=FLAGS)
flags.DEFINE_string("point", None, "what the row is of, as JSON", flag_values=FLAGS)
flags.DEFINE_string("to", None, "file of the row", flag_values=FLAGS)


def main(overrides: Sequence[tuple[str, str]]) -> None:
    began = time.monotonic()
    point = json.loads(FLAGS.point)
    experiment = cli.apply_overrides(load(FLAGS.config), None, overrides)
    experiment = dataclasses.replace(experiment, sequence=point["strategy"], layout=point["layout"])
    row = {"point": point, "versions": versions(), "parameters": count_params(experiment.model)}
    row |= counted(experiment, point)
    if point["topology"] is None:
        row |= simulated.compare(experiment, point["mesh"], point["length"])
    else:
        where = {name: point[name] for name in ("mesh", "batch", "length")}
        report = topology.compile_step(experiment, topology.parse(point["topology"]), **where)
        row |= {"status": "ok" if report.fits else "does not fit", "compiled": dataclasses.asdict(report)}
    Path(FLAGS.to).write_text(json.dumps(row | {"seconds": time.monotonic() - began}))


def counted(experiment: Experiment, point: Mapping[str, Any]) -> dict[str, Any]:
    """What needs no compiler: bytes by formula, and the predicted step."""
    devices = topology.parse(point["topology"]).devices if point["topology"] else simulated.devices_of(point["mesh"])
    kind = cost.KINDS[point["chip"]]
    where = {name: point[name] for name in ("mesh", "batch", "length")} | {"devices": devices}
    bytes_ = memory.account(experiment, kind=kind, **where)
    step = cost.step(experiment, kind, **where)
    return {
        "devices": devices,
        "axes": {name: size for name, size in parse_mesh(point["mesh"], devices).items() if size > 1},
        "bytes": {name: value._asdict() for name, value in vars(bytes_).items()} | {"peak": bytes_.peak},
        "predicted": dataclasses.asdict(step) | {"step_s": step.total},
    }


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    import importlib.metadata as metadata

    found = {"date": time.strftime("%Y-%m-%d"), "python": ".".join(map(str, sys.version_info[:2]))}
    for package in ("jax", "jaxlib", "libtpu"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS))

"""Measure recall against state: train every model of a grid on associative recall, and ask each.

    python -m experiments.recall --config=configs/recall_small.py --out=runs/recall

Writes into --out: results.jsonl (one record a model), report.md, recall.png, and a run folder for each model. What is
finished is kept: the same command goes on where it stopped. Any field can be set by its path, as
`--config.train.steps=500`.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path

from absl import flags

from experiments import cli
from jaxlong import recall as lab
from jaxlong.config import load, override
from jaxlong.core.types import BadInput
from jaxlong.evals.records import append_lines
from jaxlong.train.checkpoint import check_workdir

FLAGS = flags.FlagValues()
flags.DEFINE_string(
    "config", "configs/recall_small.py", "Python file of a grid; --config.path.to.field=value", flag_values=FLAGS
)
flags.DEFINE_string("out", "runs/recall", "folder of the results", flag_values=FLAGS)
flags.DEFINE_list("only", [], "names of the models to train; default: all", flag_values=FLAGS)


def main(overrides) -> None:
    grid, out, started = load(FLAGS.config, lab.Recall), Path(FLAGS.out), time.monotonic()
    for path, text in overrides:
        grid = override(grid, path, text)
    names = [contender.name for contender in grid.contenders]
    unknown = sorted(set(FLAGS.only) - set(names))
    if unknown:
        raise BadInput("only", ",".join(unknown), "no such model", f"some of {', '.join(names)}")
    check_workdir(out)
    records = lab.check(grid, out)
    waiting = [t for t in lab.trials(grid) if t.name not in records and t.contender.name in (FLAGS.only or names)]
    out.mkdir(parents=True, exist_ok=True)
    for n, trial in enumerate(waiting, 1):
        record = lab.measure(grid, trial, out, title=f"[{n}/{len(waiting)}] {trial.name}")
        append_lines(out / "results.jsonl", [{"kind": record.kind} | asdict(record)])
        records[trial.name] = record
        sys.stderr.write(f"{trial.name}: recall {record.accuracy:.3f} with {record.state_bytes} bytes of state\n")
    text = lab.write_report(grid, list(records.values()), out)
    sys.stdout.write(f"{text}\n{time.monotonic() - started:.0f} s; written to {out}\n")


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS))

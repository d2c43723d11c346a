"""Train the small language model of every family, and compare each with a bigram model of the same bytes.

    python -m experiments.families --configs=configs/small*.py --workdir=runs/families --out=benchmarks

The bigram model has seen exactly the training tokens, and is scored on them: no model that looks one byte back can do
better. A family is scored by its mean loss over the last 20 steps, each taken before the step that learns from it.
A run that has ended is not repeated. Writes families.json and families.md.
"""

from __future__ import annotations

import glob
import json
import sys
from pathlib import Path

from absl import flags

from experiments import cli
from jaxlong.core.types import BadInput

FLAGS = flags.FlagValues()
flags.DEFINE_string("configs", "configs/small*.py", "configurations to train, a pattern", flag_values=FLAGS)
flags.DEFINE_string("workdir", None, "folder of the runs, one below it for each configuration", flag_values=FLAGS)
flags.DEFINE_string("out", "benchmarks", "folder of the results", flag_values=FLAGS)

LAST = 20
"""Steps over which the final loss is averaged."""


def main(overrides) -> None:
    workdir = Path(cli.required(FLAGS, "workdir", "--workdir=runs/families"))
    files = sorted(glob.glob(FLAGS.configs))
    if not files:
        raise BadInput("configs", FLAGS.configs, "no such file", "configs/small*.py")
    from jaxlong.config import load

    experiments = {Path(file).stem: cli.apply_overrides(load(file), None, overrides) for file in files}
    rows = [measure(name, experiment, workdir / name) for name, experiment in experiments.items()]
    bounds = {experiment.data: bigram(experiment) for experiment in experiments.values()}
    for row, experiment in zip(rows, experiments.values(), strict=True):
        row["bigram"] = bounds[experiment.data]
    write(rows, Path(FLAGS.out))


def measure(name: str, experiment, folder: Path) -> dict:
    """Train one configuration, or read what an earlier run of it has written."""
    from jaxlong import run

    experiment = cli.override(experiment, "train.log_every", "1")
    run.check(experiment, folder)
    run.train(experiment, folder, title=name)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["nll"] for line in lines if "nll" in line}
    last = [losses[step] for step in sorted(losses)[-LAST:]]
    mixers = dict.fromkeys(
        type(part).__name__ for block in experiment.model.blocks for part in block if part is not None
    )
    return {
        "config": name,
        "layers": ", ".join(mixers),
        "parameters": run.count_params(experiment.model),
        "steps": experiment.train.steps,
        "loss": sum(last) / len(last),
    }


def bigram(experiment) -> float:
    """Nats a token of the bigram model that fits the training rows best, on those rows."""
    import numpy as np

    from jaxlong.data import batches

    counts = np.zeros((experiment.model.vocab, experiment.model.vocab))
    rows = batches(experiment.data, seed=experiment.seed)
    for _ in range(experiment.train.steps):
        batch = next(rows)
        real = batch.loss_weights > 0
        np.add.at(counts, (batch.tokens[real], batch.targets[real]), 1)
    rows.close()
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return float(-(counts * np.log(np.where(counts > 0, share, 1))).sum() / counts.sum())


def write(rows: list[dict], out: Path) -> None:
    from experiments.benchmarks import timing
    from jaxlong.evals.report import markdown_table

    rows = sorted(rows, key=lambda row: row["loss"])
    cells = [
        [row["config"], row["layers"], f"{row['parameters']:,}", row["steps"], f"{row['loss']:.3f}"] for row in rows
    ]
    cells.append(["bigram", "counts of the same bytes", "65,536", rows[0]["steps"], f"{rows[0]['bigram']:.3f}"])
    table = markdown_table(["configuration", "layers", "parameters", "steps", "loss, nats a byte"], cells)
    timing.write(out, "families", {"rows": rows}, table)
    sys.stdout.write(table)


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS))

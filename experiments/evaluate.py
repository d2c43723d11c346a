"""Evaluate a trained model by the tasks, lengths and text of its experiment.

    python -m experiments.evaluate --from=runs/tiny-yarn --out=runs/tiny-yarn/evaluation

Writes results.jsonl, one line a sample and one a loss; report.md and figures are views of those lines.
Fields of the evaluation can be set as `--config.evaluation.samples=100`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags

from experiments import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("from", None, "run folder or checkpoint to evaluate", flag_values=FLAGS)
flags.DEFINE_string("out", None, "folder of the results; default: evaluation/ in the run folder", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "of the evaluation's random streams", flag_values=FLAGS)
flags.DEFINE_integer("tokens", 65536, "tokens of held-out text for the perplexities", flag_values=FLAGS)


def main(overrides) -> None:
    source = cli.required(FLAGS, "from", "--from=runs/name")
    out = Path(FLAGS.out if FLAGS.out is not None else Path(source) / "evaluation")
    from jaxlong import run
    from jaxlong.train.checkpoint import check_workdir

    loaded = run.load(source)
    experiment = cli.apply_overrides(loaded.experiment, None, overrides)
    check_workdir(out)
    results = run.assess(
        experiment, loaded.params, tokens=FLAGS.tokens, seed=FLAGS.seed, progress=cli.progress("evaluate")
    )
    out.mkdir(parents=True, exist_ok=True)
    run.write_report(results, out, trained=experiment.data.length)
    sys.stdout.write((out / "report.md").read_text() + f"\nwritten to {out}\n")


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS))

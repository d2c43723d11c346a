"""Pretrain a language model, or go on with a run that was stopped.

    python -m experiments.pretrain --config=configs/tiny.py --workdir=runs/tiny \\
        --mesh=data=2,fsdp=2,seq=2 --config.train.steps=200

Run the same command on every host of a pod. Any field of the experiment can be set by its dotted path.
"""

from __future__ import annotations

import sys

from absl import flags

from experiments import cli

FLAGS = flags.FlagValues()
cli.experiment_flags(FLAGS)
flags.DEFINE_string("workdir", None, "folder of the run: checkpoints, metrics, the experiment", flag_values=FLAGS)
cli.process_flags(FLAGS)


def main(overrides) -> None:
    workdir = cli.required(FLAGS, "workdir", "--workdir=runs/name")
    experiment = cli.build(FLAGS, overrides)
    from jaxlong import run
    from jaxlong.parallel.processes import init_distributed

    init_distributed(timeout=FLAGS.init_timeout, heartbeat=FLAGS.heartbeat)
    run.check(experiment, workdir)
    cli.show(experiment)
    run.train(experiment, workdir)


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS))

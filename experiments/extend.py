"""Extend the context of a trained model: another rotary scaling and a short fine-tune at the longer length.

    python -m experiments.extend --from=runs/tiny --workdir=runs/tiny-yarn --factor=4 --steps=100

The checkpoint folder knows the experiment; its data is taken at `factor` times the length with about as
many tokens a batch. Fields of the new experiment can be set as `--config.path.to.field=value`.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from absl import flags

from experiments import cli
from jaxlong.core.position import NTK, PI, DynamicNTK, Yarn
from jaxlong.core.types import BadInput

FLAGS = flags.FlagValues()
METHODS = {
    "yarn": lambda factor, length: Yarn(factor=factor, original=length),
    "pi": lambda factor, length: PI(factor=factor),
    "ntk": lambda factor, length: NTK(factor=factor),
    "dynamic_ntk": lambda factor, length: DynamicNTK(factor=1.0, original=length, length=round(factor * length)),
}
flags.DEFINE_string("from", None, "run folder or checkpoint to extend", flag_values=FLAGS)
flags.DEFINE_string("workdir", None, "folder of the new run", flag_values=FLAGS)
flags.DEFINE_string("mesh", None, "mesh of the new run: data=2,fsdp=2,seq=2", flag_values=FLAGS)
flags.DEFINE_string("method", "yarn", f"one of {', '.join(METHODS)}", flag_values=FLAGS)
flags.DEFINE_float("factor", 4.0, "how many times longer", flag_values=FLAGS)
flags.DEFINE_integer("steps", 100, "steps of the fine-tune", flag_values=FLAGS)
cli.process_flags(FLAGS)


def main(overrides) -> None:
    source = cli.required(FLAGS, "from", "--from=runs/name")
    workdir = cli.required(FLAGS, "workdir", "--workdir=runs/name")
    if FLAGS.method not in METHODS:
        raise BadInput("method", FLAGS.method, "no such scaling", f"one of {', '.join(METHODS)}")
    if FLAGS.steps < 1:
        raise BadInput("steps", FLAGS.steps, "nothing to train", "1 or more")
    import jax

    from jaxlong import run
    from jaxlong.model import extend
    from jaxlong.parallel.mesh import parse_mesh
    from jaxlong.parallel.processes import init_distributed
    from jaxlong.train.optim import Cosine

    init_distributed(timeout=FLAGS.init_timeout, heartbeat=FLAGS.heartbeat)
    loaded = run.load(source)
    base, length = loaded.experiment, loaded.experiment.data.length
    factor = FLAGS.factor
    scaling = METHODS[FLAGS.method](factor, length)
    mesh = parse_mesh(base.mesh if FLAGS.mesh is None else FLAGS.mesh, jax.device_count())
    rows = mesh["data"] * mesh["fsdp"] * base.train.accumulation
    batch = max(rows, round(base.data.batch / factor / rows) * rows)
    longer = replace(base.data, length=round(factor * length), batch=batch)
    peak = getattr(base.train.schedule, "peak", 1e-3) / 3
    schedule = Cosine(peak=peak, warmup=max(1, FLAGS.steps // 10))
    recipe = replace(base.train, steps=FLAGS.steps, schedule=schedule)
    experiment = replace(base, model=extend(base.model, scaling), data=longer, train=recipe, seed=base.seed + 1)
    experiment = cli.apply_overrides(experiment, FLAGS, overrides)
    run.check(experiment, workdir, loaded.params)
    cli.show(experiment)
    run.train(experiment, workdir, params=loaded.params, title="extend")


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS))

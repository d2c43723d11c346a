"""Measure attention's implementations, every mixer, or a ring of devices, side by side in one process.

    python -m experiments.benchmark --what=attention --lengths=4096,32768 --out=benchmarks
    python -m experiments.benchmark --what=mixers --out=benchmarks
    python -m experiments.benchmark --what=ring --repeats=5 --out=benchmarks
    python -m experiments.benchmark --what=kernels --peers --lengths=32768,131072 --repeats=7 --out=benchmarks
    python -m experiments.benchmark --what=delta --repeats=5 --out=benchmarks
    python -m experiments.benchmark --what=decode --repeats=5 --out=benchmarks
    python -m experiments.benchmark --what=mixers --mixers=gqa,kda --lengths=1024 --repeats=1 --out=/tmp/quick

    python -m experiments.benchmark --explain --config=configs/kimi_linear_48b.py --lengths=131072

Times are medians of alternating runs, compilation excluded; memory is what the compiler reports for temporary buffers.
Figures are ratios first: times of another machine differ. Writes <what>.json and <what>.md. Of the mixers, slow
programs run fewer times than --repeats, and what is finished is kept: the same command goes on where it stopped.

With --explain nothing runs: it says which implementation of each op the model of an experiment takes, on a CPU, a GPU
and a TPU, one device, and why it does not take those that it asks before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from absl import flags

from experiments import cli
from experiments.benchmarks import attention, decode, delta, explain, kernels, mixers, ring
from jaxlong.config import load
from jaxlong.core.types import BadInput
from jaxlong.train.checkpoint import check_workdir

LONG = [32768, 131072]
"""Lengths of kernels, in tokens."""

BENCHMARKS: Mapping[str, Callable[[Path, list[int]], str]] = {
    "attention": lambda out, lengths: attention.run(out, lengths or [4096, 32768], FLAGS.heads, FLAGS.repeats),
    "decode": lambda out, _: decode.run(out, FLAGS.repeats, FLAGS.cases),
    "delta": lambda out, lengths: delta.run(out, lengths or LONG, FLAGS.repeats),
    "kernels": lambda out, lengths: kernels.run(out, lengths or LONG, FLAGS.repeats, FLAGS.peers, FLAGS.cases),
    "mixers": lambda out, lengths: mixers.run(out, lengths or [4096, 8192, 16384], FLAGS.mixers, FLAGS.repeats),
    "ring": lambda out, lengths: "\n".join(ring.run(out, length, FLAGS.repeats) for length in lengths or [4096]),
}
"""What can be measured: from a folder and lengths, of which there may be none, to the text of the results."""

FLAGS = flags.FlagValues()
flags.DEFINE_enum("what", "attention", list(BENCHMARKS), "what to measure", flag_values=FLAGS)
flags.DEFINE_bool("explain", False, "which implementations --config takes, and why not others", flag_values=FLAGS)
flags.DEFINE_string("config", None, "of --explain; --config.path.to.field=value", flag_values=FLAGS)
flags.DEFINE_list("lengths", [], "sequence lengths in tokens; each benchmark has its own", flag_values=FLAGS)
flags.DEFINE_integer("heads", 1, "attention: query heads of the timed runs, head dim 64", flag_values=FLAGS)
flags.DEFINE_list("mixers", [], "mixers: names in the registry; default: all", flag_values=FLAGS)
flags.DEFINE_list("cases", [], "decode, kernels: names of cases; default: all", flag_values=FLAGS)
flags.DEFINE_bool("peers", False, "kernels: beside cuDNN and whatever peer is installed", flag_values=FLAGS)
flags.DEFINE_integer("repeats", 3, "timed runs of each", flag_values=FLAGS)
flags.DEFINE_string("out", "benchmarks", "folder of the results", flag_values=FLAGS)


def main(overrides) -> None:
    if overrides and not FLAGS.explain:
        raise BadInput(f"config.{overrides[0][0]}", overrides[0][1], "benchmark takes no overrides", "its flags")
    lengths = _lengths()
    for name, value in (("lengths", min(lengths, default=1)), ("heads", FLAGS.heads), ("repeats", FLAGS.repeats)):
        if value < 1:
            raise BadInput(name, value, "must be positive", "1 or more")
    if FLAGS.explain:
        experiment = load(cli.required(FLAGS, "config", "--config=configs/llama3_8b.py"))
        experiment = cli.apply_overrides(experiment, None, overrides)
        sys.stdout.write(explain.run(experiment.model, lengths or [experiment.data.length]))
        return
    out = Path(FLAGS.out)
    check_workdir(out)
    sys.stdout.write(BENCHMARKS[FLAGS.what](out, lengths))


def _lengths() -> list[int]:
    try:
        return [int(n) for n in FLAGS.lengths]
    except ValueError:
        raise BadInput("lengths", FLAGS.lengths, "not integers", "4096,8192") from None


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS))

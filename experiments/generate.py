"""Continue a prompt with a trained model, token by token.

python -m experiments.generate --from=runs/tiny --prompt="def main(" --max_new=200 --temperature=0.7
"""

from __future__ import annotations

import sys

from absl import flags

from experiments import cli
from jaxlong.core.types import BadInput

FLAGS = flags.FlagValues()
flags.DEFINE_string("from", None, "run folder or checkpoint", flag_values=FLAGS)
flags.DEFINE_string("prompt", None, "text to continue", flag_values=FLAGS)
flags.DEFINE_integer("max_new", 200, "most tokens to write", flag_values=FLAGS)
flags.DEFINE_float("temperature", 0.8, "0 takes the most likely token", flag_values=FLAGS)
flags.DEFINE_integer("top_k", 0, "sample from the k most likely; 0 from all", flag_values=FLAGS)
flags.DEFINE_float("top_p", 1.0, "sample from the smallest set of this probability", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "of the sampling", flag_values=FLAGS)


def main(overrides) -> None:
    if overrides:
        raise BadInput(
            f"config.{overrides[0][0]}", overrides[0][1], "generate takes no overrides", "the flags of --help"
        )
    source = cli.required(FLAGS, "from", "--from=runs/name")
    prompt = cli.required(FLAGS, "prompt", "--prompt='some text'")
    import jax
    import numpy as np

    from jaxlong import run
    from jaxlong.inference import Sample, stream

    sampler = Sample(FLAGS.temperature, FLAGS.top_k or None, FLAGS.top_p)
    loaded = run.load(source)
    tokenizer = loaded.experiment.data.tokenizer
    tokens = stream(
        loaded.experiment.model,
        loaded.params,
        tokenizer.encode(prompt),
        max_new=FLAGS.max_new,
        key=jax.random.key(FLAGS.seed),
        sampler=sampler,
        eos=tokenizer.eos,
    )
    sys.stdout.write(prompt)
    written, text = [], ""
    for token in tokens:
        if token == tokenizer.eos:
            break
        written.append(token)
        whole = tokenizer.decode(np.asarray(written))
        if not whole.endswith("\N{REPLACEMENT CHARACTER}"):  # a character of several bytes is not complete yet
            sys.stdout.write(whole[len(text) :])
            sys.stdout.flush()
            text = whole
    sys.stdout.write("\n")


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS))

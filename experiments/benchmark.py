"""Measure attention's implementations side by side, in one process.

    python -m experiments.benchmark --what=attention --lengths=4096,32768 --out=benchmarks

Times are medians of alternating runs, compilation excluded; memory is what the compiler reports for
temporary buffers. Figures are ratios first: times of another machine differ. Writes attention.json and
attention.md.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from pathlib import Path

from absl import flags

from experiments import cli
from jaxlong.core.types import BadInput
from jaxlong.train.checkpoint import check_workdir

FLAGS = flags.FlagValues()
flags.DEFINE_string("what", "attention", "what to measure: attention", flag_values=FLAGS)
flags.DEFINE_list("lengths", ["4096", "32768"], "sequence lengths in tokens", flag_values=FLAGS)
flags.DEFINE_integer("heads", 1, "query heads of the timed runs, head dim 64", flag_values=FLAGS)
flags.DEFINE_integer("repeats", 3, "timed runs of each", flag_values=FLAGS)
flags.DEFINE_string("out", "benchmarks", "folder of the results", flag_values=FLAGS)

HEAD_DIM = 64
MEMORY_HEADS = 8
DENSE_LIMIT = 8192
"""Longest length at which dense attention is run; beyond, only its memory is compiled."""


def main(overrides) -> None:
    if FLAGS.what != "attention":
        raise BadInput("what", FLAGS.what, "no such benchmark", "attention")
    if overrides:
        raise BadInput(f"config.{overrides[0][0]}", overrides[0][1], "benchmark takes no overrides", "its flags")
    try:
        lengths = [int(n) for n in FLAGS.lengths]
    except ValueError:
        raise BadInput("lengths", FLAGS.lengths, "not integers", "4096,8192") from None
    for name, value in (("lengths", min(lengths)), ("heads", FLAGS.heads), ("repeats", FLAGS.repeats)):
        if value < 1:
            raise BadInput(name, value, "must be positive", "1 or more")
    out = Path(FLAGS.out)
    check_workdir(out)
    rows = [row for length in lengths for row in measure(length, FLAGS.heads, FLAGS.repeats)]
    out.mkdir(parents=True, exist_ok=True)
    text = table(rows)
    facts = environment()
    (out / "attention.json").write_text(json.dumps({"environment": facts, "rows": rows}, indent=1) + "\n")
    (out / "attention.md").write_text(f"{', '.join(f'{k} {v}' for k, v in facts.items())}\n\n{text}")
    sys.stdout.write(text)


def environment() -> dict[str, str]:
    import jax

    device = jax.devices()[0]
    return {
        "device": f"{device.platform} {device.device_kind}",
        "jax": jax.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def cases(length: int) -> dict[str, tuple[str, object]]:
    """name -> (implementation, mask)."""
    from jaxlong.core.mask import causal, sliding

    found = {
        "blockwise causal": ("blockwise", causal()),
        "blockwise window 1024": ("blockwise", sliding(1024)),
    }
    return {"dense causal": ("dense", causal())} | found


def measure(length: int, heads: int, repeats: int) -> list[dict]:
    """A row for each case: forward and forward + backward milliseconds, and temporary MiB of both at 8 heads."""
    import jax

    rows, timed = [], {}
    for name, (kernel, mask) in cases(length).items():
        forward, both = functions(kernel, mask)
        memory = [temporary(fn, length) for fn in (forward, both)]
        rows.append({"case": name, "length": length, "forward_MiB": memory[0], "both_MiB": memory[1]})
        if kernel != "dense" or length <= DENSE_LIMIT:
            arguments = inputs(length, heads)
            timed[name] = [(fn.lower(*arguments).compile(), arguments, []) for fn in (forward, both)]
    for _ in range(repeats + 1):
        for programs in timed.values():
            for compiled, arguments, times in programs:
                start = time.perf_counter()
                jax.block_until_ready(compiled(*arguments))
                times.append(1000 * (time.perf_counter() - start))
    for row in rows:
        for key, (_, _, times) in zip(("forward_ms", "both_ms"), timed.get(row["case"], ()), strict=False):
            row[key] = statistics.median(times[1:])
    return rows


def functions(kernel: str, mask):
    import jax
    import jax.numpy as jnp

    from jaxlong.ops.attend import Backend, attend

    def forward(q, k, v):
        positions = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32), q.shape[:2])
        return attend(q, k, v, mask=mask, q_positions=positions, k_positions=positions, backend=Backend(kernel=kernel))

    return jax.jit(forward), jax.jit(jax.grad(lambda q, k, v: forward(q, k, v).sum(), (0, 1, 2)))


def inputs(length: int, heads: int):
    import jax

    shape = (1, length, heads, HEAD_DIM)
    return tuple(jax.random.normal(jax.random.key(i), shape) for i in range(3))


def temporary(fn, length: int) -> float:
    """MiB of temporary buffers of the compiled program, at 8 heads."""
    import jax

    shape = jax.ShapeDtypeStruct((1, length, MEMORY_HEADS, HEAD_DIM), "float32")
    return fn.lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes / 2**20


def table(rows: list[dict]) -> str:
    from jaxlong.evals.report import markdown_table

    header = ["case", "length", "forward ms", "fwd+bwd ms", "of causal", "temporary MiB, fwd+bwd", "of dense"]
    by_name = {(row["case"], row["length"]): row for row in rows}
    told = []
    for row in rows:
        causal, dense = (by_name[name, row["length"]] for name in ("blockwise causal", "dense causal"))
        ratio = f"{row['both_ms'] / causal['both_ms']:.3f}" if "both_ms" in row else ""
        times = [f"{row[key]:.1f}" if key in row else "" for key in ("forward_ms", "both_ms")]
        memory = [f"{row['both_MiB']:.1f}", f"1/{dense['both_MiB'] / row['both_MiB']:.0f}"]
        told.append([row["case"], row["length"], *times, ratio, *memory])
    return markdown_table(header, told)


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS))

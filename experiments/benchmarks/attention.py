"""Attention's implementations against dense attention."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from experiments.benchmarks.timing import medians, temporary, write

HEAD_DIM = 64
MEMORY_HEADS = 8
DENSE_LIMIT = 8192
"""Longest length at which dense attention is run; beyond, only its memory is compiled."""


def run(out: Path, lengths: Sequence[int], heads: int, repeats: int) -> str:
    """Measure, write attention.json and attention.md, and return the table."""
    rows = [row for length in lengths for row in measure(length, heads, repeats)]
    text = table(rows)
    write(out, "attention", {"rows": rows}, text)
    return text


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
    rows, programs = [], {}
    for name, (kernel, mask) in cases(length).items():
        forward, both = functions(kernel, mask)
        memory = [temporary(compiled(fn, length)) for fn in (forward, both)]
        rows.append({"case": name, "length": length, "forward_MiB": memory[0], "both_MiB": memory[1]})
        if kernel != "dense" or length <= DENSE_LIMIT:
            arguments = inputs(length, heads)
            for key, fn in (("forward_ms", forward), ("both_ms", both)):
                programs[name, key] = partial(fn.lower(*arguments).compile(), *arguments)
    times = medians(programs, repeats)
    for row in rows:
        row |= {key: ms for (name, key), ms in times.items() if name == row["case"]}
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


def compiled(fn, length: int):
    """The program at 8 heads."""
    import jax

    shape = jax.ShapeDtypeStruct((1, length, MEMORY_HEADS, HEAD_DIM), "float32")
    return fn.lower(shape, shape, shape).compile()


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

"""The delta rule's kernels beside the plain form and flash-linear-attention, in one process."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from experiments.benchmarks import in_torch
from experiments.benchmarks.timing import amortised, write
from jaxlong.core.types import BadInput
from pallas_kernels import hopper

HEADS, DIM = 16, 128
CHECKED = 2048
"""Length at which results are compared with the rule itself, a token at a time in float32."""


def run(out: Path, lengths: Sequence[int], repeats: int) -> str:
    """Measure KDA at batch 1, write delta.json and delta.md after every length, return the table.

    Raises:
        BadInput: the kernels do not run on this machine.
    """
    if reason := hopper.refusal():
        raise BadInput("what", "delta", reason, f"a Hopper GPU, jax >= {'.'.join(map(str, hopper.OLDEST_JAX))}")
    rows: list[dict] = []
    text = ""
    for length in lengths:
        rows += measure(length, repeats)
        text = table(rows)
        write(out, "delta", {"rows": rows}, text)
    return text


def measure(length: int, repeats: int) -> list[dict]:
    """A row for each implementation and direction: milliseconds and error, or why there are none."""
    import jax

    arguments, checked = inputs(length), inputs(min(length, CHECKED))
    rows, programs = [], {}
    for who, (run, gradients) in rivals().items():
        for direction, program, args in (("forward", run, 5), ("gradients", gradients, 6)):
            row = {"length": length, "who": who, "direction": direction}
            rows.append(row)
            try:
                row["error"] = error(program(*checked[:args]), direction, checked)
                programs[who, direction] = partial(program, *arguments[:args])
                jax.block_until_ready(programs[who, direction]())
            except Exception as failure:  # one may fail in any way, and the table says how
                programs.pop((who, direction), None)
                row["failed"] = f"{type(failure).__name__}: {str(failure).splitlines()[0][:80]}"
    times = amortised(programs, repeats)
    return [row | {"ms": times.get((row["who"], row["direction"]))} for row in rows]


def inputs(length: int) -> tuple:
    """q, k, v in bfloat16, log decays of a channel and beta in float32, and the gradient of o."""
    import jax
    import jax.numpy as jnp

    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), (1, length, HEADS, *shape))
    unit = lambda x: (x / jnp.linalg.norm(x, axis=-1, keepdims=True)).astype(jnp.bfloat16)
    low = lambda x: x.astype(jnp.bfloat16)
    g, beta = -0.3 * jax.nn.softplus(draw(3, DIM)), jax.nn.sigmoid(draw(4))
    return unit(draw(0, DIM)) * DIM**-0.5, unit(draw(1, DIM)), low(draw(2, DIM)), g, beta, low(draw(5, DIM))


def rivals() -> dict[str, tuple[Callable, Callable]]:
    """name -> (inputs to o, inputs and the gradient of o to all gradients)."""
    from jaxlong.ops.delta import KERNELS

    found = {name: _jax(lambda *xs, run=run: run(64, xs, None, None)[0]) for name, run in KERNELS.items()}
    if importlib.util.find_spec("torch") and importlib.util.find_spec("fla"):
        found["flash-linear-attention"] = _fla()
    return found


def _jax(rule: Callable) -> tuple[Callable, Callable]:
    import jax

    gradients = lambda *xs: jax.vjp(rule, *xs[:5])[1](xs[5].astype(xs[2].dtype))
    return jax.jit(rule), jax.jit(gradients)


def _fla() -> tuple[Callable, Callable]:
    """Its gradients hold their forward pass, so that is part of their time."""
    from fla.ops.kda import chunk_kda

    rule = lambda *xs: chunk_kda(*xs, scale=1.0)[0]
    forward, both = (in_torch.program(rule, direction, leaves=5) for direction in ("forward", "both"))
    return forward, lambda *xs: in_torch.Ready(*both(*xs).tensors[1:])


def error(found: Any, direction: str, inputs: tuple) -> float:
    """The largest error of a result, as a fraction of its norm, against the rule itself in float32."""
    import jax.numpy as jnp
    import numpy as np

    from pallas_kernels.delta.ref import reference

    wide = [x.astype(jnp.float32) for x in inputs]
    rule, gradients = _jax(lambda *xs: reference(*xs)[0])
    wanted = [rule(*wide[:5])] if direction == "forward" else gradients(*wide)
    here = [np.asarray(x, np.float64) for x in in_torch.arrays(found)]
    off = lambda x, y: float(np.linalg.norm(x - np.float64(y)) / np.linalg.norm(np.float64(y)))
    return max(off(x, y) for x, y in zip(here, wanted, strict=True))


def table(rows: Sequence[dict]) -> str:
    """A line for each implementation, length and direction."""
    from jaxlong.evals.report import markdown_table

    told = []
    for row in rows:
        figures = ["", row["failed"]] if "failed" in row else [f"{row['ms']:.3f}", f"{row['error']:.1e}"]
        told.append([row["who"], row["direction"], row["length"], *figures])
    return markdown_table(["who", "direction", "length", "ms", "relative error"], told)

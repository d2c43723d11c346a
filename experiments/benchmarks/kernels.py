"""The attention kernels beside their peers, in one process."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from experiments.benchmarks import in_torch
from experiments.benchmarks.timing import amortised, write
from jaxlong.core.types import BadInput

DOCUMENTS = 50
"""Documents of a packed row."""

CHECKED = 2048
"""Length at which results are compared with float32 attention over all scores."""

BLOCK = 128
"""Side of the tiles that visited work is counted in."""


Rival = Callable[["Case", str], Callable]
"""From a case and a direction, "forward" or "both", to a function of q, k, v and the gradient of out."""


@dataclass(frozen=True)
class Case:
    """One attention, in bfloat16, batch 1."""

    mask: Any
    length: int
    heads: int = 16
    key_heads: int = 16
    dims: tuple[int, int] = (128, 128)
    documents: int = 1


def cases(lengths: Sequence[int]) -> dict[str, Case]:
    """name -> case. Sparse ones and other dims at the first length, the window at all of them."""
    from jaxlong.core.mask import bigbird, causal, dilated, longformer, sliding, strided

    first = lengths[0]
    found = {"causal": Case(causal(), first), "causal dim 64": Case(causal(), first, dims=(64, 64))}
    found |= {f"window 4096 of {length}": Case(sliding(4096), length) for length in lengths}
    return found | {
        "packed": Case(causal(), first, documents=DOCUMENTS),
        "bigbird": Case(bigbird(3, 1, 3, 128, 0) & causal(), first),
        "random blocks": Case(bigbird(1, 0, 13, 128, 0) & causal(), first),
        "longformer": Case(longformer(4096, 128) & causal(), first),
        "dilated": Case(dilated(8192, 4), first),
        "strided": Case(strided(128), first),
        "causal 4 key heads": Case(causal(), first, key_heads=4),
        "causal dims 192 and 128": Case(causal(), first, dims=(192, 128)),
        "causal dim 256": Case(causal(), first, heads=8, key_heads=8, dims=(256, 256)),
    }


def run(out: Path, lengths: Sequence[int], repeats: int, peers: bool, only: Sequence[str] = ()) -> str:
    """Measure, write kernels.json and kernels.md after every case, and return the table.

    Raises:
        BadInput: a name in `only` that no case has.
    """
    if unknown := [name for name in only if name not in cases(lengths)]:
        raise BadInput("cases", unknown[0], "no such case", ", ".join(cases(lengths)))
    rows: list[dict] = []
    text = ""
    for name, case in cases(lengths).items():
        if not only or name in only:
            rows += measure(name, case, repeats, peers)
            text = table(rows)
            write(out, "kernels", {"rows": rows}, text)
    return text


def measure(name: str, case: Case, repeats: int, peers: bool) -> list[dict]:
    """A row for each implementation and direction: milliseconds, rates and errors, or why there are none."""
    import jax

    short = replace(case, length=min(case.length, CHECKED))
    wanted = {"ours": in_jax(ours)} | (PEERS if peers else {})
    programs, rows = {}, []
    arguments, checked = inputs(case), inputs(short)
    truth = both(exact(short), *checked)
    work = visited(case)
    for who, build in wanted.items():
        for direction in ("forward", "both"):
            row = {"case": name, "length": case.length, "who": who, "direction": direction, "visited": work}
            rows.append(row)
            try:
                row["error"] = error(in_torch.arrays(build(short, direction)(*checked)), truth)
                programs[who, direction] = partial(build(case, direction), *arguments)
                jax.block_until_ready(programs[who, direction]())
            except Exception as failure:  # a peer may fail in any way, and the table says how
                programs.pop((who, direction), None)
                row["failed"] = f"{type(failure).__name__}: {str(failure).splitlines()[0][:80]}"
    times = amortised(programs, repeats)
    for row in rows:
        if ms := times.get((row["who"], row["direction"])):
            passes = 1 if row["direction"] == "forward" else 3.5
            row |= {"ms": ms, "tflops": passes * flops(case, work) / ms / 1e9}
    return rows


def in_jax(build: Callable[[Case], Callable]) -> Rival:
    """A rival of a function of q, k and v."""
    import jax

    def program(case: Case, direction: str) -> Callable:
        fn = build(case)
        return jax.jit(partial(both, fn) if direction == "both" else lambda q, k, v, dout: (fn(q, k, v),))

    return program


def both(fn: Callable, q: Any, k: Any, v: Any, dout: Any) -> tuple:
    """Output and gradients."""
    import jax

    out, pull = jax.vjp(fn, q, k, v)
    return out, *pull(dout.astype(out.dtype))


def inputs(case: Case) -> tuple:
    """q, k, v and the gradient of out, normal."""
    import jax

    heads = (case.heads, case.key_heads, case.key_heads, case.heads)
    dims = (case.dims[0], *case.dims, case.dims[1])
    shapes = [(1, case.length, h, d) for h, d in zip(heads, dims, strict=True)]
    return tuple(jax.random.normal(jax.random.key(i), shape).astype("bfloat16") for i, shape in enumerate(shapes))


def tokens(case: Case) -> tuple[Any, Any]:
    """Positions [1 T], restarting in every document, and segments or None. NumPy: known to the compiler."""
    import numpy as np

    index = np.arange(case.length, dtype=np.int32)
    if case.documents == 1:
        return index[None], None
    ends = np.sort(np.random.default_rng(0).choice(case.length, case.documents - 1, replace=False))
    segments = np.searchsorted(ends, index, side="right").astype(np.int32)
    starts = np.concatenate([[0], ends])
    return (index - starts[segments]).astype(np.int32)[None], segments[None]


def ours(case: Case) -> Callable:
    return attention(case, "flash")


def exact(case: Case) -> Callable:
    """All scores, in float32."""
    import jax.numpy as jnp

    fn = attention(case, "dense")
    return lambda q, k, v: fn(*(x.astype(jnp.float32) for x in (q, k, v)))


def attention(case: Case, kernel: str) -> Callable:
    """`attend` as a model calls it: positions are arrays of the program, and plans are made in it."""
    import jax.numpy as jnp

    from jaxlong.ops import Backend, attend

    positions, segments = tokens(case)

    def run(q, k, v):
        at = jnp.asarray(positions)
        of = None if segments is None else jnp.asarray(segments)
        more = {"q_positions": at, "k_positions": at, "q_segments": of, "k_segments": of}
        return attend(q, k, v, mask=case.mask, backend=Backend(kernel=kernel), **more)

    return run


def cudnn(case: Case) -> Callable:
    """With its own causal and window masks where they suffice, otherwise with an explicit mask."""
    import jax
    import jax.numpy as jnp

    from jaxlong.core.mask import causal, sliding

    positions, segments = tokens(case)
    call = partial(jax.nn.dot_product_attention, implementation="cudnn")
    if case.mask == causal() and segments is None:
        return partial(call, is_causal=True)
    if isinstance(case.mask, type(sliding(1))):
        return partial(call, is_causal=True, local_window_size=(case.mask.left - 1, 0))

    def masked(q, k, v):
        at = jnp.asarray(positions)[0]
        heads = jnp.arange(case.heads)[:, None, None]
        seen = jnp.asarray(case.mask(at[:, None], at[None, :], heads))
        if segments is not None:
            seen = seen & (segments[0][:, None] == segments[0][None, :])
        return call(q, k, v, mask=jnp.broadcast_to(seen, (1, *(1,) * (3 - seen.ndim), *seen.shape)))

    return masked


def tokamax(case: Case) -> Callable:
    import tokamax

    from jaxlong.core.mask import causal, sliding

    call = partial(tokamax.dot_product_attention, implementation="mosaic_gpu", is_causal=True)
    if case.mask == causal() and case.documents == 1:
        return call
    if isinstance(case.mask, type(sliding(1))):
        return partial(call, local_window_size=(case.mask.left - 1, 0))
    raise NotImplementedError("no such mask")


def torch_sdpa(case: Case, direction: str) -> Callable:
    from jaxlong.core.mask import causal

    if case.mask != causal() or case.documents > 1:
        raise NotImplementedError("no such mask")
    return in_torch.program(in_torch.sdpa(case.heads != case.key_heads), direction)


def flex_attention(case: Case, direction: str) -> Callable:
    fn = in_torch.flex(torch_mask(case), case.length, case.heads != case.key_heads)
    return in_torch.program(fn, direction)


def torch_mask(case: Case) -> Callable:
    """Whether a query sees a key, of tensors of indices. Drawn blocks are in a table: tensors cannot draw them."""
    import numpy as np
    import torch

    from jaxlong.core.mask import causal

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if case.documents > 1:
        at, of = (torch.from_numpy(x[0]).to(device) for x in tokens(case))
        return lambda q, k: case.mask(at[q], at[k]) & (of[q] == of[k])
    if not drawn(case.mask):
        return case.mask
    first = np.arange(0, case.length, BLOCK)
    seen = torch.from_numpy(case.mask(first[:, None], first[None])).to(device)
    return lambda q, k: seen[q // BLOCK, k // BLOCK] & causal()(q, k)


def drawn(mask: Any) -> bool:
    """Whether blocks of it are drawn: a BigBird of `BLOCK` that is causal."""
    from jaxlong.core.mask import bigbird, causal

    part = getattr(mask, "a", None)
    return isinstance(part, type(bigbird(1, 0, 0, 1, 0))) and part.block == BLOCK and mask == part & causal()


PEERS: Mapping[str, Rival] = {"cudnn": in_jax(cudnn)}
if importlib.util.find_spec("tokamax"):
    PEERS |= {"tokamax": in_jax(tokamax)}
if importlib.util.find_spec("torch"):
    PEERS |= {"SDPA": torch_sdpa, "FlexAttention": flex_attention}


def visited(case: Case) -> float:
    """Share of all tiles of 128 x 128 that may hold something visible."""
    import numpy as np

    positions, segments = tokens(case)
    ends = lambda x: (x.reshape(-1, BLOCK).min(1), x.reshape(-1, BLOCK).max(1))
    low, high = ends(positions)
    some, _ = case.mask.tile(low[:, None], high[:, None], low[None], high[None])
    if segments is not None:
        low, high = ends(segments)
        some = some & (low[:, None] <= high[None]) & (low[None] <= high[:, None])
    return float(np.mean(some))


def flops(case: Case, share: float) -> float:
    """Of a forward pass over the tiles visited."""
    return 2 * case.heads * case.length**2 * sum(case.dims) * share


def error(found: tuple, truth: tuple) -> float:
    """The largest of the relative errors, in norm, of the results: out, and the gradients if they are there."""
    import jax.numpy as jnp

    norm = lambda x: jnp.linalg.norm(x.astype(jnp.float32).ravel())
    pairs = zip(found, truth[: len(found)], strict=True)
    return max(float(norm(a.astype(jnp.float32) - b.astype(jnp.float32)) / norm(b)) for a, b in pairs)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    from jaxlong.evals.report import markdown_table

    header = [
        "case",
        "tiles visited",
        "who",
        "direction",
        "ms",
        "TFLOP/s of visited tiles",
        "time / ours",
        "relative error",
    ]
    mine = {(row["case"], row["direction"]): row.get("ms") for row in rows if row["who"] == "ours"}
    told = []
    for row in rows:
        start = [row["case"], f"{100 * row['visited']:.1f} %", row["who"], row["direction"]]
        if "ms" in row:
            base = mine[row["case"], row["direction"]]
            ratio = f"{row['ms'] / base:.2f}" if base else ""
            told.append([*start, f"{row['ms']:.3f}", f"{row['tflops']:.0f}", ratio, f"{row['error']:.1e}"])
        else:
            told.append([*start, "", "", "", row.get("failed", "not timed")])
    return markdown_table(header, told)

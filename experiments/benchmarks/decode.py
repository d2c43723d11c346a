"""The decode kernel beside cuDNN, plain JAX and a copy of as many bytes, in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from experiments.benchmarks.timing import amortised, write
from jaxlong.core.types import BadInput

CHECKED = 4096
"""Length at which results are compared with float32 attention over all scores."""

LAUNCHES = 20
"""Of an implementation in one program, each with queries and positions that the one before told."""


@dataclass(frozen=True)
class Case:
    """One new token a row, whose queries are bfloat16.

    page: tokens of a page; None for a cache of the row's own. stored: the type of keys and values.
    values: where it is given, keys are the values, too: their first so many columns.
    """

    batch: int = 8
    length: int = 131072
    heads: int = 32
    key_heads: int = 8
    dim: int = 128
    page: int | None = None
    stored: str = "bfloat16"
    values: int | None = None


CASES: Mapping[str, Case] = {
    "batch 8": Case(),
    "batch 1": Case(batch=1),
    "batch 64": Case(batch=64, length=8192),
    "pages of 64": Case(page=64),
    "pages of 128": Case(page=128),
    "int8": Case(stored="int8"),
    "float8": Case(stored="float8_e4m3fn"),
    "16 heads of latents": Case(heads=16, key_heads=1, dim=576, values=512),
    "128 heads of latents": Case(heads=128, key_heads=1, dim=576, values=512),
}


def run(out: Path, repeats: int, only: Sequence[str] = ()) -> str:
    """Measure, write decode.json and decode.md after every case, and return the table.

    Raises:
        BadInput: a name in `only` that no case has.
    """
    if unknown := [name for name in only if name not in CASES]:
        raise BadInput("cases", unknown[0], "no such case", ", ".join(CASES))
    rows: list[dict] = []
    text = ""
    for name, case in CASES.items():
        if not only or name in only:
            rows += measure(name, case, repeats)
            text = table(rows)
            write(out, "decode", {"rows": rows}, text)
    return text


def measure(name: str, case: Case, repeats: int) -> list[dict]:
    """A row for each implementation: milliseconds, bytes a second and error, or why there are none."""
    import jax

    short = replace(case, length=min(case.length, CHECKED), batch=min(case.batch, 4))
    given, checked = inputs(case), inputs(short)
    truth = exact(short)(*checked)
    moved = sum(x.nbytes for x in given[1:] if x is not None)
    programs, rows = {}, []
    for who, build in IMPLEMENTATIONS.items():
        row = {"case": name, "batch": case.batch, "length": case.length, "bytes": moved, "who": who}
        rows.append(row)
        try:
            row["error"] = error(jax.jit(build(short))(*checked), truth)
            programs[who] = partial(jax.jit(again(build(case))).lower(*given).compile(), *given)
            jax.block_until_ready(programs[who]())
        except Exception as failure:  # one may fail in any way, and the table says how
            programs.pop(who, None)
            row["failed"] = f"{type(failure).__name__}: {str(failure).splitlines()[0][:80]}"
    rows.append({"case": name, "batch": case.batch, "length": case.length, "bytes": moved, "who": "copy"})
    programs["copy"] = copy(moved)
    for who, ms in amortised(programs, repeats, 0.2).items():
        row = next(row for row in rows if row["who"] == who)
        ms = ms if who == "copy" else ms / LAUNCHES
        row |= {"ms": ms, "gbs": moved / ms / 1e6}
    return rows


def again(attention: Callable) -> Callable:
    """`LAUNCHES` of them, one after another: queries and positions hang on the result before."""
    import jax
    import jax.numpy as jnp

    def program(q, at, *rest):
        def one(_, carry):
            q, at = carry
            out = attention(q, at, *rest).astype(jnp.float32)
            return (q + 1e-6 * out[..., : q.shape[-1]].mean()).astype(q.dtype), at + jnp.isnan(out).any()

        return jax.lax.fori_loop(0, LAUNCHES, one, (q, at))

    return program


def copy(moved: int) -> Callable:
    """Reads and writes so many bytes in all."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones(moved // 8, jnp.uint32)
    return partial(jax.jit(lambda x: x + 1).lower(x).compile(), x)


def inputs(case: Case) -> tuple:
    """q, the position of its token, keys, values, the table of pages, and factors of keys and values."""
    import jax
    import jax.numpy as jnp

    B, L, K = case.batch, case.length, case.key_heads
    count = (B * L // case.page, case.page) if case.page else (B, L)
    wide = case.stored == "bfloat16"

    @partial(jax.jit, static_argnums=(1, 2))
    def draw(i, shape, dtype):
        key = jax.random.key(i)
        if dtype == "int8":
            return jax.random.randint(key, shape, -127, 128, jnp.int8)
        return jax.random.normal(key, shape, jnp.bfloat16).astype(dtype)

    q = draw(0, (B, 1, case.heads, case.dim), "bfloat16")
    at = jnp.full((B, 1), L - 1, jnp.int32)
    k = draw(1, (*count, K, case.dim), case.stored)
    v = None if case.values else draw(2, (*count, K, case.dim), case.stored)
    pages = jax.random.permutation(jax.random.key(3), count[0]).reshape(B, -1).astype(jnp.int32) if case.page else None
    size = 1 / 73 if case.stored == "int8" else 1.0
    factor = None if wide else jnp.full((*count, K), size, jnp.float32)
    return q, at, k, v, pages, factor, None if case.values else factor


def decode_inputs(case: Case, q, at, k, v, pages, k_scale, v_scale) -> tuple[Any, Any]:
    """As the kernel takes them: (setting, inputs)."""
    import jax.numpy as jnp

    from jaxlong.core.mask import causal
    from pallas_kernels.decode import Inputs, Setting

    places = jnp.broadcast_to(jnp.arange(case.length, dtype=jnp.int32), (case.batch, case.length))
    segments = jnp.zeros_like(at), jnp.where(places <= at, 0, -1)
    setting = Setting(causal(), case.dim**-0.5, None, q.dtype, case.values)
    scales = {"k_scale": k_scale, "v_scale": v_scale, "pages": pages}
    return setting, Inputs(q, k, v, at, places, *segments, **scales)


def ours(case: Case) -> Callable:
    from pallas_kernels import decode

    return lambda *given: decode.attention(*decode_inputs(case, *given))[0]


def exact(case: Case) -> Callable:
    """All scores, in float32."""
    from pallas_kernels.decode import ref

    return lambda *given: ref.attention(*decode_inputs(case, *given))[0]


def plain(case: Case) -> Callable:
    """`jaxlong.ops` without kernels."""
    from jaxlong.core.mask import causal
    from jaxlong.ops import Backend, attend

    if case.page or case.stored != "bfloat16":
        raise NotImplementedError("neither pages nor 8 bits")

    def run(*given):
        _, x = decode_inputs(case, *given)
        more = {name: getattr(x, name) for name in ("q_positions", "k_positions", "q_segments", "k_segments")}
        v = x.k[..., : case.values] if x.v is None else x.v
        return attend(x.q, x.k, v, mask=causal(), backend=Backend(kernel="blockwise"), **more)

    return run


def cudnn(case: Case) -> Callable:
    """Of full rows, without a mask."""
    import jax

    if case.page or case.stored != "bfloat16":
        raise NotImplementedError("neither pages nor 8 bits")
    call = partial(jax.nn.dot_product_attention, implementation="cudnn")
    return lambda q, at, k, v, *_: call(q, k, k[..., : case.values] if v is None else v)


IMPLEMENTATIONS: Mapping[str, Callable[[Case], Callable]] = {"ours": ours, "cudnn": cudnn, "plain JAX": plain}


def error(found: Any, truth: Any) -> float:
    """Relative, in norm."""
    import jax.numpy as jnp

    wide = lambda x: x.astype(jnp.float32)
    return float(jnp.linalg.norm((wide(found) - wide(truth)).ravel()) / jnp.linalg.norm(wide(truth).ravel()))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    from jaxlong.evals.report import markdown_table

    copies = {row["case"]: row["gbs"] for row in rows if row["who"] == "copy"}
    told = []
    for row in rows:
        start = [row["case"], row["batch"], row["length"], row["who"]]
        if "ms" in row:
            share = f"{100 * row['gbs'] / copies[row['case']]:.1f} %"
            error = f"{row['error']:.1e}" if "error" in row else ""
            told.append([*start, f"{row['ms']:.3f}", f"{row['gbs']:.0f}", share, error])
        else:
            told.append([*start, "", "", "", row.get("failed", "not timed")])
    return markdown_table(["case", "batch", "length", "who", "ms", "GB/s", "of the copy", "relative error"], told)

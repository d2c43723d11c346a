"""Tables and figures of the rows that `experiments.scaling` made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

GIB = 2**30

Row = Mapping[str, Any]


def write(out: Path, rows: Sequence[Row]) -> str:
    """Write scaling.md, memory.png, and mfu.png or context.png; returns the tables."""
    latest = list({str(sorted(row["point"].items())): row for row in rows}.values())
    latest.sort(key=lambda row: (name_of(row), row["point"]["length"]))
    kinds = (
        (
            "Training steps as the TPU compiler sees them. Step times and MFU are predictions of our own model.",
            COMPILED,
            [row for row in latest if "compiled" in row],
        ),
        ("Longest rows that fit.", LONGEST, longest(latest)),
        (
            "Small versions on simulated CPU devices beside one device. Milliseconds are those of the simulation.",
            SIMULATED,
            [row for row in latest if "simulated" in row],
        ),
        ("Without a result.", FAILED, [row for row in latest if row["status"] not in ("ok", "does not fit")]),
    )
    parts = ["# Scaling\n", _versions(latest)]
    for title, columns, found in kinds:
        parts += [f"{title}\n", _table(columns, found)] if found else []
    parts += [f"![{text}]({name})\n" for name, text in _figures(out, latest)]
    text = "\n".join(parts)
    (out / "scaling.md").write_text(text)
    return text


def _versions(rows: Sequence[Row]) -> str:
    told = dict.fromkeys(", ".join(f"{k} {v}" for k, v in row["versions"].items()) for row in rows if "versions" in row)
    return "".join(f"{line}\n" for line in told)


def model_of(row: Row) -> str:
    """The configuration, and what was set beside it."""
    point = row["point"]
    return " ".join(
        [Path(point["config"]).stem, *(f"{path.split('.')[-1]}={text}" for path, text in point["overrides"])]
    )


def name_of(row: Row) -> str:
    """A row's curve."""
    point = row["point"]
    return " ".join(str(x) for x in (model_of(row), point["topology"] or "", point["mesh"], point["strategy"]) if x)


def _table(columns: Mapping[str, Callable[[Row], Any]], rows: Sequence[Row]) -> str:
    from jaxlong.evals.report import markdown_table

    return markdown_table(list(columns), [[cell(row) for cell in columns.values()] for row in rows])


def _of(*path: str) -> Callable[[Row], Any]:
    """What stands at a path of a row; empty where there is nothing."""

    def cell(row: Row) -> Any:
        value: Any = row
        for name in path:
            value = None if value is None else value.get(name)
        return "" if value is None else value

    return cell


def _number(of: Callable[[Row], Any], digits: int, scale: float = 1.0) -> Callable[[Row], str]:
    return lambda row: "" if of(row) == "" else f"{scale * of(row):.{digits}f}"


WHAT: Mapping[str, Callable[[Row], Any]] = {
    "model": model_of,
    "chips": _of("point", "topology"),
    "mesh": _of("point", "mesh"),
    "strategy": _of("point", "strategy"),
    "rows": _of("point", "batch"),
    "length": _of("point", "length"),
}
BY_FORMULA = _number(_of("bytes", "peak"), 2, 1 / GIB)
PEAK = _number(_of("compiled", "peak_gib"), 2)
PREDICTED: Mapping[str, Callable[[Row], Any]] = {
    "step s": _number(_of("predicted", "step_s"), 2),
    "MFU %": _number(_of("predicted", "mfu"), 0, 100),
}

COMPILED = WHAT | {
    "fits": lambda row: "yes" if row["compiled"]["fits"] else "no",
    "peak GiB": PEAK,
    "of": _number(_of("compiled", "hbm_gib"), 2),
    "by formula": BY_FORMULA,
    "host GiB": _number(_of("compiled", "host_gib"), 2),
    "EFLOP": _number(_of("predicted", "flops"), 1, 1e-18),
    "GB sent": lambda row: f"{sum(kind['GB'] for kind in row['compiled']['collectives'].values()):.0f}",
    "permutes": lambda row: sum(row["compiled"]["permutes"].get(name, 0) for name in ("synchronous", "asynchronous")),
    "hidden": _of("compiled", "permutes", "hidden"),
    "kernels": _of("compiled", "kernels"),
    "compile s": _number(_of("compiled", "compile_s"), 0),
    **PREDICTED,
}
"""Columns of a row that was compiled."""

SIMULATED = {name: WHAT[name] for name in ("model", "mesh", "strategy")} | {
    "layout": _of("point", "layout"),
    "tokens": _of("simulated", "length"),
    "loss error": lambda row: f"{row['simulated']['loss_error']:.1e}",
    "gradient error": lambda row: f"{row['simulated']['gradient_error']:.1e}",
    "ms": _number(_of("simulated", "mesh_ms"), 0),
    "ms, one device": _number(_of("simulated", "one_ms"), 0),
    "length planned": _of("point", "length"),
    "GiB a chip by formula": BY_FORMULA,
    "chip": _of("point", "chip"),
    **PREDICTED,
}
"""Columns of a row that was run on simulated devices."""

LONGEST = {name: WHAT[name] for name in ("model", "chips", "mesh", "strategy")} | {
    "devices": _of("devices"),
    "longest": WHAT["length"],
    "peak GiB": PEAK,
    "tokens a device": lambda row: round(row["point"]["batch"] * row["point"]["length"] / row["devices"]),
}
"""Columns of the longest rows that fit."""

FAILED = WHAT | {"status": _of("status"), "why": lambda row: row["error"][:120]}
"""Columns of a row without a result."""


def longest(rows: Sequence[Row]) -> list[Row]:
    """The longest row that fits of each curve that also has one that does not."""
    best: dict[str, Row] = {}
    over = {name_of(row) for row in rows if row["status"] == "does not fit"}
    for row in rows:
        if row["status"] == "ok" and name_of(row) in over:
            other = best.get(name_of(row))
            if other is None or row["point"]["length"] > other["point"]["length"]:
                best[name_of(row)] = row
    return list(best.values())


def _figures(out: Path, rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Files and what they show."""
    from jaxlong.evals import report

    counted = [row for row in rows if "bytes" in row]
    if not counted:
        return []
    made = []
    memory = _curves(counted, lambda row: _peak(row))
    figure = report.lines(memory, x_label="length (tokens)", y_label="peak memory (GiB a chip)", lengths=True)
    figure.axes[0].set_yscale("log", base=2)
    figure.axes[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for limit in {row["compiled"]["hbm_gib"] for row in counted if "compiled" in row}:
        figure.axes[0].axhline(limit, color=report.INK, linewidth=0.8, linestyle=(0, (4, 2)))
    report.save(figure, out / "memory.png")
    made.append(("memory.png", "peak memory by length; the dashed line is what a chip has"))
    speed = _curves(counted, lambda row: 100 * row["predicted"]["mfu"])
    figure = report.lines(speed, x_label="length (tokens)", y_label="predicted MFU (%)", lengths=True)
    figure.axes[0].set_ylim(0)
    report.save(figure, out / "mfu.png")
    made.append(("mfu.png", "predicted MFU by length"))
    best = longest(rows)
    if len({row["devices"] for row in best}) > 1:
        report.save(_by_chips(best), out / "context.png")
        made.append(("context.png", "longest row that fits, by chips; the dashed line is proportional"))
    return made


def _peak(row: Row) -> float | None:
    """GiB as compiled, or by formula where nothing was compiled."""
    if "compiled" in row:
        return row["compiled"]["peak_gib"] if row["compiled"]["fits"] else None
    return row["bytes"]["peak"] / GIB


def _curves(rows: Sequence[Row], of: Any) -> list[Any]:
    from jaxlong.evals.report import Curve

    names = dict.fromkeys(map(name_of, rows))
    points = {name: [(row["point"]["length"], of(row)) for row in rows if name_of(row) == name] for name in names}
    told = {name: sorted((x, y) for x, y in found if y is not None) for name, found in points.items()}
    return [Curve(name, *map(list, zip(*found, strict=True))) for name, found in told.items() if found]


def _by_chips(best: Sequence[Row]) -> Any:
    from jaxlong.evals import report

    curves = []
    kind = lambda row: f"{model_of(row)} {row['point']['topology'].partition(':')[0]}"
    for name in dict.fromkeys(map(kind, best)):
        found = sorted((row["devices"], row["point"]["length"]) for row in best if kind(row) == name)
        curves.append(report.Curve(name, [n for n, _ in found], [length for _, length in found]))
    figure = report.lines(curves, x_label="chips", y_label="longest row that fits (tokens)")
    axis = figure.axes[0]
    for curve in curves:
        ideal = [n * curve.y[0] / curve.x[0] for n in curve.x]
        axis.plot(curve.x, ideal, color=report.GRID, linewidth=1, linestyle="--", zorder=0)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(sorted({n for curve in curves for n in curve.x}), sorted({n for curve in curves for n in curve.x}))
    return figure

"""Figures and Markdown from records. Needs matplotlib, which is imported when the first figure is made.

Every function returns a `matplotlib.figure.Figure` and touches no global state; `save` writes it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxlong.core.types import BadInput
from jaxlong.evals.perplexity import Loss
from jaxlong.evals.records import Estimate, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's palette, distinguishable with every common colour vision, the palest colours left out or last."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", ":")
LEGEND_INSIDE = 4
"""Most curves whose legend stands among them; beyond, it stands beside the axes."""
INK, GRID, EMPTY, BOUND = "#222222", "#dddddd", "#eeeeee", "#D55E00"
SIZES = {"title": 10, "label": 9, "tick": 8, "cell": 7.5}
"""Points."""
CELL = (0.5, 0.27)
"""Width and height of a heat map's cell, in inches."""


class Curve(NamedTuple):
    """Points of a line; `low` and `high` bound a band around it."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def heat_maps(
    panels: Mapping[str, Table], *, trained: int | None = None, depths: Sequence[float] | None = None, title: str = ""
) -> Any:
    """Accuracy by length and depth, one panel a table, side by side on one scale from 0 to 1.

    Args:
        panels: title -> records that have depths.
        trained: length that the model was trained at; a line stands between it and longer ones.
        depths: of the rows; records go to the nearest. None: 0, 0.1, ..., 1.

    Raises:
        BadInput: no panel, or a panel without depths.
    """
    if not panels:
        raise BadInput("panels", "{}", "nothing to draw", "one table or more")
    grids = {name: table.by_length_and_depth(depths) for name, table in panels.items()}
    for name, grid in grids.items():
        if not grid:
            raise BadInput("panels", name, "no record has a depth", "records of a needle task")
    lengths, rows = (sorted({key[i] for grid in grids.values() for key in grid}) for i in (0, 1))
    width, height = len(grids) * (len(lengths) * CELL[0] + 0.3) + 1.7, len(rows) * CELL[1] + 1.2
    figure, axes = _figure(width, height, columns=len(grids))
    for i, (axis, (name, grid)) in enumerate(zip(axes, grids.items(), strict=True)):
        image = _heat_map(axis, grid, lengths, rows, first=i == 0)
        axis.set_title(name, fontsize=SIZES["title"], pad=6 if trained is None else 17)
        if trained is not None:
            _mark(axis, sum(length <= trained for length in lengths) - 0.5, trained, "-", BOUND, 2.0)
    axes[0].set_ylabel("depth of the needle (%)", fontsize=SIZES["label"])
    figure.supxlabel("context length (tokens)", fontsize=SIZES["label"])
    if title:
        figure.suptitle(title, fontsize=SIZES["title"] + 1)
    strip = 0.15  # inches
    shape = {"fraction": strip / (len(grids) * len(lengths) * CELL[0]), "aspect": len(rows) * CELL[1] / strip}
    bar = figure.colorbar(image, ax=axes, pad=0.02, ticks=np.linspace(0, 1, 6), **shape)
    bar.set_label("accuracy", fontsize=SIZES["label"])
    bar.ax.tick_params(labelsize=SIZES["tick"])
    bar.outline.set_visible(False)
    return figure


def loss_curve(curves: Sequence[Curve], *, title: str = "") -> Any:
    """Training loss by step, in nats a token."""
    return lines(curves, x_label="training step", y_label="loss (nats per token)", title=title, points=False)


def accuracy_by_length(tables: Mapping[str, Table], *, trained: int | None = None, title: str = "") -> Any:
    """Accuracy of each table by length, with 95 % bootstrap bands."""
    curves = [_accuracy_curve(name, table.by_length()) for name, table in tables.items()]
    figure = lines(
        curves, x_label="context length (tokens)", y_label="accuracy", lengths=True, trained=trained, title=title
    )
    figure.axes[0].set_ylim(-0.03, 1.03)
    return figure


def perplexity_by_window(losses: Mapping[str, Sequence[Loss]], *, trained: int | None = None, title: str = "") -> Any:
    """Perplexity by window length, one line a name; on a logarithmic scale where it spans a factor of ten."""
    curves = []
    for name, found in losses.items():
        ordered = sorted(found, key=lambda loss: loss.window)
        curves.append(Curve(name, [loss.window for loss in ordered], [loss.perplexity for loss in ordered]))
    figure = lines(curves, x_label="window (tokens)", y_label="perplexity", lengths=True, trained=trained, title=title)
    values = [y for curve in curves for y in curve.y]
    if max(values) > 10 * min(values):
        figure.axes[0].set_yscale("log")
    return figure


def loss_by_position(losses: Mapping[str, Sequence[Loss]], *, trained: int | None = None, title: str = "") -> Any:
    """Loss by tokens of context, one line a name, from the buckets of `perplexity.loss_by_position`."""
    middle = lambda loss: math.sqrt(loss.start * (loss.end - 1))
    curves = [Curve(n, [middle(loss) for loss in found], [loss.nll for loss in found]) for n, found in losses.items()]
    x_label = "tokens before the predicted one"
    return lines(curves, x_label=x_label, y_label="loss (nats per token)", lengths=True, trained=trained, title=title)


def lines(
    curves: Sequence[Curve],
    *,
    x_label: str,
    y_label: str,
    lengths: bool = False,
    points: bool = True,
    trained: int | None = None,
    title: str = "",
) -> Any:
    """Lines with a legend. `lengths`: x is a number of tokens, drawn on a scale of powers of two."""
    if not curves:
        raise BadInput("curves", "()", "nothing to draw", "one curve or more")
    beside = len(curves) > LEGEND_INSIDE
    figure, (axis,) = _figure(7.2 if beside else 5.2, 3.3)
    for i, curve in enumerate(curves):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)] if points else ""
        look = {"color": colour, "marker": marker, "linestyle": DASHES[i // len(COLOURS) % len(DASHES)]}
        axis.plot(curve.x, curve.y, **look, markersize=4.5, linewidth=1.5, label=curve.label)
        if curve.low is not None and curve.high is not None:
            axis.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
    axis.set_xlabel(x_label, fontsize=SIZES["label"])
    axis.set_ylabel(y_label, fontsize=SIZES["label"])
    axis.set_title(title, fontsize=SIZES["title"], pad=6 if trained is None else 17)
    axis.grid(axis="y", color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    if lengths:
        _length_axis(axis, [float(x) for curve in curves for x in curve.x])
    if trained is not None:
        _mark(axis, float(trained), trained, (0, (4, 2)), INK, 1.1)
    if any(curve.label for curve in curves):
        place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.02)} if beside else {"loc": "best"}
        axis.legend(fontsize=SIZES["tick"], frameon=False, **place)
    return figure


def save(figure: Any, path: str | Path) -> None:
    """Write a PNG of 200 dots an inch, atomically."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(temporary, format="png", dpi=200, facecolor="white")
    os.replace(temporary, path)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table: the first column to the left, the others to the right; floats with one decimal."""
    text = lambda cell: f"{cell:.1f}" if isinstance(cell, float) else str(cell)
    table = [list(header), *([text(cell) for cell in row] for row in rows)]
    widths = [max(3, *map(len, column)) for column in zip(*table, strict=True)]
    first, others = widths[0], widths[1:]
    pad = lambda row: [row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True))]
    head, *body = ["| " + " | ".join(pad(row)) + " |" for row in table]
    rule = "|" + "|".join(["-" * (first + 2), *("-" * (width + 1) + ":" for width in others)]) + "|"
    return "\n".join([head, rule, *body]) + "\n"


def accuracy_markdown(tables: Mapping[str, Table]) -> str:
    """Accuracy in percent with its 95 % interval: a row for each table and task, a column for each length."""
    estimates = {(name, *key): e for name, table in tables.items() for key, e in table.by_task_and_length().items()}
    lengths = sorted({length for _, _, length in estimates})
    names = list(dict.fromkeys((name, task) for name, task, _ in estimates))
    cell = lambda e: "" if e is None else f"{100 * e.mean:.0f} [{100 * e.low:.0f}, {100 * e.high:.0f}]"
    rows = [[name, task, *(cell(estimates.get((name, task, n))) for n in lengths)] for name, task in names]
    return markdown_table(["model", "task", *map(str, lengths)], rows)


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Sequence[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for axis in axes:
        axis.tick_params(labelsize=SIZES["tick"], colors=INK, length=3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _heat_map(
    axis: Axes, grid: Mapping[Any, Estimate], lengths: Sequence[int], depths: Sequence[float], first: bool
) -> Any:
    from matplotlib import colormaps

    means = np.array([[grid[n, d].mean if (n, d) in grid else np.nan for n in lengths] for d in depths])
    image = axis.imshow(means, cmap=colormaps["Blues"].with_extremes(bad=EMPTY), vmin=0, vmax=1, aspect="auto")
    for (row, column), mean in np.ndenumerate(means):
        if not np.isnan(mean):
            colour = "white" if mean > 0.6 else INK
            axis.text(column, row, f"{mean:.2f}", ha="center", va="center", color=colour, fontsize=SIZES["cell"])
    axis.set_xticks(range(len(lengths)), [_short(n) for n in lengths])
    axis.set_yticks(range(len(depths)), [f"{100 * d:g}" for d in depths] if first else [""] * len(depths))
    axis.set_xticks(np.arange(len(lengths) - 1) + 0.5, minor=True)
    axis.set_yticks(np.arange(len(depths) - 1) + 0.5, minor=True)
    axis.grid(which="minor", color="white", linewidth=1)
    axis.tick_params(which="both", length=0)
    axis.spines[:].set_visible(False)
    return image


def _mark(axis: Axes, x: float, trained: int, style: Any, colour: str, width: float) -> None:
    """A vertical line at x, named above the axes."""
    axis.axvline(x, color=colour, linestyle=style, linewidth=width)
    axis.annotate(
        f"trained length {trained}",
        (x, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        fontsize=SIZES["cell"],
        color=colour,
    )


def _length_axis(axis: Axes, values: Sequence[float]) -> None:
    axis.set_xscale("log", base=2)
    low, high = min(values), max(values)
    ticks = [2**i for i in range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1) if low <= 2**i <= high]
    if ticks:
        ticks = ticks[:: math.ceil(len(ticks) / 12)]
        axis.set_xticks(ticks, [_short(n) for n in ticks])
        axis.minorticks_off()


def _short(tokens: int) -> str:
    """1024 -> 1K where that is exact."""
    return f"{tokens // 1024}K" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def _accuracy_curve(name: str, by_length: Mapping[int, Estimate]) -> Curve:
    found = list(by_length.values())
    return Curve(name, list(by_length), [e.mean for e in found], [e.low for e in found], [e.high for e in found])

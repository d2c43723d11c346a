"""Figures have the axes, numbers and lines they promise, and files are PNGs; no global state of matplotlib changes."""

import subprocess
import sys

import numpy as np
import pytest

from jaxlong.core.types import BadInput
from jaxlong.evals import report
from jaxlong.evals.perplexity import Loss
from jaxlong.evals.records import Record, Table

DEPTHS = (0.0, 0.5, 1.0)


def table(correct, lengths=(64, 128, 256)):
    return Table(
        tuple(
            Record(f"needle@{d}", n, i, 0, float(i < correct), "1", ("1",), n, d, n)
            for n in lengths
            for d in DEPTHS
            for i in range(4)
        )
    )


def loss(window, nll, **place):
    return Loss("text", window, 8, "token", nll, 100, 3, **place)


def check_png(figure, path):
    report.save(figure, path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n") and [p.name for p in path.parent.iterdir()] == [path.name]


def test_heat_maps(tmp_path):
    figure = report.heat_maps(
        {"before": table(1), "after": table(4, (64, 512))}, trained=128, depths=DEPTHS, title="Needles"
    )
    check_png(figure, tmp_path / "needle.png")
    before, after, bar = figure.axes
    assert [before.get_title(), after.get_title()] == ["before", "after"]
    assert before.get_ylabel() == "depth of the needle (%)" and figure.get_supxlabel() == "context length (tokens)"
    assert bar.get_ylabel() == "accuracy" and figure.get_suptitle() == "Needles"
    for axis, count, text in ((before, 9, "0.25"), (after, 6, "1.00")):
        assert [label.get_text() for label in axis.get_xticklabels()] == ["64", "128", "256", "512"]
        image = axis.images[0]
        assert image.get_array().shape == (3, 4) and image.get_clim() == (0, 1)
        numbers = [t.get_text() for t in axis.texts if t.get_text()[0].isdigit()]
        assert numbers == [text] * count
        assert [line.get_xdata()[0] for line in axis.lines] == [1.5]  # between 128 and 256
        assert "trained length 128" in [t.get_text() for t in axis.texts]
    assert [label.get_text() for label in before.get_yticklabels()] == ["0", "50", "100"]
    assert np.isnan(before.images[0].get_array().filled(np.nan)[:, 3]).all()  # 512 was not measured before


def test_heat_map_of_one_cell(tmp_path):
    figure = report.heat_maps({"": table(4, (64,))}, depths=(0.5,))
    check_png(figure, tmp_path / "cell.png")


def test_accuracy_by_length(tmp_path):
    figure = report.accuracy_by_length({"plain": table(1), "YaRN": table(4)}, trained=128)
    check_png(figure, tmp_path / "accuracy.png")
    (axis,) = figure.axes
    plain, yarn, mark = axis.lines
    assert list(plain.get_xdata()) == [64, 128, 256] and list(plain.get_ydata()) == [0.25] * 3
    assert list(yarn.get_ydata()) == [1.0] * 3 and mark.get_xdata()[0] == 128
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("context length (tokens)", "accuracy")
    assert [t.get_text() for t in axis.get_legend().get_texts()] == ["plain", "YaRN"]
    assert len({line.get_color() for line in axis.lines}) == 3 and plain.get_marker() != yarn.get_marker()


def test_perplexity_by_window(tmp_path):
    figure = report.perplexity_by_window({"plain": [loss(128, 3.0), loss(64, 1.0)], "PI": [loss(64, 1.5)]}, trained=64)
    check_png(figure, tmp_path / "perplexity.png")
    (axis,) = figure.axes
    assert list(axis.lines[0].get_xdata()) == [64, 128]
    assert list(axis.lines[0].get_ydata()) == pytest.approx([np.e, np.e**3])
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_yscale()) == ("window (tokens)", "perplexity", "linear")
    wide = report.perplexity_by_window({"plain": [loss(64, 1.0), loss(128, 9.0)]})
    assert wide.axes[0].get_yscale() == "log"


def test_many_curves_look_different_and_stand_beside_their_legend(tmp_path):
    figure = report.lines([report.Curve(f"run {i}", [1, 2], [i, i]) for i in range(10)], x_label="x", y_label="y")
    check_png(figure, tmp_path / "lines.png")
    (axis,) = figure.axes
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axis.lines}
    assert len(looks) == 10
    assert axis.get_legend().get_window_extent().x0 >= axis.get_window_extent().x1


def test_loss_curve_and_loss_by_position(tmp_path):
    figure = report.loss_curve([report.Curve("text", [0, 1, 2], [3.0, 2.0, 1.0])])
    check_png(figure, tmp_path / "loss.png")
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("training step", "loss (nats per token)")
    figure = report.loss_by_position(
        {"plain": [loss(64, 2.0, start=1, end=2), loss(64, 1.0, start=4, end=17)]}, trained=8
    )
    assert list(figure.axes[0].lines[0].get_xdata()) == [1.0, 8.0]
    assert figure.axes[0].get_xlabel() == "tokens before the predicted one"


def test_markdown():
    assert report.markdown_table(["a", "b"], [["x", 1.25], ["longer", 3]]) == (
        "| a      |   b |\n|--------|----:|\n| x      | 1.2 |\n| longer |   3 |\n"
    )
    lines = report.accuracy_markdown({"plain": table(2), "YaRN": table(4, (512,))}).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == ["model", "task", "64", "128", "256", "512"]
    plain, yarn = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:])
    assert plain[:2] == ["plain", "needle"] and plain[2].startswith("50 [") and plain[5] == ""
    assert yarn == ["YaRN", "needle", "", "", "", "100 [100, 100]"]


def test_nothing_to_draw():
    for call in (
        lambda: report.heat_maps({"x": Table()}),
        lambda: report.heat_maps({}),
        lambda: report.loss_curve([]),
        lambda: report.accuracy_by_length({}),
    ):
        with pytest.raises(BadInput):
            call()


def test_matplotlib_is_imported_late_and_pyplot_never():
    program = """
import sys
from jaxlong.evals import report
assert "matplotlib" not in sys.modules
report.loss_curve([report.Curve("a", [0, 1], [1, 2])])
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)

"""The notebooks run from top to bottom; their sources are plain Python in jupytext's percent format."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.py"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, monkeypatch):
    monkeypatch.setenv("STEPS", "8")
    monkeypatch.setenv("SAMPLES", "1")
    monkeypatch.chdir(path.parent.parent)
    monkeypatch.syspath_prepend(str(path.parent.parent))
    cells = runpy.run_path(str(path))
    assert (cells["folder"] / "needle.png").stat().st_size > 10_000
    assert len(cells["panels"]["plain RoPE"]) == len(cells["panels"]["YaRN, not tuned"]) == 22

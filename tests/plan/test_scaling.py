"""The scaling script as a user runs it: on simulated devices, stopped and started again, with bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import cli, scaling
from experiments.benchmarks import scaling_report

ROOT = Path(__file__).parent.parent.parent
SMALL = [f"--config={ROOT}/configs/tiny.py", "--config.model.depth=2", "--lengths=64"]


def call(*argv: str) -> int:
    for flag in scaling.FLAGS:
        scaling.FLAGS[flag].unparse()
    return cli.run(scaling.main, scaling.FLAGS, ["scaling", *argv])


def test_on_simulated_devices(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = [*SMALL, "--meshes=seq=2;seq=1", f"--out={tmp_path}"]
    assert call(*arguments) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert all(row["simulated"]["loss_error"] < 1e-6 and row["simulated"]["gradient_error"] < 2e-5 for row in rows)
    assert all(row["bytes"]["peak"] > 0 and row["predicted"]["mfu"] > 0 and row["versions"]["jax"] for row in rows)
    assert {"scaling.md", "memory.png", "mfu.png"} <= {path.name for path in tmp_path.iterdir()}
    assert "gradient error" in capsys.readouterr().out

    # a line cut short by a stop is made again, finished ones are not
    text = (tmp_path / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text(text[0] + "\n" + text[1][:40])
    made = []
    monkeypatch.setattr(scaling, "_made", lambda point, _: made.append(point["mesh"]) or rows[1])
    assert call(*arguments) == 0
    assert made == ["seq=1"]
    assert len(scaling.Rows(tmp_path / "rows.jsonl").all) == 2


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        (["--meshes=sequence=2"], "mesh: sequence=2: unknown axis 'sequence'"),
        (["--meshes=seq=-1"], "meshes: seq=-1: of how many devices?"),
        (["--meshes=seq=4", "--lengths=66"], "data.length: 66: does not divide into the 8 parts of zigzag rows"),
        (["--meshes=seq=4", "--lengths=long"], "lengths: ['long']: not integers"),
        (["--meshes=fsdp=4", "--batch=6"], "data.batch: 6: 6 rows a micro-batch do not split over data * fsdp = 4"),
        (["--meshes=seq=4", "--strategies=rings"], "backend.sequence: rings: "),
        (["--meshes=seq=4", "--topology=v6:4x4"], "topology: v6:4x4: no family 'v6' is known"),
        (["--meshes=seq=4", "--topology=v6e:4x4"], "mesh: seq=4: multiplies to 4, but there are 16 devices"),
        (["--meshes=seq=4", "--longest"], "longest: True: only a compiler says what fits"),
        (["--meshes=seq=4", "--chip=v9"], "chip: v9: is not known"),
        ([], "meshes: unset: is needed"),
    ],
)
def test_bad_input_is_one_line_before_any_row(tmp_path, capsys, changed, line):
    out = tmp_path / "never"
    assert call(*SMALL, f"--out={out}", *changed) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith(line)
    assert not out.exists()


def point(length: int) -> dict:
    return {
        "config": "configs/tiny.py", "overrides": [], "topology": "v5e:4x4", "chip": "v5e", "mesh": "seq=16",
        "strategy": "ring", "layout": "zigzag", "batch": 1, "length": length,
    }  # fmt: skip


def made(limit: int):
    """Rows as a compiler would make them that takes rows of up to `limit` tokens."""

    def row(point, overrides):
        fits = point["length"] <= limit
        report = {
            "fits": fits, "peak_gib": point["length"] / 2**20, "hbm_gib": 15.75, "host_gib": 0.0, "compile_s": 1.0,
            "collectives": {}, "permutes": {}, "error": "" if fits else "RESOURCE_EXHAUSTED",
        }  # fmt: skip
        predicted = {"flops": 1e15, "step_s": 1.0, "mfu": 0.4}
        status = "ok" if fits else "does not fit"
        return {
            "point": point, "status": status, "devices": 16, "compiled": report, "predicted": predicted,
            "bytes": {"peak": 2**30}, "versions": {"jax": "0"},
        }  # fmt: skip

    return row


@pytest.mark.parametrize(("start", "limit"), [(2**16, 2**20), (2**20, 700_000), (2**18, 2**18 * 13 // 8)])
def test_the_longest_row_by_doubling_and_bisection(tmp_path, monkeypatch, start, limit):
    scaling.FLAGS(["scaling"])
    monkeypatch.setattr(scaling, "_made", made(limit))
    rows = scaling.Rows(tmp_path / "rows.jsonl")
    scaling._longest(rows, point(start), [])
    fit = max(row["point"]["length"] for row in rows.all if row["status"] == "ok")
    over = min(row["point"]["length"] for row in rows.all if row["status"] != "ok")
    assert fit <= limit < over
    assert over - fit <= fit / 8
    assert len(rows.all) <= 12
    best = scaling_report.longest(rows.all)
    assert [row["point"]["length"] for row in best] == [fit]


def test_what_does_not_fit_and_what_failed_are_rows(tmp_path):
    rows = [made(1000)(point(n), []) for n in (512, 1024)]
    rows.append({"point": point(2048), "status": "out of time", "error": "stopped after 5 s"})
    text = scaling_report.write(tmp_path, rows)
    assert "| no |" in text.replace("  ", " ") or " no " in text
    assert "stopped after 5 s" in text
    assert (tmp_path / "memory.png").stat().st_size > 1000


def test_a_row_out_of_time_is_a_row_and_is_made_again(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = [*SMALL, "--meshes=seq=2", f"--out={tmp_path}", "--limit=0"]
    assert call(*arguments) == 0
    assert call(*arguments) == 0
    rows = scaling.Rows(tmp_path / "rows.jsonl").all
    assert [row["status"] for row in rows] == ["out of time", "out of time"]

"""The scripts one after another, as a user runs them, on the smallest experiment."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from absl import flags

from experiments import benchmark, cli, evaluate, extend, generate, pretrain
from experiments.benchmarks import decode, delta, mixers
from experiments.benchmarks.recurrences import rivals
from jaxlong.mixers import MIXERS
from jaxlong.train.loop import Diverged
from pallas_kernels import hopper

ROOT = Path(__file__).parent.parent
SMALL = [
    f"--config={ROOT}/configs/tiny.py", "--config.model.width=16", "--config.model.depth=1",
    "--config.model.pattern.0.heads=2", "--config.model.pattern.0.head_dim=8", "--config.model.mlp.hidden=16",
    "--config.data.length=64", "--config.data.batch=8", "--config.train.steps=4", "--config.train.schedule.warmup=1",
    "--config.train.log_every=1", "--config.train.tensorboard=True", "--config.train.profile=(1,2)",
    "--config.train.accumulation=2", "--config.model.remat=full", "--mesh=data=2,fsdp=2,seq=2",
]  # fmt: skip


def call(script, *argv: str) -> None:
    for flag in script.FLAGS:
        script.FLAGS[flag].unparse()
    assert cli.run(script.main, script.FLAGS, [script.__name__, *argv]) == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts") / "run"
    call(pretrain, *SMALL, f"--workdir={folder}")
    return folder


def test_pretrain_writes_everything(trained, capsys):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"loss", "nll", "grad_norm", "learning_rate", "skipped", "tokens_per_second"} <= lines[-1].keys()
    assert json.loads((trained / "experiment.json").read_text())["model"]["width"] == 16
    assert any((trained / "tensorboard").iterdir()) and any((trained / "profile").rglob("*.xplane.pb"))


def test_extend_evaluate_generate(trained, capsys):
    longer = trained.with_name("longer")
    call(extend, f"--from={trained}", f"--workdir={longer}", "--factor=4", "--steps=2")
    stored = json.loads((longer / "experiment.json").read_text())
    assert stored["data"]["length"] == 256
    assert stored["model"]["pattern"][0]["position"]["scaling"]["type"] == "Yarn"

    call(evaluate, f"--from={longer}", "--config.evaluation.samples=2", "--tokens=2048")
    out = longer / "evaluation"
    kinds = [json.loads(line)["kind"] for line in (out / "results.jsonl").read_text().splitlines()]
    assert kinds.count("sample") == 2 * 3 * 2 and kinds.count("loss") > 4
    assert {p.name for p in out.glob("*.png")} == {"needle.png", "perplexity.png", "position.png"}
    assert "niah_single_1" in (out / "report.md").read_text()

    capsys.readouterr()
    call(generate, f"--from={longer}", "--prompt=def ", "--max_new=5", "--temperature=0.5", "--top_k=9")
    assert capsys.readouterr().out.startswith("def ")


def test_benchmark(tmp_path, capsys):
    call(benchmark, "--lengths=256,512", "--heads=1", "--repeats=1", f"--out={tmp_path}")
    rows = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert len(rows) == 6 and all(row["both_ms"] > 0 and row["both_MiB"] > 0 for row in rows)
    assert "blockwise window 1024" in (tmp_path / "attention.md").read_text()


def test_benchmark_of_the_delta_rule(tmp_path, capsys, monkeypatch):
    """Without a GPU it says in one line what it takes; with the check out of the way it measures what runs here."""
    flags = ("--what=delta", "--lengths=8", "--repeats=1", f"--out={tmp_path}")
    for flag in benchmark.FLAGS:
        benchmark.FLAGS[flag].unparse()
    assert cli.run(benchmark.main, benchmark.FLAGS, ["benchmark", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("what: delta: ") and line.endswith("; a Hopper GPU, jax >= 0.11.2")
    assert not any(tmp_path.iterdir())

    chunks = delta.rivals()["chunks"]
    fails = lambda *xs: 1 / 0
    monkeypatch.setattr(delta.hopper, "refusal", lambda: None)
    monkeypatch.setattr(delta, "rivals", lambda: {"chunks": chunks, "broken": (fails, fails)})
    monkeypatch.setattr(delta, "HEADS", 1)
    monkeypatch.setattr(delta, "DIM", 8)
    call(benchmark, *flags)
    rows = json.loads((tmp_path / "delta.json").read_text())["rows"]
    assert [row["direction"] for row in rows if row["who"] == "chunks" and row["ms"] > 0] == ["forward", "gradients"]
    assert (tmp_path / "delta.md").read_text().count("ZeroDivisionError: division by zero") == 2


def test_benchmark_of_decoding(tmp_path, monkeypatch):
    """Whatever does not run here is named with its reason."""
    small = decode.Case(batch=2, length=32, heads=4, key_heads=2, dim=8)
    monkeypatch.setattr(decode, "CASES", {"rows": small, "pages": replace(small, page=8, stored="int8")})
    monkeypatch.setattr(decode, "LAUNCHES", 2)
    call(benchmark, "--what=decode", "--repeats=1", f"--out={tmp_path}")
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert [row["case"] for row in rows if row["who"] == "copy" and row["gbs"] > 0] == ["rows", "pages"]
    assert [row["error"] < 1e-2 for row in rows if row["who"] == "plain JAX" and "ms" in row] == [True]
    assert (tmp_path / "decode.md").read_text().count("neither pages nor 8 bits") == 2


def test_explain_names_what_runs_and_why_others_do_not(capsys):
    config = ("--config.model.dtype=bfloat16", "--config.model.width=64", "--config.model.pattern.0.head_dim=64")
    call(benchmark, "--explain", SMALL[0], *config, "--lengths=512")
    blocks = {}
    for line in capsys.readouterr().out.splitlines():
        lines = blocks.setdefault(line, []) if not line.startswith(" ") else lines
        lines.append(line.strip())
    older = jax.__version_info__ < hopper.OLDEST_JAX
    why = "flash: jax" if older else "flash: the default device is no Hopper GPU but cpu"
    _, taken, reason = blocks["a row of 512 tokens, cpu"]
    assert taken == "GQA attend: blockwise" and reason.startswith(why)
    on_gpu = blocks["a row of 512 tokens, gpu NVIDIA H200"][1:]
    assert on_gpu == (["GQA attend: blockwise", reason] if older else ["GQA attend: flash"])
    assert "GQA attend: dense" in blocks["a token after 512, cpu"]
    assert ("GQA attend: dense" if older else "GQA attend: decode") in blocks["a token after 512, gpu NVIDIA H200"]
    assert len(blocks) == 6


def test_benchmark_of_mixers(tmp_path, capsys):
    call(
        benchmark, "--what=mixers", "--mixers=short_conv,mamba2", "--lengths=16,32", "--repeats=1", f"--out={tmp_path}"
    )
    results = json.loads((tmp_path / "mixers.json").read_text())
    mamba, conv = results["rows"]  # in the order of the registry
    assert conv["mixer"] == "short_conv" and conv["linear"] and mamba["module"]["heads"] == 8
    assert set(conv["both_ms"]) == set(conv["both_MiB"]) == {"16", "32"} and conv["decode_ms"] > 0
    assert conv["state_bytes"] == {"4K": 2056, "128K": 2056, "1M": 2056}
    (against,) = results["tokens"]
    assert against["mixer"] == "mamba2" and against["error"] < 1e-5 and against["tokens_both_ms"] > 0
    assert "Time at 32 tokens over time at 16" in (tmp_path / "mixers.md").read_text()


def test_benchmark_of_mixers_goes_on(tmp_path, capsys, monkeypatch):
    def fails(name, *settings):
        raise ValueError(f"no {name}\nat all")

    flags = ("--what=mixers", "--mixers=short_conv", "--lengths=8", "--repeats=1", f"--out={tmp_path}")
    rows = lambda: json.loads((tmp_path / "mixers.json").read_text())["rows"]
    with monkeypatch.context() as patch:
        patch.setattr(mixers, "measure", fails)
        call(benchmark, *flags)
    assert [row["failed"] for row in rows()] == ["ValueError: no short_conv"]
    assert "short_conv failed: ValueError: no short_conv" in capsys.readouterr().out
    call(benchmark, *flags)
    assert "failed" not in rows()[0] and rows()[0]["both_ms"]["8"] > 0
    monkeypatch.setattr(mixers, "measure", fails)
    kept = rows()
    call(benchmark, *flags)
    assert rows() == kept and "| short_conv" in capsys.readouterr().out
    for flag in benchmark.FLAGS:
        benchmark.FLAGS[flag].unparse()
    assert cli.run(benchmark.main, benchmark.FLAGS, ["benchmark", *flags, "--repeats=2"]) == 2
    assert "its mixers.json has repeats 1, not 2" in capsys.readouterr().err


@pytest.mark.slow
def test_recurrences_are_those_of_the_chunks():
    import jax.numpy as jnp

    for name, rival in rivals().items():
        arguments = rival.inputs(65)
        want = rival.tokens(*arguments)
        assert jnp.abs(rival.chunked(*arguments) - want).max() < 1e-5 * jnp.abs(want).max(), name


def test_every_mixer_has_a_size():
    """The benchmark knows a size for every entry of the registry, and which of them are linear in time."""
    found = {name: mixers.linear(mixers.sized(name)) for name in MIXERS}
    assert set(found) <= set(mixers.SIZES)
    assert found["kda"] and found["mamba2"] and not found["gqa"] and not found["mla"]


def test_divergence_is_one_line_and_exit_code_1(capsys):
    def main(overrides):
        raise Diverged("step 9: the last 20 steps were skipped; loss is not finite")

    assert cli.run(main, flags.FlagValues(), ["script"]) == 1
    assert capsys.readouterr().err == "step 9: the last 20 steps were skipped; loss is not finite\n"

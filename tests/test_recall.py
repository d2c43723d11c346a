"""The recall experiment end to end, on the smallest grid."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cli
from experiments import recall as script
from jaxlong import recall as lab
from jaxlong.config import from_data, load, override, to_data
from jaxlong.core.mask import sliding
from jaxlong.core.state import nbytes
from jaxlong.core.types import BadInput
from jaxlong.data import MQAR, Ids
from jaxlong.evals.records import read_lines
from jaxlong.mixers import GQA, ShortConv
from jaxlong.run import flat

ROOT = Path(__file__).parent.parent
SMALL, FULL = (f"{ROOT}/configs/recall_{name}.py" for name in ("small", "full"))

TINY = """
from jaxlong.config import Train
from jaxlong.core.mask import sliding
from jaxlong.data import MQAR, Data, Ids
from jaxlong.layers.mlp import Gelu
from jaxlong.evals.records import read_lines
from jaxlong.mixers import GQA, ShortConv
from jaxlong.model import LM
from jaxlong.recall import Contender, Recall
from jaxlong.train.optim import Cosine


def config():
    window = GQA(heads=1, kv_heads=1, head_dim=8, mask=sliding(8))
    model = LM(vocab=16, width=8, depth=2, pattern=(ShortConv(width=2), window), mlp=Gelu(hidden=8))
    return Recall(
        contenders=(
            Contender("window", "sliding window", model, rates=(0.01,)),
            Contender("conv", "convolution", model.clone(pattern=(ShortConv(width=2),))),
        ),
        data=Data(length=32, batch=8, tokenizer=Ids(16), mixture=(MQAR(vocab=16, pairs=2, length=16),)),
        tests=tuple(MQAR(vocab=16, pairs=n, writes=n // 2, length=16, split="test") for n in (2, 4)),
        train=Train(steps=3, schedule=Cosine(peak=1.0, warmup=1)),
        rows=20,
    )
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("grid") / "tiny.py"
    path.write_text(TINY)
    return path


def call(*argv: str) -> int:
    for flag in script.FLAGS:
        script.FLAGS[flag].unparse()
    return cli.run(script.main, script.FLAGS, ["recall", *argv])


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def out(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    assert call(f"--config={tiny}", f"--out={folder}", "--only=window") == 0
    return folder


def test_what_is_written(out, tiny):
    records, grid = lines(out), load(str(tiny), lab.Recall)
    assert [record["trial"] for record in records] == ["window_rate0.01_seed0"]
    model = grid.contenders[0].model
    state = jax.eval_shape(lambda: model.init_state(1, 16, max_chunk=1))
    for record in records:
        assert record["pairs"] == [2, 4] and record["lengths"] == [16, 16] and record["steps"] == 3
        assert [record["accuracy"], record["replaced"]] == record["by_test"] and 0 <= record["accuracy"] <= 1
        assert record["state_bytes"] == nbytes(state) and record["seconds"] > 0
        assert record["computed"] == lab.computed_accuracy(grid, 7)
        assert record["mixer"]["type"] == "GQA" and record["mixer"]["mask"] == to_data(sliding(8))
    text = (out / "report.md").read_text()
    assert "| window " in text and "conv" not in text
    assert all((out / f"{name}.png").stat().st_size > 1000 for name in ("recall", "replaced"))


def test_a_second_run_trains_only_what_is_missing(out, tiny, monkeypatch, capsys):
    trained, train = [], lab.run.train
    monkeypatch.setattr(lab.run, "train", lambda e, d, **k: (trained.append(Path(d).name), train(e, d, **k))[1])
    before = lines(out)
    assert call(f"--config={tiny}", f"--out={out}") == 0
    assert trained == ["conv_rate0.003_seed0"] and lines(out)[:1] == before
    assert "| conv " in capsys.readouterr().out
    assert call(f"--config={tiny}", f"--out={out}") == 0 and len(trained) == 1


def test_other_settings_are_refused(out, tiny, capsys):
    before = (out / "results.jsonl").read_bytes()
    for flag in ("--config.rows=21", "--config.contenders.0.model.mlp.hidden=4", "--config.train.steps=4"):
        capsys.readouterr()
        assert call(f"--config={tiny}", f"--out={out}", flag) == 2
        assert "holds" in capsys.readouterr().err
    assert call(f"--config={tiny}", f"--out={out}", "--only=widnow") == 2
    assert "only: widnow: no such model; some of window, conv" in capsys.readouterr().err
    assert (out / "results.jsonl").read_bytes() == before


def test_a_broken_record_is_told(tiny, tmp_path, capsys):
    (tmp_path / "results.jsonl").write_text('{"kind": "recall", "trial"')
    assert call(f"--config={tiny}", f"--out={tmp_path}") == 2
    assert "results.jsonl:1: is no record" in capsys.readouterr().err


@pytest.mark.parametrize("flag, say", [
    ("--config.rows=0", "rows"),
    ("--config.contenders.0.rates=()", "rates"),
    ("--config.contenders.1.name=window", "contenders"),
    ("--config.contenders.0.name=a/b", "name"),
    ("--config.contenders.2.name=x", "has no item"),
    ("--config.tests.0.split=train", "tests.0"),
    ("--config.tests.0.writes=2", "tests"),
    ("--config.tests.0.vocab=18", "MQAR.vocab: 18"),
    ("--config.data.tokenizer=Ids(vocab_size=17)", "model.vocab: 16"),
    ("--config.contnders=()", "nearest: contenders"),
])  # fmt: skip
def test_bad_input_is_one_line(tiny, tmp_path, capsys, flag, say):
    assert call(f"--config={tiny}", f"--out={tmp_path / 'new'}", flag) == 2
    told = capsys.readouterr().err
    assert say in told and len(told.splitlines()) == 1 and not (tmp_path / "new").exists()


def test_the_best_rate_counts(out, tiny):
    grid = load(str(tiny), lab.Recall)
    one = read_lines(out / "results.jsonl", lab.Recalled)[0]
    made = lambda rate, seed, accuracy: replace(one, learning_rate=rate, seed=seed, accuracy=accuracy)
    records = [made(1e-2, 0, 0.5), made(1e-2, 1, 0.7), made(2e-2, 0, 0.9), made(2e-2, 1, 0.1)]
    (found,) = lab.best(grid, records)
    assert found.accuracy == pytest.approx(0.6) and found.records == tuple(records[:2])


def test_reach_of_a_window(tiny):
    """Beyond `window_reach` no value can be read off, and at it one can: perturb the pair, look at the query."""
    model = load(str(tiny), lab.Recall).contenders[0].model
    for window, width in ((8, 2), (5, 4)):
        conv, attention = ShortConv(width=width, bias=True), model.pattern[1].clone(mask=sliding(window))
        lm = model.clone(pattern=(conv, attention))
        reach = lab.window_reach(lm)
        assert reach == window - 1 + width - 2
        tokens = np.random.default_rng(0).integers(1, 16, (1, 24))
        params = lab.run.init_params(lm, jax.random.key(0))
        hidden = jax.jit(lambda t, lm=lm, params=params: lm.apply({"params": params}, t)[0][0, -1])

        def seen(places, tokens=tokens, hidden=hidden):
            other = tokens.copy()
            other[0, places] = (other[0, places] + 5) % 16
            return not np.array_equal(hidden(jnp.asarray(tokens)), hidden(jnp.asarray(other)))

        query = 23
        # the key, one before the value, is what the window loses first
        assert seen([query - reach - 1]) and not seen([query - reach - 2])
    assert lab.window_reach(model.clone(pattern=(conv, GQA(heads=1, kv_heads=1, head_dim=8)))) is None
    assert lab.window_reach(model.clone(depth=4)) is None
    assert lab.window_reach(model.clone(pattern=(attention, attention))) is None


@pytest.mark.parametrize("path", [SMALL, FULL], ids=["small", "full"])
def test_configurations(path, tmp_path):
    grid = load(path, lab.Recall)
    assert lab.check(grid, tmp_path / "new") == {}
    for contender in grid.contenders:
        assert from_data(json.loads(json.dumps(to_data(contender.model)))) == contender.model
    assert override(grid, "train.steps", "7").train.steps == 7
    assert len({lab.settings(grid, trial) for trial in lab.trials(grid)}) == len(lab.trials(grid))
    assert flat(to_data(MQAR(vocab=16, pairs=2)))["pairs"] == 2 and isinstance(grid.data.tokenizer, Ids)


def test_another_kind_of_configuration():
    with pytest.raises(BadInput, match="returned Experiment; a value of Recall"):
        load(f"{ROOT}/configs/tiny.py", lab.Recall)

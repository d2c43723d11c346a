"""evaluate(): a model that reads scores 1, one that is silent 0; records survive the disk; views equal NumPy."""

import dataclasses
import json
import random

import numpy as np
import pytest
from eval_toys import HAYSTACK, Bytes, Reader, Silent

from jaxlong.core.types import BadInput
from jaxlong.evals.base import Example, LanguageModel, Task, evaluate, stream
from jaxlong.evals.needle import Needle, needle_grid
from jaxlong.evals.perplexity import Loss, load_losses, save_losses
from jaxlong.evals.records import Estimate, Record, Table, bootstrap

NEEDLE = Needle(HAYSTACK, needles=(1, 3))


def record(**changes):
    base = Record("needle", 128, 0, 0, 1.0, "482", ("482",), 128, 0.5, 60, None, "plain")
    return dataclasses.replace(base, **changes)


def test_protocols():
    assert isinstance(NEEDLE, Task) and isinstance(Reader(), LanguageModel)


def test_reader_scores_one_and_silence_scores_zero():
    for lm, score in ((Reader(), 1.0), (Silent(), 0.0)):
        table = evaluate(lm, [NEEDLE], [128, 256], samples=7, seed=3)
        assert len(table) == 14
        assert {r.correct for r in table.records} == {score}
        assert table.overall() == Estimate(score, score, score, 14)


def test_records_tell_the_sample():
    table = evaluate(Reader(), [NEEDLE], [200], samples=3, seed=9, model="toy")
    for i, r in enumerate(table.records):
        example = NEEDLE(stream(9, "needle", 200, i), 200, Bytes())
        assert (r.task, r.length, r.index, r.seed, r.model, r.tokens) == ("needle", 200, i, 9, "toy", 200)
        assert r.references == example.answers and r.prediction == example.answers[0]
        assert (r.depth, r.distance) == (example.meta["depth"], example.meta["distance"])


def test_samples_do_not_depend_on_the_batch_or_on_other_tasks():
    grid = needle_grid(NEEDLE, (0.0, 0.5, 1.0))
    together = evaluate(Reader(), grid, [128, 160], samples=5, seed=0, batch=64)
    alone = [evaluate(Reader(), [task], [n], samples=5, seed=0, batch=2) for n in (128, 160) for task in grid]
    assert together == sum(alone, Table())


def test_streams_of_training_and_evaluation_differ():
    training = {NEEDLE(random.Random(f"train/0/{i}"), 128, Bytes()).prompt for i in range(200)}
    evaluation = {NEEDLE(stream(0, "needle", 128, i), 128, Bytes()).prompt for i in range(200)}
    assert not training & evaluation


def test_model_gets_at_most_a_batch_and_progress_reaches_the_end():
    lm, seen = Reader(), []
    evaluate(lm, [NEEDLE], [128, 129], samples=5, seed=0, batch=4, progress=lambda *p: seen.append(p))
    assert [len(prompts) for prompts, _ in lm.calls] == [4, 4, 2]
    assert seen == [(4, 10), (8, 10), (10, 10)]


def test_no_prompt_gets_more_than_its_own_allowance():
    long = dataclasses.replace(NEEDLE, digits=5, label="long")
    lm = Reader()
    table = evaluate(lm, [NEEDLE, long], [128], samples=3, seed=0)
    assert {r.correct for r in table.records} == {1.0}
    assert sorted((len(prompts), n) for prompts, n in lm.calls) == [(3, 3), (3, 5)]


@dataclasses.dataclass(frozen=True)
class SometimesTooLong:
    """Fits at its smallest length for some draws only."""

    label: str = "sometimes"
    scoring: str = "exact"

    def __call__(self, rng, length, tokenizer):
        if length < 100 + (rng.random() > 0.9):
            raise BadInput("length", length, "too short", "101 or more")
        return Example("?", ("1",), {"length": 2, "depth": 0.0, "max_new": 1})


class Never(Reader):
    def generate(self, prompts, max_new):
        raise AssertionError("the model ran")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"lengths": [128, 8]}, "length"),
        ({"lengths": [0]}, "length"),
        ({"lengths": []}, "lengths"),
        ({"tasks": []}, "tasks"),
        ({"tasks": [NEEDLE, NEEDLE]}, "tasks"),
        ({"tasks": [dataclasses.replace(NEEDLE, scoring="exactly")]}, "needle.scoring"),
        ({"tasks": [SometimesTooLong()], "lengths": [100], "samples": 100}, "length"),
        ({"samples": 0}, "samples"),
        ({"batch": 0}, "batch"),
    ],
)
def test_bad_input_before_the_model_runs(changes, field):
    arguments = {"tasks": [NEEDLE], "lengths": [128], "samples": 2, "batch": 4} | changes
    tasks, lengths = arguments.pop("tasks"), arguments.pop("lengths")
    with pytest.raises(BadInput) as error:
        evaluate(Never(), tasks, lengths, seed=0, **arguments)
    assert error.value.field == field and "\n" not in str(error.value)


# Tables -------------------------------------------------------------------------------------------------


def test_table_round_trip(tmp_path):
    path = tmp_path / "results.jsonl"
    first = Table((record(prediction="\u00e9\U0001f600\n"), record(depth=None, distance=None, position=3)))
    second = Table((record(task="niah@0.5", references=("a", "b")),))
    first.save(path)
    second.save(path)
    assert Table.load(path) == first + second
    assert len(path.read_text().splitlines()) == 3
    assert all(json.loads(line)["kind"] == "sample" for line in path.read_text().splitlines())
    assert [p.name for p in tmp_path.iterdir()] == ["results.jsonl"]


def test_kinds_share_a_file(tmp_path):
    path = tmp_path / "results.jsonl"
    loss = Loss("text", 128, 64, "token", 1.5, 1000, 9, model="plain")
    Table((record(),)).save(path)
    save_losses([loss], path)
    assert Table.load(path).records == (record(),)
    assert load_losses(path) == [loss]


def test_saving_after_a_line_cut_short_keeps_lines_apart(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"kind": "other"}')
    Table((record(),)).save(path)
    assert Table.load(path).records == (record(),)


@pytest.mark.parametrize(
    "content",
    ["{", "[1]", '{"task": "x"}', '{"kind": "sample", "task": "x"}', '{"kind": "sample", "colour": 1}', b"\xff\n"],
)
def test_load_refuses_what_is_no_record(tmp_path, content):
    path = tmp_path / "results.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput) as error:
        Table.load(path)
    assert "results.jsonl" in str(error.value)


def test_load_refuses_a_missing_file(tmp_path):
    with pytest.raises(BadInput, match="no such file"):
        Table.load(tmp_path / "none.jsonl")


def test_views_equal_numpy():
    rng = np.random.default_rng(0)
    records = tuple(
        record(task=f"{task}@{depth}", length=n, index=i, depth=float(depth), correct=float(rng.integers(2)))
        for task in ("a", "b")
        for n in (64, 128)
        for depth in (0.0, 0.24, 0.26, 1.0)
        for i in range(5)
    )
    table = Table(records)
    mean = lambda keep: np.mean([r.correct for r in records if keep(r)])
    assert {k: e.mean for k, e in table.by_task_and_length().items()} == {
        (task, n): mean(lambda r, t=task, n=n: r.task.startswith(t) and r.length == n)
        for task in ("a", "b")
        for n in (64, 128)
    }
    assert {k: e.mean for k, e in table.by_length().items()} == {
        n: mean(lambda r, n=n: r.length == n) for n in (64, 128)
    }
    grid = table.by_length_and_depth((0.0, 0.25, 1.0))
    assert grid[64, 0.25].mean == mean(lambda r: r.length == 64 and 0.2 < r.depth < 0.3)
    assert grid[64, 0.25].samples == 20
    assert list(grid) == [(n, d) for n in (64, 128) for d in (0.0, 0.25, 1.0)]
    assert len(table.where(lambda r: r.depth > 0.5)) == 20
    assert list(Table((record(depth=0.31),)).by_length_and_depth()) == [(128, 0.3)]
    assert Table((record(depth=None),)).by_length_and_depth() == {}


def test_bootstrap_equals_plain_resampling():
    rng = np.random.default_rng(1)
    for scores in (rng.integers(0, 2, 150).astype(float), rng.random(80)):
        estimate = bootstrap(scores.tolist(), resamples=20_000)
        means = rng.choice(scores, (20_000, len(scores))).mean(axis=1)
        low, high = np.quantile(means, (0.025, 0.975))
        assert estimate.mean == pytest.approx(scores.mean())
        assert estimate.low == pytest.approx(low, abs=0.012) and estimate.high == pytest.approx(high, abs=0.012)
    assert bootstrap([0.0, 1.0, 1.0]) == bootstrap([0.0, 1.0, 1.0])
    assert bootstrap([1.0] * 4) == Estimate(1.0, 1.0, 1.0, 4)
    with pytest.raises(BadInput):
        bootstrap([])

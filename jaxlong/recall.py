"""The recall experiment: many small models learn the same rows, and each shows what its state can hold.

Papers: Zoology (Arora et al., arXiv 2312.04927), Based (Arora et al., arXiv 2402.18668).
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from jaxlong import run
from jaxlong.config import Experiment, Train, to_data
from jaxlong.core.types import BadInput, Batch
from jaxlong.data import MQAR, Data
from jaxlong.data.recall import within
from jaxlong.data.tokenizers import Tokenizer
from jaxlong.evals import report
from jaxlong.evals.records import read_lines
from jaxlong.mixers import GQA, ShortConv
from jaxlong.model import LM, looks_back
from jaxlong.train.grads import next_token_loss


@dataclass(frozen=True)
class Contender:
    """A model of the grid.

    Fields:
        name: of its folder and its row.    family: models of one family are one curve of the figure.
        rates: learning rates to try, each the schedule's peak in turn; the best counts.
    """

    name: str
    family: str
    model: LM
    rates: tuple[float, ...] = (3e-3,)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise BadInput("contender.name", self.name, "names a folder", "letters, digits, '-', '_' and '.'")
        if not self.rates or len(set(self.rates)) < len(self.rates):
            raise BadInput("contender.rates", self.rates, "no rate, or one twice", "one learning rate or more")


@dataclass(frozen=True)
class Recall:
    """What to train and how to ask. Every model sees the same rows and answers the same questions.

    Fields:
        data, train: as in an Experiment; the schedule's peak is each model's own.
        tests: held-out questions; accuracy is the mean over those whose keys are written once, and, apart from
            these, over those whose keys are written again.    rows: documents of each.
        seeds: of parameters and training rows; accuracy is the mean over them.
    """

    contenders: tuple[Contender, ...]
    data: Data
    tests: tuple[MQAR, ...]
    train: Train = field(default_factory=Train)
    rows: int = 512
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        names = [contender.name for contender in self.contenders]
        for name, values in (("contenders", names), ("tests", self.tests), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise BadInput(name, values, "none, or one twice", "one or more, all different")
        if self.rows < 1:
            raise BadInput("rows", self.rows, "asks nothing", "1 or more")
        if all(test.writes > 1 for test in self.tests):
            raise BadInput("tests", self.tests, "none writes its keys once", "one test or more with writes=1")
        for i, test in enumerate(self.tests):
            if test.length is None or test.split != "test":
                raise BadInput(f"tests.{i}", test, "is no held-out document", 'a length of its own, split="test"')


@dataclass(frozen=True)
class Recalled:
    """One trained model and its accuracy.

    Fields:
        mixer: of the last layer, with its fields.    state_bytes: of all layers, one row of the longest test.
        accuracy: share of held-out queries answered, the mean over the tests whose keys are written once.
        replaced: the same where keys are written again; None if that is not asked.
        by_test: both, test by test.
        computed: for a model whose memory is one window, the share of queries that it reaches, as `accuracy`.
        seconds: of training, compilation included; of the last part only where a run went on.
        settings: a hash of everything that decides the accuracy.
    """

    kind: ClassVar[str] = "recall"

    trial: str
    contender: str
    mixer: dict[str, Any]
    state_bytes: int
    parameters: int
    accuracy: float
    replaced: float | None
    by_test: tuple[float, ...]
    pairs: tuple[int, ...]
    writes: tuple[int, ...]
    lengths: tuple[int, ...]
    steps: int
    learning_rate: float
    seed: int
    seconds: float
    settings: str
    computed: float | None = None


class Trial(NamedTuple):
    """One model to train: a contender, a learning rate, a seed."""

    contender: Contender
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.contender.name}_rate{self.rate:g}_seed{self.seed}"


def trials(recall: Recall) -> list[Trial]:
    """Everything to train, in the order of the contenders."""
    return [Trial(c, rate, seed) for c in recall.contenders for rate in c.rates for seed in recall.seeds]


def experiment_of(recall: Recall, trial: Trial) -> Experiment:
    """The trial as an experiment, which `jaxlong.run` trains."""
    schedule = replace(recall.train.schedule, peak=trial.rate)
    train = replace(recall.train, schedule=schedule)
    return Experiment(model=trial.contender.model, data=recall.data, train=train, seed=trial.seed)


def check(recall: Recall, out: str | Path) -> dict[str, Recalled]:
    """All that can be known before training; returns the finished trials of the folder by name.

    Raises:
        BadInput: a value that cannot work, or a folder that holds other results.
    """
    for trial in trials(recall):
        run.check(experiment_of(recall, trial), Path(out) / trial.name)
    for test in recall.tests:
        test.rows(length=test.length, tokenizer=recall.data.tokenizer, seed=0)
    path = Path(out) / "results.jsonl"
    found = {r.trial: r for r in read_lines(path, Recalled)} if path.exists() else {}
    for trial in trials(recall):
        if trial.name in found and found[trial.name].settings != settings(recall, trial):
            raise BadInput("out", out, f"holds {trial.name} of other settings", "another folder, or the same values")
    return {trial.name: found[trial.name] for trial in trials(recall) if trial.name in found}


def settings(recall: Recall, trial: Trial) -> str:
    """A hash of what decides a trial's accuracy."""
    free = run.MAY_CHANGE - {"train.steps"}
    values = run.flat(to_data(experiment_of(recall, trial)))
    kept = {name: value for name, value in values.items() if not any(f"{name}.".startswith(f"{f}.") for f in free)}
    text = json.dumps([kept, to_data(recall.tests), recall.rows], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def measure(recall: Recall, trial: Trial, out: str | Path, *, title: str = "train") -> Recalled:
    """Train a model in its folder under `out`, or go on where that stopped, and ask it."""
    experiment, started = experiment_of(recall, trial), time.monotonic()
    params = run.train(experiment, Path(out) / trial.name, title=title)
    seconds = time.monotonic() - started
    model, reach = trial.contender.model, window_reach(trial.contender.model)
    by_test = tuple(accuracy(model, params, recall, test) for test in recall.tests)
    computed = None if reach is None else computed_accuracy(recall, reach)
    once = [test.writes == 1 for test in recall.tests]
    return Recalled(
        trial=trial.name,
        contender=trial.contender.name,
        mixer=to_data(model.blocks[-1][0]),
        state_bytes=state_bytes(model, max(test.length or 0 for test in recall.tests)),
        parameters=run.count_params(model),
        accuracy=_mean(by_test, once),
        replaced=None if all(once) else _mean(by_test, [not one for one in once]),
        by_test=by_test,
        pairs=tuple(test.pairs for test in recall.tests),
        writes=tuple(test.writes for test in recall.tests),
        lengths=tuple(test.length or 0 for test in recall.tests),
        steps=recall.train.steps,
        learning_rate=trial.rate,
        seed=trial.seed,
        seconds=seconds,
        settings=settings(recall, trial),
        computed=computed,
    )


def _mean(values: Sequence[float], chosen: Sequence[bool]) -> float:
    return float(np.mean(np.asarray(values)[np.asarray(chosen)]))


def accuracy(model: LM, params: Any, recall: Recall, test: MQAR) -> float:
    """The share of a test's queries whose value has the largest logit."""
    ask, right, asked = jax.jit(next_token_loss(model)), 0.0, 0.0
    for batch in held_out(test, recall.data, recall.rows):
        metrics = ask(params, batch)[1]
        right += float(metrics["accuracy"]) * float(metrics["weight"])
        asked += float(metrics["weight"])
    return right / asked


def held_out(test: MQAR, data: Data, rows: int) -> Iterator[Batch]:
    """The test's rows, as many tokens a batch as in training."""
    source = _rows(test, data.tokenizer)
    size = max(1, data.batch * data.length // (test.length or 1))
    for start in range(0, rows, size):
        yield Batch(*map(np.stack, zip(*map(source, range(start, min(rows, start + size))), strict=True)))


def _rows(test: MQAR, tokenizer: Tokenizer) -> Any:
    return test.rows(length=test.length, tokenizer=tokenizer, seed=0).__getitem__


@functools.cache
def computed_accuracy(recall: Recall, reach: int) -> float:
    """What a model answers that sees exactly `reach` tokens back, from the rows of the tests written once alone."""
    source = lambda test: Batch(*map(np.concatenate, zip(*held_out(test, recall.data, recall.rows), strict=True)))
    return float(np.mean([within(source(test), reach) for test in recall.tests if test.writes == 1]))


def window_reach(model: LM) -> int | None:
    """The farthest a value may lie back for a model that is one short convolution and one window of attention.

    The convolution makes a pair one token's features, at the value or up to width - 2 tokens later; the window
    must hold one of these. None for other models.
    """
    mixers = [mixer for mixer, _ in model.blocks]
    if [type(mixer) for mixer in mixers] != [ShortConv, GQA] or any(looks_back(mlp) for _, mlp in model.blocks):
        return None
    conv, attention = mixers
    window = attention.mask.reach()
    return None if window is None or attention.conv else window - 1 + conv.width - 2


def state_bytes(model: LM, length: int) -> int:
    """Bytes that all layers keep of one row of `length` tokens, by the mixers' own formulas."""
    itemsize = np.dtype(jax.numpy.dtype(model.dtype)).itemsize
    sizes = {"width": model.width, "max_chunk": 1, "itemsize": itemsize}
    kept = [part for block in model.blocks for part in block if hasattr(part, "state_bytes")]
    return sum(part.state_bytes(1, length, **sizes) for part in kept)


class Best(NamedTuple):
    """A contender's records at the learning rate that answers most, and their mean accuracy over seeds."""

    contender: Contender
    records: tuple[Recalled, ...]
    accuracy: float


def best(recall: Recall, records: Sequence[Recalled]) -> list[Best]:
    """Of each contender that has records."""
    found = []
    for contender in recall.contenders:
        by_rate: dict[float, list[Recalled]] = {}
        for record in records:
            if record.contender == contender.name:
                by_rate.setdefault(record.learning_rate, []).append(record)
        means = [Best(contender, tuple(rs), float(np.mean([r.accuracy for r in rs]))) for rs in by_rate.values()]
        if means:
            found.append(max(means, key=lambda b: b.accuracy))
    return found


def write_report(recall: Recall, records: Sequence[Recalled], out: str | Path) -> str:
    """Write report.md and recall.png (and replaced.png), views of the records; returns the report."""
    found = best(recall, records)
    asks = {"recall": [test for test in recall.tests if test.writes == 1]}
    again = [test for test in recall.tests if test.writes > 1]
    asks |= {"replaced": again} if again else {}
    for name in asks:
        report.save(draw(found, name), Path(out) / f"{name}.png")
    tests = lambda tests: ", ".join(f"{t.pairs} pairs of {t.keys} keys in {t.length} tokens" for t in tests)
    text = "\n".join(
        [
            "# Recall\n",
            f"Share of held-out queries answered after {recall.train.steps} steps (multi-query associative recall,"
            f" {recall.rows} documents each). State: bytes that all layers keep of one document. "
            + " ".join(f"{name.capitalize()}: {tests(asked)}." for name, asked in asks.items())
            + " Computed: the recall of all that a window reaches, from the data alone.\n",
            report.markdown_table(
                ["model", "state bytes", *asks, "computed", "parameters", "rate", "of", "seeds", "s a run"],
                [_row(b, again=bool(again)) for b in found],
            ),
            *(f"![{name} by state]({name}.png)\n" for name in asks),
        ]
    )
    (Path(out) / "report.md").write_text(text)
    return text


def _row(b: Best, again: bool) -> list[Any]:
    first = b.records[0]
    shares = [f"{b.accuracy:.3f}", *([f"{replaced(b):.3f}"] if again else [])]
    computed = "" if first.computed is None else f"{first.computed:.3f}"
    rate = [f"{first.learning_rate:g}", len(b.contender.rates), len(b.records)]
    seconds = f"{np.mean([r.seconds for r in b.records]):.0f}"
    return [b.contender.name, first.state_bytes, *shares, computed, first.parameters, *rate, seconds]


def replaced(b: Best) -> float:
    """Accuracy where keys are written again, the mean over seeds; NaN if that was not asked."""
    return float(np.mean([np.nan if r.replaced is None else r.replaced for r in b.records]))


def draw(found: Sequence[Best], name: str = "recall") -> Any:
    """Accuracy by bytes of state, one curve a family; for "recall" a dotted one for what windows reach."""
    curves, reached = [], []
    for family in dict.fromkeys(b.contender.family for b in found):
        members = sorted((b for b in found if b.contender.family == family), key=lambda b: b.records[0].state_bytes)
        sizes = [b.records[0].state_bytes for b in members]
        curves.append(report.Curve(family, sizes, [b.accuracy if name == "recall" else replaced(b) for b in members]))
        computed = [b.records[0].computed for b in members]
        if name == "recall" and None not in computed:
            reached.append(report.Curve(f"{family}, computed", sizes, computed))
    label = {"recall": "recall", "replaced": "recall of replaced values"}[name]
    figure = report.lines([*curves, *reached], x_label="state (bytes)", y_label=label, lengths=True)
    axis = figure.axes[0]
    axis.set_ylim(-0.03, 1.05)
    for line in axis.lines:  # hollow, since models of one size that answer everything share a point
        line.set(markerfacecolor="none", markersize=7.5, markeredgewidth=1.4)
    for line in axis.lines[len(curves) :]:
        line.set(color=report.INK, marker="", linestyle=":")
    axis.legend(fontsize=report.SIZES["tick"], frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.02))
    return figure

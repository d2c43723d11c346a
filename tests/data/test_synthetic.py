"""Samples: the label weights, the row as a function of its number, and tasks that do not fit."""

from __future__ import annotations

import dataclasses
import functools
import random
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest

from jaxlong.core.types import BadInput
from jaxlong.data import Ascii, Bytes, HuggingFace, Samples, Stdlib
from jaxlong.data.synthetic import covered, name_of


class Example(NamedTuple):
    prompt: str
    answers: tuple[str, ...]
    meta: dict


@dataclass(frozen=True)
class Recall:
    """`key=12 ... key?` -> `12`: the number also counts as an answer where it is first written, if `spans` says so."""

    filler: str = "é"
    spans: bool = False
    over: int = 0

    def __call__(self, rng: random.Random, length: int, tokenizer: Any) -> Example:
        number = str(rng.randrange(10, 100))
        head, tail = f"key={number} ", " key?"
        room = length + self.over - len(head) - len(tail) - len(number)
        body = self.filler * (room // len(tokenizer.encode(self.filler)))
        prompt = head + body + tail
        ends = ((4, 6), (len(prompt), len(prompt) + 2)) if self.spans else ()
        return Example(prompt, (number, "other"), {"spans": ends} if ends else {"length": length})


def expected_row(text: str, answers: set[int], length: int, text_weight: float, answer_weight: float) -> tuple:
    """Character by character, for a tokenizer of bytes: `answers` are characters."""
    stream, weight = [], []
    for i, character in enumerate(text):
        for byte in character.encode():
            stream.append(byte)
            weight.append(answer_weight if i in answers else text_weight)
    stream.append(0)
    weight.append(text_weight)
    fields = [[0] * length for _ in range(5)]
    for t in range(min(len(stream), length)):
        fields[0][t], fields[2][t], fields[3][t] = stream[t], t, 1
        if t + 1 < len(stream):
            fields[1][t], fields[4][t] = stream[t + 1], weight[t + 1]
    return tuple(fields)


@pytest.mark.parametrize("filler", ["a", "é"])
@pytest.mark.parametrize("spans", [False, True])
def test_rows_and_label_weights(filler, spans):
    task = Recall(filler=filler, spans=spans)
    rows = Samples(task, text_weight=0.5, answer_weight=20.0).rows(length=41, tokenizer=Bytes(), seed=3)
    for i in (0, 1, 7, 1000):
        example = task(random.Random(f"train/3/{i}"), 41, Bytes())
        text = example.prompt + example.answers[0]
        marked = {*range(len(example.prompt), len(text)), *((4, 5) if spans else ())}
        expected = expected_row(text, marked, 41, 0.5, 20.0)
        for got, want in zip(rows[i], expected, strict=True):
            assert got.tolist() == want


def test_a_sample_that_fills_the_row_still_learns_to_stop():
    """Forty tokens in a row of forty: the end is the last label, though not a token of the row."""
    rows = Samples(Recall(filler="a")).rows(length=40, tokenizer=Ascii(), seed=0)
    row = rows[0]
    assert (row.segment_ids == 1).all() and row.tokens[-1] != 0
    assert row.targets[-1] == 0 and row.loss_weights[-1] == 1


def test_padding_has_no_weight():
    rows = Samples(Recall(filler="a", over=-10), answer_weight=5.0).rows(length=40, tokenizer=Ascii(), seed=0)
    row = rows[0]
    assert row.tokens[30] == 0 and row.segment_ids.tolist() == [1] * 31 + [0] * 9
    assert row.loss_weights.tolist() == [1.0] * 27 + [5.0] * 2 + [1.0] + [0.0] * 10


@pytest.mark.parametrize("over", [0, -7])
@pytest.mark.parametrize("length", [40, 100, 135])
def test_several_samples_in_a_row(length, over):
    """A row of `length // 40` short samples is the rows of length 40 one after the other, without their padding."""
    samples = Samples(Recall(filler="a", over=over), answer_weight=7.0)
    alone = samples.rows(length=40, tokenizer=Ascii(), seed=2)
    rows = dataclasses.replace(samples, length=40).rows(length=length, tokenizer=Ascii(), seed=2)
    count = length // 40
    for i in (0, 3, 11):
        parts = [alone[i * count + n] for n in range(count)]
        for name, got in rows[i]._asdict().items():
            kept = [getattr(part, name)[part.segment_ids > 0] for part in parts]
            if name == "segment_ids":
                kept = [ids * (n + 1) for n, ids in enumerate(kept)]
            expected = np.concatenate(kept)
            assert got.tolist() == [*expected.tolist(), *[0] * (length - len(expected))], name


def test_lengths_of_samples_that_cannot_be():
    with pytest.raises(BadInput, match=r"Samples.length: 41: rows have 40 tokens; at most 40"):
        Samples(Recall(), length=41).rows(length=40, tokenizer=Ascii(), seed=0)
    with pytest.raises(BadInput, match=r"Samples.length: 1: too short"):
        Samples(Recall(), length=1)
    with pytest.raises(BadInput, match=r"Samples.length: 40: Recall\(.*\) made 43 tokens in sample 2"):
        Samples(Recall(filler="a", over=3), length=40).rows(length=80, tokenizer=Ascii(), seed=0)[1]


def test_too_long_for_the_row():
    rows = Samples(Recall(filler="a", over=1)).rows(length=40, tokenizer=Ascii(), seed=0)
    with pytest.raises(BadInput, match=r"data.length: 40: Recall\(.*\) made 41 tokens in sample 5; longer samples"):
        rows[5]


def test_rows_are_pure():
    rows, again = (Samples(Recall()).rows(length=50, tokenizer=Bytes(), seed=1) for _ in range(2))
    ahead = [rows[i] for i in range(20)]
    for i in (19, 3, 3, 0, 11):
        assert all(np.array_equal(a, b) for a, b in zip(again[i], ahead[i], strict=True))
    assert len({row.tokens.tobytes() for row in ahead}) > 10
    other = Samples(Recall()).rows(length=50, tokenizer=Bytes(), seed=2)
    assert any(not np.array_equal(other[i].tokens, ahead[i].tokens) for i in range(20))


def test_tokens_of_a_span_with_merged_tokens(tmp_path):
    """A token that holds any character of an answer counts as answer."""
    import tokenizers

    vocabulary = {"k": 0, "=": 1, "1": 2, "2": 3, "=1": 4, "</s>": 5}
    model = tokenizers.models.BPE(vocabulary, [("=", "1")])
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))

    def task(rng, length, tokenizer):
        return Example("k=", ("12",), {})

    rows = Samples(task, answer_weight=9.0).rows(length=6, tokenizer=HuggingFace(str(tmp_path)), seed=0)
    assert rows[0].tokens.tolist() == [0, 4, 3, 5, 5, 5]
    assert rows[0].targets.tolist() == [4, 3, 5, 5, 5, 5]
    assert rows[0].loss_weights.tolist() == [9, 9, 1, 0, 0, 0]


@pytest.mark.parametrize("span", [(-1, 2), (3, 2), (0, 6)])
def test_spans_outside_the_text(span):
    with pytest.raises(BadInput, match="outside the text; characters from 0 to 5"):
        covered(np.stack([np.arange(5), np.arange(1, 6)], 1), (span,), 5)


def test_empty_span_covers_nothing():
    assert not covered(np.stack([np.arange(5), np.arange(1, 6)], 1), ((2, 2), (5, 5)), 5).any()


@pytest.mark.parametrize("field, value", [("text_weight", -1.0), ("answer_weight", float("nan"))])
def test_weights_that_are_none(field, value):
    with pytest.raises(BadInput, match=f"Samples.{field}: {value}: not a weight"):
        Samples(Recall(), **{field: value})


def test_nothing_to_learn():
    with pytest.raises(BadInput, match="nothing to learn"):
        Samples(Recall(), text_weight=0.0, answer_weight=0.0)


def test_names_of_tasks_survive_a_restart():
    """A name is equal for equal tasks, differs with any field or corpus, and never holds an address."""

    @dataclass(frozen=True)
    class Task:
        haystack: Any
        sizes: tuple = (1, 2)
        call: Any = field(default=len)

    names = [name_of(Task(Stdlib(split))) for split in ("train", "heldout")]
    assert names[0] != names[1] and Stdlib("train").identity in names[0]
    assert name_of(Task(Stdlib("train"))) == names[0] != name_of(Task(Stdlib("train"), sizes=(1, 3)))
    for odd in (lambda: 0, functools.partial(name_of, object()), Task(object(), call=name_of), Task):
        assert " at 0x" not in name_of(odd)

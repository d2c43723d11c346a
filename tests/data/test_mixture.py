"""Batches: the same for any process count, exact to resume, refused with other data, in the given proportions."""

from __future__ import annotations

import dataclasses
import json
import random
import time
from typing import Any, NamedTuple

import numpy as np
import pytest

from jaxlong.core.types import BadInput, Batch
from jaxlong.data import Ascii, Bytes, Data, Jsonl, Packed, Part, Samples, Stdlib, TextFolder, batches, describe


class Example(NamedTuple):
    prompt: str
    answers: tuple[str, ...]
    meta: dict


@dataclasses.dataclass(frozen=True)
class Letter:
    """Rows of one letter and the number of the row: which part a row came from can be read off it."""

    letter: str

    def __call__(self, rng: random.Random, length: int, tokenizer: Any) -> Example:
        return Example(self.letter * 4, (str(rng.randrange(10**6)),), {})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Jsonl:
    """Small enough for many epochs in a test."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("mixture") / "a.jsonl"
    texts = ["".join(rng.choices("abcdef \n", k=rng.randrange(1, 120))) for _ in range(25)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return Jsonl(str(path))


@pytest.fixture
def data(corpus) -> Data:
    parts = (Packed(corpus), Packed(corpus, weight=0.5, packing="first_fit"), Samples(Letter("x"), weight=2.0))
    return Data(length=24, batch=8, mixture=parts)


def equal(a: Batch, b: Batch) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def taken(stream, n: int) -> list[Batch]:
    return [next(stream) for _ in range(n)]


# -- what a batch is -------------------------------------------------------------------------------------------------


def test_fields(data):
    stream = batches(data, seed=0)
    assert iter(stream) is stream and all(isinstance(part, Part) for part in data.mixture)
    for batch in taken(stream, 3):
        assert isinstance(batch, Batch) and all(isinstance(f, np.ndarray) and f.shape == (8, 24) for f in batch)
        assert [f.dtype for f in batch] == [np.int32] * 4 + [np.float32]
        assert batch.tokens.max() < 256 and batch.targets.max() < 256
        assert (batch.loss_weights[batch.segment_ids == 0] == 0).all()


def test_default_data_needs_no_file():
    batch = next(batches(Data(), seed=0))
    assert batch.tokens.shape == (32, 128) and (batch.segment_ids > 0).mean() > 0.99


def test_rows_come_from_the_parts_in_order(corpus):
    """One part: batch n holds its rows n B .. (n + 1) B - 1, over many epochs."""
    part = Packed(corpus)
    rows = part.rows(length=24, tokenizer=Ascii(), seed=5)
    stream = batches(Data(length=24, batch=7, tokenizer=Ascii(), mixture=(part,)), seed=5)
    for n, batch in enumerate(taken(stream, 3 * rows.rows // 7)):
        for b in range(7):
            assert equal(Batch(*(f[b] for f in batch)), rows[7 * n + b])


@pytest.mark.parametrize("weights", [(1.0, 9.0), (0.25, 0.5, 0.25), (3.0, 2.0, 1.0), (1.0, 1.7)])
def test_rows_in_proportion_to_weights(weights):
    parts = tuple(Samples(Letter("abc"[i]), weight=w) for i, w in enumerate(weights))
    stream = batches(Data(length=16, batch=20, tokenizer=Ascii(), mixture=parts), seed=0)
    letters = "".join(chr(t) for batch in taken(stream, 100) for t in batch.tokens[:, 0])
    for i, weight in enumerate(weights):
        share = weight / sum(weights)
        assert abs(letters.count("abc"[i]) - share * 2000) < 0.003 * 2000 + 2
        for start in range(0, 2000, 200):  # evenly, not only in the end
            assert abs(letters[start : start + 200].count("abc"[i]) - share * 200) <= 2


# -- shares, threads   ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 4, 8])
def test_any_number_of_shares_makes_one_global_batch(data, count):
    whole = taken(batches(data, seed=3), 12)
    parts = [taken(batches(data, seed=3, share=s, shares=count), 12) for s in range(count)]
    for n, batch in enumerate(whole):
        together = Batch(*(np.concatenate(fields) for fields in zip(*(p[n] for p in parts), strict=True)))
        assert equal(batch, together)


@pytest.mark.parametrize("threads", [0, 2, 5])
def test_threads_change_nothing(data, threads):
    here, there = batches(data, seed=3), batches(dataclasses.replace(data, threads=threads), seed=3)
    for _ in range(20):
        assert equal(next(here), next(there)) and here.get_state() == there.get_state()


def test_seeds_differ(data):
    assert not equal(next(batches(data, seed=0)), next(batches(data, seed=1)))


# -- state -----------------------------------------------------------------------------------------------------------


def test_resumes_exactly_at_random_points(data, corpus):
    epoch = Packed(corpus).rows(length=24, tokenizer=Bytes(), seed=0).rows
    uninterrupted = batches(data, seed=1)
    states, whole = [], []
    for _ in range(60):
        states.append(json.dumps(uninterrupted.get_state()))
        whole.append(next(uninterrupted))
    assert 3 * epoch < 60 * 8, "several ends of an epoch lie in between, most of them inside a batch"
    resumed, used = batches(data, seed=1), batches(data, seed=1)
    for n in [0, 59, *random.Random(2).sample(range(60), 25)]:
        for stream in (resumed, used):  # `used` goes back and forth
            stream.set_state(json.loads(states[n]))
            assert json.dumps(stream.get_state()) == states[n]
        for k in range(n, min(n + 3, 60)):
            assert equal(next(used), whole[k])
        assert equal(next(resumed), whole[n])


def test_state_counts_what_was_handed_out(data):
    stream = batches(dataclasses.replace(data, threads=4), seed=0)
    for n in range(5):
        assert stream.get_state()["next_index"] == n
        next(stream)
    state = stream.get_state()
    assert len(json.dumps(state)) < 1500 and json.loads(json.dumps(state)) == state


def test_a_state_serves_any_number_of_shares(data):
    stream = batches(data, seed=0)
    taken(stream, 7)
    half = batches(data, seed=0, share=1, shares=2)
    half.set_state(stream.get_state())
    assert equal(next(half), Batch(*(f[4:] for f in next(stream))))


class Interrupted:
    """A task that is interrupted once, in its seventh call for rows."""

    def __init__(self):
        self.calls = 0

    def __call__(self, rng, length, tokenizer):
        self.calls += 1
        if self.calls == 7:
            raise KeyboardInterrupt
        return Letter("x")(rng, length, tokenizer)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_an_interrupt_loses_no_batch(threads):
    """Stopped in the middle of a cell and run again: the stream goes on where it was."""

    def stream(task):
        return batches(Data(length=16, batch=2, mixture=(Samples(task),), threads=threads), seed=0)

    stopped, whole, got = stream(Interrupted()), taken(stream(Letter("x")), 12), []
    interrupts = 0
    while len(got) < 12:
        try:
            got.append(next(stopped))
        except KeyboardInterrupt:
            interrupts += 1
            assert stopped.get_state()["next_index"] == len(got)
    assert interrupts == 1 and all(map(equal, got, whole))


OTHER_DATA = {
    "data.seed: 4: the checkpoint was trained with 1; go on with the same data, or start a new run": {"seed": 4},
    "data.length: 32: the checkpoint was trained with 24": {"length": 32},
    "data.batch: 16: the checkpoint was trained with 8": {"batch": 16},
    "data.tokenizer: ascii: the checkpoint was trained with bytes": {"tokenizer": Ascii()},
    "data.mixture.0.weight: 1.5: the checkpoint was trained with 1.0": {"part": 0, "weight": 1.5},
    "data.mixture.0.packing: first_fit: the checkpoint was trained with split": {"part": 0, "packing": "first_fit"},
    "data.mixture.0.source": {"part": 0, "source": None},
    "data.mixture.2.task: Letter(letter='y'): the checkpoint was trained with Letter(letter='x')": {
        "part": 2,
        "task": Letter("y"),
    },
    "data.mixture.2.answer_weight: 3.0: the checkpoint was trained with 1.0": {"part": 2, "answer_weight": 3.0},
    "data.mixture.2.length: 12: the checkpoint was trained with row": {"part": 2, "length": 12},
    "data.mixture.2.part: nothing: the checkpoint was trained with Samples": {"mixture": 2},
}


@pytest.mark.parametrize("line", OTHER_DATA)
def test_refuses_other_data_in_one_line(data, corpus, tmp_path, line):
    change = dict(OTHER_DATA[line])
    seed = change.pop("seed", 1)
    if "source" in change:
        (tmp_path / "other.txt").write_text("some other text, long enough for one row")
        change["source"] = TextFolder(str(tmp_path))
        line = f"data.mixture.0.source: {change['source'].identity}: the checkpoint was trained with {corpus.identity}"
    if "part" in change:
        parts, at = list(data.mixture), change.pop("part")
        parts[at] = dataclasses.replace(parts[at], **change)
        change = {"mixture": tuple(parts)}
    elif "mixture" in change:
        change["mixture"] = data.mixture[: change["mixture"]]
    stream = batches(dataclasses.replace(data, **change), seed=seed)
    with pytest.raises(BadInput) as caught:
        stream.set_state(json.loads(json.dumps(batches(data, seed=1).get_state())))
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)
    assert stream.get_state()["next_index"] == 0, "a refusal changes nothing"


def test_moving_the_files_is_no_other_data(data, corpus, tmp_path):
    moved = tmp_path / "elsewhere.jsonl"
    with open(corpus.path, "rb") as file:
        moved.write_bytes(file.read())
    there = dataclasses.replace(data, mixture=(Packed(Jsonl(str(moved))), *data.mixture[1:]), threads=2)
    stream = batches(there, seed=1)
    stream.set_state(batches(data, seed=1).get_state())
    assert equal(next(stream), next(batches(data, seed=1)))


@pytest.mark.parametrize("state", [{}, {"next_index": -1, "identity": {}}, {"next_index": 3}, {"next_index": "3"}])
def test_refuses_what_is_no_state(data, state):
    with pytest.raises(BadInput, match="not the state of an iterator"):
        batches(data, seed=0).set_state(state)


def test_close_stops(data):
    stream = batches(data, seed=0)
    next(stream)
    stream.close()
    with pytest.raises(ValueError, match="closed"):
        next(stream)


# -- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, line",
    [
        ({"length": 1}, "data.length: 1: too small; an integer, at least 2"),
        ({"batch": 0}, "data.batch: 0: too small; an integer, at least 1"),
        ({"threads": -1}, "data.threads: -1: too small; an integer, at least 0"),
        ({"mixture": ()}, "data.mixture: (): no part"),
        ({"mixture": (Packed(weight=0.0),)}, "data.mixture.0.weight: 0.0: not a weight"),
        ({"mixture": (Packed(), Packed(weight=float("inf")))}, "data.mixture.1.weight: inf: not a weight"),
    ],
)
def test_values_that_cannot_be(change, line):
    with pytest.raises(BadInput) as caught:
        Data(**change)
    assert str(caught.value).startswith(line)


def test_batch_over_shares():
    with pytest.raises(BadInput, match=r"data.batch: 30: does not divide over the 4 shares .*; a multiple of 4"):
        batches(Data(batch=30), seed=0, shares=4)
    with pytest.raises(BadInput, match=r"share: 4: no such share of the rows; from 0 to 3"):
        batches(Data(), seed=0, share=4, shares=4)


def test_found_before_the_first_batch(corpus):
    """A corpus, a length or a task that cannot be used ends when the stream is made."""
    with pytest.raises(BadInput, match=r"Jsonl.path: none.jsonl: no such file"):
        batches(Data(mixture=(Packed(Jsonl("none.jsonl")),)), seed=0)
    with pytest.raises(BadInput, match=r"data.length: 1000000: the corpus has only"):
        batches(Data(length=1_000_000, mixture=(Packed(corpus),)), seed=0)
    with pytest.raises(BadInput, match=r"data.length: 4: Letter\(letter='x'\) made"):
        batches(Data(length=4, mixture=(Samples(Letter("x")),)), seed=0)


def test_describe_is_short_and_plain(data, corpus):
    facts = describe(data)
    assert json.loads(json.dumps(facts)) == facts
    tokens = sum(len(text.encode()) + 1 for text in corpus)
    first = facts["mixture"][0]
    assert (first["corpus"], first["documents"], first["tokens"]) == (corpus.identity[:12], 25, tokens)
    assert facts["mixture"][2]["task"] == "Letter(letter='x')" and facts["tokenizer"] == "bytes"


def test_fast_enough():
    """50 batches of 32 x 128 a second on one core is asked; CPU time, so that a busy machine does not fail it."""
    stream = batches(Data(threads=0, mixture=(Packed(Stdlib("heldout")),)), seed=0)
    next(stream)
    start = time.process_time()
    taken(stream, 50)
    assert time.process_time() - start < 1.0

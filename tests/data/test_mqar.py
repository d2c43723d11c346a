"""Associative recall: rows that are a pure function of their number, with answers that are right."""

from __future__ import annotations

import numpy as np
import pytest

from jaxlong.core.types import BadInput, Batch
from jaxlong.data import MQAR, Bytes, Data, Ids, batches
from jaxlong.data.recall import distances, within

CASES = {
    "tight": (MQAR(vocab=34, pairs=16), 64),
    "small": (MQAR(vocab=128, pairs=5, length=30), 64),
    "random": (MQAR(vocab=90, pairs=4, filler="random"), 40),
    "written": (MQAR(vocab=64, pairs=12, writes=3, length=36), 80),
    "test": (MQAR(vocab=64, pairs=3, length=32, split="test", alpha=1.0), 100),
}
every_case = pytest.mark.parametrize("case", CASES)


def rows(part: MQAR, length: int, numbers, seed: int = 0) -> Batch:
    source = part.rows(length=length, tokenizer=Ids(part.vocab), seed=seed)
    return Batch(*map(np.stack, zip(*[source[i] for i in numbers], strict=True)))


def same(a: Batch, b: Batch) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def check_answers(tokens, targets, weights, pairs: int, writes: int) -> None:
    """Read a document token by token."""
    keys, values = tokens[0 : 2 * pairs : 2].tolist(), tokens[1 : 2 * pairs : 2].tolist()
    assert all(keys.count(key) == writes for key in keys)
    assert len(set(values)) == pairs and max(keys) < min(values)
    asked = []
    for at in range(len(tokens)):
        if weights[at]:
            assert at >= 2 * pairs and at % 2 == 0
            assert targets[at] == dict(zip(keys, values, strict=True))[tokens[at]]
            asked.append(tokens[at])
        else:
            assert targets[at] == 0
    assert sorted(asked) == sorted(set(keys))


@every_case
def test_answers_are_right(case):
    part, length = CASES[case]
    size = part.length or length
    batch = rows(part, length, range(20))
    for row in zip(*batch, strict=True):
        row = Batch(*row)
        for n in range(length // size):
            span = slice(n * size, (n + 1) * size)
            check_answers(row.tokens[span], row.targets[span], row.loss_weights[span], part.pairs, part.writes)
            assert np.array_equal(row.positions[span], np.arange(size)) and (row.segment_ids[span] == n + 1).all()
        rest = slice(length // size * size, length)
        assert not row.loss_weights[rest].any() and not row.segment_ids[rest].any()
    assert batch.tokens.min() >= 0 and batch.tokens.max() < part.vocab
    if part.filler == "random":
        assert (batch.tokens[:, 2 * part.pairs :] > 0).mean() > 0.9
    else:
        fill = (batch.loss_weights == 0) & (batch.positions >= 2 * part.pairs)
        assert not batch.tokens[fill].any()


@every_case
def test_a_row_is_a_pure_function_of_its_number(case):
    part, length = CASES[case]
    forward, backward = rows(part, length, range(6)), rows(part, length, range(5, -1, -1))
    assert same(forward, Batch(*(field[::-1] for field in backward)))
    assert not same(forward, rows(part, length, range(6), seed=1))


def test_rows_are_these_forever():
    """Recorded: a change of NumPy or of the code that changes the data is seen."""
    row = MQAR(vocab=16, pairs=3).rows(length=16, tokenizer=Ids(16), seed=0)[7]
    assert row.tokens.tolist() == RECORDED


RECORDED = [5, 13, 7, 9, 2, 12, 7, 0, 5, 0, 0, 0, 0, 0, 2, 0]


def test_splits_are_disjoint():
    train, test = (rows(MQAR(vocab=256, pairs=8, split=s), 64, range(500)).tokens for s in ("train", "test"))
    assert not {row.tobytes() for row in train} & {row.tobytes() for row in test}


def test_power_law():
    """Slots are drawn in proportion to i^(alpha - 1): the first query of each row shows it, without replacement."""
    part, slots = MQAR(vocab=64, pairs=1, alpha=0.5), np.arange(1, 10)
    batch = rows(part, 20, range(4000))
    found = np.bincount((np.argmax(batch.loss_weights, axis=1) - 2) // 2, minlength=9) / 4000
    want = slots**-0.5 / (slots**-0.5).sum()
    assert np.abs(found - want).max() < 4 * np.sqrt(want.max() / 4000)


@every_case
def test_distances_against_a_search(case):
    part, length = CASES[case]
    batch = rows(part, length, range(10))
    for row, found in zip(zip(*batch, strict=True), distances(batch), strict=True):
        tokens, targets, _, segments, weights = row
        want = []
        for q in np.flatnonzero(weights):
            s = q - 1
            while not (tokens[s] == targets[q] and tokens[s - 1] == tokens[q] and segments[s] == segments[q]):
                s -= 1
            want.append(q - s)
        assert found.tolist() == want
    assert within(batch, 0) == 0 and within(batch, length) == 1


def test_published_windows():
    """What a window reaches in the data of Based (arXiv 2402.18668), as read off its figure 2."""
    published = {8: 0.07, 32: 0.31, 128: 0.65, 512: 0.94}
    cells = [(64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)]
    data = [rows(MQAR(vocab=8192, pairs=n, filler="random", split="test"), length, range(16)) for length, n in cells]
    for window, share in published.items():
        assert np.mean([within(batch, window - 1) for batch in data]) == pytest.approx(share, abs=0.025)


def test_a_part_of_a_mixture():
    data = Data(length=32, batch=4, tokenizer=Ids(64), mixture=(MQAR(vocab=64, pairs=4),), threads=0)
    stream = batches(data, seed=3)
    first, state, second = next(stream), stream.get_state(), next(stream)
    assert first.tokens.shape == (4, 32) and first.loss_weights.sum() == 16
    assert same(first, rows(MQAR(vocab=64, pairs=4), 32, range(4), seed=3))
    again = batches(data, seed=3)
    again.set_state(state)
    assert same(next(again), second)


@pytest.mark.parametrize("make, say", [
    (lambda: MQAR(vocab=64, pairs=0), "MQAR.pairs: 0"),
    (lambda: MQAR(vocab=20, pairs=10), "MQAR.vocab: 20: has 9 keys for 10 pairs; 22 or more"),
    (lambda: MQAR(vocab=64, pairs=4, writes=3), "MQAR.writes: 3: does not divide pairs = 4"),
    (lambda: MQAR(vocab=64, pairs=4, writes=0), "MQAR.writes: 0"),
    (lambda: MQAR(vocab=64, pairs=4, length=15), "MQAR.length: 15"),
    (lambda: MQAR(vocab=64, pairs=4, length=17), "MQAR.length: 17"),
    (lambda: MQAR(vocab=64, pairs=4, alpha=0.0), "MQAR.alpha: 0.0"),
    (lambda: MQAR(vocab=64, pairs=4, filler="zeros"), "MQAR.filler: zeros: unknown; one of zero, random"),
    (lambda: MQAR(vocab=64, pairs=4, split="heldout"), "MQAR.split: heldout"),
    (lambda: MQAR(vocab=512, pairs=4).rows(length=64, tokenizer=Bytes(), seed=0), "MQAR.vocab: 512"),
    (lambda: MQAR(vocab=64, pairs=4).rows(length=14, tokenizer=Bytes(), seed=0), "data.length: 14"),
    (lambda: MQAR(vocab=64, pairs=4, length=32).rows(length=30, tokenizer=Bytes(), seed=0), "MQAR.length: 32"),
    (lambda: Ids(1), "Ids.vocab_size: 1"),
    (lambda: Ids(9).encode("3 x"), "text: 'x'"),
    (lambda: Ids(9).encode("3 9"), "ids: 9"),
])  # fmt: skip
def test_bad_input(make, say):
    with pytest.raises(BadInput) as error:
        make()
    assert say in str(error.value)


def test_ids_as_text():
    ids = Ids(300)
    text = " 7 299\n0 12"
    assert ids.encode(text).tolist() == [7, 299, 0, 12] and ids.encode(text).dtype == np.int32
    assert ids.decode([7, 299, 0, 12]) == "7 299 12" and ids.encode("").shape == (0,)
    assert [text[a:b] for a, b in ids.offsets(text)] == ["7", "299", "0", "12"]
    assert ids.offsets("").shape == (0, 2) and ids.identity != Ids(301).identity

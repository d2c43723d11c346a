"""Packing against slow constructions, and the laws of rows: pure, complete, labelled by what follows."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from jaxlong.core.types import BadInput
from jaxlong.data import Bytes, Packed, Source, Stdlib, Tokenizer
from jaxlong.data import documents as documents_module
from jaxlong.data.documents import Documents, documents
from jaxlong.data.packing import PACKINGS, PackedRows, Piece, fill_row, first_fit, split, stable_permutation


@dataclass(frozen=True)
class Numbered(Source):
    """Document i is "a b": the ids a .. b - 1, so that every token of the corpus has an id of its own."""

    lengths: tuple[int, ...]

    @property
    def identity(self) -> str:
        return f"numbered {self.lengths}"

    @property
    def _count(self) -> int:
        return len(self.lengths)

    def _read(self, i: int) -> str:
        start = 1 + sum(self.lengths[:i])
        return f"{start} {start + self.lengths[i]}"


@dataclass(frozen=True)
class Ranges:
    """The tokenizer of `Numbered`: ids 1, 2, ...; 0 ends a document."""

    vocab_size: ClassVar[int] = 1 << 20
    eos: ClassVar[int] = 0
    identity: ClassVar[str] = "ranges"

    def encode(self, text: str) -> np.ndarray:
        start, stop = map(int, text.split())
        return np.arange(start, stop, dtype=np.int32)

    def decode(self, ids) -> str:
        return str(list(ids))

    def offsets(self, text: str) -> np.ndarray:
        return np.zeros((len(self.encode(text)), 2), int)


LENGTHS = (
    (5, 1, 0, 12, 3, 7, 7, 40, 2, 0, 0, 9),
    (100,),
    (7, 7, 7, 7),  # with eos, exactly a row of 8 each
    (8, 15, 16, 31, 1),
    tuple(np.random.RandomState(0).geometric(0.05, size=60).tolist()),
)
T = 8


def rows_of(lengths, packing, *, seed=0, length=T) -> PackedRows:
    return PackedRows(Documents(Numbered(lengths), Ranges()), length=length, packing=packing, seed=seed)


def test_registry_and_protocol():
    assert list(PACKINGS) == ["split", "first_fit"] and isinstance(Ranges(), Tokenizer)


# -- the algorithms, against slow ones -------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", LENGTHS)
def test_split_is_one_line_of_documents_cut_in_rows(lengths):
    sizes = np.array(lengths) + 1
    order = np.random.RandomState(1).permutation(len(sizes))
    line = [(int(d), t) for d in order for t in range(sizes[d])]
    packing = split(sizes, T)
    pieces = packing.epoch(order)
    assert packing.rows == (len(line) + T - 1) // T
    for row in np.random.RandomState(2).permutation(packing.rows):
        got = [(d, t) for d, start, stop in pieces(int(row)) for t in range(start, stop)]
        assert got == line[row * T : (row + 1) * T]
        assert all(piece.stop > piece.start for piece in pieces(int(row)))


@pytest.mark.parametrize("lengths", LENGTHS)
def test_first_fit_is_first_fit(lengths):
    """Same bins as the quadratic algorithm, longest piece first."""
    sizes = [n + 1 for n in lengths]
    full = [[Piece(d, k * T, k * T + T)] for d, n in enumerate(sizes) for k in range(n // T)]
    rests = sorted((Piece(d, n - n % T, n) for d, n in enumerate(sizes) if n % T), key=lambda p: p.start - p.stop)
    bins: list[list[Piece]] = []
    for piece in rests:
        size = piece.stop - piece.start
        home = next((b for b in bins if sum(p.stop - p.start for p in b) + size <= T), None)
        if home is None:
            bins.append(home := [])
        home.append(piece)
    packing = first_fit(np.array(sizes), T)
    pieces = packing.epoch(np.random.RandomState(3).permutation(len(sizes)))
    assert sorted(map(tuple, full + bins)) == sorted(tuple(pieces(r)) for r in range(packing.rows))


def test_first_fit_is_not_worse_than_naive():
    rng = np.random.RandomState(4)
    for _ in range(30):
        sizes, length = rng.randint(1, 50, size=rng.randint(1, 200)), int(rng.randint(10, 60))
        rows = first_fit(sizes, length).rows
        cut = [min(length, n - k) for n in sizes for k in range(0, n, length)]
        in_turn, room = 0, 0
        for size in cut:  # next-fit: open a new row when the piece does not fit the last one
            if size > room:
                in_turn, room = in_turn + 1, length
            room -= size
        assert -(-sum(cut) // length) <= rows <= min(in_turn, len(cut))


def test_first_fit_keeps_the_documents_of_neighbours_together():
    """Full rows of a long document follow one another before the shuffle, so that it is tokenized once."""
    sizes = np.full(20, 5 * T)
    order = np.random.RandomState(5).permutation(20)
    pieces = first_fit(sizes, T).epoch(order)
    assert [pieces(r)[0].document for r in range(100)] == np.repeat(order, 5).tolist()


def test_fill_row_by_hand():
    """Documents 11 12 13 0 and 21 22 23 24 25 0: the end of the first, the start of the second, padding."""
    ids = [np.array([11, 12, 13, 0], np.int32), np.array([21, 22, 23, 24, 25, 0], np.int32)]
    row = fill_row([Piece(0, 1, 4), Piece(1, 0, 3)], ids.__getitem__, length=8, pad=99)
    assert row.tokens.tolist() == [12, 13, 0, 21, 22, 23, 99, 99]
    assert row.targets.tolist() == [13, 0, 99, 22, 23, 24, 99, 99]
    assert row.positions.tolist() == [0, 1, 2, 0, 1, 2, 0, 0]
    assert row.segment_ids.tolist() == [1, 1, 1, 2, 2, 2, 0, 0]
    assert row.loss_weights.tolist() == [1, 1, 0, 1, 1, 1, 0, 0]
    assert [f.dtype for f in row] == [np.int32] * 4 + [np.float32]


# -- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_rows_of_an_epoch_hold_each_token_once_with_what_follows(lengths, packing):
    """Every id occurs once, so each label can be checked without knowing the order."""
    rows = rows_of(lengths, packing)
    total = sum(lengths)
    last = set(np.cumsum(lengths).tolist())  # the last id of each document, labelled by eos
    for epoch in range(3):
        tokens, labels = [], []
        for i in range(epoch * rows.rows, (epoch + 1) * rows.rows):
            row = rows[i]
            assert all(field.shape == (T,) for field in row)
            document_at = row.segment_ids > 0
            assert (np.diff(document_at.astype(int)) <= 0).all(), "padding only at the end"
            assert row.segment_ids[0] == 1 and set(np.diff(row.segment_ids[document_at])) <= {0, 1}
            for segment in range(1, row.segment_ids.max() + 1):
                inside = row.segment_ids == segment
                ids, target, weight = row.tokens[inside], row.targets[inside], row.loss_weights[inside]
                assert row.positions[inside].tolist() == list(range(len(ids)))
                assert (np.diff(ids[ids > 0]) == 1).all() and 0 not in ids[:-1]
                for t, (token, label) in enumerate(zip(ids.tolist(), target.tolist(), strict=True)):
                    assert weight[t] == (token != 0)
                    if token:
                        assert label == (0 if token in last else token + 1)
            assert (row.loss_weights[~document_at] == 0).all() and (row.tokens[~document_at] == 0).all()
            tokens += row.tokens[document_at].tolist()
            labels += row.targets[row.loss_weights > 0].tolist()
        assert sorted(t for t in tokens if t) == list(range(1, total + 1)) and tokens.count(0) == len(lengths)
        firsts = {1 + sum(lengths[:i]) for i, n in enumerate(lengths) if n}
        assert sorted(label for label in labels if label) == sorted(set(range(1, total + 1)) - firsts)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_only_the_last_row_of_split_has_padding(lengths):
    rows = rows_of(lengths, "split")
    padding = [n for i in range(rows.rows) if (n := int((rows[i].segment_ids == 0).sum()))]
    total = sum(lengths) + len(lengths)
    assert padding == ([-total % T] if total % T else [])


def same(a, b) -> bool:
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_row_is_a_pure_function_of_its_number(packing):
    lengths = LENGTHS[-1]
    rows = rows_of(lengths, packing)
    inorder = [rows[i] for i in range(3 * rows.rows)]
    again = rows_of(lengths, packing)
    for i in np.random.RandomState(6).permutation(3 * rows.rows):
        assert same(again[i], inorder[i])
    assert same(rows[10**12], again[10**12]), "epochs without end, none of them in memory"


@pytest.mark.parametrize("lengths", [LENGTHS[-1], (100,)])
@pytest.mark.parametrize("packing", PACKINGS)
def test_seeds_and_epochs_differ(packing, lengths):
    def first_epoch(rows, epoch=0):
        return np.concatenate([rows[epoch * rows.rows + i].tokens for i in range(rows.rows)]).tolist()

    rows = rows_of(lengths, packing)
    orders = [first_epoch(rows), first_epoch(rows, 1), first_epoch(rows_of(lengths, packing, seed=1))]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


SCRIPT = """
import hashlib
from jaxlong.data import Ascii, Packed, Stdlib
for packing in ("split", "first_fit"):
    rows = Packed(Stdlib("heldout"), packing=packing).rows(length=100, tokenizer=Ascii(), seed=7)
    print(hashlib.sha256(b"".join(f.tobytes() for i in (0, 5, 10**6) for f in rows[i])).hexdigest())
"""


def test_another_process_makes_the_same_rows(capsys):
    exec(SCRIPT, {})
    here = capsys.readouterr().out
    environment = {"PYTHONHASHSEED": "123", "PATH": "", "JAX_PLATFORMS": "cpu"}
    there = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=True)
    assert here == there.stdout and len(set(here.split())) == 2


def test_the_permutation_is_pinned():
    """A checkpoint of today must meet the same order tomorrow."""
    assert stable_permutation(10, "jaxlong").tolist() == [8, 9, 2, 6, 0, 7, 1, 5, 4, 3]
    assert sorted(stable_permutation(1000, "x").tolist()) == list(range(1000))
    assert Counter(tuple(stable_permutation(3, str(i)).tolist()) for i in range(600)).most_common()[-1][1] > 60


@pytest.mark.parametrize("packing, digest", [("split", "545de1c730da91e9"), ("first_fit", "713eafe3bbd396d1")])
def test_the_rows_are_pinned(monkeypatch, packing, digest):
    """Two epochs of several windows: a change of order would break every checkpoint in mid-training."""
    monkeypatch.setattr("jaxlong.data.packing.KEPT_TOKENS", 10 * T)
    rows = rows_of(LENGTHS[-1], packing)
    tokens = np.stack([rows[i].tokens for i in range(2 * rows.rows)])
    assert hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest()[:16] == digest


def test_windows_shuffle_within_the_tokens_kept(monkeypatch):
    """With memory for 80 tokens, ten rows of eight: the rows of a window hold a run of the documents' order."""
    monkeypatch.setattr("jaxlong.data.packing.KEPT_TOKENS", 80)
    rows = rows_of((39,) * 50, "split")
    assert rows.rows == 250
    for window in range(25):
        ids = np.concatenate([rows[10 * window + k].tokens for k in range(10)])
        assert len({(t - 1) // 39 for t in ids[ids > 0].tolist()}) == 2, "ten rows are two documents of forty tokens"
    order = [int(rows[i].tokens[0]) for i in range(250)]
    patterns = {tuple(np.argsort(order[10 * w : 10 * w + 10]).tolist()) for w in range(25)}
    assert len(patterns) > 20, "each window in an order of its own"


def test_documents_forgets_and_makes_again(monkeypatch):
    monkeypatch.setattr(documents_module, "KEPT_TOKENS", 20)
    corpus = Documents(Numbered((9, 9, 30, 9)), Ranges())
    assert corpus.lengths.tolist() == [10, 10, 31, 10]
    for i in (2, 0, 1, 2, 3, 3, 0):
        start = 1 + sum((9, 9, 30, 9)[:i])
        assert corpus(i).tolist() == [*range(start, start + len(corpus(i)) - 1), 0]
        assert corpus._kept._size == sum(map(len, corpus._kept._arrays.values())) <= 31


def test_a_corpus_that_fits_in_memory_is_tokenized_once(monkeypatch):
    calls, encode = [], Ranges.encode
    monkeypatch.setattr(Ranges, "encode", lambda self, text: (calls.append(text), encode(self, text))[1])
    rows = rows_of(LENGTHS[-1], "split")
    for i in range(2 * rows.rows):
        rows[i]
    assert len(calls) == len(LENGTHS[-1])


def test_documents_are_shared_by_contents():
    assert documents(Stdlib("heldout"), Bytes()) is documents(Stdlib("heldout"), Bytes())


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_corpus_shorter_than_a_row(packing):
    assert rows_of((7,), packing).rows == 1
    with pytest.raises(BadInput, match=r"data.length: 8: the corpus has only 7 tokens; at most 7"):
        rows_of((6,), packing)


def test_ids_outside_the_vocabulary_never_reach_a_row():
    with pytest.raises(BadInput, match=r"tokenizer.encode: 1048576: token id outside the vocabulary"):
        Documents(Numbered((1 << 20,)), Ranges())


def test_unknown_packing():
    with pytest.raises(BadInput, match=r"Packed.packing: best_fit: unknown packing; one of split, first_fit"):
        Packed(packing="best_fit")

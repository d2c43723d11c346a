"""Rows of equal length from documents of any length, with random access.

Row `i` of an endless stream is a pure function of (corpus, seed, i): nothing is read in order, so a restart reads
nothing again, and any number of processes sees the same rows. `i // rows` is the epoch; each epoch takes the documents
in another order and shuffles the rows within windows of as many tokens as `Documents` keeps in memory, so that a
document is tokenized about once an epoch.
"""

from __future__ import annotations

import functools
import hashlib
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
from jaxtyping import Int

from jaxlong.core.types import BadInput, Batch
from jaxlong.data.documents import KEPT_TOKENS, Documents, documents
from jaxlong.data.sources import Source, Stdlib
from jaxlong.data.tokenizers import Tokenizer


class Piece(NamedTuple):
    """Tokens `start <= t < stop` of a document, which lie together in a row."""

    document: int
    start: int
    stop: int


class Packing(NamedTuple):
    """How documents of known lengths fill rows.

    rows: rows in an epoch, the same for each.
    epoch: the order of the documents -> row -> its pieces. Neighbouring rows read neighbouring documents of the order.
    """

    rows: int
    epoch: Callable[[np.ndarray], Callable[[int], list[Piece]]]


def split(lengths: Int[np.ndarray, "N"], length: int) -> Packing:
    """Concatenate and split: all documents in a line, cut every `length` tokens. Only the last row has padding."""
    total = int(lengths.sum())

    def epoch(order: np.ndarray) -> Callable[[int], list[Piece]]:
        ends = np.cumsum(lengths[order])

        def pieces(row: int) -> list[Piece]:
            start, stop = row * length, min((row + 1) * length, total)
            place = int(np.searchsorted(ends, start, side="right"))
            found = []
            while start < stop:
                document, end = int(order[place]), int(ends[place])
                begin, cut = end - int(lengths[document]), min(stop, end)
                found.append(Piece(document, start - begin, cut - begin))
                start, place = cut, place + 1
            return found

        return pieces

    return Packing(-(-total // length), epoch)


def first_fit(lengths: Int[np.ndarray, "N"], length: int) -> Packing:
    """Whole documents side by side: each goes, longest first, into the first row with room for it.

    A document longer than a row is cut into full rows and a rest. Which documents share a row does not change with the
    epoch (the number of rows must not), the order of the rows does.
    """
    full, rest = np.divmod(lengths, length)
    alone = np.repeat(np.arange(len(lengths)), full)
    longest_first = np.argsort(-rest, kind="stable")
    shared = longest_first[rest[longest_first] > 0]
    bins = len(alone) + _first_bins(rest[shared].tolist(), length)

    document = np.concatenate([alone, shared])
    part = np.arange(len(alone)) - np.repeat(np.cumsum(full) - full, full)
    start = np.concatenate([part, full[shared]]) * length
    stop = start + np.concatenate([np.full(len(alone), length), rest[shared]])
    bin_of = np.concatenate([np.arange(len(alone)), bins])
    members = np.argsort(bin_of, kind="stable")
    rows = int(bin_of.max()) + 1
    edges = np.searchsorted(bin_of[members], np.arange(rows + 1))

    def epoch(order: np.ndarray) -> Callable[[int], list[Piece]]:
        rank = np.argsort(order)
        by_document = np.argsort(rank[document[members[edges[:-1]]]], kind="stable")

        def pieces(row: int) -> list[Piece]:
            chosen = by_document[row]
            inside = members[edges[chosen] : edges[chosen + 1]]
            return [Piece(int(document[p]), int(start[p]), int(stop[p])) for p in inside]

        return pieces

    return Packing(rows, epoch)


def _first_bins(sizes: Sequence[int], capacity: int) -> Int[np.ndarray, "n"]:
    """The bin of each size: the first one opened that has room (n log n: a tree of the largest free space)."""
    leaves = 1 << max(len(sizes) - 1, 0).bit_length()
    free = [capacity] * (2 * leaves)
    bins = np.zeros(len(sizes), np.int64)
    for i, size in enumerate(sizes):
        node = 1
        while node < leaves:
            node *= 2
            node += free[node] < size
        bins[i] = node - leaves
        free[node] -= size
        while node > 1:
            node //= 2
            free[node] = max(free[2 * node], free[2 * node + 1])
    return bins


PACKINGS: dict[str, Callable[..., Packing]] = {"split": split, "first_fit": first_fit}


def fill_row(pieces: Sequence[Piece], read: Callable[[int], np.ndarray], *, length: int, pad: int) -> Batch:
    """One row of a batch; each field `[T]`, T = `length`.

    The target of a token is the token after it in its document, also where the row ends before that document does. Only
    the end of a document has none: weight 0, as for padding. Segments count from 1 and positions from 0 in each piece.
    """
    tokens, targets = np.full(length, pad, np.int32), np.full(length, pad, np.int32)
    positions, segments = np.zeros(length, np.int32), np.zeros(length, np.int32)
    weights, at = np.zeros(length, np.float32), 0
    for segment, (document, start, stop) in enumerate(pieces, 1):
        ids, size = read(document), stop - start
        labels = ids[start + 1 : stop + 1]
        tokens[at : at + size] = ids[start:stop]
        targets[at : at + len(labels)] = labels
        weights[at : at + len(labels)] = 1
        positions[at : at + size] = np.arange(size)
        segments[at : at + size] = segment
        at += size
    return Batch(tokens, targets, positions, segments, weights)


def stable_permutation(n: int, name: str) -> Int[np.ndarray, "n"]:
    """A permutation of `n` drawn from `name`, the same with any version of NumPy.

    RandomState is frozen by NumPy's policy (NEP 19); the streams of newer generators may change between releases.
    """
    words = np.frombuffer(hashlib.sha256(name.encode()).digest(), "<u4")
    return np.random.RandomState(words).permutation(n)


class PackedRows:
    """The rows of a corpus over endless epochs; a random-access source for grain.

    Raises:
        BadInput: the corpus has fewer tokens than one row.
    """

    def __init__(self, corpus: Documents, *, length: int, packing: str, seed: int):
        tokens = int(corpus.lengths.sum())
        if tokens < length:
            raise BadInput("data.length", length, f"the corpus has only {tokens} tokens", f"at most {tokens}")
        self._corpus, self._length = corpus, length
        self._name = f"{corpus.source.identity}/{seed}"
        self._packing = PACKINGS[packing](corpus.lengths, length)
        self._window_rows = max(1, KEPT_TOKENS // length)
        # The last of each: prefetching reads across the edge between two epochs or windows.
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)
        self._window = functools.lru_cache(maxsize=2)(self._make_window)

    @property
    def rows(self) -> int:
        """Rows in an epoch."""
        return self._packing.rows

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, i: SupportsIndex) -> Batch:
        epoch, row = divmod(operator.index(i), self.rows)
        window, offset = divmod(row, self._window_rows)
        row = window * self._window_rows + int(self._window(epoch, window)[offset])
        pieces = self._epoch(epoch)(row)
        return fill_row(pieces, self._corpus, length=self._length, pad=self._corpus.tokenizer.eos)

    def _make_epoch(self, epoch: int) -> Callable[[int], list[Piece]]:
        order = stable_permutation(len(self._corpus.lengths), f"{self._name}/documents/{epoch}")
        return self._packing.epoch(order)

    def _make_window(self, epoch: int, window: int) -> np.ndarray:
        size = min(self._window_rows, self.rows - window * self._window_rows)
        return stable_permutation(size, f"{self._name}/rows/{epoch}/{window}")


@dataclass(frozen=True)
class Packed:
    """A part of a mixture: the documents of a source, packed.

    Args:
        source: where the documents come from.
        weight: rows of this part for each row of a part of weight 1.
        packing: "split" (no padding, documents cut at row ends) or "first_fit" (documents whole where they fit).
    """

    source: Source = field(default_factory=Stdlib)
    weight: float = 1.0
    packing: str = "split"

    def __post_init__(self) -> None:
        if self.packing not in PACKINGS:
            raise BadInput("Packed.packing", self.packing, "unknown packing", f"one of {', '.join(PACKINGS)}")

    def rows(self, *, length: int, tokenizer: Tokenizer, seed: int) -> PackedRows:
        """Row i of `length` tokens for every i >= 0."""
        return PackedRows(documents(self.source, tokenizer), length=length, packing=self.packing, seed=seed)

    def identity(self) -> dict[str, str | float]:
        """What must be the same for the same rows."""
        return {"source": self.source.identity, "packing": self.packing, "weight": float(self.weight)}

    def describe(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """A few facts to print."""
        corpus = documents(self.source, tokenizer)
        return {
            "source": repr(self.source),
            "corpus": self.source.identity[:12],
            "documents": len(corpus.lengths),
            "tokens": int(corpus.lengths.sum()),
            "packing": self.packing,
            "weight": float(self.weight),
        }

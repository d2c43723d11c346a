"""Multi-query associative recall (MQAR): rows of key-value pairs, and queries that ask for the value of each key.

    k1 v1 k2 v2 ... kN vN  0 0 k2 0 0 0 k1 0 ...      the label at a query is its value; nothing else counts

Papers: Zoology (Arora et al., arXiv 2312.04927), Based (Arora et al., arXiv 2402.18668).
"""

from __future__ import annotations

import hashlib
import operator
import re
import sys
from dataclasses import dataclass
from typing import Any, ClassVar, SupportsIndex

import numpy as np
from jaxtyping import Float64, Int
from numpy.typing import ArrayLike

from jaxlong.core.types import BadInput, Batch
from jaxlong.data.tokenizers import Tokenizer, check_ids

FILLERS = ("zero", "random")
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Ids:
    """For data made of ids: its text is the ids in decimal, "17 5 200"; 0 ends and pads."""

    vocab_size: int
    eos: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.vocab_size < 2:
            raise BadInput("Ids.vocab_size", self.vocab_size, "too small", "2 or more")

    @property
    def identity(self) -> str:
        return f"ids:{self.vocab_size}"

    def encode(self, text: str) -> Int[np.ndarray, "n"]:
        words = text.split()
        wrong = [word for word in words if not re.fullmatch("[0-9]{1,9}", word)]
        if wrong:
            raise BadInput("text", ascii(wrong[0]), "is no token id", f"numbers from 0 to {self.vocab_size - 1}")
        return check_ids(np.array([int(word) for word in words], np.int32), self.vocab_size).astype(np.int32)

    def decode(self, ids: ArrayLike) -> str:
        return " ".join(str(i) for i in check_ids(ids, self.vocab_size) if i != self.eos)

    def offsets(self, text: str) -> Int[np.ndarray, "n 2"]:
        return np.array([found.span() for found in re.finditer(r"\S+", text)], np.int64).reshape(-1, 2)


@dataclass(frozen=True)
class MQAR:
    """A part of a mixture: documents of N pairs and one query for each key.

    Keys are drawn from 1 .. vocab / 2 - 1 and values from vocab / 2 .. vocab - 1, both without replacement. The
    queries stand in slots of two tokens after the pairs; slot i is drawn, without replacement, in proportion to
    i^(alpha - 1).

    Args:
        vocab: ids are below it.
        pairs: N; as many tokens as pairs and queries take must fit.
        writes: values that each key is given, in pairs in any order; the last is the answer. 1 is the published task;
            2 or more also ask whether a memory can replace what it holds. Divides N.
        length: tokens of a document; a row holds as many as fit, packed. None: one as long as the row.
        alpha: 1 asks for all keys equally late; near 0 most are asked for early.
        filler: what stands where no query is: "zero", or "random" ids of the whole vocabulary.
        split: "train" or "test", disjoint random streams.
        weight: rows of this part for each row of a part of weight 1.
    """

    vocab: int
    pairs: int
    writes: int = 1
    length: int | None = None
    alpha: float = 0.01
    filler: str = "zero"
    split: str = "train"
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise BadInput("MQAR.pairs", self.pairs, "nothing to recall", "1 or more")
        if self.writes < 1 or self.pairs % self.writes:
            why = f"does not divide pairs = {self.pairs}"
            raise BadInput("MQAR.writes", self.writes, why, "1, or another divisor")
        if self.vocab < 2 * self.pairs + 2:
            why = f"has {max(self.vocab // 2 - 1, 0)} keys for {self.pairs} pairs"
            raise BadInput("MQAR.vocab", self.vocab, why, f"{2 * self.pairs + 2} or more")
        if self.length is not None:
            self._check_length("MQAR.length", self.length)
        if not 0 < self.alpha < float("inf"):
            raise BadInput("MQAR.alpha", self.alpha, "is no exponent of the power law", "a finite number above 0")
        for name, allowed in (("filler", FILLERS), ("split", SPLITS)):
            if getattr(self, name) not in allowed:
                raise BadInput(f"MQAR.{name}", getattr(self, name), "unknown", f"one of {', '.join(allowed)}")

    def _check_length(self, field: str, length: int) -> None:
        least = 2 * self.pairs + 2 * self.keys
        if length < least or length % 2:
            why = f"{self.pairs} pairs and {self.keys} slots for queries do not fit"
            raise BadInput(field, length, why, f"an even number, {least} or more")

    @property
    def keys(self) -> int:
        """Different keys, and queries, of a document."""
        return self.pairs // self.writes

    def rows(self, *, length: int, tokenizer: Tokenizer, seed: int) -> MQARRows:
        """Row i of `length` tokens for every i >= 0.

        Raises:
            BadInput: documents longer than a row or too short for the pairs, or ids that the tokenizer does not have.
        """
        if tokenizer.vocab_size < self.vocab:
            why = f"the tokenizer has {tokenizer.vocab_size} ids"
            raise BadInput("MQAR.vocab", self.vocab, why, f"at most {tokenizer.vocab_size}, or Ids({self.vocab})")
        size = length if self.length is None else self.length
        if size > length:
            raise BadInput("MQAR.length", size, f"rows have {length} tokens", f"at most {length}")
        self._check_length("data.length" if self.length is None else "MQAR.length", size)
        return MQARRows(self, length=length, size=size, seed=seed)

    def identity(self) -> dict[str, str | int | float]:
        """What must be the same for the same rows."""
        numbers = {"vocab": self.vocab, "pairs": self.pairs, "writes": self.writes, "length": self.length or "row"}
        law = {"alpha": float(self.alpha), "filler": self.filler, "split": self.split, "weight": float(self.weight)}
        return numbers | law

    def describe(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """A few facts to print."""
        return self.identity()


class MQARRows:
    """Endless rows; a random-access source for grain. Row i depends on (part, seed, i) only."""

    def __init__(self, part: MQAR, *, length: int, size: int, seed: int):
        self._part, self._length, self._size, self._count = part, length, size, length // size
        name = hashlib.sha256(f"mqar/{part.split}/{seed}".encode()).digest()
        self._key = np.frombuffer(name[:16], "<u8").copy()
        slots = np.arange(1, (size - 2 * part.pairs) // 2 + 1)
        self._log_odds = (part.alpha - 1) * np.log(slots)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, i: SupportsIndex) -> Batch:
        first = operator.index(i) * self._count
        documents = [self._document(first + n) for n in range(self._count)]
        whole = lambda arrays, dtype: np.concatenate(
            [*arrays, np.zeros(self._length - self._count * self._size)], dtype=dtype, casting="unsafe"
        )
        tokens, targets = zip(*documents, strict=True)
        targets = whole(targets, np.int32)
        return Batch(
            tokens=whole(tokens, np.int32),
            targets=targets,
            positions=whole([np.arange(self._size)] * self._count, np.int32),
            segment_ids=whole([np.full(self._size, n + 1) for n in range(self._count)], np.int32),
            loss_weights=(targets != 0).astype(np.float32),
        )

    def _document(self, i: int) -> tuple[Int[np.ndarray, "T"], Int[np.ndarray, "T"]]:
        """Tokens, and labels that are 0 where there is no query."""
        part, half = self._part, self._part.vocab // 2
        N, K = part.pairs, part.keys
        counts = half - 1, part.vocab - half, len(self._log_odds), self._size, N
        draws = np.split(self._uniform(i, sum(counts)), np.cumsum(counts[:-1]))
        keys, values = 1 + np.argsort(draws[0])[:K], half + np.argsort(draws[1])[:N]
        # The largest of log p + Gumbel noise, in order, are successive draws without replacement.
        queries = 2 * N + 2 * np.argsort(np.log(-np.log(draws[2])) - self._log_odds)[:K]
        key_of_pair = np.arange(N) if part.writes == 1 else np.argsort(draws[4]) % K
        last = np.zeros(K, np.int64)
        np.maximum.at(last, key_of_pair, np.arange(N))

        tokens, targets = np.zeros(self._size, np.int64), np.zeros(self._size, np.int64)
        if part.filler == "random":
            tokens[:] = draws[3] * part.vocab
        tokens[0 : 2 * N : 2], tokens[1 : 2 * N : 2] = keys[key_of_pair], values
        tokens[queries], targets[queries] = keys, values[last]
        return tokens, targets

    def _uniform(self, i: int, count: int) -> Float64[np.ndarray, "n"]:
        """Numbers in (0, 1), from raw words of a counter-based generator: NumPy never changes those."""
        words = np.random.Philox(key=self._key, counter=[0, i, 0, 0]).random_raw(count)
        return ((words >> np.uint64(11)) + 0.5) * 2.0**-53


def distances(batch: Batch) -> list[Int[np.ndarray, "n"]]:
    """For each row, of its queries in order: tokens from the value (the nearest, where several fit) to the query.

    Args:
        batch: of `[B, T]` NumPy arrays.
    """
    return [_row_distances(Batch(*fields)) for fields in zip(*batch, strict=True)]


def _row_distances(row: Batch) -> Int[np.ndarray, "n"]:
    (queries,) = np.nonzero(row.loss_weights)
    place = np.arange(len(row.tokens))
    before = np.concatenate([[-1], row.tokens[:-1]])
    fits = (row.tokens == row.targets[queries, None]) & (before == row.tokens[queries, None])
    fits &= (place < queries[:, None]) & (row.segment_ids == row.segment_ids[queries, None])
    return queries - np.where(fits, place, -sys.maxsize // 2).max(axis=1)


def within(batch: Batch, reach: int) -> float:
    """The share of a row's queries whose value is at most `reach` tokens back, averaged over rows.

    What a model that sees no farther can answer, besides by luck.
    """
    return float(np.mean([np.mean(found <= reach) for found in distances(batch)]))

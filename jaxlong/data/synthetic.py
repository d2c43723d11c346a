"""Training rows from the tasks that evaluation asks.

A task is `(random.Random, length in tokens, tokenizer) -> Example(prompt, answers, meta)`. Training draws from the
streams `train/{seed}/{i}`, evaluation from `eval/...`: the same task in disjoint streams.
"""

from __future__ import annotations

import dataclasses
import operator
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Bool

from jaxlong.core.types import BadInput, Batch
from jaxlong.data.documents import with_end
from jaxlong.data.packing import Piece, fill_row
from jaxlong.data.tokenizers import Tokenizer

Task = Callable[[random.Random, int, Any], Any]
"""Gives an object with `prompt: str`, `answers: tuple[str, ...]` and `meta: dict`.

`meta["spans"]`, if there, holds the (start, end) characters of `prompt + answers[0]` that are answers; without it,
`answers[0]` is.
"""


@dataclass(frozen=True)
class Samples:
    """A part of a mixture: samples of a task, `prompt + answers[0]`, packed as documents and padded.

    Args:
        task: a callable; a frozen dataclass or a function of a module, so that it is known again after a restart.
        weight: rows of this part for each row of a part of weight 1.
        text_weight: weight in the loss of a token that is no answer.
        answer_weight: weight in the loss of a token of an answer.
        length: tokens of a sample; a row holds as many as fit. None: one sample as long as the row.
    """

    task: Task
    weight: float = 1.0
    text_weight: float = 1.0
    answer_weight: float = 1.0
    length: int | None = None

    def __post_init__(self) -> None:
        for name in ("text_weight", "answer_weight"):
            value = getattr(self, name)
            if not 0.0 <= value < float("inf"):
                raise BadInput(f"Samples.{name}", value, "not a weight", "a finite number, at least 0")
        if self.text_weight == self.answer_weight == 0:
            raise BadInput("Samples.answer_weight", 0, "text_weight is 0 too: nothing to learn", "a number above 0")
        if self.length is not None and self.length < 2:
            raise BadInput("Samples.length", self.length, "too short for a sample", "2 or more, or None")

    def rows(self, *, length: int, tokenizer: Tokenizer, seed: int) -> SampleRows:
        """Row i of `length` tokens for every i >= 0."""
        return SampleRows(self, length=length, tokenizer=tokenizer, seed=seed)

    def identity(self) -> dict[str, str | int | float]:
        """What must be the same for the same rows."""
        return {
            "task": name_of(self.task),
            "weight": float(self.weight),
            "text_weight": float(self.text_weight),
            "answer_weight": float(self.answer_weight),
            "length": self.length or "row",
        }

    def describe(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """A few facts to print."""
        return self.identity()


class SampleRows:
    """Endless rows of a task; a random-access source for grain. Row i depends on (samples, seed, i) only.

    Raises:
        BadInput: samples longer than a row.
    """

    def __init__(self, samples: Samples, *, length: int, tokenizer: Tokenizer, seed: int):
        size = samples.length or length
        if size > length:
            raise BadInput("Samples.length", size, f"rows have {length} tokens", f"at most {length}")
        self._samples, self._length, self._tokenizer, self._seed = samples, length, tokenizer, seed
        self._size, self._count = size, length // size

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, i: SupportsIndex) -> Batch:
        """Row i. Raises BadInput where a sample is longer than its share of the row."""
        first = operator.index(i) * self._count
        made = [self._sample(first + n) for n in range(self._count)]
        ids = [ids for ids, _ in made]
        pieces = [Piece(n, 0, min(len(tokens), self._size)) for n, tokens in enumerate(ids)]
        row = fill_row(pieces, ids.__getitem__, length=self._length, pad=self._tokenizer.eos)
        weights = np.ones(self._length, np.float32)
        labels = np.concatenate([labels[: piece.stop] for (_, labels), piece in zip(made, pieces, strict=True)])
        weights[: len(labels)] = labels
        return row._replace(loss_weights=row.loss_weights * weights)

    def _sample(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample i: its ids and eos `[n + 1]`, and the weight of the label of each."""
        example = self._samples.task(random.Random(f"train/{self._seed}/{i}"), self._size, self._tokenizer)
        text = example.prompt + example.answers[0]
        ids = with_end(self._tokenizer, text)
        if len(ids) - 1 > self._size:
            why = f"{name_of(self._samples.task)} made {len(ids) - 1} tokens in sample {i}"
            field = "data.length" if self._samples.length is None else "Samples.length"
            raise BadInput(field, self._size, why, "longer samples, or a smaller task")
        return ids, self._label_weights(text, example, len(ids))

    def _label_weights(self, text: str, example: Any, count: int) -> np.ndarray:
        """The weight of each label: it is worth what its token is, so the answer starts one place early."""
        spans = example.meta.get("spans", ((len(example.prompt), len(text)),))
        answers = covered(self._tokenizer.offsets(text), spans, len(text))
        weights = np.full(count, self._samples.text_weight, np.float32)
        weights[: len(answers) - 1][answers[1:]] = self._samples.answer_weight
        return weights


def covered(offsets: np.ndarray, spans: Any, characters: int) -> Bool[np.ndarray, "n"]:
    """Which tokens share a character with a span.

    Args:
        offsets: `[n, 2]` the characters of each token.
        spans: (start, end) pairs of characters.
        characters: length of the text.

    Raises:
        BadInput: a span outside the text.
    """
    inside = np.zeros(len(offsets), bool)
    for start, end in spans:
        if not 0 <= start <= end <= characters:
            raise BadInput("meta.spans", (start, end), "outside the text", f"characters from 0 to {characters}")
        inside |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    return inside


def name_of(value: Any) -> str:
    """A name of a task or a field of one, equal in every process; a corpus is named by its contents."""
    if isinstance(getattr(value, "identity", None), str):
        return f"{type(value).__name__}:{value.identity}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ", ".join(f"{f.name}={name_of(getattr(value, f.name))}" for f in dataclasses.fields(value))
        return f"{type(value).__name__}({fields})"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(name_of, value))})"
    if " at 0x" in repr(value):  # an address is another one after a restart
        return getattr(value, "__qualname__", type(value).__qualname__)
    return repr(value)

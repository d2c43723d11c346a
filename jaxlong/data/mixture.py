"""Batches from a weighted mixture, on grain, with a state that knows which data it belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np

from jaxlong.core.types import BadInput, Batch
from jaxlong.data.packing import Packed
from jaxlong.data.tokenizers import Bytes, Tokenizer


@runtime_checkable
class Part(Protocol):
    """A part of a mixture: Packed, Samples, or your own."""

    weight: float

    def rows(self, *, length: int, tokenizer: Tokenizer, seed: int) -> grain.sources.RandomAccessDataSource[Batch]:
        """Endless rows with random access, each field `[T]`; `len` is `sys.maxsize`."""

    def identity(self) -> dict[str, str | int | float]:
        """What must be the same for the same rows; JSON values."""

    def describe(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """A few facts to print."""


@dataclass(frozen=True)
class Data:
    """What a run trains on.

    Args:
        length: tokens in a row, T.
        batch: rows in a batch over all processes, B.
        tokenizer: shared by all parts.
        mixture: the parts; rows are drawn in proportion to their weights, in a fixed pattern.
        threads: threads that make batches ahead of use; 0 makes each when it is asked for. No effect on the rows.

    Raises:
        BadInput: a value that cannot be.
    """

    length: int = 128
    batch: int = 32
    tokenizer: Tokenizer = field(default_factory=Bytes)
    mixture: tuple[Part, ...] = field(default_factory=lambda: (Packed(),))
    threads: int = 1

    def __post_init__(self) -> None:
        for name, least in (("length", 2), ("batch", 1), ("threads", 0)):
            if getattr(self, name) < least:
                raise BadInput(f"data.{name}", getattr(self, name), "too small", f"an integer, at least {least}")
        if not self.mixture:
            raise BadInput("data.mixture", "()", "no part", "at least one of Packed(...), Samples(...)")
        for i, part in enumerate(self.mixture):
            if not 0.0 < part.weight < float("inf"):
                raise BadInput(f"data.mixture.{i}.weight", part.weight, "not a weight", "a finite number above 0")


class Batches(Iterator[Batch]):
    """Batch after batch without end: NumPy arrays `[b, T]`, one share of each global batch.

    `get_state()` is JSON: how many batches were handed out (whatever is prefetched), and what they were made of.
    """

    def __init__(self, dataset: grain.IterDataset, identity: dict[str, Any]):
        self._batches, self._identity, self._next = iter(dataset), identity, 0

    def __next__(self) -> Batch:
        try:
            batch = next(self._batches)
        except BaseException:
            # An interrupt while waiting would leave the prefetched batches one ahead of the count.
            self._batches.set_state({"next_index": self._next})
            raise
        self._next += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """`{"next_index": batches handed out, "identity": {field: value}}`."""
        return {"next_index": self._next, "identity": dict(self._identity)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`: the next batch is the one that followed it.

        Raises:
            BadInput: the state belongs to other data, or is none.
        """
        index, trained = state.get("next_index"), state.get("identity")
        if not isinstance(index, int) or index < 0 or not isinstance(trained, dict):
            raise BadInput("data.state", state, "not the state of an iterator", "what get_state() gave")
        for name in (*self._identity, *trained):
            here, there = self._identity.get(name, "nothing"), trained.get(name, "nothing")
            if here != there:
                advice = "go on with the same data, or start a new run"
                raise BadInput(name, here, f"the checkpoint was trained with {there}", advice)
        self._batches.set_state({"next_index": index})
        self._next = index

    def close(self) -> None:
        """Stop the threads; afterwards no batch can be taken."""
        self._batches.close()


def batches(data: Data, *, seed: int, share: int = 0, shares: int = 1) -> Batches:
    """An endless iterator over `data`.

    The global batch n is the same for any number of shares: share s of S has its rows `s B/S <= b < (s+1) B/S`.
    Its state is that of all shares, and serves any number of them.

    Args:
        data: what to train on.
        seed: decides the order of documents, of rows, and the synthetic samples.
        share: s, the rows that this process reads (`jaxlong.parallel.mesh.row_share`).
        shares: S.

    Raises:
        BadInput: a corpus, task or tokenizer that cannot make these rows, found by making the first row of each part.
    """
    if not 0 <= share < shares:
        raise BadInput("share", share, "no such share of the rows", f"from 0 to {shares - 1}")
    if data.batch % shares:
        why = f"does not divide over the {shares} shares that processes read"
        raise BadInput("data.batch", data.batch, why, f"a multiple of {shares}")
    parts = [part.rows(length=data.length, tokenizer=data.tokenizer, seed=seed) for part in data.mixture]
    for part in parts:
        part[0]
    rows = grain.MapDataset.mix([grain.MapDataset.source(part) for part in parts], [p.weight for p in data.mixture])
    own = rows.batch(data.batch // shares, drop_remainder=True, batch_fn=_stack)[share::shares]
    ahead = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=2 * data.threads)
    return Batches(own.to_iter_dataset(ahead), identity(data, seed))


def _stack(rows: Sequence[Batch]) -> Batch:
    return Batch(*map(np.stack, zip(*rows, strict=True)))


def identity(data: Data, seed: int) -> dict[str, Any]:
    """Everything that decides the batches, by the name of its field; JSON values."""
    parts = {
        f"data.mixture.{i}.{field}": value
        for i, part in enumerate(data.mixture)
        for field, value in {"part": type(part).__name__, **part.identity()}.items()
    }
    return {
        "data.seed": seed,
        "data.length": data.length,
        "data.batch": data.batch,
        "data.tokenizer": data.tokenizer.identity,
        **parts,
    }


def describe(data: Data) -> dict[str, Any]:
    """A few facts to print before training: hashes and sizes of each corpus; reads it whole."""
    return {
        "length": data.length,
        "batch": data.batch,
        "tokenizer": data.tokenizer.identity,
        "mixture": [{"part": type(part).__name__, **part.describe(data.tokenizer)} for part in data.mixture],
    }

"""Perplexity of long documents: sliding windows, two ways to average, and loss by position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxlong.core.types import BadInput
from jaxlong.evals.base import LanguageModel
from jaxlong.evals.records import append_lines, read_lines


class Scored(NamedTuple):
    """Tokens of all documents, each scored once: its loss in nats, and the window that scored it."""

    nll: Float[np.ndarray, "N"]
    window: Int[np.ndarray, "N"]


class Window(NamedTuple):
    """Tokens `start` to `end` of a document, of which those from `scored` on have not been scored before."""

    document: int
    start: int
    scored: int
    end: int


@dataclass(frozen=True)
class Loss:
    """One measured loss, a JSON line of kind "loss".

    Fields:
        name: of the text.    window, stride: of the sliding windows, in tokens.    average: a name in AVERAGES.
        nll: nats a token, so averaged.    tokens, windows: how many were scored.
        start, end: tokens of context before the scored tokens, if this is one bucket of positions.
        model: name of what was evaluated.
    """

    kind: ClassVar[str] = "loss"

    name: str
    window: int
    stride: int
    average: str
    nll: float
    tokens: int
    windows: int
    start: int | None = None
    end: int | None = None
    model: str = ""

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.nll))


def save_losses(losses: Sequence[Loss], path: str | Path) -> None:
    """Add the losses to the JSON lines at `path`, atomically."""
    append_lines(path, ({"kind": Loss.kind} | asdict(loss) for loss in losses))


def load_losses(path: str | Path) -> list[Loss]:
    """Read the losses among the JSON lines at `path`. Raises BadInput for no file, or a line that is no record."""
    return read_lines(path, Loss)


def token_mean(scored: Scored) -> float:
    """Mean over tokens: every token weighs the same."""
    return float(np.mean(scored.nll))


def window_mean(scored: Scored) -> float:
    """Mean of the means of windows (YaRN's script, arXiv 2309.00071): the first, long one weighs as much as any."""
    counts = np.bincount(scored.window)
    sums = np.bincount(scored.window, weights=scored.nll)
    return float(np.mean(sums[counts > 0] / counts[counts > 0]))


AVERAGES: Mapping[str, Callable[[Scored], float]] = {"token": token_mean, "window": window_mean}


def perplexity(
    lm: LanguageModel,
    documents: Sequence[np.ndarray],
    *,
    window: int,
    stride: int,
    average: str = "token",
    bos: int | None = None,
    batch: int = 32,
    name: str = "",
    model: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Loss:
    """Sliding-window loss of documents, in nats a token; `.perplexity` is its exponential.

    Windows of `window` tokens start every `stride` tokens, and each token is scored once, by the first window
    that reaches it: with at least `window - stride` tokens before it, except in the first window. The largest
    stride, `window - 1`, scores many tokens with little context: report both (Press et al., arXiv 2012.15832).

    Args:
        documents: token ids, one array a document; windows do not cross from one to the next.
        average: "token", or "window" as YaRN's script.
        bos: id put in front of every window, as one of its tokens; the first token of a document is then
            scored too. None: it is not.
        batch: windows given to the model at once.
        progress: called with (windows done, windows in all).

    Raises:
        BadInput: a stride that skips tokens, or no token to score.
    """
    _check(window, stride, average)
    arrays = [np.asarray(document, np.int32) for document in documents]
    body = window if bos is None else window - 1
    windows = [w for i, ids in enumerate(arrays) for w in _windows(i, len(ids), body, stride, bos)]
    if not windows:
        raise BadInput("documents", f"{len(arrays)} documents", "no token to score", "a document of 2 tokens or more")
    losses = []
    for start in range(0, len(windows), batch):
        group = windows[start : start + batch]
        rows = np.stack([_row(arrays[w.document], w, window, bos) for w in group])
        logprobs = np.asarray(lm.logprobs(rows), np.float64)
        losses += [_new_losses(line, w, bos) for line, w in zip(logprobs, group, strict=True)]
        if progress is not None:
            progress(start + len(group), len(windows))
    owner = np.repeat(np.arange(len(windows)), [len(loss) for loss in losses])
    scored = Scored(np.concatenate(losses), owner)
    nll = AVERAGES[average](scored)
    return Loss(name, window, stride, average, nll, tokens=len(owner), windows=len(windows), model=model)


def truncated_perplexity(
    lm: LanguageModel,
    documents: Sequence[np.ndarray],
    *,
    window: int,
    bos: int | None = None,
    batch: int = 32,
    name: str = "",
    model: str = "",
) -> Loss:
    """Loss of the first window of each document, the mode behind YaRN's tables: every document weighs the same."""
    length = window if bos is None else window - 1
    heads = [document[:length] for document in documents]
    return perplexity(
        lm, heads, window=window, stride=window - 1, average="window", bos=bos, batch=batch, name=name, model=model
    )


def loss_by_position(
    lm: LanguageModel,
    documents: Sequence[np.ndarray],
    *,
    length: int,
    buckets_an_octave: int = 2,
    batch: int = 32,
    name: str = "",
    model: str = "",
) -> list[Loss]:
    """Mean loss by the number of tokens before the scored one, in buckets of equal ratio.

    Each document is cut into windows of `length` tokens that do not overlap; the rest of a document that
    does not fill one is left out, so every bucket averages over the same windows. A model that uses its
    context has a loss that falls to the end.

    Raises:
        BadInput: no document has `length` tokens.
    """
    _check(length, 1, "token")
    arrays = [np.asarray(document, np.int32) for document in documents]
    rows = [ids[i : i + length] for ids in arrays for i in range(0, len(ids) - length + 1, length)]
    if not rows:
        longest = max((len(ids) for ids in arrays), default=0)
        raise BadInput("length", length, "no document is so long", f"at most {longest}")
    total = np.zeros(length - 1)
    for start in range(0, len(rows), batch):
        total -= np.asarray(lm.logprobs(np.stack(rows[start : start + batch])), np.float64).sum(axis=0)
    edges = position_buckets(length, buckets_an_octave)
    return [
        Loss(
            name=name,
            window=length,
            stride=length,
            average="token",
            nll=float(total[start - 1 : end - 1].mean()) / len(rows),
            tokens=(end - start) * len(rows),
            windows=len(rows),
            start=start,
            end=end,
            model=model,
        )
        for start, end in pairwise(edges)
    ]


def position_buckets(length: int, buckets_an_octave: int) -> list[int]:
    """Edges 1 = e0 < e1 < ... = length; a token with n before it belongs to the bucket with e_i <= n < e_(i+1)."""
    steps = int(np.ceil(np.log2(length) * buckets_an_octave)) if length > 1 else 0
    edges = {round(2 ** (i / buckets_an_octave)) for i in range(steps)} | {1, length}
    return sorted(edge for edge in edges if edge <= length)


def _windows(document: int, tokens: int, body: int, stride: int, bos: int | None) -> Iterator[Window]:
    scored = 1 if bos is None else 0
    start = 0
    while scored < tokens:
        end = min(start + body, tokens)
        yield Window(document, start, scored, end)
        start, scored = start + stride, end


def _row(ids: Int[np.ndarray, "N"], w: Window, window: int, bos: int | None) -> Int[np.ndarray, "T"]:
    """The window's tokens at full length; what is filled up on the right changes no earlier score."""
    row = np.zeros(window, np.int32)
    front = [] if bos is None else [bos]
    row[: len(front) + w.end - w.start] = np.concatenate([np.asarray(front, np.int32), ids[w.start : w.end]])
    return row


def _new_losses(logprobs: Float[np.ndarray, "T"], w: Window, bos: int | None) -> Float[np.ndarray, "N"]:
    before = 1 if bos is None else 0  # logprobs[i] scores token i + 1 of the row
    return -logprobs[w.scored - w.start - before : w.end - w.start - before]


def _check(window: int, stride: int, average: str) -> None:
    if window < 2:
        raise BadInput("window", window, "scores no token", "2 or more")
    if not 1 <= stride < window:
        raise BadInput(
            "stride", stride, "would skip tokens" if stride > 0 else "must be positive", f"1 to {window - 1}"
        )
    if average not in AVERAGES:
        raise BadInput("average", average, "no such average", f"one of {', '.join(AVERAGES)}")

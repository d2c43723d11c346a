"""A model, its parameters and a tokenizer as a language model of texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.types import BadInput
from jaxlong.inference.generate import REAL, Model, check_prompts, generate
from jaxlong.inference.sampler import GREEDY, Sampler

LOGITS = 2**26
"""Logits that `logprobs` holds at once, 256 MiB in float32."""


@dataclass(frozen=True, eq=False)
class Runner:
    """Continues prompts and scores tokens; implements `jaxlong.evals.base.LanguageModel`.

    Few shapes are compiled: rows are padded to a power of two of at most `max_batch`, prompts to multiples
    of `bucket` that grow with them (at most four shapes an octave, at most a quarter of padding). For a tiny
    model compiling takes longer than running: a bucket of the longest prompt compiles once.

    Fields:
        params: the model's parameters.
        tokenizer: `encode`, `decode` and `eos`, at which generation stops.
        max_batch: rows at once.    bucket: tokens.
        chunk: tokens of a prompt at once; longer ones go through the model's state piece by piece.
        sampler, seed: how tokens are chosen; the same call makes the same texts.
        dtype: of the cache; None is the model's.
    """

    model: Model
    params: Any
    tokenizer: Any
    max_batch: int = 32
    bucket: int = 64
    chunk: int = 4096
    sampler: Sampler = GREEDY
    seed: int = 0
    dtype: Any = None

    def __post_init__(self):
        for name in ("max_batch", "bucket", "chunk"):
            if getattr(self, name) < 1:
                raise BadInput(name, getattr(self, name), "must be positive", "1 or more")

    def generate(self, prompts: Sequence[str], max_new: int) -> list[str]:
        """At most `max_new` tokens after each prompt, up to the tokenizer's eos, as text.

        Raises:
            BadInput: an empty prompt, ids outside the vocabulary, max_new below 1.
        """
        rows = [np.asarray(self.tokenizer.encode(prompt)) for prompt in prompts]
        for row in rows:
            check_prompts(self.model.vocab, row[None], None)
        texts: list[str] = [""] * len(rows)
        for members, width in self._batches([len(row) for row in rows]):
            tokens, lengths = _fill([rows[i] for i in members], _power(len(members), self.max_batch), width)
            new = generate(
                self.model,
                self.params,
                tokens,
                max_new=max_new,
                key=jax.random.fold_in(jax.random.key(self.seed), members[0]),
                sampler=self.sampler,
                lengths=lengths,
                eos=self.tokenizer.eos,
                chunk=self.chunk,
                dtype=self.dtype,
            )
            for i, row in zip(members, np.asarray(new), strict=False):
                texts[i] = self.tokenizer.decode(self._until_eos(row))
        return texts

    def logprobs(self, tokens: Int[np.ndarray, "B T"]) -> Float[np.ndarray, "B T-1"]:
        """log p(tokens[b, i + 1] | tokens[b, : i + 1]) in nats at [b, i]; compiled once for each T.

        Raises:
            BadInput: fewer than two tokens a row, or ids outside the vocabulary.
        """
        tokens, _ = check_prompts(self.model.vocab, tokens, None)
        length = tokens.shape[1]
        if length < 2:
            raise BadInput("tokens", length, "too few a row to score any", "2 or more")
        scored = []
        for start in range(0, len(tokens), self.max_batch):
            rows = list(tokens[start : start + self.max_batch])
            batch, _ = _fill(rows, _power(len(rows), self.max_batch), length)
            chunk = min(self.chunk, max(self.bucket, LOGITS // (len(batch) * self.model.vocab)))
            found = _logprobs(self.model, self.params, batch, chunk=chunk, dtype=self.dtype)
            scored.append(np.asarray(found)[: len(rows)])
        return np.concatenate(scored)

    def _batches(self, lengths: Sequence[int]) -> Iterator[tuple[list[int], int]]:
        """Members and width of each batch: rows of one bucket together."""
        buckets: dict[int, list[int]] = {}
        for i, length in enumerate(lengths):
            buckets.setdefault(bucketed(length, self.bucket), []).append(i)
        for width, members in sorted(buckets.items()):
            for start in range(0, len(members), self.max_batch):
                yield members[start : start + self.max_batch], width

    def _until_eos(self, row: Int[np.ndarray, "N"]) -> Int[np.ndarray, "M"]:
        ends = np.flatnonzero(row == self.tokenizer.eos)
        return row[: ends[0]] if ends.size else row


def bucketed(length: int, block: int) -> int:
    """The length rounded up to a multiple of `block`: of 1, 2, 4, ... blocks, the most that add less than a quarter."""
    step = block << max(0, (length // block).bit_length() - 3)
    return -(-length // step) * step


def _power(rows: int, most: int) -> int:
    """The power of two that holds the rows, at most `most`."""
    return min(most, 1 << (rows - 1).bit_length())


def _fill(rows: Sequence[np.ndarray], count: int, width: int) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
    """Rows [count, width] filled with 0 on the right and below, and their lengths (1 for those below)."""
    tokens, lengths = np.zeros((count, width), np.int32), np.ones(count, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        lengths[i] = len(row)
    return tokens, lengths


@partial(jax.jit, static_argnames=("model", "chunk", "dtype"))
def _logprobs(model: Model, params: Any, tokens: Int[Array, "B T"], *, chunk: int, dtype: Any) -> Float[Array, "B T-1"]:
    """Scores of all tokens but the first; what stands to the right of a token does not change its score."""
    batch, width = tokens.shape[0], tokens.shape[1] - 1

    def score(state: Any, piece: tuple[Array, Array, Array]) -> tuple[Any, Array]:
        ids, targets, positions = piece
        sequence = {"positions": positions, "segment_ids": jnp.full_like(positions, REAL)}
        logits, state = model.apply({"params": params}, ids, **sequence, state=state)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return state, chosen - jax.nn.logsumexp(logits, axis=-1)

    positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (batch, width))
    pieces = (tokens[:, :-1], tokens[:, 1:], positions)
    if width <= chunk:
        return score(None, pieces)[1]
    chunks = -(-width // chunk)
    pad = lambda a: jnp.pad(a, ((0, 0), (0, chunks * chunk - width)))
    split = lambda a: jnp.moveaxis(pad(a).reshape(batch, chunks, chunk), 1, 0)
    state = model.init_state(batch, chunks * chunk, max_chunk=chunk, dtype=dtype)
    _, scores = jax.lax.scan(score, state, tuple(map(split, pieces)))
    return jnp.moveaxis(scores, 0, 1).reshape(batch, -1)[:, :width]

"""Gradients of long rows a chunk of tokens at a time: memory for one chunk, and for the states between chunks.

The chunks of a row are fed through the model's state. A first pass without gradients keeps that state at every chunk; a
second one takes the chunks in reverse, computes each again from the state before it, and hands the gradient of that
state on to the chunk before. SeCO, arXiv 2505.16710, takes all chunks and is exact; SpaCO, of the same paper, draws
some of them.

What grows by appending (caches of keys and values: `core.state.Appended`) is kept once, at its end: what it was at an
earlier chunk is the same arrays with later entries blanked out. Other states (recurrences, tails of convolutions,
rings that went round) are kept for every chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from jaxlong.core.state import Appended, nbytes
from jaxlong.core.types import BadInput, Batch, State
from jaxlong.ops.loss import LossStats, cross_entropy
from jaxlong.train.grads import Drawing, GradFn, Metrics, Whole, means, reported
from jaxlong.train.state import Params


def seco(model: Any, *, chunk: int, z_loss: float = 0.0, loss_chunk: int = 1024) -> GradFn:
    """The gradient of `next_token_loss` over whole rows, exactly, with activations of one chunk at a time.

    Costs one forward pass more than `full`. Holds the states (see the module), the float32 gradient of what was
    appended, and what one chunk's forward and backward pass take; the model's remat applies within a chunk. Rows are in
    the order of the text. A length that `chunk` does not divide is padded.

    Args:
        model: a `jaxlong.model.LM`, or anything with its `apply(..., state=, method="features")`, `init_state`, `head`,
            `soft_cap` and `mtp`.
        chunk: tokens of a row to handle at once.
        z_loss, loss_chunk: as `z_loss` and `chunk` of `next_token_loss`.

    Raises:
        BadInput: `chunk` below 1; and when called, a model with multi-token prediction or with losses of its layers:
            these look at more than a chunk and its state.
    """
    passes = _Passes(model, _checked(chunk), z_loss, loss_chunk)

    def grad_fn(params: Params, batch: Batch) -> tuple[Params, Metrics]:
        rows = passes.cut(batch)
        history = passes.forward(params, rows, passes.feed)
        grads, told = passes.backward(params, rows, history, None)
        return grads, _metrics(told, rows.count)

    return grad_fn


@dataclass(frozen=True)
class Bernoulli:
    """Each chunk with probability `rate`, alone; the gradient's mean over all draws is the exact gradient.

    A chunk's loss and the gradient of the state after it count 1 / rate: whether a chunk is drawn has nothing to do
    with the chunks behind it, from which its gradient comes, so both factors are right in the mean.
    """

    rate: float

    def __post_init__(self):
        if not 0 < self.rate <= 1:
            raise BadInput("sampling.rate", self.rate, "is no probability to draw with", "above 0, at most 1")

    def draw(self, key: Array, chunks: int) -> Draw:
        return self.chosen(jax.random.bernoulli(key, self.rate, (chunks,)))

    def chosen(self, selected: Bool[Array, "k"]) -> Draw:
        return Draw(selected, 1 / self.rate, 1 / self.rate)


@dataclass(frozen=True)
class WithoutReplacement:
    """`count` of the chunks, each set of them alike (the paper's form, algorithm 2): biased.

    The gradient of the state counts chunks / count, `max_factor` at most (the paper advises 2); that of a loss counts
    as it is, so the gradient of what leads to one chunk's loss alone comes out count / chunks of itself.
    """

    count: int
    max_factor: float | None = None

    def __post_init__(self):
        if self.count < 1:
            raise BadInput("sampling.count", self.count, "draws nothing", "1 or more")
        if self.max_factor is not None and self.max_factor < 1:
            raise BadInput("sampling.max_factor", self.max_factor, "is below that of all chunks", "1 or more, or None")

    def draw(self, key: Array, chunks: int) -> Draw:
        if self.count > chunks:
            raise BadInput("sampling.count", self.count, f"a row has {chunks} chunks", f"{chunks} at most")
        return self.chosen(jax.random.permutation(key, jnp.arange(chunks) < self.count))

    def chosen(self, selected: Bool[Array, "k"]) -> Draw:
        factor = len(selected) / self.count
        return Draw(selected, 1.0, factor if self.max_factor is None else min(factor, self.max_factor))


class Draw(NamedTuple):
    """Which chunks count, and the factors of their losses and of the gradients of the states after them."""

    selected: Bool[Array, "k"]
    loss: float
    state: float


def spaco(
    model: Any,
    *,
    chunk: int,
    sampling: Bernoulli | WithoutReplacement,
    seed: int = 0,
    z_loss: float = 0.0,
    loss_chunk: int = 1024,
) -> Drawing:
    """The gradient of `next_token_loss` from some of the chunks of a row, drawn anew each time.

    The forward pass takes all chunks, and the metrics are those of all tokens; the backward pass costs nothing for a
    chunk that was not drawn. Memory, other arguments and errors as in `seco`.

    Args:
        sampling: how to draw. `Bernoulli` is unbiased.
        seed: of the draws; that of a step follows from it and the step's number alone.
    """
    of_draw = chosen_gradient(model, chunk=chunk, z_loss=z_loss, loss_chunk=loss_chunk)

    def grad_fn(params: Params, batch: Batch, draw: Array | int) -> tuple[Params, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), draw)
        return of_draw(params, batch, sampling.draw(key, -(-batch.tokens.shape[1] // chunk)))

    return Drawing(grad_fn)


def chosen_gradient(
    model: Any, *, chunk: int, z_loss: float = 0.0, loss_chunk: int = 1024
) -> Callable[[Params, Batch, Draw], tuple[Params, Metrics]]:
    """What `spaco` computes for one draw: `(params, batch, draw) -> (gradient, metrics)`. Arguments as there."""
    passes = _Passes(model, _checked(chunk), z_loss, loss_chunk)

    def grad_fn(params: Params, batch: Batch, draw: Draw) -> tuple[Params, Metrics]:
        rows = passes.cut(batch)
        history = passes.forward(params, rows, passes.measure)
        grads, _ = passes.backward(params, rows, history, draw)
        return grads, _metrics(history.told, rows.count) | {"chunks": draw.selected.sum().astype(jnp.float32)}

    return grad_fn


@dataclass(frozen=True)
class SeCO:
    """`seco` in chunks of so many tokens."""

    chunk: int

    in_text_order = True

    def __post_init__(self):
        _checked(self.chunk)

    def of(self, model: Any, *, z_loss: float, loss_chunk: int, mtp_weight: float, seed: int) -> GradFn:
        return seco(model, chunk=self.chunk, z_loss=z_loss, loss_chunk=loss_chunk)


@dataclass(frozen=True)
class SpaCO:
    """`spaco` in chunks of so many tokens, drawn as `sampling` says."""

    chunk: int
    sampling: Bernoulli | WithoutReplacement

    in_text_order = True

    def __post_init__(self):
        _checked(self.chunk)

    def of(self, model: Any, *, z_loss: float, loss_chunk: int, mtp_weight: float, seed: int) -> Drawing:
        return spaco(model, chunk=self.chunk, sampling=self.sampling, seed=seed, z_loss=z_loss, loss_chunk=loss_chunk)


GRADIENTS: Mapping[str, type] = {"whole": Whole, "seco": SeCO, "spaco": SpaCO}
SAMPLINGS: Mapping[str, type] = {"bernoulli": Bernoulli, "without_replacement": WithoutReplacement}


def _checked(chunk: int) -> int:
    if chunk < 1:
        raise BadInput("train.chunk", chunk, "a chunk holds at least one token", "1 or more")
    return chunk


class _Rows(NamedTuple):
    """A batch in chunks [k B C], and the sum of its weights, 1 where that is 0."""

    chunks: Batch
    count: Float[Array, ""]


class _Told(NamedTuple):
    """What chunks measured, added up: sums over tokens, and what layers report, over `chunks`."""

    loss: Float[Array, ""]
    stats: LossStats
    reports: Metrics
    chunks: Float[Array, ""]


class _History(NamedTuple):
    """The last state; for every chunk what is needed to have the state before it again; what was measured."""

    last: State
    marks: Any
    told: Any


@dataclass(frozen=True)
class _Passes:
    """The two passes over the chunks of a batch."""

    model: Any
    chunk: int
    z_loss: float
    loss_chunk: int

    def cut(self, batch: Batch) -> _Rows:
        """Chunks, of which the last is filled up with tokens that continue its document and do not count."""
        over = -batch.tokens.shape[1] % self.chunk
        fill = jax.tree.map(lambda x: jnp.repeat(x[:, -1:], over, axis=1), batch)
        later = fill.positions + jnp.arange(1, over + 1, dtype=fill.positions.dtype)
        fill = fill._replace(positions=later, loss_weights=jnp.zeros_like(fill.loss_weights))
        whole = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), batch, fill)
        weight = batch.loss_weights.astype(jnp.float32).sum()
        split = lambda x: x.reshape(len(x), -1, self.chunk).swapaxes(0, 1)
        return _Rows(jax.tree.map(split, whole), jnp.where(weight > 0, weight, 1.0))

    def feed(self, params: Params, chunk: Batch, state: State) -> tuple[None, State]:
        """The state after a chunk."""
        return None, self._features(params, chunk, state)[0][1]

    def measure(self, params: Params, chunk: Batch, state: State) -> tuple[_Told, State]:
        """A chunk's loss, summed, and the state after it."""
        (hidden, after), told = self._features(params, chunk, state)
        loss, stats = cross_entropy(
            hidden,
            self.model.head(params),
            chunk.targets,
            chunk.loss_weights,
            z_loss=self.z_loss,
            chunk=self.loss_chunk,
            soft_cap=self.model.soft_cap,
        )
        return _Told(loss, stats, means(reported(told, "metrics")), jnp.ones((), jnp.float32)), after

    def forward(self, params: Params, rows: _Rows, of_chunk: Callable[..., tuple[Any, State]]) -> _History:
        """All chunks through the state, without gradients; `of_chunk` is `feed` or `measure`."""
        self._refuse(params, rows)
        empty = self._empty(rows)

        def step(state: State, chunk: Batch) -> tuple[State, Any]:
            told, after = of_chunk(params, chunk, state)
            return after, (_Cells.of(state, self._tokens(rows)).marks(), told)

        last, (marks, told) = lax.scan(step, empty, rows.chunks)
        return _History(last, marks, jax.tree.map(lambda x: x.sum(0), told))

    def backward(self, params: Params, rows: _Rows, history: _History, draw: Draw | None) -> tuple[Params, _Told]:
        """The gradient of the mean loss, and what was measured on the way. `draw` None takes all chunks as they are."""
        cells = _Cells.of(history.last, self._tokens(rows))
        apart = draw is not None  # then a chunk's own factor must not touch what went by it
        loss_factor, state_factor = (1.0, 1.0) if draw is None else (draw.loss, draw.state)

        def of_chunk(carry: Any, chunk: Batch, marks: list[Any]) -> Any:
            grads, dstate, told = carry
            before = cells.rewind(marks)

            def run(params: Params, floats: list[Array]) -> tuple[Any, Any]:
                measured, after = self.measure(params, chunk, before.replace(floats).state())
                after = _Cells.of(after, self._tokens(rows))
                return (measured.loss, after.owed(marks, self.chunk, apart)), (measured, after.cells)

            (_, new), pull, (measured, after) = jax.vjp(run, params, before.floats(), has_aux=True)
            owed = _Cells(after, cells.tree).replace(dstate).owed(marks, self.chunk, apart)
            seeds = jax.tree.map(lambda x, like: (state_factor * x).astype(like.dtype), owed, new)
            more, dbefore = pull((loss_factor / rows.count, seeds))
            add = lambda total, x: total + x.astype(total.dtype)
            return (
                jax.tree.map(add, grads, more),
                cells.hand_on(dstate, dbefore, apart),
                jax.tree.map(add, told, measured),
            )

        def skip(carry: Any, chunk: Batch, marks: list[Any]) -> Any:
            grads, dstate, told = carry
            return grads, cells.hand_on(dstate, jax.tree.map(jnp.zeros_like, dstate), apart), told

        def step(carry: Any, chunk: Any) -> tuple[Any, None]:
            selected, *chunk = chunk
            return of_chunk(carry, *chunk) if draw is None else lax.cond(selected, of_chunk, skip, carry, *chunk), None

        told = jax.eval_shape(self.measure, params, jax.tree.map(lambda x: x[0], rows.chunks), history.last)[0]
        zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)
        selected = None if draw is None else draw.selected
        chunks = selected, rows.chunks, history.marks
        (grads, _, told), _ = lax.scan(step, zeros((params, cells.floats(), told)), chunks, reverse=True)
        return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params), told

    def _features(self, params: Params, chunk: Batch, state: State, collection: str = "metrics") -> Any:
        """((hidden states, the state after), what layers sowed into the collection)."""
        where = {"positions": chunk.positions, "segment_ids": chunk.segment_ids, "state": state}
        return self.model.apply({"params": params}, chunk.tokens, **where, mutable=[collection], method="features")

    def _tokens(self, rows: _Rows) -> int:
        """Of a row, those that fill it up included."""
        return len(rows.chunks.tokens) * self.chunk

    def _empty(self, rows: _Rows) -> State:
        """The state before a row. Rings as long as the row need not be kept a chunk; short ones may still cost less."""
        chunks, batch, _ = rows.chunks.tokens.shape
        length = self._tokens(rows)
        make = lambda longest: self.model.init_state(batch, length, max_chunk=longest)
        cost = lambda longest: _Cells.of(jax.eval_shape(partial(make, longest)), length).cost(chunks)
        return make(min((self.chunk, length), key=cost))

    def _refuse(self, params: Params, rows: _Rows) -> None:
        if self.model.mtp:
            raise BadInput("model.mtp", self.model.mtp, "looks at tokens of other chunks", "0 for gradients by chunks")
        chunk = jax.tree.map(lambda x: x[0], rows.chunks)
        sow = lambda params: self._features(params, chunk, None, collection="losses")[1]
        losses = jax.eval_shape(lambda params: reported(sow(params), "losses"), params)
        if names := sorted(losses):
            why = "losses of layers over all tokens at once are no sum over chunks"
            raise BadInput("model", ", ".join(names), why, "layers without them, for gradients by chunks")


@dataclass(frozen=True)
class _Cells:
    """A state as a list: each cell is a part that grows by appending and overwrites nothing, or any other array."""

    cells: list[Any]
    tree: Any

    @classmethod
    def of(cls, state: State, tokens: int) -> _Cells:
        """`tokens`: how many it will have seen in the end."""
        return cls(*jax.tree.flatten(state, is_leaf=lambda x: isinstance(x, Appended) and x.holds(tokens)))

    def state(self) -> State:
        return jax.tree.unflatten(self.tree, self.cells)

    def marks(self) -> list[Any]:
        """What to keep of it: for what grows, how far it is."""
        return [cell.mark() if isinstance(cell, Appended) else cell for cell in self.cells]

    def rewind(self, marks: list[Any]) -> _Cells:
        """The state at those marks, from a later one."""
        pairs = zip(self.cells, marks, strict=True)
        return _Cells([cell.rewind(mark) if isinstance(cell, Appended) else mark for cell, mark in pairs], self.tree)

    def owed(self, marks: list[Any], tokens: int, apart: bool) -> list[Array]:
        """The floating-point arrays whose gradients a chunk takes: of what grows, what the last tokens made, if the
        gradient of the rest is to go by the chunk; else everything."""
        pairs = zip(self.cells, marks, strict=True)
        arrays = [cell.since(mark, tokens) if _goes_by(cell, apart) else jax.tree.leaves(cell) for cell, mark in pairs]
        return [x for of_cell in arrays for x in of_cell if _is_float(x)]

    def floats(self) -> list[Array]:
        return [x for x in jax.tree.leaves(self.cells) if _is_float(x)]

    def replace(self, floats: list[Array]) -> _Cells:
        """With other arrays in place of `floats()`."""
        rest = iter(floats)
        return _Cells(jax.tree.map(lambda x: next(rest) if _is_float(x) else x, self.cells), self.tree)

    def hand_on(self, later: list[Array], new: list[Array], apart: bool) -> list[Array]:
        """The float32 gradient of the state before a chunk: from that of the state after it, what went by the chunk,
        and what came through it."""
        by = [_goes_by(cell, apart) for cell in self.cells for x in jax.tree.leaves(cell) if _is_float(x)]
        wide = [x.astype(jnp.float32) for x in new]
        return [old + x if goes_by else x for goes_by, old, x in zip(by, later, wide, strict=True)]

    def cost(self, chunks: int) -> int:
        """Bytes, roughly: what grows, its float32 gradient and copies of both; all else once a chunk."""
        return sum(nbytes(cell) * (6 if isinstance(cell, Appended) else chunks) for cell in self.cells)


def _goes_by(cell: Any, apart: bool) -> bool:
    """Whether the gradient of entries that a chunk only read goes by it: to be added up in float32 where entries are
    of a narrower type. Through the chunk there is one array less."""
    narrow = any(_is_float(x) and x.dtype != jnp.float32 for x in jax.tree.leaves(cell))
    return isinstance(cell, Appended) and (apart or narrow)


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _metrics(told: _Told, count: Array) -> Metrics:
    stats = told.stats
    metrics = {"loss": told.loss, "nll": stats.nll_sum, "accuracy": stats.correct_sum}
    reports = {name: total / told.chunks for name, total in told.reports.items()}
    return {name: total / count for name, total in metrics.items()} | {"weight": stats.weight_sum} | reports

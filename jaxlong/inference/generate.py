"""Continuing token sequences with a cache: a compiled prefill, then one token at a time.

Prompts of different lengths are aligned at their ends. The padding before them carries segment id 0, real
tokens 1, and positions count from the first real token, so that no mixer lets padding be seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int

from jaxlong.core.types import BadInput, State
from jaxlong.inference.sampler import GREEDY, Sampler

PAD, REAL = 0, 1
"""Segment ids."""
NEVER = -1
"""An end that no token is."""


@runtime_checkable
class Model(Protocol):
    """A hashable language model with explicit parameters and state, such as `jaxlong.model.LM`."""

    vocab: int

    def apply(self, variables: Any, *arguments: Any, method: Any = None) -> Any: ...

    def init_state(self, batch: int, max_len: int, *, max_chunk: int, dtype: Any = None) -> State: ...


def generate(
    model: Model,
    params: Any,
    tokens: Any,
    *,
    max_new: int,
    key: Array,
    sampler: Sampler = GREEDY,
    lengths: Any = None,
    eos: int | None = None,
    chunk: int | None = None,
    dtype: Any = None,
) -> Int[Array, "B N"]:
    """New tokens after each prompt; compiled once for each shape, model, sampler and number of new tokens.

    Args:
        tokens: prompts [B, T].
        max_new: N, tokens to make.
        key: of the randomness; step i uses fold_in(key, i), as `stream` does.
        lengths: real tokens of each row [B], the rest on the right is ignored; None is T for all.
        eos: a row that made this id is filled up with it, and the loop ends when all rows have.
        chunk: tokens of prefill at once, which bounds its memory; None takes the prompt whole.
        dtype: of the cache; None is the model's.

    Raises:
        BadInput: an empty prompt, ids outside the vocabulary, max_new or chunk below 1.
    """
    tokens, lengths = check_prompts(model.vocab, tokens, lengths)
    _check_sizes(max_new, chunk)
    end = NEVER if eos is None else eos
    return _generate(model, sampler, params, tokens, lengths, key, end, max_new=max_new, chunk=chunk, dtype=dtype)


def stream(
    model: Model,
    params: Any,
    tokens: Any,
    *,
    max_new: int,
    key: Array,
    sampler: Sampler = GREEDY,
    eos: int | None = None,
    chunk: int | None = None,
    dtype: Any = None,
) -> Iterator[int]:
    """The new tokens after one prompt [T], each as soon as it is made; ends after `eos` or `max_new` tokens.

    The same tokens as `generate`'s. Raises BadInput as `generate` does, before the first token.
    """
    tokens, lengths = check_prompts(model.vocab, np.asarray(tokens)[None], None)
    _check_sizes(max_new, chunk)
    return _stream(model, sampler, params, tokens, lengths, key, max_new, eos, chunk, dtype)


def check_prompts(vocab: int, tokens: Any, lengths: Any) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
    """Prompts and their lengths as int32 arrays. Raises BadInput for empty prompts and ids outside the vocabulary."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise BadInput("prompt", f"shape {tokens.shape}", "holds no tokens", "one token or more")
    if not np.issubdtype(tokens.dtype, np.integer):
        raise BadInput("prompt", tokens.dtype, "is no type of token ids", "integers")
    lengths = np.full(len(tokens), tokens.shape[1]) if lengths is None else np.asarray(lengths)
    if lengths.shape != tokens.shape[:1] or lengths.min() < 1 or lengths.max() > tokens.shape[1]:
        raise BadInput("lengths", lengths.tolist(), "do not fit the prompts", f"one a row, 1 to {tokens.shape[1]}")
    real = np.arange(tokens.shape[1]) < lengths[:, None]
    outside = tokens[real & ((tokens < 0) | (tokens >= vocab))]
    if outside.size:
        raise BadInput("prompt", outside[0], "is outside the vocabulary", f"0 to {vocab - 1}")
    return tokens.astype(np.int32), lengths.astype(np.int32)


def _check_sizes(max_new: int, chunk: int | None) -> None:
    for name, value in (("max_new", max_new), ("chunk", chunk)):
        if value is not None and value < 1:
            raise BadInput(name, value, "must be positive", "1 or more")


@partial(jax.jit, static_argnames=("model", "sampler", "max_new", "chunk", "dtype"))
def _generate(
    model: Model,
    sampler: Sampler,
    params: Any,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    key: Array,
    eos: Int[Array, ""] | int,
    *,
    max_new: int,
    chunk: int | None,
    dtype: Any,
) -> Int[Array, "B N"]:
    state = _prefill(model, params, tokens, lengths, max_new, chunk, dtype)
    rows = jnp.arange(len(tokens))
    new = jnp.full((len(tokens), max_new), eos, jnp.int32)

    def running(carry: tuple) -> Array:
        step, *_, done = carry
        return (step < max_new) & ~jnp.all(done)

    def advance(carry: tuple) -> tuple:
        step, state, token, new, done = carry
        made, state = _step(model, sampler, params, state, token, lengths, step, key)
        made = jnp.where(done, eos, made)
        return step + 1, state, made, new.at[:, step].set(made), done | (made == eos)

    done = jnp.zeros(len(tokens), bool)
    carry = (jnp.int32(0), state, tokens[rows, lengths - 1], new, done)
    return jax.lax.while_loop(running, advance, carry)[3]


def _stream(
    model: Model,
    sampler: Sampler,
    params: Any,
    tokens: Int[np.ndarray, "B T"],
    lengths: Int[np.ndarray, "B"],
    key: Array,
    max_new: int,
    eos: int | None,
    chunk: int | None,
    dtype: Any,
) -> Iterator[int]:
    state = _prefill_jit(model, params, tokens, lengths, max_new=max_new, chunk=chunk, dtype=dtype)
    token = tokens[:, -1]
    for step in range(max_new):
        token, state = _step_jit(model, sampler, params, state, token, lengths, step, key)
        made = int(np.asarray(token)[0])
        yield made
        if made == eos:
            return


def _prefill(
    model: Model,
    params: Any,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    max_new: int,
    chunk: int | None,
    dtype: Any,
) -> State:
    """The state after all tokens of each prompt but its last, with room for the rest."""
    batch, width = tokens.shape[0], tokens.shape[1] - 1
    chunk = max(1, width if chunk is None else min(chunk, width))
    chunks = -(-width // chunk)
    state = model.init_state(batch, chunks * chunk + max_new, max_chunk=chunk, dtype=dtype)
    aligned = _align(tokens, lengths - 1, chunks * chunk)
    pieces = [jnp.moveaxis(a.reshape(batch, chunks, chunk), 1, 0) for a in aligned]

    def feed(state: State, piece: Sequence[Array]) -> tuple[State, None]:
        ids, positions, segments = piece
        sequence = {"positions": positions, "segment_ids": segments}
        return model.apply({"params": params}, ids, **sequence, state=state, method="features")[1], None

    if chunks == 1:
        return feed(state, [piece[0] for piece in pieces])[0]
    return jax.lax.scan(feed, state, pieces)[0]


def _align(tokens: Int[Array, "B T"], lengths: Int[Array, "B"], width: int) -> tuple[Array, Array, Array]:
    """Tokens, positions and segments [B, width] with each row's first `lengths` tokens at the right."""
    source = jnp.arange(width) - width + lengths[:, None]
    ids = jnp.take_along_axis(tokens, jnp.clip(source, 0, tokens.shape[1] - 1), axis=1)
    real = source >= 0
    return jnp.where(real, ids, 0), jnp.maximum(source, 0).astype(jnp.int32), jnp.where(real, REAL, PAD)


def _step(
    model: Model,
    sampler: Sampler,
    params: Any,
    state: State,
    token: Int[Array, "B"],
    lengths: Int[Array, "B"],
    step: Int[Array, ""],
    key: Array,
) -> tuple[Int[Array, "B"], State]:
    """Feed one token of each row, the last of its prompt at step 0, and choose the next."""
    positions = (lengths - 1 + step)[:, None]
    sequence = {"positions": positions, "segment_ids": jnp.full_like(positions, REAL)}
    logits, state = model.apply({"params": params}, token[:, None], **sequence, state=state)
    return sampler(logits[:, -1], jax.random.fold_in(key, step)), state


_prefill_jit = partial(jax.jit, static_argnames=("model", "max_new", "chunk", "dtype"))(_prefill)
_step_jit = partial(jax.jit, static_argnames=("model", "sampler"), donate_argnames=("state",))(_step)

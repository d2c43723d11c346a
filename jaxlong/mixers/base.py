"""The contract of a sequence mixer: one call for training, prefill, decode and chunked training."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.position import Rope
from jaxlong.core.state import KVCache, LatentCache
from jaxlong.core.types import BadInput, State
from jaxlong.ops.text_order import text_order
from jaxlong.ops.weights import whole


@runtime_checkable
class SequenceMixer(Protocol):
    """A linen module that mixes tokens along the sequence.

    `state=None` mixes whole sequences in parallel form and keeps nothing (training). With a state, x
    continues what the state has seen, for any T >= 1: a prefill chunk, one decoding step, a chunk of
    truncated or exact chunked training; it is differentiable. `segment_ids=None` means one segment, 0.
    """

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: State | None = None,
    ) -> tuple[Float[Array, "B T D"], State | None]: ...

    def init_state(self, batch: int, max_len: int, *, width: int, max_chunk: int, dtype: Any) -> State:
        """The empty state for up to `max_len` tokens of width `width`, fed at most `max_chunk` at a time."""
        ...

    def state_bytes(self, batch: int, max_len: int, *, width: int, max_chunk: int, itemsize: int) -> int:
        """Size of that state by the published formula, in bytes."""
        ...

    def mixing_flops(self, length: int) -> float:
        """Forward flops a token in rows of `length` tokens, beyond 2 a parameter."""
        ...

    @classmethod
    def examples(cls) -> dict[str, SequenceMixer]:
        """Small settings that together use every field; the laws run on each."""
        ...


@runtime_checkable
class SharesFirstValues(Protocol):
    """A mixer whose values are drawn towards those of the model's first layer, if `value_residual` says so."""

    value_residual: bool

    def no_values(self, x: Float[Array, "B T D"]) -> Any:
        """What `mix` takes as `first` before any layer has made values for the inputs x."""
        ...

    def mix(
        self,
        x: Float[Array, "B T D"],
        first: Any,
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: State | None = None,
    ) -> tuple[Float[Array, "B T D"], State | None, Any]:
        """The mixer's call, with the first layer's values handed from layer to layer."""
        ...


@runtime_checkable
class ReadsKeys(Protocol):
    """A mixer whose output at a token depends on other tokens through their keys and values alone.

    With its property `reads_keys` it takes `core.state.KeysOnly` and sealed caches as states.
    """

    @property
    def reads_keys(self) -> bool:
        """Whether its settings leave it so."""
        ...


def projection(
    module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], *, inputs: int, dtype: Any
) -> Float[Array, "..."]:
    """A weight with logical axis names, of variance 1 / fan-in over its first `inputs` axes, cast to `dtype`."""
    fan_in = range(inputs)
    init = nn.initializers.variance_scaling(
        1.0, "fan_in", "truncated_normal", in_axis=tuple(fan_in), out_axis=tuple(range(inputs, len(shape)))
    )
    return whole(module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32), axes, dtype)


def vector(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    init: Any = nn.initializers.zeros,
) -> Float[Array, "..."]:
    """A float32 parameter with logical axis names: a bias, a norm's scale, a gate, a decay."""
    return whole(module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32), axes, jnp.float32)


def rms_norm(x: Float[Array, "*B C"], scale: Float[Array, "C"], eps: float = 1e-6) -> Float[Array, "*B C"]:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32, returned in the dtype of x."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype)


def to_heads(
    module: nn.Module, name: str, x: Float[Array, "B T D"], heads: int, head_dim: int, axis: str = "heads"
) -> Float[Array, "B T H C"]:
    """x times the projection `name` [D H C]; `axis` is "kv_heads" for keys and values."""
    shape, axes = (x.shape[-1], heads, head_dim), ("embed", axis, "head_dim")
    return jnp.einsum("btd,dhc->bthc", x, projection(module, name, shape, axes, inputs=1, dtype=x.dtype))


def from_heads(module: nn.Module, name: str, o: Float[Array, "B T H C"], width: int) -> Float[Array, "B T D"]:
    """o times the projection `name` [H C D]: the heads joined again."""
    shape, axes = (*o.shape[2:], width), ("heads", "head_dim", "embed")
    return jnp.einsum("bthc,hcd->btd", o, projection(module, name, shape, axes, inputs=2, dtype=o.dtype))


def require(module: Any, least: int, *names: str) -> None:
    """Refuse a module whose integer fields are below `least`."""
    for name in names:
        if getattr(module, name) < least:
            raise BadInput(name, getattr(module, name), "is too small", f"{least} or more")


def require_one_of(module: Any, name: str, *allowed: str) -> None:
    """Refuse a module whose field `name` is none of the allowed values."""
    if getattr(module, name) not in allowed:
        raise BadInput(name, getattr(module, name), "no such value", f"one of {', '.join(allowed)}")


def require_conv(module: Any) -> None:
    """Refuse a module whose field `conv` is neither 0, for none, nor the width of a convolution."""
    if module.conv < 0 or module.conv == 1:
        raise BadInput("conv", module.conv, "is no width of a convolution", "0 for none, or 2 or more")


def require_rotation(position: Any, dim: int) -> None:
    """Refuse a rotation that does not fit into heads of `dim`."""
    if isinstance(position, Rope):
        position.frequencies(dim)


def require_divides(module: Any, part: str, whole: str) -> None:
    """Refuse a module whose field `part` does not divide its field `whole`."""
    small, large = getattr(module, part), getattr(module, whole)
    if large % small:
        divisors = [n for n in range(1, large + 1) if large % n == 0]
        raise BadInput(part, small, f"does not divide {whole} = {large}", f"one of {divisors}")


def require_spans(module: Any) -> None:
    """Refuse a mixer that works along the text on a layout that leaves no two tokens in a row on a device."""
    if module.backend.layout == "striped":
        why = f"{type(module).__name__} works along the text, and no two tokens in a row are on a device"
        raise BadInput("backend.layout", "striped", why, "nearest: zigzag")


def in_text_order(call: Any) -> Any:
    """A mixer's call, for those that count tokens, blocks or documents by their place in the row.

    Where the layout of rows is another, devices exchange their parts of x, positions and segments for those of a
    contiguous layout, and the outputs back: two transfers of [B T D] a call. A call with a state is in the order of the
    text anyway.
    """

    @functools.wraps(call)
    def ordered(self, x, *, positions, segment_ids=None, state=None):
        if state is not None or self.backend.layout == "contiguous":
            return call(self, x, positions=positions, segment_ids=segment_ids, state=state)
        # the same mixer on the same parameters
        inner = self.clone(parent=self.scope, backend=replace(self.backend, layout="contiguous"))
        rows = lambda tokens: inner(tokens[0], positions=tokens[1], segment_ids=tokens[2])[0]
        return text_order(rows, (x, positions, segment_ids), backend=self.backend), None

    ordered.in_text_order = True
    return ordered


def check_state(mixer: Any, state: State, x: Float[Array, "B T D"]) -> None:
    """Refuse a state that `mixer.init_state` would not make for inputs like x.

    Lengths of caches are free, all else is not: sizes that differ between the states for one token and
    for a million are lengths. Sealed caches are not checked: the same mixer has just made them.

    Raises:
        BadInput: the first array that differs in kind, type or shape.
    """
    if isinstance(state, KVCache | LatentCache) and state.next is None:
        return
    batch, _, width = x.shape
    make = lambda n: mixer.init_state(batch, n, width=width, max_chunk=n, dtype=x.dtype)
    one, many = (jax.eval_shape(lambda n=n: make(n)) for n in (1, 2**30))
    here = jax.tree.structure(one)
    if jax.tree.structure(state) != here:
        raise BadInput("state", jax.tree.structure(state), f"{type(mixer).__name__} keeps another", str(here))
    for (path, a), b, given in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(many), jax.tree.leaves(state), strict=True
    ):
        fits = len(given.shape) == len(a.shape) and all(
            size == n or n != m for size, n, m in zip(given.shape, a.shape, b.shape, strict=True)
        )
        if not fits or given.dtype != a.dtype:
            shape = ["any" if n != m else str(n) for n, m in zip(a.shape, b.shape, strict=True)]
            name = "state" + jax.tree_util.keystr(path)
            allowed = f"{a.dtype}[{', '.join(shape)}]"
            raise BadInput(name, f"{given.dtype}{list(given.shape)}", "was made for other inputs", allowed)

"""The arithmetic of a block of keys, as the kernel and its twin do it: online softmax over lines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


@dataclass(frozen=True)
class Spec:
    """What is known while tracing.

    lanes: whether keys and values are [dim, line] instead of [line, dim].
    soft_cap, scale: of scores.    k_scale, v_scale, slopes: whether lines have factors and positions.
    groups: of queries that meet the same lines, in a block.
    values: the dim of values.
    """

    lanes: bool
    scale: float
    soft_cap: float | None
    k_scale: bool
    v_scale: bool
    slopes: bool
    groups: int
    values: int


class Carry(NamedTuple):
    """Of R queries: the weighted sum of values [R V], the largest score [R 1], and the sum of weights [R 1]."""

    sums: Any
    top: Any
    total: Any


def start(rows: int, values: int) -> Carry:
    """Before any key."""
    column = lambda fill: jnp.full((rows, 1), fill, jnp.float32)
    return Carry(jnp.zeros((rows, values), jnp.float32), column(-jnp.inf), column(0.0))


def finish(carry: Carry) -> tuple[Array, Array]:
    """(out [R V], lse [R 1]), 0 and -inf where nothing was seen."""
    empty = carry.total == 0
    safe = jnp.where(empty, 1.0, carry.total)
    return carry.sums / safe, jnp.where(empty, -jnp.inf, carry.top + jnp.log(safe))


def fold(spec: Spec, group: int, q: Array, want: Array, k: Array, v: Array, lines: Array, carry: Carry) -> Carry:
    """One more block.

    Args:
        q: [R C] of the group.    want: [R 4], as `blocks.wanted` says.
        k, v: [X C] and [X V], or [C X] and [V X].    lines: [F X], as `blocks.Blocks` says.
    """
    code, k_scale, v_scale, behind = _told(spec, group, lines)
    scores = _product(q, k.astype(q.dtype), across=not spec.lanes) * spec.scale
    if spec.k_scale:
        scores = scores * k_scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    if spec.slopes:
        scores = scores - want[:, 2:3] * jnp.abs(want[:, 3:4] - behind)
    integer = lambda x: x.astype(jnp.int32)
    seen = (integer(code) & integer(want[:, 0:1])) == integer(want[:, 1:2])
    scores = jnp.where(seen, scores, -jnp.inf)
    top = jnp.maximum(carry.top, scores.max(1, keepdims=True))
    pivot = jnp.where(top == -jnp.inf, 0.0, top)
    weights, decay = jnp.exp(scores - pivot), jnp.exp(carry.top - pivot)
    total = carry.total * decay + weights.sum(1, keepdims=True)
    weights = (weights * v_scale if spec.v_scale else weights).astype(q.dtype)
    return Carry(carry.sums * decay + _weighted(spec, weights, seen, v), top, total)


def _told(spec: Spec, group: int, lines: Array) -> list[Array | None]:
    """The rows of `lines`: code, factors of keys and values, positions."""
    found, at = [lines[0:1]], 1
    for there in (spec.k_scale, spec.v_scale):
        found.append(lines[at + group : at + group + 1] if there else None)
        at += spec.groups * there
    return [*found, lines[at : at + 1] if spec.slopes else None]


def _weighted(spec: Spec, weights: Array, seen: Array, values: Array) -> Array:
    """weights @ values. A value that is not finite spoils the queries that see it alone, though 0 NaN is NaN too."""
    product = lambda x, v: _product(x, v, across=spec.lanes)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        return product(weights, values.astype(weights.dtype))
    values = values.astype(weights.dtype)
    found = product(weights, values)

    def mended() -> Array:
        sound = jnp.abs(values.astype(jnp.float32)) < jnp.inf
        one = lambda x: jnp.where(x, 1.0, 0.0).astype(weights.dtype)
        clean = jnp.where(sound, values.astype(jnp.float32), 0.0).astype(weights.dtype)
        return jnp.where(product(one(seen), one(~sound)) > 0, jnp.nan, product(weights, clean))

    spoiled = jnp.max(jnp.where(jnp.abs(found) < jnp.inf, 0.0, 1.0)) > 0
    return jax.lax.cond(spoiled, mended, lambda: found)


def _product(x: Array, y: Array, across: bool) -> Array:
    """x @ y, or x @ y.T if they meet across their last axes; float32 sums, and products if x is that."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    meet = (((1,), (1 if across else 0,)), ((), ()))
    return jax.lax.dot_general(x, y, meet, preferred_element_type=jnp.float32, precision=precision)

"""The arithmetic of a block of keys, as the kernel and its twin do it: online softmax over lines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.decode.blocks import HEAD


@dataclass(frozen=True)
class Spec:
    """What is known while tracing.

    heads: K.    mixed: whether lines are of all heads, or each group of queries has those of its own.
    lanes: whether keys and values are [dim, line] instead of [line, dim].
    soft_cap, scale: of scores.    k_scale, v_scale, slopes: whether slots have factors and positions.
    both: whether values are a part of the keys, with their factors.
    values: the dim of values.
    """

    heads: int
    mixed: bool
    lanes: bool
    scale: float
    soft_cap: float | None
    k_scale: bool
    v_scale: bool
    slopes: bool
    both: bool
    values: int

    @property
    def groups(self) -> int:
        """Groups of queries."""
        return 1 if self.mixed else self.heads


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


class Lines(NamedTuple):
    """What a group's lines are, [1 X] each: codes; factors of keys and of values; positions. None where not needed."""

    code: Any
    k_scale: Any
    v_scale: Any
    behind: Any


def lines_of(spec: Spec, group: int, told: Array, of_slot: Array, of_head: Array) -> Lines:
    """Lines from slots: `blocks.Blocks.told` of a block, and `blocks.spread`."""
    factors, at = [], 1
    for there in (spec.k_scale, spec.v_scale):
        factors.append(told[at : at + spec.heads] if there else None)
        at += spec.heads * there
    behind = told[at] if spec.slopes else None
    if spec.mixed:
        code = _exactly(told[0], of_slot, 1) + HEAD * of_head
        factors = [None if factor is None else _mixed(factor, of_slot, of_head) for factor in factors]
        behind = None if behind is None else _exactly(behind, of_slot, 3)
    else:
        code, factors = told[0], [None if factor is None else factor[group] for factor in factors]
    code, k_scale, v_scale, behind = (None if x is None else _row(x) for x in (code, *factors, behind))
    return Lines(code, k_scale, k_scale if spec.both else v_scale, behind)


def _mixed(factor: Array, of_slot: Array, of_head: Array) -> Array:
    """[K m 128] of slots to [m X]: of each line, that of its head."""
    return sum(jnp.where(of_head == h, _exactly(of, of_slot, 3), 0.0) for h, of in enumerate(factor))


def _exactly(x: Array, of_slot: Array, parts: int) -> Array:
    """Each slot's number at all of its lines, by a product: float32 is the sum of three bfloat16."""
    found = 0.0
    for _ in range(parts):
        part = x.astype(jnp.bfloat16)
        found, x = found + _product(part, of_slot, across=False), x - part.astype(jnp.float32)
    return found


def _row(x: Array) -> Array:
    """[m w] as [1 m * w]."""
    return jnp.concatenate([x[i : i + 1] for i in range(len(x))], axis=1)


def fold(spec: Spec, q: Array, want: Array, k: Array, v: Array, lines: Lines, carry: Carry) -> Carry:
    """One more block.

    Args:
        q: [R C] of a group.    want: [R 4], as `blocks.wanted` says.
        k, v: [X C] and [X V], or [C X] and [V X].
    """
    code, k_scale, v_scale, behind = lines
    scores = _product(q, k.astype(q.dtype), across=not spec.lanes) * spec.scale
    if k_scale is not None:
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
    weights = (weights if v_scale is None else weights * v_scale).astype(q.dtype)
    return Carry(carry.sums * decay + _weighted(spec, weights, seen, v), top, total)


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

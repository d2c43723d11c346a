"""A predicate of positions on the rows and columns of a tile.

Written with broadcasting, most of a mask's arithmetic is on rows or columns alone: the block of a query, the hash of a
key. Evaluated on whole tiles it would cost a kernel more than the products that it masks. So a predicate is traced once
on [n, 1] rows and [1, m] columns, and its equations are replayed on vectors, which become tiles only where they meet.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

SCALAR, ROWS, COLUMNS, TILE = range(4)
"""What a value varies along: nothing, rows, columns, both. The bits of the two axes, so `|` joins them."""

_SHAPES_ONLY = ("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "copy", "copy_p")
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}


def on_tile(mask: Callable[[Any, Any, Any], Any], q: Any, k: Any, head: Any, keys_axis: int = 1) -> Any:
    """The predicate of positions q [n] and k [m] and of a head, as bool: [n m], or [m n] where keys are on axis 0.

    Raises:
        NotImplementedError: the predicate does what cannot be told apart by rows and columns (a reduction, say).
    """
    shape = (q.shape[0], k.shape[0]) if keys_axis else (k.shape[0], q.shape[0])
    closed = _trace(mask, *shape, keys_axis)
    kinds = (ROWS, COLUMNS) if keys_axis else (COLUMNS, ROWS)
    values = [*zip(kinds, (q, k), strict=True), (SCALAR, head)]
    [(kind, out)] = _replay(closed.jaxpr, [(SCALAR, x) for x in closed.consts], values, shape)
    return _as(kind, TILE, out, shape)


@cache
def _trace(mask: Callable[[Any, Any, Any], Any], n: int, m: int, keys_axis: int) -> core.ClosedJaxpr:
    rows, columns, head = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((n, 1), (1, m), ()))
    return jax.make_jaxpr(mask)(*((rows, columns) if keys_axis else (columns, rows)), head)


def _as(kind: int, want: int, x: Any, shape: tuple[int, int]) -> Any:
    """`x` with everything that `want` varies along; truth values by way of integers, which backends can broadcast."""
    if kind == want:
        return x
    to = {ROWS: shape[:1], COLUMNS: shape[1:], TILE: shape}[want]
    if isinstance(x, np.generic):
        return jnp.full(to, x)
    if x.dtype == jnp.bool:
        return _as(kind, want, jnp.where(x, np.int32(1), np.int32(0)), shape) != 0
    return lax.broadcast_in_dim(x, to, {SCALAR: (), ROWS: (0,), COLUMNS: (1,)}[kind])


def _replay(jaxpr: core.Jaxpr, consts: list, values: list, shape: tuple[int, int]) -> list[tuple[int, Any]]:
    known: dict[Any, tuple[int, Any]] = dict(zip(jaxpr.constvars, consts, strict=True))
    known |= dict(zip(jaxpr.invars, values, strict=True))

    def read(atom: Any) -> tuple[int, Any]:
        if isinstance(atom, core.Literal):
            return SCALAR, np.asarray(atom.val, atom.aval.dtype).reshape(())[()]
        return known[atom]

    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        inputs = [read(atom) for atom in eqn.invars]
        if name in _CALLS:
            inner = eqn.params[_CALLS[name]]
            outs = _replay(inner.jaxpr, [(SCALAR, x) for x in inner.consts], inputs, shape)
        elif name in _SHAPES_ONLY:
            outs = inputs[:1]
        else:
            outs = [_elementwise(eqn, inputs, shape)]
        known |= dict(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _elementwise(eqn: core.JaxprEqn, inputs: list, shape: tuple[int, int]) -> tuple[int, Any]:
    [out] = eqn.outvars
    if out.aval.ndim > 2 or any(key in eqn.params for key in ("axes", "axis", "dimension", "dimension_numbers")):
        raise NotImplementedError(f"a mask that computes {eqn.primitive.name} is not evaluated on tiles")
    want = SCALAR
    for kind, _ in inputs:
        want |= kind
    inputs = [_as(kind, want, x, shape) for kind, x in inputs]
    if eqn.primitive is lax.not_p and out.aval.dtype == jnp.bool:  # not every backend has it
        return want, inputs[0] ^ jnp.ones_like(inputs[0])
    return want, eqn.primitive.bind(*inputs, **eqn.params)

"""A predicate of positions on the rows and columns of a tile.

Written with broadcasting, most of a mask's arithmetic is on rows or columns alone: the block of a query, the hash of a
key. Evaluated on whole tiles it would cost a kernel more than the products that it masks. So a predicate is traced once
on [n, 1] rows and [1, m] columns, and its equations are replayed on vectors, which become tiles only where they meet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

SCALAR, ROWS, COLUMNS, TILE = range(4)
"""What a value varies along: nothing, rows, columns, both. The bits of the two axes, so `|` joins them."""

Shapes = Mapping[int, tuple[int, ...]]
"""Of rows, columns and tiles."""

_SHAPES_ONLY = ("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "copy", "copy_p")
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}


def on_tile(mask: Callable[[Any, Any, Any], Any], q: Any, k: Any, head: Any, keys_axis: int = 1) -> Any:
    """The predicate of positions q [n] and k [m] and of a head, as bool: [n m], or [m n] where keys are on axis 0.

    Vectors may be given as [n 1] and [1 m] (with keys on axis 0, [1 n] and [m 1]), and remain so where tiles do not
    need to be made of them.

    Raises:
        NotImplementedError: the predicate does what cannot be told apart by rows and columns (a reduction, say).
    """
    n, m = shape = (q.size, k.size) if keys_axis else (k.size, q.size)
    closed = _trace(mask, *shape, keys_axis)
    shapes = {ROWS: (n,), COLUMNS: (m,), TILE: shape} if q.ndim == 1 else {ROWS: (n, 1), COLUMNS: (1, m), TILE: shape}
    kinds = (ROWS, COLUMNS) if keys_axis else (COLUMNS, ROWS)
    values = [*zip(kinds, (q, k), strict=True), (SCALAR, head)]
    [(kind, out)] = _replay(closed.jaxpr, [(SCALAR, x) for x in closed.consts], values, shapes)
    return _as(kind, TILE, out, shapes)


@cache
def _trace(mask: Callable[[Any, Any, Any], Any], n: int, m: int, keys_axis: int) -> core.ClosedJaxpr:
    rows, columns, head = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((n, 1), (1, m), ()))
    return jax.make_jaxpr(mask)(*((rows, columns) if keys_axis else (columns, rows)), head)


def _as(kind: int, want: int, x: Any, shapes: Shapes) -> Any:
    """`x` with everything that `want` varies along; truth values by way of integers, which backends can broadcast."""
    if kind == want:
        return x
    to = shapes[want]
    if isinstance(x, np.generic):
        return jnp.full(to, x)
    if x.dtype == jnp.bool:
        return _as(kind, want, jnp.where(x, np.int32(1), np.int32(0)), shapes) != 0
    if x.ndim == 2:
        return lax.broadcast_in_dim(x, to, (0, 1))
    return lax.broadcast_in_dim(x, to, {SCALAR: (), ROWS: (0,), COLUMNS: (1,)}[kind])


def _replay(jaxpr: core.Jaxpr, consts: list, values: list, shapes: Shapes) -> list[tuple[int, Any]]:
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
            outs = _replay(inner.jaxpr, [(SCALAR, x) for x in inner.consts], inputs, shapes)
        elif name in _SHAPES_ONLY:
            outs = inputs[:1]
        else:
            outs = [_elementwise(eqn, inputs, shapes)]
        known |= dict(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _elementwise(eqn: core.JaxprEqn, inputs: list, shapes: Shapes) -> tuple[int, Any]:
    [out] = eqn.outvars
    if out.aval.ndim > 2 or any(key in eqn.params for key in ("axes", "axis", "dimension", "dimension_numbers")):
        raise NotImplementedError(f"a mask that computes {eqn.primitive.name} is not evaluated on tiles")
    want = SCALAR
    for kind, _ in inputs:
        want |= kind
    inputs = [_as(kind, want, x, shapes) for kind, x in inputs]
    if eqn.primitive is lax.not_p and out.aval.dtype == jnp.bool:  # not every backend has it
        return want, inputs[0] ^ jnp.ones_like(inputs[0])
    return want, eqn.primitive.bind(*inputs, **eqn.params)

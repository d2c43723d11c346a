"""Rows of tokens on the mesh of `jax.set_mesh`, cut into spans of the text for the functions of `parallel.prefix`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxlong.core.types import BadInput
from jaxlong.parallel.layout import parts
from jaxlong.parallel.manual import auto_mesh, dividing, vary_alike
from jaxlong.parallel.mesh import RULES, partition
from jaxlong.parallel.prefix import Chain, moved


def spread(length: int, layout: str) -> bool:
    """Whether rows of that length lie in spans on several devices of the mesh of `jax.set_mesh`.

    Not so inside one's own `jax.shard_map`. A contiguous length that the devices do not divide is left to the compiler.

    Raises:
        BadInput: a layout without spans, or a length that does not divide into its parts.
    """
    mesh = auto_mesh()
    devices = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in _axes(mesh))
    if devices == 1 or length == 1:
        return False
    if layout == "striped":
        raise BadInput("backend.layout", layout, "leaves no two tokens in a row on a device", "zigzag")
    count = parts(layout, devices)
    if length % count and layout != "contiguous":
        near = max(count, round(length / count) * count)
        raise BadInput("length", length, f"does not divide into the {count} parts of {layout}", f"nearest: {near}")
    return length % count == 0


def over_spans(step: Callable[[Any, Any, Chain], tuple[Any, Any]], tokens: Any, shared: Any, *, layout: str) -> Any:
    """`step(tokens, shared, chain)` on the spans of each device of the mesh of `jax.set_mesh`, where they are `spread`.

    Manual over the axes of rows and tokens only: the compiler goes on dividing heads over others.

    Args:
        step: returns arrays of tokens, and arrays of rows [B, ...] that are alike on all devices of a row (`final`).
        tokens: a tree of arrays [B, T, ...].
        shared: a tree of arrays that all tokens use. Their gradients are added up across devices once.
    """
    mesh = auto_mesh()
    chain = Chain(_axes(mesh), layout)
    rows = partition(("batch",), jax.tree.leaves(tokens)[0].shape[:1], mesh)
    batch = tuple(jax.tree.leaves(tuple(rows)))  # axes of more than one device that divide the batch

    def part(tokens: Any, shared: Any) -> tuple[Any, Any]:
        tokens, shared = vary_alike((jax.tree.map(chain.cut, tokens), shared))
        out, end = step(tokens, shared, chain)
        return jax.tree.map(lambda x: x.reshape(x.shape[0] // chain.held, -1, *x.shape[2:]), out), end

    return jax.shard_map(
        part,
        mesh=mesh,
        in_specs=(P(batch, chain.axes), P()),
        out_specs=(P(batch, chain.axes), P(batch)),
        axis_names={*batch, *chain.axes, *(axis for axis, size in mesh.shape.items() if size == 1)},
    )(tokens, shared)


def over_rows(
    step: Callable[..., tuple[Array, ...]],
    arrays: Sequence[Array | None],
    names: Sequence[tuple[str | None, ...]],
    like: Sequence[int],
) -> tuple[Array, ...]:
    """`step(*arrays)` on what each device of the mesh of `jax.set_mesh` holds of rows, heads and widths, for kernels:
    these are programs of one device. Without a mesh, or inside `jax.shard_map` over all its axes, it is just that.

    An axis of the mesh that does not divide a dimension is left out of it. No token is split from its row.

    Args:
        names: of the first dimensions of each array (`parallel.mesh.RULES`); arrays without names are shared.
        like: the arrays by which results are split, one each.

    Raises:
        NotImplementedError: inside `jax.shard_map` over some axes, where a second one cannot be for the others.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if set(mesh.axis_types) <= {AxisType.Manual}:
        return step(*vary_alike(tuple(arrays)))
    if set(mesh.axis_types) != {AxisType.Auto}:
        raise NotImplementedError("the program is inside shard_map for some axes of its mesh only")

    def axes(name: str | None, size: int) -> tuple[str, ...]:
        rule = RULES[name] if name is not None else None
        return dividing(mesh, (rule,) if isinstance(rule, str) else (rule or ()), size)

    spec = lambda x, named: None if x is None else P(*map(axes, named, x.shape))
    specs = tuple(spec(x, named) for x, named in zip(arrays, names, strict=True))
    return jax.shard_map(
        lambda *arrays: step(*vary_alike(arrays)),
        mesh=mesh,
        in_specs=specs,
        out_specs=tuple(specs[i] for i in like),
    )(*arrays)


def to_text(tokens: Any, layout: str) -> Any:
    """Arrays [B T ...] of a layout in the order of the text, where they are `spread`: each device sends its spans."""
    return _rearranged(tokens, layout, lambda chain: chain.places)


def from_text(tokens: Any, layout: str) -> Any:
    """The inverse of `to_text`."""
    return _rearranged(tokens, layout, lambda chain: np.argsort(chain.places))


def _rearranged(tokens: Any, layout: str, source: Callable[[Chain], np.ndarray]) -> Any:
    if layout == "contiguous" or not spread(jax.tree.leaves(tokens)[0].shape[1], layout):
        return tokens
    fetch = lambda tokens, _, chain: (moved(tokens, source(chain), chain), None)
    return over_spans(fetch, tokens, None, layout=layout)[0]


def _axes(mesh: Any) -> tuple[str, ...]:
    """The axes of more than one device that divide rows."""
    rule = RULES["seq"]
    return tuple(axis for axis in ((rule,) if isinstance(rule, str) else rule) if mesh.shape.get(axis, 1) > 1)

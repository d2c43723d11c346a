"""Tokens through the feed-forward layers of their experts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from jaxlong.parallel.columns import Columns
from jaxlong.parallel.manual import auto_mesh, vary_alike
from jaxlong.parallel.partial import wide
from jaxlong.parallel.tokens import gathered, token_map

NAMES = (P("experts", "embed", "mlp"), P("experts", "embed", "mlp"), P("experts", "mlp", "embed"))
"""Logical axes of the weights."""


def mixture(
    x: Float[Array, "B T D"],
    experts: Int[Array, "B T k"],
    weights: Float[Array, "B T k"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
) -> Float[Array, "B T D"]:
    """sum_k weights_k swiglu(x; experts_k): rows sorted by expert, three grouped matmuls, rows back in order.

    Under a mesh (`jax.set_mesh`) each device sorts its own tokens. Along an axis "expert" that divides E it has its own
    experts, and what the others' add comes by a sum over that axis; of its own it gathers the parts.
    """
    mesh = auto_mesh()
    columns = Columns.of(mesh, "expert", gate.shape[0])

    def local(tokens: Any, parts: Any, held: Any) -> Array:
        # Tied together, the weights of several layers are not gathered at once; nor, backward, do gradients wait.
        (x, experts, weights), parts = jax.lax.optimization_barrier(vary_alike((tokens, parts)))
        whole = (gathered(place, x.dtype, part).astype(x.dtype) for part, place in zip(parts, held, strict=True))
        return columns.sum(_of_device(x, experts - columns.first(parts[0].shape[0]), weights, *whole))

    also = () if columns.axis is None else (columns.axis,)
    return token_map(local, (x, experts, weights), (gate, up, down), NAMES, mesh=mesh, also=also)


def _of_device(x: Array, experts: Array, weights: Array, gate: Array, up: Array, down: Array) -> Array:
    """What experts 0..E-1 add; other numbers are experts of other devices."""
    (B, T, D), k, E = x.shape, experts.shape[-1], gate.shape[0]
    mine = (experts >= 0) & (experts < E)
    number = jnp.where(mine, experts, E).reshape(-1)  # others' rows are sorted to the end
    places = jnp.arange(B * T * k, dtype=jnp.int32)
    order = _sorted(number, E)
    back = jnp.zeros_like(order).at[order].set(places, unique_indices=True)
    sizes = jnp.bincount(number, length=E + 1)[:E].astype(jnp.int32)
    here = (places < sizes.sum())[:, None]  # rows of no group may come out as anything
    rows = jnp.where(here, _picked(x.reshape(B * T, D), order, back), 0)
    grouped: Any = lambda rows, w: jax.lax.ragged_dot(rows, w, sizes)
    out = jnp.where(here, grouped(jax.nn.silu(grouped(rows, gate)) * grouped(rows, up), down), 0)
    chosen = _picked(out, back, order).reshape(B, T, k, D)
    return jnp.einsum("btkd,btk->btd", chosen, weights.astype(x.dtype))


def _sorted(number: Int[Array, "n"], most: int) -> Int[Array, "n"]:
    """The order of numbers 0..most, equal ones as they come.

    As one integer each where that has room: a sort of two arrays takes the TPU compiler longer than all else here.
    """
    n = len(number)
    places = jnp.arange(n, dtype=jnp.int32)
    if (most + 1) * n < 2**31:
        return jax.lax.sort(number * n + places, is_stable=False) % n
    return jax.lax.sort((number, places), num_keys=2, is_stable=False)[1]


@jax.custom_vjp
def _picked(x: Float[Array, "n D"], order: Int[Array, "m"], back: Int[Array, "m"]) -> Float[Array, "m D"]:
    """x[order // k], where `order` permutes k copies of each row and `back` undoes that. No gradient scatters."""
    return x[order // (len(order) // len(x))]


def _picked_bwd(residuals, drows):
    n, back = residuals
    return wide(drows[back].reshape(n, -1, drows.shape[-1])).sum(1).astype(drows.dtype), None, None


_picked.defvjp(lambda x, order, back: (_picked(x, order, back), (len(x), back)), _picked_bwd)

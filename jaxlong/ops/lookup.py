"""Rows of a table by their numbers: embeddings."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from jaxlong.ops.dense import accumulator
from jaxlong.parallel.manual import auto_mesh, vary_alike
from jaxlong.parallel.tokens import gather, scatter, token_map


def lookup(table: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
    """`table[tokens]` in `dtype`. The gradient of a row is summed over its tokens in float32.

    Under a mesh (`jax.set_mesh`) each device gathers the table, in `dtype`, for its own tokens; the table's gradient
    crosses devices once.
    """

    def local(tokens, table, held):
        return _rows(_Static(jnp.dtype(dtype), table.dtype, held), *vary_alike((table, tokens)))

    return token_map(local, tokens, table, P("vocab", "embed"), mesh=auto_mesh())


class _Static(NamedTuple):
    dtype: jnp.dtype
    table_dtype: jnp.dtype
    held: P


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(static: _Static, table: Array, tokens: Array) -> Array:
    return gather(table.astype(static.dtype), static.held)[tokens]


def _rows_fwd(static, table, tokens):
    return _rows(static, table, tokens), (tokens, jnp.zeros_like(table, shape=(table.shape[0], 0)))


def _rows_bwd(static, residuals, dx):
    tokens, like = residuals
    wide = dx.astype(accumulator(dx.dtype))
    sums = jnp.zeros_like(wide, shape=(like.shape[0], dx.shape[-1])).at[tokens].add(wide)
    return scatter(sums, static.held).astype(static.table_dtype), None


_rows.defvjp(_rows_fwd, _rows_bwd)

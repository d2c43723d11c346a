"""The plainest sequence parallelism: devices share out tokens and gather what they need whole.

Attention gathers keys, for any mask and any layout, since masks see positions: a device holds all keys and values of
its batch rows and heads while it computes.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jaxlong.parallel.partial import Local, Meta, wide


def all_gather(
    local: Local,
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S K M"],
    v: Float[Array, "B S K V"] | None,
    meta: Meta,
    *,
    axis: str | tuple[str, ...],
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """Inside `jax.shard_map`: attention of a device's queries over the keys of all devices of `axis`, gathered.

    One gather of k and v side by side; their gradients go back by a reduce-scatter that adds up in float32.

    Args:
        local: attention on one device.
        q, k, v, meta: the device's part of each. v may be None, if `local` makes it of k. A bias has the rows of the
            device's queries and the columns of all keys, in the order of the devices.
        axis: the mesh axis of the sequence, or several.
    """
    kv = gather_floats(axis, k if v is None else jnp.concatenate([k, v], axis=-1))
    k_positions, k_segments = gather_ints((meta.k_positions, meta.k_segments), axis)
    meta = meta._replace(k_positions=k_positions, k_segments=k_segments)
    return local(q, kv[..., : k.shape[-1]], None if v is None else kv[..., k.shape[-1] :], meta)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def gather_floats(axis: str | tuple[str, ...], x: Float[Array, "B S *rest"]) -> Float[Array, "B nS *rest"]:
    """The parts of all devices one after another, whose gradients are summed in float32."""
    return lax.all_gather(x, axis, axis=1, tiled=True)


gather_floats.defvjp(
    lambda axis, x: (gather_floats(axis, x), jnp.zeros((0,), x.dtype)),
    lambda axis, like, dx: (lax.psum_scatter(wide(dx), axis, scatter_dimension=1, tiled=True).astype(like.dtype),),
)


def gather_ints(rows: tuple[Array | None, ...], axis: str | tuple[str, ...]) -> tuple[Array | None, ...]:
    """Integers [B, S] of all devices, in one gather; an array that comes twice goes once."""
    found = {id(x): x for x in rows if x is not None}
    whole = lax.all_gather(jnp.stack(list(found.values())), axis, axis=2, tiled=True)
    by_id = dict(zip(found, whole, strict=True))
    return tuple(None if x is None else by_id[id(x)] for x in rows)

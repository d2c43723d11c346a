"""Ulysses (Jacobs et al. 2023, arXiv 2309.14509): tokens are exchanged for heads, and exchanged back.

    [B, S / n, H, C]  -- all to all -->  [B, S, H / n, C]  -- attention -->  [B, S, H / n, V]  -- all to all -->

A device computes a share of the heads over the whole sequence, so any attention will do. Autodiff sends gradients the
same ways. With a ring for the attention, on another mesh axis, it is USP (Fang and Zhao 2024, arXiv 2405.07719).
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from jaxlong.parallel.allgather import gather_floats, gather_ints
from jaxlong.parallel.partial import Local, Meta, wide


class Share(NamedTuple):
    """Which heads a device of n computes: each row's, as many for each, and the key heads that these look at.

    Where heads do not divide by n, some come twice, and only the first is kept.
    """

    queries: Int[np.ndarray, "n h"]
    keys: Int[np.ndarray, "n k"]


def share_heads(heads: int, kv_heads: int, devices: int) -> Share:
    """ceil(H / n) query heads a device, in order.

    A device gets the key heads of its queries once, if they serve equally many; otherwise a copy for each query head.
    Key heads that several devices need are sent to each: that is what each would receive in any exchange.
    """
    groups, each = heads // kv_heads, -(-heads // devices)
    queries = np.minimum(np.arange(devices * each).reshape(devices, each), heads - 1)
    serving = queries // groups
    if each % groups == 0:
        serving = np.minimum(np.arange(devices * each).reshape(devices, -1)[:, ::groups] // groups, kv_heads - 1)
    elif groups % each == 0:
        serving = serving[:, :1]
    return Share(queries, serving)


def ulysses(
    local: Local,
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S K M"],
    v: Float[Array, "B S K V"] | None,
    meta: Meta,
    *,
    axis: str | tuple[str, ...],
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """Inside `jax.shard_map`: attention of a device's queries over the keys of all devices of `axis`.

    Three exchanges forward (q; k and v side by side; out) and three backward; positions and segment ids are gathered.

    Args:
        local: attention on one device, or over another mesh axis: `functools.partial(ring, local, axis="seq")`.
        q, k, v, meta: the device's part of each, with all heads. v may be None, if `local` makes it of k; what makes
            it, `meta.weights`, has as many heads as q. A bias has the rows of the device's queries and all columns.
        axis: the mesh axis of the sequence, or several.
    """
    devices = lax.axis_size(axis)
    if devices == 1:
        return local(q, k, v, meta)
    H, K = q.shape[2], k.shape[2]
    share = share_heads(H, K, devices)
    kv = k if v is None else jnp.concatenate([k, v], axis=-1)
    whole_q = _to_heads(_take(q, share.queries, 2), axis)
    # all devices look at a single head
    whole_kv = gather_floats(axis, kv) if K == 1 else _to_heads(_take(kv, share.keys, 2), axis)
    out, lse = local(
        whole_q,
        whole_kv[..., : k.shape[-1]],
        None if v is None else whole_kv[..., k.shape[-1] :],
        _whole(meta, share, axis),
    )
    return _to_tokens(out, axis)[:, :, :H], _to_tokens(lse, axis)[:, :, :H]


def _to_heads(x: Float[Array, "B T H *rest"], axis: str | tuple[str, ...]) -> Float[Array, "B nT h *rest"]:
    return lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True)


def _to_tokens(x: Float[Array, "B nT h *rest"], axis: str | tuple[str, ...]) -> Float[Array, "B T H *rest"]:
    return lax.all_to_all(x, axis, split_axis=1, concat_axis=2, tiled=True)


def _take(x: Array, table: Int[np.ndarray, "n h"], dim: int) -> Array:
    """Heads in the order of a table; gradients of those that come more than once add up in float32."""
    if table.size == x.shape[dim] and (table.reshape(-1) == np.arange(x.shape[dim])).all():
        return x
    return jnp.take(wide(x), table.reshape(-1), axis=dim).astype(x.dtype)


def _whole(meta: Meta, share: Share, axis: str | tuple[str, ...]) -> Meta:
    """Meta of all tokens and of the device's heads."""
    places = (meta.q_positions, meta.k_positions, meta.q_segments, meta.k_segments)
    of_heads = lambda x, dim=0: None if x is None else jnp.take(x, _own(share, axis), axis=dim)
    weights = None if meta.weights is None else tuple(of_heads(w, 1) for w in meta.weights)
    return Meta(
        *gather_ints(places, axis),
        of_heads(meta.heads),
        None if meta.bias is None else _whole_bias(meta.bias, share, axis),
        of_heads(meta.alibi_slopes),
        of_heads(meta.sinks),
        weights,
    )


def _own(share: Share, axis: str | tuple[str, ...]) -> Int[Array, "h"]:
    """The heads of this device."""
    return jnp.asarray(share.queries, jnp.int32)[lax.axis_index(axis)]


def _whole_bias(bias: Float[Array, "b h t s"], share: Share, axis: str | tuple[str, ...]) -> Float[Array, "b h_ t_ s"]:
    """All rows of the device's heads. What is shared by all heads, or by all rows, stays shared."""
    _, h, t, _ = bias.shape
    if h == 1:
        return bias if t == 1 else jnp.swapaxes(gather_floats(axis, jnp.swapaxes(bias, 1, 2)), 1, 2)
    if t == 1:
        return jnp.take(bias, _own(share, axis), axis=1)
    return lax.all_to_all(_take(bias, share.queries, 1), axis, split_axis=1, concat_axis=2, tiled=True)

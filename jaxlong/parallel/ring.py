"""Ring Attention (Liu et al. 2023, arXiv 2310.01889): queries stay, keys and values go round.

    hop 0      device r attends to its own keys                 and sends them on to device r + 1
    hop i      ... to the keys of device r - i, just arrived    and sends them on, until hop n - 1

Each transfer is issued before the attention that it passes behind, so a hop takes the longer of the two. What a hop
finds is merged into float32 sums by its lse. Masks see positions, which travel along: any layout will do.

The backward pass is a second ring. Given out and lse of the whole, a hop's gradients are final, as in
FlashAttention: dq stays and adds up, dk and dv follow their keys and add up on the way, in float32. Own keys come
last here, when their sums come home.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int

from jaxlong.core.mask import Mask, full
from jaxlong.parallel.manual import vary_alike
from jaxlong.parallel.partial import (
    Gradients,
    Local,
    Meta,
    backward_of,
    join_sinks,
    merge,
    partial_of,
    sinks_gradient,
    wide,
)

Axis = str | tuple[str, ...]

EVERYTHING = full()


def ring(
    local: Local,
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S K M"],
    v: Float[Array, "B S K V"] | None,
    meta: Meta,
    *,
    axis: Axis,
    mask: Mask = EVERYTHING,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """Inside `jax.shard_map`: attention of a device's queries over the keys of all devices of `axis`.

    n - 1 transfers of keys forward; n - 1 of keys and n of their float32 gradients backward. A device holds the keys
    of two others at a time. The output and the lse carry the checkpoint names "attend_out" and "attend_lse": a remat
    policy that saves both never runs the forward ring again.

    Args:
        local: attention on one device, a hop. It never sees `sinks`.
        q, k, v, meta: the device's part of each. v may be None, if `local` makes it of k. A bias has the rows of the
            device's queries and the columns of all keys, in the order of the devices.
        axis: the mesh axis of the sequence, or several.
        mask: what `local` shows, so that hops which show nothing are skipped. It hides nothing itself.

    Returns:
        out in v's dtype, lse in float32.
    """
    if lax.axis_size(axis) == 1:
        return local(q, k, v, meta)
    return _ring(_Static(local, axis, mask), *vary_alike((q, k, v, meta)))


class _Static(NamedTuple):
    local: Local
    axis: Axis
    mask: Mask


class _Keys(NamedTuple):
    """What goes round: one array of numbers, k and v side by side, and one of positions (and segment ids)."""

    kv: Float[Array, "B S K M+V"]
    places: Int[Array, "i B S"]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(static: _Static, q: Array, k: Array, v: Array | None, meta: Meta):
    q, meta = lax.optimization_barrier((q, meta))  # else what follows from positions leaves the loop over layers
    hops, attend = lax.axis_size(static.axis), partial_of(static.local)

    def visit(i, keys, total):
        k_i, v_i, meta_i, _ = _arrived(static, i, keys, k, meta)
        join = lambda total: merge(total, attend(q, k_i, v_i, meta_i))
        return lax.cond(_sees(static.mask, meta_i), join, lambda total: total, total)

    def hop(i, carry):
        keys, total = carry
        coming = _send(keys, static.axis)
        return coming, visit(i, keys, total)

    out, lse = jax.eval_shape(attend, q, k, v, meta._replace(bias=_columns(meta.bias, 0, k.shape[1]), sinks=None))
    nothing = (
        jnp.zeros_like(wide(q), shape=out.shape),
        jnp.full_like(wide(q), -jnp.inf, shape=lse.shape),
    )
    keys, total = lax.fori_loop(0, hops - 1, hop, (_pack(k, v, meta), nothing))
    out, lse = join_sinks(*visit(hops - 1, keys, total), meta.sinks)
    return out.astype(k.dtype), lse


def _ring_fwd(static: _Static, q: Array, k: Array, v: Array | None, meta: Meta):
    out, lse = _ring(static, q, k, v, meta)
    out, lse = checkpoint_name(out, "attend_out"), checkpoint_name(lse, "attend_lse")
    return (out, lse), (q, k, v, meta, out, lse)


def _ring_bwd(static: _Static, residuals, cotangents):
    q, k, v, meta, out, lse = residuals
    hops, backward = lax.axis_size(static.axis), backward_of(static.local)
    (dout, dlse), (q, meta) = cotangents, lax.optimization_barrier((q, meta))
    own = _pack(k, v, meta)

    def visit(i, keys, sums):
        k_i, v_i, meta_i, column = _arrived(static, i, keys, k, meta)

        def add(sums):
            found = backward(q, k_i, v_i, meta_i, out, lse, dout, dlse)
            return _add(sums, found, column), _join(found.k, found.v)

        nothing = lambda sums: (sums, _zeros(keys.kv))
        return lax.cond(_sees(static.mask, meta_i), add, nothing, sums)

    def hop(i, carry):
        keys, owed, sums = carry
        coming, pending = _send(keys, static.axis), _send(owed, static.axis)
        sums, here = visit(i, keys, sums)
        return coming, pending + here, sums

    def last_hop(carry, at):
        (owed, sums), (i, keys) = carry, at
        pending = _send(owed, static.axis)
        sums, here = visit(i, keys, sums)
        return (pending + here, sums), None

    sums = jax.tree.map(_zeros, Gradients(q, None, None, meta.bias, meta.alibi_slopes, meta.weights))
    keys, owed, sums = lax.fori_loop(1, hops - 1, hop, (_send(own, static.axis), _zeros(own.kv), sums))
    ends = jnp.arange(hops - 1, hops + 1), jax.tree.map(lambda *x: jnp.stack(x), keys, own)
    (owed, sums), _ = lax.scan(last_hop, (owed, sums), ends)

    dk, dv = _split(owed, k)
    found = sums._replace(k=dk, v=None if v is None else dv)
    like = Gradients(q, k, v, meta.bias, meta.alibi_slopes, meta.weights)
    found = jax.tree.map(lambda x, y: x.astype(y.dtype), found, like)
    of_meta = Meta(None, None, bias=found.bias, alibi_slopes=found.alibi_slopes, weights=found.weights)
    if meta.sinks is not None:
        of_meta = of_meta._replace(sinks=sinks_gradient(meta.sinks, out, lse, dout, dlse).astype(meta.sinks.dtype))
    return found.q, found.k, found.v, of_meta


_ring.defvjp(_ring_fwd, _ring_bwd)


def _send(x: Any, axis: Axis) -> Any:
    """To the next device of the ring."""
    n = lax.axis_size(axis)
    return lax.ppermute(x, axis, [(r, (r + 1) % n) for r in range(n)])


def _pack(k: Array, v: Array | None, meta: Meta) -> _Keys:
    places = [meta.k_positions] if meta.k_segments is None else [meta.k_positions, meta.k_segments]
    return _Keys(_join(k, v), jnp.stack(places))


def _join(k: Array, v: Array | None) -> Array:
    return k if v is None else jnp.concatenate([k, v], axis=-1)


def _split(kv: Array, k: Array) -> tuple[Array, Array]:
    return kv[..., : k.shape[-1]], kv[..., k.shape[-1] :]


def _arrived(
    static: _Static, i: Array | int, keys: _Keys, k: Array, meta: Meta
) -> tuple[Array, Array | None, Meta, Array]:
    """At hop i: keys, values and meta of the device i places back, and its first column of a bias."""
    k_i, v_i = _split(keys.kv, k)
    source = (lax.axis_index(static.axis) - i) % lax.axis_size(static.axis)
    column = source * k.shape[1]
    meta = meta._replace(
        k_positions=keys.places[0],
        k_segments=None if meta.k_segments is None else keys.places[1],
        bias=_columns(meta.bias, column, k.shape[1]),
        sinks=None,
    )
    return k_i, v_i if v_i.shape[-1] else None, meta, column


def _zeros(x: Array) -> Array:
    return jnp.zeros_like(wide(x))


def _columns(bias: Array | None, start: Array | int, size: int) -> Array | None:
    """Those of one device's keys, if the columns differ."""
    if bias is None or bias.shape[3] == 1:
        return bias
    return lax.dynamic_slice_in_dim(bias, start, size, axis=3)


def _add(sums: Gradients, found: Gradients, column: Array) -> Gradients:
    """Adds up what stays at home; a bias where its columns are."""
    stay = lambda x: x._replace(k=None, v=None, bias=None)
    added = jax.tree.map(jnp.add, stay(sums), stay(found))
    if sums.bias is None:
        return added
    before = _columns(sums.bias, column, found.bias.shape[3])
    if sums.bias.shape[3] == 1:
        return added._replace(bias=before + found.bias)
    return added._replace(bias=lax.dynamic_update_slice_in_dim(sums.bias, before + found.bias, column, axis=3))


def _sees(mask: Mask, meta: Meta) -> Bool[Array, ""]:
    """Whether any query may see any key, by the ranges of their positions and of their segments."""
    q_first, q_last, q_low, q_high = _ranges(meta.q_positions, meta.q_segments)
    k_first, k_last, k_low, k_high = _ranges(meta.k_positions, meta.k_segments)
    maybe_any, _ = mask.tile(q_first, q_last, k_first, k_last)
    return (maybe_any & (q_low <= k_high) & (k_low <= q_high)).any()


def _ranges(positions: Int[Array, "B S"], segments: Int[Array, "B S"] | None) -> tuple[Array, Array, Array, Array]:
    """Least and greatest position and segment of each row, over the slots that hold a token; none is an empty range."""
    segments = jnp.zeros_like(positions) if segments is None else segments
    held, large = segments >= 0, jnp.iinfo(jnp.int32).max
    least = lambda x: jnp.where(held, x, large).min(-1)
    most = lambda x: jnp.where(held, x, -1).max(-1)
    first, last = least(positions), most(positions)
    some = last >= 0
    return jnp.where(some, first, 0), jnp.where(some, last, 0), least(segments), most(segments)

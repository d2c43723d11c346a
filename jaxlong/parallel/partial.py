"""Attention over some of the keys: what it takes, how results over disjoint keys merge, and what each owes the whole.

The softmax over all keys is a mean of the softmaxes over parts of them, weighted by exp(lse_i - lse). So a part needs
of the others nothing but the whole's output and lse, forward or backward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


class Meta(NamedTuple):
    """What attention takes beside q, k and v, and what is cut along with them.

    weights: what `local` makes keys and values of its k and v with, [*, H, *] each; None where these are given.
    """

    q_positions: Int[Array, "B T"]
    k_positions: Int[Array, "B S"]
    q_segments: Int[Array, "B T"] | None = None
    k_segments: Int[Array, "B S"] | None = None
    heads: Int[Array, "H"] | None = None
    bias: Float[Array, "#B #H #T #S"] | None = None
    alibi_slopes: Float[Array, "H"] | None = None
    sinks: Float[Array, "H"] | None = None
    weights: Any = None


class Gradients(NamedTuple):
    """Of everything that a part of the keys gives a gradient to, in float32; None as in the arguments."""

    q: Float[Array, "B T H C"]
    k: Float[Array, "B S K M"]
    v: Float[Array, "B S K V"] | None
    bias: Float[Array, "#B #H #T #S"] | None = None
    alibi_slopes: Float[Array, "H"] | None = None
    weights: Any = None


@runtime_checkable
class Local(Protocol):
    """Attention on the arrays of one device. Any function `(q, k, v, meta) -> (out, lse)` is one.

    It must hash if it is to go round a ring, and may have two methods: `partial`, the same call with `out` in float32,
    to be merged; and `backward(q, k, v, meta, out, lse, dout, dlse) -> Gradients`, those that k and v are owed, where
    out and lse are results over *all* keys, sinks included.
    """

    def __call__(self, q: Array, k: Array, v: Array | None, meta: Meta) -> tuple[Array, Array]: ...


def partial_of(local: Local) -> Callable[..., tuple[Array, Array]]:
    """Attention whose result will be merged."""
    return getattr(local, "partial", local)


def backward_of(local: Local) -> Callable[..., Gradients]:
    """The backward pass of a part of the keys, given out and lse of the whole."""
    return getattr(local, "backward", None) or partial(recomputed, local)


def recomputed(
    local: Local,
    q: Array,
    k: Array,
    v: Array | None,
    meta: Meta,
    out: Float[Array, "B T H V"],
    lse: Float[Array, "B T H"],
    dout: Float[Array, "B T H V"],
    dlse: Float[Array, "B T H"],
) -> Gradients:
    """The backward pass of a part for any `local`, which it runs again in float32.

    out = sum_i w_i out_i  with  w_i = exp(lse_i - lse)
    d out_i = w_i dout,  d lse_i = w_i (dout . (out_i - out) + dlse)
    """
    floats = Gradients(q, k, v, meta.bias, meta.alibi_slopes, meta.weights)

    def run(floats: Gradients):
        also = meta._replace(bias=floats.bias, alibi_slopes=floats.alibi_slopes, weights=floats.weights)
        return partial_of(local)(floats.q, floats.k, floats.v, also)

    (out_i, lse_i), pull = jax.vjp(run, jax.tree.map(wide, floats))
    here = lse_i != -jnp.inf
    weight = jnp.where(here, jnp.exp(jnp.where(here, lse_i - lse, 0)), 0)
    dout = jnp.where(here[..., None], wide(dout), 0)
    dlse = jnp.where(here, wide(dlse), 0) + (dout * (out_i - wide(out))).sum(-1)
    return pull(((weight[..., None] * dout).astype(out_i.dtype), (weight * dlse).astype(lse_i.dtype)))[0]


def merge(
    a: tuple[Float[Array, "B T H V"], Float[Array, "B T H"]],
    b: tuple[Float[Array, "B T H V"], Float[Array, "B T H"]],
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """Attention over two disjoint sets of keys, from `(out, lse)` over each. Empty sets (lse -inf) are neutral.

    Computed in float32; the output has the wider dtype of the two, so carry a float32 one through many merges.
    """
    (out_a, lse_a), (out_b, lse_b) = a, b
    top = jax.lax.stop_gradient(jnp.maximum(lse_a, lse_b))
    top = jnp.where(top == -jnp.inf, 0, top)
    weight_a, weight_b = jnp.exp(lse_a - top), jnp.exp(lse_b - top)
    total = weight_a + weight_b
    nothing = total == 0
    total = jnp.where(nothing, 1, total)
    out = out_a * (weight_a / total)[..., None] + out_b * (weight_b / total)[..., None]
    return out.astype(jnp.promote_types(out_a.dtype, out_b.dtype)), jnp.where(nothing, -jnp.inf, top + jnp.log(total))


def join_sinks(
    out: Float[Array, "B T H V"], lse: Float[Array, "B T H"], sinks: Float[Array, "H"] | None
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """Merges keys of value 0, one a head, with `sinks` for scores."""
    if sinks is None:
        return out, lse
    joined = jnp.logaddexp(lse, wide(sinks))
    share = jnp.where(lse == -jnp.inf, 0, jnp.exp(lse - joined))
    return out * share[..., None], joined


def sinks_gradient(
    sinks: Float[Array, "H"],
    out: Float[Array, "B T H V"],
    lse: Float[Array, "B T H"],
    dout: Float[Array, "B T H V"],
    dlse: Float[Array, "B T H"],
) -> Float[Array, "H"]:
    """What those keys are owed, from results that include them."""
    delta = (wide(out) * wide(dout)).sum(-1) - dlse
    return -(jnp.exp(jnp.minimum(wide(sinks) - lse, 0)) * delta).sum((0, 1))


def wide(x: Array) -> Array:
    """float32, or float64 if it is that."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))

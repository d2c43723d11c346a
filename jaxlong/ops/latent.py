"""Attention over latents: one small vector a token, of which every head makes its keys and values where it attends.

What moves between devices is the latent: 576 numbers a token instead of 40,960 at DeepSeek-V3's sizes. A hop of a ring
makes keys and values of what has arrived, so all of them are made once on every device:
S d_c (d_n + d_v) multiply-adds a head, a tenth of the attention from some 4,000 tokens a device on.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.mask import Mask
from jaxlong.ops.attend import Backend, Local, over_mesh
from jaxlong.ops.dense import accumulator, precision
from jaxlong.parallel.partial import Gradients, Meta


def attend_latent(
    q: Float[Array, "B T H C"],
    latent: Float[Array, "B S M"],
    weights: tuple[Float[Array, "R H N"], Float[Array, "R H V"]] | None,
    *,
    mask: Mask,
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B T"] | None = None,
    k_segments: Int[Array, "B S"] | None = None,
    scale: float,
    backend: Backend,
) -> Float[Array, "B T H U"]:
    """Softmax attention where `latent` is [c ; r] and head h sees keys [c Wk_h ; r] and values c Wv_h.

    Args:
        weights: Wk and Wv; None takes the latents themselves for keys and for values, C = M.
        mask, q_positions, k_positions, q_segments, k_segments, scale, backend: as in `attend`.
    """
    heads = jnp.arange(q.shape[2], dtype=jnp.int32)
    meta = Meta(q_positions, k_positions, q_segments, k_segments, heads, weights=weights)
    local = FromLatents(Local(backend.kernel, mask, scale, None))
    return over_mesh(local, q, latent[:, :, None], None, meta, mask, backend)[0]


@dataclass(frozen=True)
class FromLatents:
    """Attention on one device over the keys and values that `meta.weights` make of the latents k."""

    local: Local

    def __call__(self, q: Array, k: Array, v: None, meta: Meta) -> tuple[Array, Array]:
        return self.local(q, *_expand(k, meta.weights), meta)

    def partial(self, q: Array, k: Array, v: None, meta: Meta) -> tuple[Array, Array]:
        return self.local.partial(q, *_expand(k, meta.weights), meta)

    def backward(
        self, q: Array, k: Array, v: None, meta: Meta, out: Array, lse: Array, dout: Array, dlse: Array
    ) -> Gradients:
        found = self.local.backward(q, *_expand(k, meta.weights), meta, out, lse, dout, dlse)
        dk, weights = _contract(k, meta.weights, found.k, found.v)
        return found._replace(k=dk, v=None, weights=weights)


Weights = tuple[Float[Array, "R H N"], Float[Array, "R H V"]] | None


def _expand(latent: Float[Array, "B S 1 M"], weights: Weights) -> tuple[Array, Array]:
    """Keys and values of all heads."""
    if weights is None:
        return latent, latent
    wk, wv = weights
    c, r = latent[:, :, 0, : len(wk)], latent[..., len(wk) :]
    k = jnp.einsum("bsr,rhn->bshn", c, wk)
    k = jnp.concatenate([k, jnp.broadcast_to(r, (*k.shape[:3], r.shape[-1]))], -1)
    return k, jnp.einsum("bsr,rhv->bshv", c, wv)


def _contract(
    latent: Float[Array, "B S 1 M"], weights: Weights, dk: Float[Array, "B S K C"], dv: Float[Array, "B S K V"]
) -> tuple[Float[Array, "B S 1 M"], Weights]:
    """Gradients of the latents and of the weights, in float32, from those of keys and values."""
    if weights is None:
        return dk + dv, None
    wk, wv = weights
    c, N = latent[:, :, 0, : len(wk)], wk.shape[-1]
    dn, dr = dk[..., :N].astype(c.dtype), dk[..., N:].sum(2)
    dv = dv.astype(c.dtype)
    dc = _einsum("bshn,rhn->bsr", dn, wk) + _einsum("bshv,rhv->bsr", dv, wv)
    return jnp.concatenate([dc, dr], -1)[:, :, None], (
        _einsum("bsr,bshn->rhn", c, dn),
        _einsum("bsr,bshv->rhv", c, dv),
    )


def _einsum(formula: str, x: Array, y: Array) -> Array:
    return jnp.einsum(formula, x, y, preferred_element_type=accumulator(x.dtype), precision=precision(x.dtype))

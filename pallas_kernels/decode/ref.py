"""Decode attention's oracle: pages gathered, numbers scaled, all scores at once, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.decode.blocks import Inputs, Setting, of_slots


def attention(setting: Setting, inputs: Inputs) -> tuple[Array, Array]:
    """(out [B T H V] in setting.dtype, lse [B T H] float32)."""
    k = _wide(inputs, inputs.k, inputs.k_scale)
    v = k[..., : setting.value_dim] if inputs.v is None else _wide(inputs, inputs.v, inputs.v_scale)
    (B, T, H, C), K = inputs.q.shape, k.shape[2]
    q = inputs.q.astype(jnp.float32).reshape(B, T, K, H // K, C)
    high = {"preferred_element_type": jnp.float32, "precision": jax.lax.Precision.HIGHEST}
    scores = setting.scale * jnp.einsum("btkgc,bskc->btkgs", q, k, **high).reshape(B, T, H, -1)
    if setting.soft_cap is not None:
        scores = setting.soft_cap * jnp.tanh(scores / setting.soft_cap)
    rows, columns = inputs.q_positions[:, :, None], inputs.k_positions[:, None, :]
    if inputs.slopes is not None:
        scores = scores - inputs.slopes[:, None] * jnp.abs(rows - columns).astype(jnp.float32)[:, :, None]
    seen = setting.mask(rows, columns)
    if inputs.q_segments is not None:
        k_segments = inputs.k_segments[:, None, :]
        seen = seen & (inputs.q_segments[:, :, None] == k_segments) & (k_segments >= 0)
    scores = jnp.where(seen[:, :, None], scores, -jnp.inf)
    top = scores.max(-1)
    top = top if inputs.sinks is None else jnp.maximum(top, inputs.sinks)
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(scores - top[..., None])
    total = weights.sum(-1) if inputs.sinks is None else weights.sum(-1) + jnp.exp(inputs.sinks - top)
    safe = jnp.where(total == 0, 1, total)
    # what a query does not see is not multiplied by 0, which NaN would survive
    v = jnp.where(seen.any(1)[..., None, None], v, 0)
    weights = (weights / safe[..., None]).reshape(B, T, K, H // K, -1)
    out = jnp.einsum("btkgs,bskv->btkgv", weights, v, **high).reshape(B, T, H, -1)
    return out.astype(setting.dtype), jnp.where(total == 0, -jnp.inf, top + jnp.log(safe))


def _wide(inputs: Inputs, x: Array, factor: Array | None) -> Array:
    """[B S K c] in float32."""
    x = x.astype(jnp.float32)
    if inputs.pages is not None:
        x = x[jnp.clip(inputs.pages, 0, len(x) - 1)].reshape(len(inputs.pages), -1, *x.shape[2:])
    return x if factor is None else x * of_slots(inputs, factor)[..., None]

"""Flash attention's oracle: all scores at once, in float32."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.flash import Inputs, Setting


def attention(setting: Setting, inputs: Inputs, narrow: Callable[[Array], Array] = lambda x: x) -> tuple[Array, Array]:
    """(out [B T H V] in setting.dtype, lse [B T H] float32).

    Args:
        narrow: applied to scores, weights and out: a rounding here gives the errors of attention in a narrow type.
    """
    q, k, v = (x.astype(jnp.float32) for x in (inputs.q, inputs.k, inputs.v))
    groups = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    high = {"preferred_element_type": jnp.float32, "precision": jax.lax.Precision.HIGHEST}
    scores = narrow(setting.scale * jnp.einsum("bthc,bshc->bhts", q, k, **high))
    if setting.soft_cap is not None:
        scores = setting.soft_cap * jnp.tanh(scores / setting.soft_cap)
    rows, columns = inputs.q_positions[:, None, :, None], inputs.k_positions[:, None, None, :]
    if inputs.slopes is not None:
        scores = scores - inputs.slopes[:, None, None] * jnp.abs(rows - columns).astype(jnp.float32)
    seen = setting.mask(rows, columns, inputs.heads[None, :, None, None])
    if inputs.q_segments is not None:
        k_segments = inputs.k_segments[:, None, None, :]
        seen = seen & (inputs.q_segments[:, None, :, None] == k_segments) & (k_segments >= 0)
    scores = jnp.where(seen, scores, -jnp.inf)
    top = scores.max(-1, keepdims=True)
    sinks = None if inputs.sinks is None else inputs.sinks.astype(jnp.float32)[None, :, None, None]
    if sinks is not None:
        top = jnp.maximum(top, sinks)
    top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks - top)
    safe = jnp.where(total == 0, 1, total)
    out = narrow(jnp.einsum("bhts,bshv->bthv", narrow(weights / safe), v, **high))
    lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(safe))
    return out.astype(setting.dtype), jnp.moveaxis(lse[..., 0], 1, 2)

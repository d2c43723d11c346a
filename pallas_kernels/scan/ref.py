"""The oracle of the selective scan: one token at a time, float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def reference(
    x: Array,
    dt: Array,
    a: Array,
    b: Array,
    c: Array,
    d: Array,
    h0: Array | None = None,
    resets: Array | None = None,
) -> tuple[Array, Array]:
    """The recurrence itself, h_t = exp(dt_t a) h_(t-1) + (dt_t x_t) b_t^T and y_t = h_t c_t + d x_t.

    Gu and Dao, arXiv 2312.00752.

    Args:
        x, dt: [B T D].    a: [D N].    b, c: [B T N].    d: [D].    h0: [B D N], None is 0.
        resets: [B T], tokens before which the state becomes 0.

    Returns:
        y [B T D] and the state after the last token [B D N], float32.
    """
    x, dt, a, b, c, d = (array.astype(jnp.float32) for array in (x, dt, a, b, c, d))
    (batch, length, width), states = x.shape, a.shape[1]
    h0 = jnp.zeros((batch, width, states)) if h0 is None else h0.astype(jnp.float32)
    resets = jnp.zeros((batch, length), bool) if resets is None else resets

    def step(h: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        x, dt, b, c, reset = token
        h = jnp.exp(dt[..., None] * a) * jnp.where(reset[:, None, None], 0, h) + (dt * x)[..., None] * b[:, None]
        return h, (h * c[:, None]).sum(-1) + d * x

    h, y = jax.lax.scan(step, h0, jax.tree.map(lambda array: jnp.moveaxis(array, 1, 0), (x, dt, b, c, resets)))
    return jnp.moveaxis(y, 0, 1), h

"""The oracle of the delta rule: one token at a time, float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def reference(
    q: Array, k: Array, v: Array, log_decay: Array, beta: Array, s0: Array | None = None, resets: Array | None = None
) -> tuple[Array, Array]:
    """The recurrence itself, in float32 at the highest matmul precision.

        S_t = (I - beta_t k_t k_t^T) Diag(exp(log_decay_t)) S_(t-1) + beta_t k_t v_t^T
        o_t = S_t^T q_t

    Yang et al., arXiv 2406.06484 and 2412.06464; Kimi Linear, arXiv 2510.26692.

    Args:
        q, k: [B T H K].    v: [B T H V].    log_decay: [B T H K] or [B T H].    beta: [B T H].
        s0: [B H K V] before the first token; None is 0.    resets: [B T], tokens before which the state becomes 0.

    Returns:
        o [B T H V] and the state after the last token [B H K V], float32.
    """
    q, k, v, g, beta = (x.astype(jnp.float32) for x in (q, k, v, log_decay, beta))
    batch, length, heads, key_dim = k.shape
    g = g if g.ndim == 4 else g[..., None]
    s0 = jnp.zeros((batch, heads, key_dim, v.shape[-1])) if s0 is None else s0.astype(jnp.float32)
    resets = jnp.zeros((batch, length), bool) if resets is None else resets

    def step(s: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, g, beta, reset = token
        s = jnp.exp(g)[..., None] * jnp.where(reset[:, None, None, None], 0, s)
        held = jnp.einsum("bhk,bhkv->bhv", k, s, precision="highest")
        s = s + k[..., None] * (beta[..., None] * (v - held))[..., None, :]
        return s, jnp.einsum("bhk,bhkv->bhv", q, s, precision="highest")

    s, o = jax.lax.scan(step, s0, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, g, beta, resets)))
    return jnp.moveaxis(o, 0, 1), s


def linear(
    q: Array, k: Array, v: Array, log_decay: Array, s0: Array | None = None, resets: Array | None = None
) -> tuple[Array, Array]:
    """Linear attention with decay, S_t = Diag(exp(log_decay_t)) S_(t-1) + k_t v_t^T; the rest as `reference`.

    q and k may be of fewer heads that divide those of v: Mamba-2, arXiv 2405.21060.
    """
    q, k, v, g = (x.astype(jnp.float32) for x in (q, k, v, log_decay))
    (batch, length, heads, value_dim), key_dim = v.shape, k.shape[-1]
    q, k = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (q, k))
    g = g if g.ndim == 4 else g[..., None]
    s0 = jnp.zeros((batch, heads, key_dim, value_dim)) if s0 is None else s0.astype(jnp.float32)
    resets = jnp.zeros((batch, length), bool) if resets is None else resets

    def step(s: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, g, reset = token
        s = jnp.exp(g)[..., None] * jnp.where(reset[:, None, None, None], 0, s) + k[..., None] * v[..., None, :]
        return s, jnp.einsum("bhk,bhkv->bhv", q, s, precision="highest")

    s, o = jax.lax.scan(step, s0, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, g, resets)))
    return jnp.moveaxis(o, 0, 1), s

"""Arguments for the flash kernels, small and random."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from pallas_kernels.flash import Inputs, Setting


def arguments(
    mask,
    *,
    B=1,
    T=40,
    S=None,
    H=2,
    K=1,
    C=8,
    V=8,
    dtype=jnp.float32,
    packed=False,
    mixed=False,
    slopes=False,
    sinks=False,
    soft_cap=None,
    seed=0,
    scale=None,
):
    """(setting, inputs, dout, dlse); `mixed` shuffles positions, `packed` cuts rows into documents with empty slots."""
    rows, S = np.random.default_rng(seed), S or T
    normal = lambda *shape: jnp.asarray(rows.normal(size=shape), dtype)
    positions = lambda n: np.broadcast_to(np.arange(n, dtype=np.int32), (B, n))
    q_positions, k_positions = positions(T), positions(S)
    if mixed:
        q_positions, k_positions = (rows.permuted(x, axis=1) for x in (q_positions, k_positions))
    q_segments = k_segments = None
    if packed:
        of = lambda n: np.cumsum(rows.random((B, n)) < 3 / n, axis=1).astype(np.int32)
        q_segments, k_segments = of(T), of(S)
        k_segments = jnp.asarray(np.where(rows.random((B, S)) < 0.05, -1, k_segments))
        q_segments = jnp.asarray(q_segments)
    inputs = Inputs(
        normal(B, T, H, C),
        normal(B, S, K, C),
        normal(B, S, K, V),
        jnp.asarray(q_positions),
        jnp.asarray(k_positions),
        q_segments,
        k_segments,
        jnp.arange(H, dtype=jnp.int32),
        jnp.asarray(2.0 ** -np.arange(1, H + 1), jnp.float32) if slopes else None,
        jnp.asarray(rows.normal(size=H), jnp.float32) if sinks else None,
    )
    setting = Setting(mask, C**-0.5 if scale is None else scale, soft_cap, jnp.dtype(dtype))
    return setting, inputs, normal(B, T, H, V), jnp.asarray(rows.normal(size=(B, T, H)), jnp.float32)

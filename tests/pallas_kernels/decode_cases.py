"""Arguments for the decode kernel, small and random."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxlong.core.mask import causal
from pallas_kernels.decode import Inputs, Setting

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}


def arguments(
    mask=None,
    *,
    B=2,
    T=1,
    H=4,
    K=2,
    C=16,
    V=16,
    S=300,
    held=None,
    dtype=jnp.float32,
    stored=None,
    page=None,
    per_page=False,
    latent=False,
    slopes=False,
    sinks=False,
    soft_cap=None,
    packed=False,
    seed=0,
):
    """(setting, inputs, inputs before rounding to `stored`). Caches are rings that begin anywhere, or pages in any
    order; row b holds held[b] tokens, all S by default; `latent`: values are the first V columns of keys."""
    rows = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rows.normal(size=shape), dtype)
    held = np.full(B, S) if held is None else np.array(held)
    length = S + (-S % page if page else 0)
    turn = np.zeros(B, int) if page else rows.integers(0, S, B)  # the slot of the first token
    token = (np.arange(length) - turn[:, None]) % length
    k_segments = np.where(token < held[:, None], 0, -1)
    q_positions = np.maximum(held[:, None] - T + np.arange(T), 0)
    q_segments = np.zeros((B, T), np.int32)
    if packed:
        of = lambda position: position * 3 // np.maximum(held[:, None], 1)
        q_segments, k_segments = of(q_positions), np.where(k_segments < 0, -1, of(token))
    k = normal(B, length, K, C)
    v = None if latent else normal(B, length, K, V)
    table, cut = None, lambda x: x
    if page:
        order = rows.permutation(B * (length // page) + 3)[: B * (length // page)]
        table = jnp.asarray(order.reshape(B, -1), jnp.int32)
        put = lambda x: jnp.zeros((len(order) + 3, page, *x.shape[2:]), x.dtype)
        cut = lambda x: put(x).at[order].set(x.reshape(-1, page, *x.shape[2:]))
    k, v = cut(k), None if latent else cut(v)
    integers = (jnp.asarray(x, jnp.int32) for x in (q_positions, token, q_segments, k_segments))
    inputs = Inputs(
        normal(B, T, H, C),
        k,
        v,
        *integers,
        jnp.asarray(2.0 ** -np.arange(1, H + 1), jnp.float32) if slopes else None,
        jnp.asarray(rows.normal(size=H), jnp.float32) if sinks else None,
        pages=table,
    )
    setting = Setting(mask or causal(), C**-0.5, soft_cap, jnp.dtype(dtype), V if latent else None)
    return setting, rounded(inputs, stored, per_page), inputs


def rounded(inputs, stored, per_page=False):
    """Keys and values in 8 bits, with a factor a slot and head, or a page and head."""
    if stored is None:
        return inputs

    def of(x):
        wide = x.astype(jnp.float32)
        most = jnp.abs(wide).max((1, 3) if per_page else 3, keepdims=True)
        factor = jnp.maximum(most, 1e-6) / LARGEST[jnp.dtype(stored).name]
        found = wide / factor
        return (jnp.round(found) if stored == jnp.int8 else found).astype(stored), factor[..., 0]

    k, k_scale = of(inputs.k)
    if inputs.v is None:
        return inputs._replace(k=k, k_scale=k_scale)
    v, v_scale = of(inputs.v)
    return inputs._replace(k=k, v=v, k_scale=k_scale, v_scale=v_scale)

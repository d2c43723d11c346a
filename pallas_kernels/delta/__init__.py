"""The gated delta rule on Hopper GPUs: DeltaNet, Gated DeltaNet (a decay a head) and KDA (a decay a channel).

`delta_rule` is the entry. It computes what `ref.reference` computes, in chunks (`rule`), forward and backward, and runs
where `refusal` returns None.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from pallas_kernels import hopper
from pallas_kernels.delta.config import Config

DIMS = ((64, 64), (64, 128), (128, 128))
"""Dims of keys and values that are taken."""


def refusal(q: Array, k: Array, v: Array, log_decay: Array, beta: Array) -> str | None:
    """Why the kernels do not take these arguments on this machine; None if they do."""
    if not q.dtype == k.dtype == v.dtype == jnp.bfloat16:
        return f"q, k and v of {q.dtype}, {k.dtype} and {v.dtype}, not all bfloat16"
    if (k.shape[-1], v.shape[-1]) not in DIMS:
        return f"dims {k.shape[-1]} and {v.shape[-1]} of keys and values, not one of {DIMS}"
    if not q.size or not v.size:
        return "nothing to do"
    return hopper.refusal()


def delta_rule(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    beta: Array,
    *,
    s0: Array | None = None,
    resets: Array | None = None,
    config: Config | None = None,
) -> tuple[Array, Array]:
    """`ref.reference` by the kernels, differentiable in all but resets.

        S_t = (I - beta_t k_t k_t^T) Diag(exp(log_decay_t)) S_(t-1) + beta_t k_t v_t^T
        o_t = S_t^T q_t

    States, sums and scores are float32; what meets a matrix instruction is rounded to bfloat16, and to float16 within
    the inverse of a chunk. A log decay below -16 a token counts as -16, and a beta below 1e-6 as 1e-6.

    Args:
        q, k: [B T H K] bfloat16, queries scaled by the caller and keys of norm at most 1.    v: [B T H V] bfloat16.
        log_decay: [B T H K] or [B T H], at most 0.    beta: [B T H], 0 to 2.
        s0: [B H K V] before the first token; None is 0.    resets: [B T], tokens before which the state becomes 0.

    Returns:
        o [B T H V] bfloat16 and the state after the last token [B H K V] float32.

    Raises:
        NotImplementedError: with what `refusal` says.
    """
    if reason := refusal(q, k, v, log_decay, beta):
        raise NotImplementedError(reason)
    from pallas_kernels.delta.gpu import Kernels
    from pallas_kernels.delta.rule import chunked

    config = Config.of(k.shape[-1], v.shape[-1]) if config is None else config
    return chunked(Kernels(config), q, k, v, log_decay, beta, s0, resets)

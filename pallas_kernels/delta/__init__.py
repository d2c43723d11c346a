"""The gated delta rule on Hopper GPUs and TPUs: DeltaNet, Gated DeltaNet (a decay a head) and KDA (one a channel).

`delta_rule` is the entry. It computes what `ref.reference` computes, in chunks (`rule`; on a TPU `tpu`), forward and
backward, and runs where `refusal` returns None. `linear_attention` is the rule without its correction (`ref.linear`),
on TPUs.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from pallas_kernels import hopper, machine
from pallas_kernels.delta.config import Blocks, Config

DIMS = ((64, 64), (64, 128), (128, 128))
"""Dims of keys and values that are taken on a GPU."""

WIDEST, MULTIPLE = 256, 8
"""Dims that are taken on a TPU: up to this, multiples of this."""


def refusal(q: Array, k: Array, v: Array, log_decay: Array, beta: Array) -> str | None:
    """Why the kernels do not take these arguments on this machine; None if they do."""
    if machine.platform() == "tpu":
        return _tpu_refusal(q, k, v)
    if not q.dtype == k.dtype == v.dtype == jnp.bfloat16:
        return f"q, k and v of {q.dtype}, {k.dtype} and {v.dtype}, not all bfloat16"
    if (k.shape[-1], v.shape[-1]) not in DIMS:
        return f"dims {k.shape[-1]} and {v.shape[-1]} of keys and values, not one of {DIMS}"
    if not q.size or not v.size:
        return "nothing to do"
    return hopper.refusal()


def _tpu_refusal(q: Array, k: Array, v: Array) -> str | None:
    if not {x.dtype.name for x in (q, k, v)} <= {"bfloat16", "float32"}:
        return f"q, k and v of {q.dtype}, {k.dtype} and {v.dtype}, not bfloat16 or float32"
    if any(x.shape[-1] > WIDEST or x.shape[-1] % MULTIPLE for x in (k, v)):
        dims = f"dims {k.shape[-1]} and {v.shape[-1]} of keys and values"
        return f"{dims}, not multiples of {MULTIPLE} up to {WIDEST}"
    if not q.size or not v.size:
        return "nothing to do"
    return None


def delta_rule(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    beta: Array,
    *,
    s0: Array | None = None,
    resets: Array | None = None,
    config: Config | Blocks | None = None,
) -> tuple[Array, Array]:
    """`ref.reference` by the kernels, differentiable in all but resets.

        S_t = (I - beta_t k_t k_t^T) Diag(exp(log_decay_t)) S_(t-1) + beta_t k_t v_t^T
        o_t = S_t^T q_t

    States, sums and scores are float32. On a GPU what meets a matrix instruction is rounded to bfloat16, and to float16
    within the inverse of a chunk; on a TPU to the type of q, k and v, and nothing within the inverse. A log decay below
    -16 a token counts as -16, and a beta below 1e-6 as 1e-6.

    Args:
        q, k: [B T H K] queries scaled by the caller and keys of norm at most 1.    v: [B T H V]. All bfloat16; on a TPU
            float32 too, and float32 if one is.
        log_decay: [B T H K] or [B T H], at most 0.    beta: [B T H], 0 to 2.
        s0: [B H K V] before the first token; None is 0.    resets: [B T], tokens before which the state becomes 0.

    Returns:
        o [B T H V] of v's type and the state after the last token [B H K V] float32.

    Raises:
        NotImplementedError: with what `refusal` says.
    """
    if reason := refusal(q, k, v, log_decay, beta):
        raise NotImplementedError(reason)
    if machine.platform() == "tpu":
        return _on_tpu(q, k, v, log_decay, beta, s0, resets, config)
    from pallas_kernels.delta.gpu import Kernels
    from pallas_kernels.delta.rule import chunked

    config = Config.of(k.shape[-1], v.shape[-1]) if config is None else config
    return chunked(Kernels(config), q, k, v, log_decay, beta, s0, resets)


def linear_refusal(q: Array, k: Array, v: Array) -> str | None:
    """Why `linear_attention` does not take these arguments on this machine; None if it does."""
    if (platform := machine.platform()) != "tpu":
        return f"the default device is no TPU but {platform}"
    return _tpu_refusal(q, k, v)


def linear_attention(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None,
    *,
    s0: Array | None = None,
    resets: Array | None = None,
    config: Blocks | None = None,
) -> tuple[Array, Array]:
    """`ref.linear` by the kernels for TPUs, differentiable in all but resets.

        S_t = Diag(exp(log_decay_t)) S_(t-1) + k_t v_t^T;   o_t = S_t^T q_t

    Args:
        q, k: [B T I K] and [B T J K], of heads that divide those of v [B T H V]: head h reads h // (H / J). The others
            are those of `delta_rule`.    log_decay: None is no decay.

    Raises:
        NotImplementedError: with what `linear_refusal` says.
    """
    if reason := linear_refusal(q, k, v):
        raise NotImplementedError(reason)
    return _on_tpu(q, k, v, log_decay, None, s0, resets, config)


def _on_tpu(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None,
    beta: Array | None,
    s0: Array | None,
    resets: Array | None,
    config: Blocks | None,
) -> tuple[Array, Array]:
    from pallas_kernels.delta.tpu import chunked

    dtype = jnp.result_type(q, k, v)
    config = Blocks.of(k.shape[-1], v.shape[-1]) if config is None else config
    o, s = chunked(config, *(x.astype(dtype) for x in (q, k, v)), log_decay, beta, s0, resets)
    return o.astype(v.dtype), s

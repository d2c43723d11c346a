"""Flash attention over the tiles that a mask leaves: forward and backward, on Hopper GPUs and on TPUs.

`attention` is the differentiable entry, `forward` and `backward` are its halves, for callers with their own rule (hops
of a ring, which see a part of the keys). All take q [B T H C], k [B S K C], v [B S K V] and what else `Inputs` and
`Setting` hold, and compute what `ref.py` computes. They run where `refusal` returns None.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import hopper, machine
from pallas_kernels.flash.scores import LOG2E, Spec
from pallas_kernels.plan import MaskPlan, Predicate, Tokens, mask_plan, tokens

DIMS = ((64, 64), (128, 128), (192, 128), (256, 256))
"""Dims of keys and values that are taken on a GPU."""
WIDEST = 256
"""The largest dim that is taken on a TPU."""


@dataclass(frozen=True)
class Setting:
    """What is known while tracing.

    mask: a predicate of positions (`pallas_kernels.plan.Predicate`).
    scale: of the products, positive; soft_cap: keeps scores within +-soft_cap.
    dtype: of out.
    otherwise: the backward pass for what the kernels do not take, `f(setting, inputs, out, lse, dout, dlse)` to the
        gradients of q, k, v and slopes; None raises NotImplementedError instead.
    """

    mask: Predicate
    scale: float
    soft_cap: float | None
    dtype: Any
    otherwise: Callable[..., tuple] | None = None


class Inputs(NamedTuple):
    """The arrays: positions [P T] and [P S] with P 1 or B, segments alike, heads [H], slopes and sinks [H] or None."""

    q: Any
    k: Any
    v: Any
    q_positions: Any
    k_positions: Any
    q_segments: Any
    k_segments: Any
    heads: Any
    slopes: Any = None
    sinks: Any = None


def refusal(setting: Setting, inputs: Inputs) -> str | None:
    """Why the kernels do not take these arguments on this machine; None if they do."""
    q, k, v = inputs.q, inputs.k, inputs.v
    on_tpu = machine.platform() == "tpu"
    if reason := _shapes(setting, inputs, on_tpu):
        return reason
    if not on_tpu and (reason := hopper.refusal()):
        return reason
    if on_tpu and q.shape[1] == 1:
        return "one query is decoding, which should not turn around nor read all keys for each head"
    if not q.shape[1] or not k.shape[1] or not v.shape[0]:
        return "nothing to attend"
    return None


def _shapes(setting: Setting, inputs: Inputs, on_tpu: bool) -> str | None:
    q, k, v = inputs.q, inputs.k, inputs.v
    taken = ("bfloat16", "float32") if on_tpu else ("bfloat16", "float16")
    if not q.dtype == k.dtype == v.dtype or q.dtype.name not in taken:
        return f"q, k and v of {q.dtype}, {k.dtype} and {v.dtype}, not all {taken[0]} or all {taken[1]}"
    dims = q.shape[-1], v.shape[-1]
    if on_tpu and max(dims) > WIDEST:
        return f"dims {dims[0]} and {dims[1]} of keys and values, more than {WIDEST}"
    if not on_tpu and dims not in DIMS:
        return f"dims {dims[0]} and {dims[1]} of keys and values, not one of {DIMS}"
    if not setting.scale > 0:
        return f"scale {setting.scale} is not positive"
    if jnp.dtype(setting.dtype) not in (q.dtype, jnp.float32):
        return f"out in {jnp.dtype(setting.dtype)}, neither {q.dtype} nor float32"
    return None


def plan(setting: Setting, inputs: Inputs, block_q: int, block_k: int) -> tuple[MaskPlan, Tokens]:
    """The plan of these positions and the tokens it speaks of."""
    found = tokens(inputs.q_positions, inputs.k_positions, inputs.q_segments, inputs.k_segments, block_q, block_k)
    return mask_plan(setting.mask, found, inputs.q.shape[1], block_q, block_k), found


def forward(setting: Setting, inputs: Inputs, config: Any = None) -> tuple[Array, Array]:
    """(out [B T H V], lse [B T H] float32); a query that sees nothing gets 0 and -inf, or its sink.

    Args:
        config: how the kernel runs, of `gpu.py` or `tpu.py`; by default what these think best on this machine.
    """
    run, c = _forward_kernel(inputs, config)
    found, held = plan(setting, inputs, c.block_q, c.block_k)
    spec = Spec(setting.mask, setting.scale, setting.soft_cap, inputs.slopes is not None)
    q, k, v = (_whole(x) for x in (inputs.q, inputs.k, _held(inputs, inputs.v)))
    heads, slopes, sinks = _of_heads(inputs)
    out, lse = run(spec, c, q, k, v, found.by_query, held, heads, slopes, sinks, jnp.dtype(setting.dtype))
    T = inputs.q.shape[1]
    return _vary(inputs.q, (out[:, :T], jnp.moveaxis(lse[:, :, :T], 1, 2)))


def backward(
    setting: Setting,
    inputs: Inputs,
    out: Array,
    lse: Array,
    dout: Array,
    dlse: Array,
    config: Any = None,
    dtype: Any = jnp.float32,
) -> tuple[Array, Array, Array, Array | None]:
    """The gradients of q, k and v in `dtype` and of slopes in float32, from results over these keys and any others.

    Raises:
        NotImplementedError: the gradients of keys of these dims need more registers than a GPU has.
    """
    run, c = _backward_kernels(inputs, config)
    T, S = inputs.q.shape[1], inputs.k.shape[1]
    found, held = plan(setting, inputs, c.block_q, c.block_k)
    spec = Spec(setting.mask, setting.scale, setting.soft_cap, inputs.slopes is not None)
    wide = lambda x: x.astype(jnp.float32)
    # a row that saw nothing has out == 0, and its cotangent may be anything
    saw = lse > -jnp.inf
    dout = jnp.where(saw[..., None], dout, 0)
    delta = jnp.where(saw, (wide(out) * wide(dout)).sum(-1) - wide(dlse), 0)
    by_head = lambda x, fill: jnp.pad(
        jnp.moveaxis(x, 1, 2), ((0, 0), (0, 0), (0, -T % c.block_q)), constant_values=fill
    )
    lse = by_head(jnp.where(saw, wide(lse) * LOG2E, jnp.inf), jnp.inf)
    q, k, v, dout = (_whole(x) for x in (inputs.q, _held(inputs, inputs.k), inputs.v, dout.astype(inputs.q.dtype)))
    heads, slopes, _ = _of_heads(inputs)
    dq, dk, dv, dslopes = run(
        spec, c, q, k, v, dout, lse, by_head(delta, 0), found, held, heads, slopes, jnp.dtype(dtype)
    )
    dslopes = None if dslopes is None else dslopes[:, :, :T].sum((0, 2))
    return _vary(inputs.q, (dq[:, :T], dk[:, :S], dv[:, :S], dslopes))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(setting: Setting, inputs: Inputs) -> tuple[Array, Array]:
    """`forward`, differentiable in q, k, v, slopes and sinks through both results."""
    return forward(setting, inputs)


def _attention_fwd(setting: Setting, inputs: Inputs):
    out, lse = forward(setting, inputs)
    return (out, lse), (inputs, out, lse)


def _attention_bwd(setting: Setting, residuals: Any, cotangents: Any):
    inputs, out, lse = residuals
    dout, dlse = cotangents
    try:
        dq, dk, dv, dslopes = backward(setting, inputs, out, lse, dout, dlse, dtype=inputs.q.dtype)
    except NotImplementedError:
        if setting.otherwise is None:
            raise
        dq, dk, dv, dslopes = setting.otherwise(setting, inputs, out, lse, dout, dlse)
    like = lambda x, given: None if given is None else x.astype(given.dtype)
    found = Inputs(*(None for _ in Inputs._fields))._replace(
        q=like(dq, inputs.q), k=like(dk, inputs.k), v=like(dv, inputs.v), slopes=like(dslopes, inputs.slopes)
    )
    if inputs.sinks is not None:
        found = found._replace(sinks=_sinks_gradient(inputs.sinks, out, lse, dout, dlse))
    return (found,)


attention.defvjp(_attention_fwd, _attention_bwd)


def _sinks_gradient(sinks: Array, out: Array, lse: Array, dout: Array, dlse: Array) -> Array:
    """Of keys of value 0: minus their weight times what every other weight owes."""
    wide = lambda x: x.astype(jnp.float32)
    owed = (wide(out) * wide(dout)).sum(-1) - wide(dlse)
    return -(jnp.exp(jnp.minimum(wide(sinks) - lse, 0)) * owed).sum((0, 1)).astype(sinks.dtype)


def _vary(like: Array, results: Any) -> Any:
    return results if machine.platform() == "tpu" else hopper.varying(like, results)


def _held(inputs: Inputs, x: Array) -> Array:
    """Keys or values with 0 in empty slots: what lies there, NaN even, would meet a weight of 0 in a product."""
    return x if inputs.k_segments is None else jnp.where((inputs.k_segments >= 0)[..., None, None], x, 0)


def _whole(x: Array) -> Array:
    """Padded to the 8 rows of a tile that TMA moves."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, 0))) if x.shape[1] % 8 else x


def _of_heads(inputs: Inputs) -> tuple[Array, Array | None, Array | None]:
    wide = lambda x: None if x is None else x.astype(jnp.float32)
    return inputs.heads.astype(jnp.int32), wide(inputs.slopes), wide(inputs.sinks)


def _forward_kernel(inputs: Inputs, config: Any) -> tuple[Callable[..., tuple], Any]:
    """The kernel that a configuration is for; without one, this machine's and its configuration."""
    from pallas_kernels.flash import tpu

    if isinstance(config, tpu.Config) or (config is None and machine.platform() == "tpu"):
        return tpu.forward, _tpu_config(inputs) if config is None else config
    from pallas_kernels.flash import gpu

    C, V = inputs.q.shape[-1], inputs.v.shape[-1]
    return gpu.forward, gpu.Config.of(C, V, inputs.q_segments is not None) if config is None else config


def _backward_kernels(inputs: Inputs, config: Any) -> tuple[Callable[..., tuple], Any]:
    from pallas_kernels.flash import tpu

    if isinstance(config, tpu.Config) or (config is None and machine.platform() == "tpu"):
        from pallas_kernels.flash import tpu_backward

        return tpu_backward.gradients, _tpu_config(inputs) if config is None else config
    from pallas_kernels.flash import gpu_backward

    C, V = inputs.q.shape[-1], inputs.v.shape[-1]
    return gpu_backward.gradients, gpu_backward.BackwardConfig.of(C, V) if config is None else config


def _tpu_config(inputs: Inputs) -> Any:
    from pallas_kernels.flash.tpu import Config

    (T, C), (S, V) = inputs.q.shape[1::2], inputs.v.shape[1::2]
    return Config.of(C, V, T, S, inputs.q.dtype, machine.kind())

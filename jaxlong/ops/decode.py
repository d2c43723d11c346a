"""A few new tokens a row attend to a cache, by the Pallas kernel for TPUs; gradients by `jaxlong.ops.blockwise`."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from jaxlong.core.mask import Mask
from jaxlong.ops.blockwise import blockwise_backward
from jaxlong.parallel.manual import vary_alike
from jaxlong.parallel.partial import sinks_gradient
from pallas_kernels import decode as kernels

FEW_QUERIES = kernels.QUERIES
"""Queries a row that are few, at most."""


def decode(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K V"],
    *,
    mask: Mask,
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B T"] | None = None,
    k_segments: Int[Array, "B S"] | None = None,
    heads: Int[Array, "H"] | None = None,
    bias: Float[Array, "#B #H #T #S"] | None = None,
    alibi_slopes: Float[Array, "H"] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "H"] | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """`attend_with_lse` of few queries over the blocks of a cache that they see; `jaxlong.ops.attend` describes the
    arguments. Keys that are the values too, the same array, are read once.

    Raises:
        NotImplementedError: the kernel does not take these arguments on this machine; it says why.
    """
    if bias is not None:
        raise NotImplementedError("a bias is not taken")
    both = v is k
    found = jnp.dtype(v.dtype if dtype is None else dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    setting = kernels.Setting(mask, scale, soft_cap, found, k.shape[-1] if both else None)
    given = q_positions, k_positions, q_segments, k_segments, alibi_slopes, sinks
    inputs = kernels.Inputs(q, k, None if both else v, *given)
    if reason := kernels.refusal(setting, inputs) or _shared():
        raise NotImplementedError(reason)
    out, lse = _attention(setting, vary_alike(inputs))
    return checkpoint_name(out, "attend_out"), checkpoint_name(lse, "attend_lse")


def _shared() -> str | None:
    """Why the compiler could not place the kernel on the mesh of `jax.set_mesh`: it does not divide kernels."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = math.prod(size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes)
    return None if devices == 1 else f"the compiler divides the program over {devices} devices, and no kernel"


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(setting: kernels.Setting, inputs: kernels.Inputs) -> tuple[Array, Array]:
    return kernels.attention(setting, inputs)


def _forward(setting: kernels.Setting, inputs: kernels.Inputs) -> tuple[tuple[Array, Array], Any]:
    out, lse = kernels.attention(setting, inputs)
    return (out, lse), (inputs, out, lse)


def _backward(setting: kernels.Setting, residuals: Any, cotangents: tuple[Array, Array]) -> tuple[kernels.Inputs]:
    (inputs, out, lse), (dout, dlse) = residuals, cotangents
    dq, dk, dv, _, dslopes = blockwise_backward(
        inputs.q,
        inputs.k,
        inputs.k if inputs.v is None else inputs.v,
        out,
        lse,
        dout,
        dlse,
        mask=setting.mask,
        q_positions=inputs.q_positions,
        k_positions=inputs.k_positions,
        q_segments=inputs.q_segments,
        k_segments=inputs.k_segments,
        alibi_slopes=inputs.slopes,
        scale=setting.scale,
        soft_cap=setting.soft_cap,
    )
    if inputs.v is None:
        dk, dv = dk + dv, None
    dsinks = None if inputs.sinks is None else sinks_gradient(inputs.sinks, out, lse, dout, dlse)
    like = lambda x, given: None if given is None else x.astype(given.dtype)
    nothing = kernels.Inputs(*(None for _ in inputs))
    return (
        nothing._replace(
            q=like(dq, inputs.q),
            k=like(dk, inputs.k),
            v=like(dv, inputs.v),
            slopes=like(dslopes, inputs.slopes),
            sinks=like(dsinks, inputs.sinks),
        ),
    )


_attention.defvjp(_forward, _backward)

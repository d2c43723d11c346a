"""Attention by the Pallas kernels for Hopper GPUs and TPUs, with `jaxlong.ops.blockwise` for what they leave out."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from jaxlong.core.mask import Mask
from jaxlong.ops.blockwise import blockwise_backward
from jaxlong.parallel.manual import auto_mesh, vary_alike
from pallas_kernels import flash as kernels


def flash(
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
    """`attend_with_lse` by tiles that the mask leaves; `jaxlong.ops.attend` describes the arguments.

    Gradients of dims that a GPU's backward kernels do not take come from `blockwise_backward`.

    Raises:
        NotImplementedError: the kernels do not take these arguments on this machine; it says why.
    """
    found = v.dtype if dtype is None else dtype
    given = q_positions, k_positions, q_segments, k_segments, heads, alibi_slopes, sinks
    setting, inputs = _prepare(q, k, v, mask, given, bias, scale, soft_cap, found)
    out, lse = kernels.attention(setting, vary_alike(inputs))
    return checkpoint_name(out, "attend_out"), checkpoint_name(lse, "attend_lse")


def flash_backward(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K V"],
    out: Float[Array, "B T H V"],
    lse: Float[Array, "B T H"],
    dout: Float[Array, "B T H V"],
    dlse: Float[Array, "B T H"],
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
) -> tuple[Array | None, ...]:
    """The gradients of q, k, v, bias and slopes in float32, of these keys, which may be a part of all.

    Args:
        out, lse: results over all keys, of which the queries may see others too.
        dout, dlse: the gradients of these.

    Raises:
        NotImplementedError: as `flash`, and for dims whose gradients need more registers than a GPU has.
    """
    given = q_positions, k_positions, q_segments, k_segments, heads, alibi_slopes, None
    setting, inputs = _prepare(q, k, v, mask, given, bias, scale, soft_cap, v.dtype)
    dq, dk, dv, dslopes = kernels.backward(setting, *vary_alike((inputs, out, lse, dout, dlse)))
    return dq, dk, dv, None, dslopes


def _prepare(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    given: tuple,
    bias: Array | None,
    scale: float | None,
    soft_cap: float | None,
    dtype: DTypeLike,
) -> tuple[kernels.Setting, kernels.Inputs]:
    """What the kernels take, if they take it."""
    q_positions, k_positions, q_segments, k_segments, heads, slopes, sinks = given
    if bias is not None:
        raise NotImplementedError("a bias is not taken")
    mesh = auto_mesh()
    if mesh is not None and mesh.size > 1:
        raise NotImplementedError(f"the program is one over {mesh.size} devices, not inside shard_map")
    if heads is None:
        heads = jnp.arange(q.shape[2], dtype=jnp.int32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    setting = kernels.Setting(mask, scale, soft_cap, jnp.dtype(dtype), _blockwise)
    inputs = kernels.Inputs(q, k, v, q_positions, k_positions, q_segments, k_segments, heads, slopes, sinks)
    if reason := kernels.refusal(setting, inputs):
        raise NotImplementedError(reason)
    return setting, inputs


def _blockwise(
    setting: kernels.Setting, inputs: kernels.Inputs, out: Array, lse: Array, dout: Array, dlse: Array
) -> tuple[Array, Array, Array, Array | None]:
    """The gradients of q, k, v and slopes for dims without backward kernels."""
    dq, dk, dv, _, dslopes = blockwise_backward(
        inputs.q,
        inputs.k,
        inputs.v,
        out,
        lse,
        dout,
        dlse,
        mask=setting.mask,
        q_positions=inputs.q_positions,
        k_positions=inputs.k_positions,
        q_segments=inputs.q_segments,
        k_segments=inputs.k_segments,
        heads=inputs.heads,
        alibi_slopes=inputs.slopes,
        scale=setting.scale,
        soft_cap=setting.soft_cap,
    )
    return dq, dk, dv, dslopes

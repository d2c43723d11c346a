"""Dense attention: the reference. Holds all scores at once, so memory grows with T * S."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from jaxlong.core.mask import Mask


def dense(
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
    """`attend_with_lse` over the whole score matrix in float32; `jaxlong.ops.attend` describes the arguments.

    What a query does not see cannot reach it, not even as NaN or infinity: non-finite entries are 0 in every
    contraction, and what makes a visible key (or a query) non-finite travels in its score.

    Args:
        dtype: of out; v's unless given.
    """
    (B, T, H, C), K = q.shape, k.shape[2]
    wide = accumulator(q.dtype)
    by_head = lambda x: x.astype(wide).reshape(K, H // K, 1, 1)
    q, scale = q.reshape(B, T, K, H // K, C), C**-0.5 if scale is None else scale

    scores = scale * jnp.einsum(
        "btkgc,bskc->bkgts", finite(q), finite(k), preferred_element_type=wide, precision=precision(q.dtype)
    )
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    if bias is not None:
        scores = scores + grouped(bias, K).astype(wide)
    if alibi_slopes is not None:
        scores = scores - by_head(alibi_slopes) * distance(q_positions, k_positions).astype(wide)
    scores = scores + jnp.moveaxis(_taint(q), 1, -1)[..., None]
    scores = scores + jnp.moveaxis(_taint(k) + _taint(v), 1, -1)[:, :, None, None, :]

    seen = visible(mask, q_positions, k_positions, q_segments, k_segments, head_grid(heads, H, K))
    scores = jnp.where(seen, scores, -jnp.inf)
    top = scores.max(-1, keepdims=True)
    if sinks is not None:
        top = jnp.maximum(top, by_head(sinks))
    top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(by_head(sinks) - top)
    nothing = total == 0
    total = jnp.where(nothing, 1, total)

    out = jnp.einsum(
        "bkgts,bskv->bkgtv",
        (weights / total).astype(v.dtype),
        finite(v),
        preferred_element_type=wide,
        precision=precision(v.dtype),
    )
    out = jnp.where(seen.any(-1, keepdims=True), out, 0)  # stops even a NaN cotangent of an empty row
    lse = jnp.where(nothing, -jnp.inf, top + jnp.log(total))
    by_token = lambda x: jnp.moveaxis(x, 3, 1).reshape(B, T, H, -1)
    out, lse = by_token(out).astype(v.dtype if dtype is None else dtype), by_token(lse)[..., 0]
    # named as blockwise names them, for remat policies that keep what attention gives
    return checkpoint_name(out, "attend_out"), checkpoint_name(lse, "attend_lse")


def visible(
    mask: Mask,
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B T"] | None,
    k_segments: Int[Array, "B S"] | None,
    heads: Int[Array, "K G"],
) -> Bool[Array, "B #K #G T S"]:
    """Which pairs attend: by the mask on positions, equal segments, and no empty slot (negative segment)."""
    rows, columns = lambda x: x[:, None, None, :, None], lambda x: x[:, None, None, None, :]
    seen = mask(rows(q_positions), columns(k_positions), heads[None, :, :, None, None])
    if q_segments is not None:
        seen = seen & (rows(q_segments) == columns(k_segments)) & (columns(k_segments) >= 0)
    return seen


def head_grid(heads: Int[Array, "H"] | None, H: int, K: int) -> Int[Array, "K G"]:
    """The indices by which masks tell heads apart, grouped by key head; 0..H-1 unless given."""
    return (jnp.arange(H, dtype=jnp.int32) if heads is None else heads).reshape(K, H // K)


def grouped(bias: Float[Array, "b h t s"], K: int) -> Float[Array, "b k g t s"]:
    """Splits the heads of a bias by key head; a bias shared by all heads stays shared."""
    b, h, t, s = bias.shape
    return bias.reshape((b, 1, 1, t, s) if h == 1 else (b, K, h // K, t, s))


def distance(q_positions: Int[Array, "B T"], k_positions: Int[Array, "B S"]) -> Int[Array, "B 1 1 T S"]:
    """How far a key is from a query, back or ahead."""
    return jnp.abs(q_positions[:, None, None, :, None] - k_positions[:, None, None, None, :])


def finite(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x with 0 for NaN and infinities: in a contraction, a weight of 0 must mean absence."""
    return jnp.where(jnp.isfinite(x), x, 0)


def accumulator(dtype: DTypeLike) -> jnp.dtype:
    """float32, or float64 for float64 inputs."""
    return jnp.promote_types(dtype, jnp.float32)


def precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """Full float32 products for float32 inputs, unless `jax.default_matmul_precision` says otherwise."""
    chosen = jax.config.jax_default_matmul_precision is not None
    return None if chosen or jnp.dtype(dtype).itemsize < 4 else jax.lax.Precision.HIGHEST


def _taint(x: Float[Array, "... C"]) -> Float[Array, "..."]:
    """NaN where a vector holds anything non-finite, otherwise 0."""
    return jnp.where(jnp.isfinite(x).all(-1), 0, jnp.nan).astype(accumulator(x.dtype))

"""How a position scheme enters heads: rotations of queries and keys, and the factor of their products."""

from __future__ import annotations

from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.position import Alibi, NoPE, Rope, apply_rope


def rotate(
    scheme: Rope | NoPE | Alibi, x: Float[Array, "B T H C"], positions: Int[Array, "B T"]
) -> Float[Array, "B T H C"]:
    """x turned by its positions, or as it is under a scheme that does not rotate."""
    if not isinstance(scheme, Rope):
        return x
    return apply_rope(x, positions, scheme.frequencies(x.shape[-1]), interleaved=scheme.interleaved)


def softmax_scale(scheme: Rope | NoPE | Alibi, head_dim: int) -> float:
    """Factor of q k^T: C ** -0.5, times what the scaling of a rotation asks for."""
    return head_dim**-0.5 * (scheme.softmax_scale if isinstance(scheme, Rope) else 1.0)

"""How a position scheme enters heads: rotations of queries and keys, and the factor of their products."""

from __future__ import annotations

from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.position import NoPE, Rope, apply_rope


def rotate(scheme: Rope | NoPE, x: Float[Array, "B T H C"], positions: Int[Array, "B T"]) -> Float[Array, "B T H C"]:
    """x turned by its positions, or as it is without a scheme."""
    if isinstance(scheme, NoPE):
        return x
    return apply_rope(x, positions, scheme.frequencies(x.shape[-1]), interleaved=scheme.interleaved)


def softmax_scale(scheme: Rope | NoPE, head_dim: int) -> float:
    """Factor of q k^T: C ** -0.5, times what the scaling of a rotation asks for."""
    return head_dim**-0.5 * (scheme.softmax_scale if isinstance(scheme, Rope) else 1.0)

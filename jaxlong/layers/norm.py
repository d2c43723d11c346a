"""Root-mean-square normalisation."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxlong.ops.weights import whole


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32 (Zhang and Sennrich, 2019).

    `axis` is the logical name of that axis.
    """

    eps: float = 1e-6
    axis: str | None = "embed"

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        init = nn.with_logical_partitioning(nn.initializers.ones, (self.axis,))
        scale = whole(self.param("scale", init, (x.shape[-1],), jnp.float32), (self.axis,), jnp.float32)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * scale).astype(x.dtype)

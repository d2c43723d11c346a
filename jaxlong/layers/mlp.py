"""Token-wise feed-forward layers."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxlong.ops.weights import whole


class SwiGLU(nn.Module):
    """y = (silu(x W_gate) * x W_up) W_down (Shazeer, arXiv 2002.05202). Parameters: 3 D F."""

    hidden: int

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        width = x.shape[-1]
        gate = dense(self, "gate", (width, self.hidden), ("embed", "mlp"), x.dtype)
        up = dense(self, "up", (width, self.hidden), ("embed", "mlp"), x.dtype)
        down = dense(self, "down", (self.hidden, width), ("mlp", "embed"), x.dtype)
        return (jax.nn.silu(x @ gate) * (x @ up)) @ down


class Gelu(nn.Module):
    """y = gelu(x W_up) W_down (Hendrycks and Gimpel, arXiv 1606.08415). Parameters: 2 D F."""

    hidden: int

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        width = x.shape[-1]
        up = dense(self, "up", (width, self.hidden), ("embed", "mlp"), x.dtype)
        down = dense(self, "down", (self.hidden, width), ("mlp", "embed"), x.dtype)
        return jax.nn.gelu(x @ up) @ down


def dense(
    module: nn.Module, name: str, shape: tuple[int, int], axes: tuple[str, str], dtype: Any
) -> Float[Array, "D F"]:
    init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes)
    return whole(module.param(name, init, shape, jnp.float32), axes, dtype)


FEED_FORWARDS = {"swiglu": SwiGLU, "gelu": Gelu}

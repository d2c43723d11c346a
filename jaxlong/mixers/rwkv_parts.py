"""What the RWKV mixers share: interpolation with the previous token, low-rank maps, the norm, initial values.

Published initial values depend on the depth of a layer. A module under a scan over depth does not know its
own, so each starts as the layer halfway up does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxlong.mixers.base import vector


def toward(x: Float[Array, "B T D"], previous: Float[Array, "B T D"], mu: Array) -> Float[Array, "B T D"]:
    """x + (previous - x) mu in the type of x; mu, [D] or [B T D], is the share of the previous token."""
    return x + (previous - x) * mu.astype(x.dtype)


def share(module: nn.Module, name: str, width: int, power: float, less: float = 0.0) -> Float[Array, "D"]:
    """A vector of shares of the previous token, at first 1 - (i / D) ** power - less in channel i."""
    init = lambda key, shape, dtype: 1 - (jnp.arange(width, dtype=dtype) / width) ** power - less
    return vector(module, name, (width,), ("embed",), init)


def by_channel(value: Callable[[Array, Array], Any]) -> Any:
    """Initial values `value(ramp, zigzag)` of a parameter [H C].

    `ramp` rises from 0 to 1 over all channels; `zigzag` is n |n| for n from -1 to 1 over those of a head.
    """

    def init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        ramp = jnp.linspace(0, 1, math.prod(shape), dtype=dtype).reshape(shape)
        n = jnp.linspace(-1, 1, shape[-1], dtype=dtype)
        return jnp.broadcast_to(value(ramp, n * jnp.abs(n)), shape)

    return init


def orthogonal(key: Array, shape: tuple[int, int, int], dtype: Any) -> Array:
    """A map [R H C] of orthogonal rows (columns, if those are fewer), small enough to begin as a perturbation."""
    rows, columns = shape[0], shape[1] * shape[2]
    scale = 0.1 * max(1.0, (rows / columns) ** 0.5)
    return nn.initializers.orthogonal(scale)(key, (rows, columns), dtype).reshape(shape)


def low_rank(
    module: nn.Module,
    name: str,
    x: Float[Array, "B T D"],
    shape: tuple[int, int, int],
    between: Callable[[Array], Array] = lambda hidden: hidden,
    init: Any = orthogonal,
) -> Float[Array, "B T H C"]:
    """between(x W1) W2 in float32, for `shape` [R H C] of W2; W1 starts at zero."""
    down = vector(module, f"{name}1", (x.shape[-1], shape[0]), ("embed", None)).astype(x.dtype)
    up = vector(module, f"{name}2", shape, (None, "heads", "head_dim"), init).astype(x.dtype)
    return jnp.einsum("btr,rhc->bthc", between(x @ down), up, preferred_element_type=jnp.float32)


def head_norm(module: nn.Module, o: Float[Array, "B T H V"]) -> Float[Array, "B T H V"]:
    """Each head centred and of variance 1, then scale and bias by channel; float32."""
    shape = o.shape[2:]
    scale = vector(module, "norm_scale", shape, ("heads", "head_dim"), nn.initializers.ones)
    bias = vector(module, "norm_bias", shape, ("heads", "head_dim"))
    o = o.astype(jnp.float32)
    centred = o - o.mean(axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + 64e-5) * scale + bias

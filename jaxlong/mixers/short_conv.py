"""A gated short convolution: the local half of hybrids whose other half recalls."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.state import ConvTail
from jaxlong.mixers.base import check_state, projection, require, require_spans, vector
from jaxlong.ops.attend import Backend
from jaxlong.ops.short_conv import short_conv


class ShortConv(nn.Module):
    """Convolution over the last W tokens, gated before and after.

        b, c, u = x Wb, x Wc, x Wu   [+ bias];   z = conv(b * u)   [+ bias];   y = (c * z) Wo

    Paper: LFM2 (Liquid AI, arXiv 2511.23404); without the gate b it is close to Zoology's BaseConv
    (Arora et al., arXiv 2312.04927). Sees W tokens, so it serves as one half of a hybrid.
    Training cost: 8 D I + 2 W I flops a token, I the channels.    State: (W - 1) I elements and as many segments.

    Fields:
        width: W, taps of the convolution.    channels: I; None is the width of the input.
        bias: a bias on gates, inputs and convolution; those of the gates start at 1, so the gates start open.
    """

    width: int = 3
    channels: int | None = None
    bias: bool = False
    backend: Backend = Backend()

    def __post_init__(self):
        require(self, 2, "width")
        if self.channels is not None:
            require(self, 1, "channels")
        require_spans(self)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: Any = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        if state is not None:
            check_state(self, state, x)
        width = x.shape[-1]
        channels = self._channels(width)
        segments = jnp.zeros_like(positions) if segment_ids is None else segment_ids
        wide = projection(self, "w_in", (width, 3, channels), ("embed", None, "mlp"), inputs=1, dtype=x.dtype)
        before, after, u = jnp.moveaxis(jnp.einsum("btd,dgi->btgi", x, wide), 2, 0)
        kernel = vector(self, "conv", (self.width, channels), (None, "mlp"), _taps)
        if self.bias:
            opened = vector(self, "gate_bias", (2, channels), (None, "mlp"), nn.initializers.ones).astype(x.dtype)
            before, after = before + opened[0], after + opened[1]
        z, tail = short_conv(before * u, kernel, segments, state, backend=self.backend)
        if self.bias:
            z += vector(self, "conv_bias", (channels,), ("mlp",)).astype(x.dtype)
        out = projection(self, "w_out", (channels, width), ("mlp", "embed"), inputs=1, dtype=x.dtype)
        return (after * z) @ out, None if state is None else tail

    def _channels(self, width: int) -> int:
        return width if self.channels is None else self.channels

    def init_state(self, batch: int, max_len: int, *, width: int, max_chunk: int, dtype: Any) -> ConvTail:
        return ConvTail.empty(batch, self.width, self._channels(width), dtype)

    def state_bytes(self, batch: int, max_len: int, *, width: int, max_chunk: int, itemsize: int) -> int:
        """Bytes of the state by the formula above (segments are int32)."""
        return batch * (self.width - 1) * (self._channels(width) * itemsize + 4)

    def mixing_flops(self, length: int) -> float:
        """Forward flops a token in rows of `length` tokens, beyond 2 a parameter: the taps are parameters."""
        return 0.0

    @classmethod
    def examples(cls) -> dict[str, ShortConv]:
        """Small settings that cover the fields."""
        return {"short_conv": cls(width=3, channels=8), "biased": cls(width=4, bias=True)}


_taps = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=0, out_axis=())

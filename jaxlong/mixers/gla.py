"""Gated linear attention: a decay for each channel of the keys that depends on the token."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.state import ConvTail, Recurrent
from jaxlong.core.types import BadInput
from jaxlong.mixers.base import (
    check_state,
    from_heads,
    projection,
    require,
    require_conv,
    require_spans,
    rms_norm,
    to_heads,
    vector,
)
from jaxlong.mixers.scan_parts import convolve, entry, pack, unpack
from jaxlong.ops.attend import Backend
from jaxlong.ops.scan import linear_attention


class GLA(nn.Module):
    """Gated linear attention.

        q, k, v = x Wq, x Wk, x Wv               [silu(conv(.))];   g = log sigmoid(x W1 W2 + b) / tau
        S_t = Diag(exp(g_t)) S_(t-1) + k_t v_t^T;   o_t = S_t^T q_t / sqrt(C)
        y = (rmsnorm_head(o) * silu(x Wg)) Wo

    Paper: Yang et al., arXiv 2312.06635.
    Training cost: 2 D H (2 C + 3 V) T flops, and 2 H (chunk (C + V) + 2 C V) T for the recurrence.
    State: H C V float32 and 4 bytes; the convolution adds (W - 1)(H (2 C + V)) elements.

    Fields:
        head_dim: C.    value_dim: V; None is C.
        gate_rank: rank of the gate's map.    temperature: tau; larger forgets less.
        conv: width of a causal depthwise convolution with SiLU on q, k and v; 0 is neither.
        chunk: tokens a chunk; the result does not depend on it.
    """

    heads: int
    head_dim: int
    value_dim: int | None = None
    gate_rank: int = 16
    temperature: float = 16.0
    conv: int = 0
    chunk: int = 64
    backend: Backend = Backend()

    def __post_init__(self):
        require(self, 1, "heads", "head_dim", "gate_rank", "chunk")
        if self.value_dim is not None:
            require(self, 1, "value_dim")
        if not self.temperature > 0:
            raise BadInput("temperature", self.temperature, "must be positive", "16 in the paper")
        require_conv(self)
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
        memory, tail = unpack(state)
        segments, s0, resets = entry(positions, segment_ids, memory, self.backend)
        parts = [to_heads(self, "wq", x, self.heads, self.head_dim), to_heads(self, "wk", x, self.heads, self.head_dim)]
        parts.append(to_heads(self, "wv", x, self.heads, self._value_dim))
        if self.conv:
            parts, tail = convolve(self, tuple(parts), segments, tail, width=self.conv, backend=self.backend)
            parts = [jax.nn.silu(part) for part in parts]
        q, k, v = (part.astype(jnp.float32) for part in parts)
        o, s = linear_attention(
            q * self.head_dim**-0.5,
            k,
            v,
            self._log_decay(x),
            s0=s0,
            resets=resets,
            chunk=self.chunk,
            backend=self.backend,
        )
        scale = vector(self, "norm_scale", (self._value_dim,), ("head_dim",), nn.initializers.ones)
        gate = to_heads(self, "wg", x, self.heads, self._value_dim)
        y = from_heads(self, "wo", rms_norm(o, scale).astype(x.dtype) * jax.nn.silu(gate), x.shape[-1])
        return y, None if state is None else pack(Recurrent(s, segments[:, -1]), tail)

    def _log_decay(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H C"]:
        shape, axes = (self.heads, self.head_dim), ("heads", "head_dim")
        low = projection(self, "w_decay1", (x.shape[-1], self.gate_rank), ("embed", None), inputs=1, dtype=x.dtype)
        high = projection(self, "w_decay2", (self.gate_rank, *shape), (None, *axes), inputs=1, dtype=jnp.float32)
        logits = jnp.einsum("btr,rhc->bthc", (x @ low).astype(jnp.float32), high)
        return jax.nn.log_sigmoid(logits + vector(self, "decay_bias", shape, axes)) / self.temperature

    @property
    def _value_dim(self) -> int:
        return self.head_dim if self.value_dim is None else self.value_dim

    def init_state(self, batch: int, max_len: int, *, width: int, max_chunk: int, dtype: Any) -> Any:
        memory = Recurrent.empty(batch, (self.heads, self.head_dim, self._value_dim))
        channels = self.heads * (2 * self.head_dim + self._value_dim)
        return pack(memory, ConvTail.empty(batch, self.conv, channels, dtype) if self.conv else None)

    def state_bytes(self, batch: int, max_len: int, *, width: int, max_chunk: int, itemsize: int) -> int:
        """Bytes of the state by the formula above (segments are int32)."""
        tail = (self.conv - 1) * (self.heads * (2 * self.head_dim + self._value_dim) * itemsize + 4) if self.conv else 0
        return batch * (self.heads * self.head_dim * self._value_dim * 4 + 4 + tail)

    def mixing_flops(self, length: int) -> float:
        """Forward flops a token in rows of `length` tokens, beyond 2 a parameter."""
        chunk, keys, values = min(self.chunk, length), self.head_dim, self._value_dim
        return 2 * self.heads * (chunk * (keys + values) + 2 * keys * values)

    @classmethod
    def examples(cls) -> dict[str, GLA]:
        """Small settings that cover the fields."""
        return {
            "gla": cls(heads=2, head_dim=6, gate_rank=3, chunk=4),
            "conv": cls(heads=3, head_dim=4, value_dim=5, gate_rank=2, temperature=0.5, conv=3, chunk=8),
        }

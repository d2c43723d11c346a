"""Mamba-2: a state space model with one decay a head, computed as decayed linear attention."""

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
    require_divides,
    require_spans,
    rms_norm,
    to_heads,
    vector,
)
from jaxlong.mixers.scan_parts import convolve, entry, log_rate, pack, step_bias, unpack
from jaxlong.ops.attend import Backend
from jaxlong.ops.scan import linear_attention


class Mamba2(nn.Module):
    """The layer of Mamba-2 (state space duality), which expands the width and gates the result itself.

        z = x Wz;   u, B, C = silu(conv(x Wu, x Wb, x Wc));   dt = softplus(x Wdt + b)
        S_t = exp(dt_t A_h) S_(t-1) + B_t (dt_t u_t)^T;   o_t = S_t^T C_t + D_h u_t
        y = rmsnorm_group(o * silu(z)) Wo

    Head h reads B and C of group h // (H / G). Paper: Dao and Gu, arXiv 2405.21060.
    Training cost: 2 D (3 H P + 2 G N + H) T flops, and 2 H (chunk (N + P) + 2 N P) T for the scan (the scores C B^T
    are made once a group). State: H N P float32 and 4 bytes, and (W - 1)(H P + 2 G N) elements with their segments.

    Fields:
        head_dim: P.    state_dim: N.    groups: G, of the maps B and C and of the norm.
        conv: W, width of the convolution.    step_limit: least and largest dt; None has no limits.
        chunk: tokens a chunk; the result does not depend on it.
    """

    heads: int
    head_dim: int = 64
    state_dim: int = 128
    groups: int = 1
    conv: int = 4
    step_limit: tuple[float, float] | None = None
    chunk: int = 64
    backend: Backend = Backend()

    def __post_init__(self):
        require(self, 1, "heads", "head_dim", "state_dim", "groups", "chunk")
        require(self, 2, "conv")
        require_divides(self, "groups", "heads")
        if self.step_limit is not None and not 0 <= self.step_limit[0] < self.step_limit[1]:
            raise BadInput("step_limit", self.step_limit, "is no range of step sizes", "0 <= least < largest")
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
        z = to_heads(self, "wz", x, self.heads, self.head_dim)
        u, b, c = to_heads(self, "wu", x, self.heads, self.head_dim), self._group("wb", x), self._group("wc", x)
        (u, b, c), tail = convolve(self, (u, b, c), segments, tail, width=self.conv, backend=self.backend)
        u, b, c = (jax.nn.silu(part).astype(jnp.float32) for part in (u, b, c))

        step = x @ projection(self, "w_step", (x.shape[-1], self.heads), ("embed", "heads"), inputs=1, dtype=x.dtype)
        step = step.astype(jnp.float32) + vector(self, "step_bias", (self.heads,), ("heads",), step_bias)
        step = jax.nn.softplus(step)
        if self.step_limit is not None:
            step = jnp.clip(step, *self.step_limit)
        rate = -jnp.exp(vector(self, "a_log", (self.heads,), ("heads",), log_rate(1.0)))
        o, s = linear_attention(
            c, b, step[..., None] * u, step * rate, s0=s0, resets=resets, chunk=self.chunk, backend=self.backend
        )
        o += vector(self, "d", (self.heads,), ("heads",), nn.initializers.ones)[:, None] * u
        y = from_heads(self, "wo", self._norm(o * jax.nn.silu(z.astype(jnp.float32))).astype(x.dtype), x.shape[-1])
        return y, None if state is None else pack(Recurrent(s, segments[:, -1]), tail)

    def _group(self, name: str, x: Float[Array, "B T D"]) -> Float[Array, "B T G N"]:
        shape, axes = (x.shape[-1], self.groups, self.state_dim), ("embed", None, None)
        return jnp.einsum("btd,dgn->btgn", x, projection(self, name, shape, axes, inputs=1, dtype=x.dtype))

    def _norm(self, o: Float[Array, "B T H P"]) -> Float[Array, "B T H P"]:
        """RMS norm over the heads of a group."""
        scale = vector(self, "norm_scale", o.shape[2:], ("heads", "head_dim"), nn.initializers.ones)
        grouped = o.reshape(*o.shape[:2], self.groups, -1)
        return rms_norm(grouped, jnp.ones(grouped.shape[-1:])).reshape(o.shape) * scale

    def init_state(self, batch: int, max_len: int, *, width: int, max_chunk: int, dtype: Any) -> Any:
        memory = Recurrent.empty(batch, (self.heads, self.state_dim, self.head_dim))
        return memory, ConvTail.empty(batch, self.conv, self._channels, dtype)

    @property
    def _channels(self) -> int:
        return self.heads * self.head_dim + 2 * self.groups * self.state_dim

    def state_bytes(self, batch: int, max_len: int, *, width: int, max_chunk: int, itemsize: int) -> int:
        """Bytes of the state by the formula above (segments are int32)."""
        memory = self.heads * self.state_dim * self.head_dim * 4 + 4
        return batch * (memory + (self.conv - 1) * (self._channels * itemsize + 4))

    def mixing_flops(self, length: int) -> float:
        """Forward flops a token in rows of `length` tokens, beyond 2 a parameter."""
        chunk, states = min(self.chunk, length), self.state_dim
        return 2 * chunk * self.groups * states + 2 * self.heads * self.head_dim * (chunk + 2 * states)

    @classmethod
    def examples(cls) -> dict[str, Mamba2]:
        """Small settings that cover the fields."""
        return {
            "mamba2": cls(heads=2, head_dim=6, state_dim=5, chunk=4),
            "groups": cls(heads=4, head_dim=4, state_dim=3, groups=2, conv=2, step_limit=(0.1, 0.9), chunk=8),
        }

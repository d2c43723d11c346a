"""Log-linear attention: linear attention with decay over a logarithmic number of states."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.state import Recurrent
from jaxlong.core.types import BadInput, State
from jaxlong.mixers.base import check_state, from_heads, projection, require, require_spans, rms_norm, to_heads, vector
from jaxlong.mixers.scan_parts import log_rate, step_bias
from jaxlong.ops.attend import Backend
from jaxlong.ops.log_linear import log_linear, slots_for


class LogLinear(nn.Module):
    """Decayed linear attention that reads each power-of-two stretch of the past with a factor of its own.

        S_l = sum over the stretch of level l of exp(b_t - b_j) k_j v_j^T,  b_t = sum of log decays g
        o_t = sum_l lambda_tl q_t S_l / sqrt(C);  level 0 is t itself, level l a stretch of 2^(l-1) tokens
        g = -exp(a_h) softplus(x Wa + d_h),  lambda = softplus(x Wl + c_hl)
        y = (rms_norm(o_h) n) Wo

    The stretches are those of a Fenwick tree over positions: the set bits of t. With all lambda = 1 this is linear
    attention with scalar decay (Mamba-2, Lightning). Positions from 2^(levels - 1) on share the last lambda.

    Paper: Guo et al., arXiv 2506.04761.
    Training cost: projections + 2 H (C + V) T chunk + 2 H C V T (log2(T / chunk) + 1) flops.
    State: H C V float32 for each of min(levels - 1, bits of max_len) levels.

    Fields:
        key_dim, value_dim: C and V of each head.
        levels: how many lambda a head has.
        chunk: tokens a step of the training form, a power of 2; the result does not depend on it.
    """

    heads: int
    key_dim: int
    value_dim: int
    levels: int = 20
    chunk: int = 64
    backend: Backend = Backend()

    def __post_init__(self):
        require(self, 1, "heads", "key_dim", "value_dim", "chunk")
        require(self, 2, "levels")
        if self.chunk & (self.chunk - 1):
            raise BadInput("chunk", self.chunk, "the levels halve it", "a power of 2")
        require_spans(self)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: State | None = None,
    ) -> tuple[Float[Array, "B T D"], Recurrent | None]:
        if state is not None:
            check_state(self, state, x)
            segment_ids = jnp.zeros_like(positions) if segment_ids is None else segment_ids
        q = to_heads(self, "wq", x, self.heads, self.key_dim) * self.key_dim**-0.5
        k = to_heads(self, "wk", x, self.heads, self.key_dim)
        v = to_heads(self, "wv", x, self.heads, self.value_dim)
        o, after = log_linear(
            q,
            k,
            v,
            self._log_decay(x),
            self._scales(x),
            positions=positions,
            segment_ids=segment_ids,
            chunk=self.chunk,
            state=state,
            backend=self.backend,
        )
        o = rms_norm(o, vector(self, "norm", (self.value_dim,), ("head_dim",), nn.initializers.ones))
        return from_heads(self, "wo", o.astype(x.dtype), x.shape[-1]), None if state is None else after

    def _log_decay(self, x: Array) -> Float[Array, "B T H"]:
        weight = projection(self, "wa", (x.shape[-1], self.heads), ("embed", "heads"), inputs=1, dtype=jnp.float32)
        rate = vector(self, "rate", (self.heads,), ("heads",), log_rate(1.0))
        step = vector(self, "step", (self.heads,), ("heads",), step_bias)
        return -jnp.exp(rate) * jax.nn.softplus(x.astype(jnp.float32) @ weight + step)

    def _scales(self, x: Array) -> Float[Array, "B T H L"]:
        shape, axes = (self.heads, self.levels), ("heads", None)
        weight = projection(self, "wl", (x.shape[-1], *shape), ("embed", *axes), inputs=1, dtype=jnp.float32)
        one = vector(self, "level", shape, axes, nn.initializers.constant(math.log(math.e - 1)))  # softplus gives 1
        return jax.nn.softplus(jnp.einsum("btd,dhl->bthl", x.astype(jnp.float32), weight) + one)

    def init_state(self, batch: int, max_len: int, *, width: int, max_chunk: int, dtype: Any) -> Recurrent:
        shape = (slots_for(self.levels, max_len), self.heads, self.key_dim, self.value_dim)
        return Recurrent.empty(batch, shape)

    def state_bytes(self, batch: int, max_len: int, *, width: int, max_chunk: int, itemsize: int) -> int:
        """Bytes of the state by the formula above (one segment, int32)."""
        matrix = self.heads * self.key_dim * self.value_dim
        return batch * 4 * (slots_for(self.levels, max_len) * matrix + 1)

    def mixing_flops(self, length: int) -> float:
        """Forward flops a token in rows of `length` tokens, beyond 2 a parameter."""
        chunk = min(self.chunk, length)
        pieces = max(slots_for(self.levels, length) - (chunk - 1).bit_length(), 1)
        matrix = 2 * self.heads * self.key_dim * self.value_dim
        return 2 * self.heads * (self.key_dim + self.value_dim) * chunk + matrix * (pieces + 1)

    @classmethod
    def examples(cls) -> dict[str, LogLinear]:
        """Small settings that cover the fields; the laws and the benchmark run on each."""
        small = cls(heads=2, key_dim=4, value_dim=6, levels=7, chunk=4)
        return {"all": small, "few": small.clone(heads=3, levels=3, chunk=2)}

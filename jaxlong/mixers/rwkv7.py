"""RWKV-7: a matrix state with decay and learning rate by channel, edited by a generalised delta rule."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxlong.core.state import ConvTail, Recurrent
from jaxlong.mixers.base import check_state, from_heads, require, require_spans, to_heads, vector
from jaxlong.mixers.rwkv_parts import by_channel, head_norm, low_rank, share, toward
from jaxlong.ops.attend import Backend
from jaxlong.ops.chunks import starts
from jaxlong.ops.delta import generalized_delta_rule
from jaxlong.ops.token_shift import token_shift

FASTEST = -math.exp(-0.5)
"""Log decays lie between this and 0: a token keeps at least 0.545 of each channel."""


class FirstValues(NamedTuple):
    """The values of the first layer of a model, which each later layer mixes into its own.

    They go from layer to layer, not from token to token: no state holds them. `known` is False until a
    layer has written its values.
    """

    v: Float[Array, "B T H C"]
    known: Bool[Array, ""]


class RWKV7(nn.Module):
    """Time mixing of RWKV-7: S forgets what it holds under a key, at a learned rate by channel, and writes anew.

        x_n = lerp(x, x', mu_n) for n in r, w, k, v, a, g,   x' the token before x in its document
        r, k, v = x_r W_r, x_k W_k, x_v W_v;   v = v + (v_first - v) sigmoid(v0 + x_v V1 V2)   [value residual]
        w = exp(-e^(-1/2) sigmoid(w0 + tanh(x_w W1) W2)),   a = sigmoid(a0 + x_a A1 A2),   g = sigmoid(x_g G1) G2
        z = l2norm(k * k_k),   k = k (1 + (a - 1) k_a)
        S_t = Diag(w) S_(t-1) - (z * a) (z^T S_(t-1)) + k v^T,   o_t = S_t^T r
        y = ((groupnorm(o) + (r . (k * r_k)) v) * g) W_o,   a group a head

    lerp(x, x', mu) is x + (x' - x) mu. Paper: Peng et al., arXiv 2503.14456.
    Training cost: 8 D H C T flops, and the generalised delta rule's.
    State: H C C float32, D elements and 8 bytes.

    Fields:
        decay_rank, rate_rank, value_rank, gate_rank: ranks of W2, A2, V2 and G2.
        value_residual: layers share the values of the first, which `mix` receives and returns; only then
            are there v0, V1 and V2.
        chunk: tokens a chunk of the rule; the result does not depend on it.
    """

    heads: int
    head_dim: int
    decay_rank: int = 64
    rate_rank: int = 64
    value_rank: int = 32
    gate_rank: int = 128
    value_residual: bool = True
    chunk: int = 32
    backend: Backend = Backend()

    def __post_init__(self):
        require(self, 1, "heads", "head_dim", "decay_rank", "rate_rank", "value_rank", "gate_rank", "chunk")
        require_spans(self)
        super().__post_init__()

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: Any = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """As the first layer of a model, which mixes no values of another."""
        y, state, _ = self.mix(x, None, positions=positions, segment_ids=segment_ids, state=state)
        return y, state

    @nn.compact
    def mix(
        self,
        x: Float[Array, "B T D"],
        first: FirstValues | None,
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: Any = None,
    ) -> tuple[Float[Array, "B T D"], Any, FirstValues | None]:
        """The same, with the values of the first layer handed from layer to layer.

        Args:
            first: from `no_values` or from the layer below; None is the same as `no_values`.

        Returns:
            y, the new state, and `first` for the layer above (as it came, without value_residual).
        """
        if state is not None:
            check_state(self, state, x)
        tail, memory = (None, None) if state is None else state
        before = None if memory is None else memory.segment_ids
        aligned = segment_ids is None and state is None
        segments = jnp.zeros_like(positions) if segment_ids is None else segment_ids
        previous, tail = token_shift(x, segments, tail, backend=self.backend)
        lerp = lambda name, power: toward(x, previous, share(self, f"mu_{name}", x.shape[-1], power))
        x_k, x_v = lerp("k", 0.35), lerp("v", 0.35)

        r = to_heads(self, "wr", lerp("r", 0.1), self.heads, self.head_dim).astype(jnp.float32)
        k = to_heads(self, "wk", x_k, self.heads, self.head_dim).astype(jnp.float32)
        v = to_heads(self, "wv", x_v, self.heads, self.head_dim)
        if self.value_residual:
            v, first = self._residual(x_v, v, first)
        v = v.astype(jnp.float32)
        log_decay = FASTEST * jax.nn.sigmoid(self._low_rank("w", lerp("w", 0.45), self.decay_rank, _decays, jnp.tanh))
        rate = jax.nn.sigmoid(self._low_rank("a", lerp("a", 0.45), self.rate_rank, _rates))
        z = _l2norm(k * self._channels("k_k", by_channel(lambda ramp, zigzag: 0.71 - 0.1 * (ramp - 0.5))))
        k *= 1 + (rate - 1) * self._channels("k_a", nn.initializers.constant(1.02))

        o, s = generalized_delta_rule(
            r,
            k,
            v,
            log_decay,
            -z,
            z * rate,
            s0=None if memory is None else memory.memory,
            resets=None if aligned else starts(segments, before, backend=self.backend),
            chunk=self.chunk,
            backend=self.backend,
        )
        own = jnp.sum(r * k * self._channels("r_k", nn.initializers.constant(-0.04)), axis=-1, keepdims=True)
        gate_shape = (self.gate_rank, self.heads, self.head_dim)
        gate = low_rank(self, "g", lerp("g", 0.1), gate_shape, jax.nn.sigmoid)
        o = ((head_norm(self, o) + own * v) * gate).astype(x.dtype)
        y = from_heads(self, "wo", o, x.shape[-1])
        return y, None if state is None else (tail, Recurrent(s, segments[:, -1])), first

    def no_values(self, x: Float[Array, "B T D"]) -> FirstValues:
        """What `mix` receives for these inputs in the first layer; also the carry of a scan over layers."""
        return FirstValues(jnp.zeros((*x.shape[:2], self.heads, self.head_dim), x.dtype), jnp.zeros((), bool))

    def _residual(self, x_v: Array, v: Array, first: FirstValues | None) -> tuple[Array, FirstValues]:
        """v, moved to the first layer's where those are known, and the first layer's."""
        share = jax.nn.sigmoid(self._low_rank("v", x_v, self.value_rank, _value_shares))
        if first is None:
            return v, FirstValues(v, jnp.ones((), bool))
        mixed = (v + (first.v - v) * share).astype(v.dtype)
        owned = FirstValues(jnp.where(first.known, first.v, v), jnp.ones((), bool))
        return jnp.where(first.known, mixed, v), owned

    def _low_rank(self, name: str, x: Array, rank: int, init: Any, between: Any = lambda hidden: hidden) -> Array:
        return self._channels(f"{name}0", init) + low_rank(self, name, x, (rank, self.heads, self.head_dim), between)

    def _channels(self, name: str, init: Any) -> Array:
        return vector(self, name, (self.heads, self.head_dim), ("heads", "head_dim"), init)

    def init_state(self, batch: int, max_len: int, *, width: int, max_chunk: int, dtype: Any) -> Any:
        memory = Recurrent.empty(batch, (self.heads, self.head_dim, self.head_dim))
        return ConvTail.empty(batch, 2, width, dtype), memory

    def state_bytes(self, batch: int, max_len: int, *, width: int, max_chunk: int, itemsize: int) -> int:
        """Bytes of the state by the formula above (two segments are int32)."""
        return batch * (self.heads * self.head_dim**2 * 4 + width * itemsize + 8)

    def mixing_flops(self, length: int) -> float:
        """Forward flops a token in rows of `length` tokens, beyond 2 a parameter."""
        n, c = min(self.chunk, length), self.head_dim
        return self.heads * (20 * n * c + 8 * c**2 + 2 * c**3 / n + 2 * n**2 / 3)

    @classmethod
    def examples(cls) -> dict[str, RWKV7]:
        """One layer alone, which has no first layer to share with."""
        small = cls(heads=2, head_dim=8, decay_rank=3, rate_rank=4, gate_rank=5, value_residual=False, chunk=4)
        return {"rwkv7": small, "one_head": small.clone(heads=1, head_dim=12)}


def _l2norm(x: Float[Array, "B T H C"]) -> Float[Array, "B T H C"]:
    """x / max(|x|, 1e-12) a head."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


_decays = by_channel(lambda ramp, zigzag: -5.5 + 6 * ramp**1.81 + 2.5 * zigzag)
_rates = by_channel(lambda ramp, zigzag: -0.19 + 0.3 * zigzag + 0.4 * (ramp - 0.5))
_value_shares = by_channel(lambda ramp, zigzag: 0.73 - 0.4 * (ramp - 0.5))

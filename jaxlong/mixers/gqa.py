"""Softmax attention with grouped key/value heads; multi-head and multi-query are its settings."""

from __future__ import annotations

from dataclasses import field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.mask import Mask, causal, sliding
from jaxlong.core.position import Alibi, NoPE, Rope
from jaxlong.core.state import ConvTail, KeysOnly, KVCache
from jaxlong.mixers.base import (
    check_state,
    from_heads,
    require,
    require_conv,
    require_divides,
    require_rotation,
    require_spans,
    rms_norm,
    to_heads,
    vector,
)
from jaxlong.ops.attend import Backend, attend
from jaxlong.ops.rotate import rotate
from jaxlong.ops.short_conv import short_conv


class GQA(nn.Module):
    """Grouped-query attention under any mask and position scheme.

        q, k, v = x Wq, x Wk, x Wv        [conv]  [qk-norm]  [rotation]
        o_h = softmax(q_h k_g^T / sqrt(C) + mask) v_g,   g = h // (H / K)
        y = (o * sigmoid(x Wg)) Wo        [gate]

    Paper: Ainslie et al., arXiv 2305.13245. K = H is multi-head (Vaswani et al., arXiv 1706.03762), K = 1
    multi-query (Shazeer, arXiv 1911.02150) attention.
    Training cost: 4 D C (H + K) T + 4 H C T S flops, S the keys that the mask shows a query on average.
    State: 2 K C elements and 8 bytes a token, for min(max_len, mask.reach() + max_chunk - 1) tokens;
    the convolution adds (W - 1)(H + K) C elements.

    Fields:
        qk_norm: RMS norm on each head of q and k before the rotation (as Qwen3).
        bias: a bias on q, k and v (as Qwen2).
        gate: sigmoid output gate (as Qwen3-Next).
        conv: width of a causal depthwise convolution on q and k; 0 is none.
        sinks: a learned logit a head in the softmax's denominator (as gpt-oss).
        soft_cap: bound of the logits, c tanh(s / c) (as Gemma 2).
        scale: factor of q k^T; None is C ** -0.5.
    """

    heads: int
    kv_heads: int
    head_dim: int
    mask: Mask = field(default_factory=causal)
    position: Rope | NoPE | Alibi = Rope()
    qk_norm: bool = False
    bias: bool = False
    gate: bool = False
    conv: int = 0
    sinks: bool = False
    soft_cap: float | None = None
    scale: float | None = None
    backend: Backend = Backend()

    def __post_init__(self):
        require(self, 1, "heads", "kv_heads", "head_dim")
        require_divides(self, "kv_heads", "heads")
        require_conv(self)
        if self.conv:
            require_spans(self)
        require_rotation(self.position, self.head_dim)
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
        keys_only = isinstance(state, KeysOnly)
        if state is not None and not keys_only:
            check_state(self, state, x)
        segments = jnp.zeros_like(positions) if segment_ids is None else segment_ids
        q, k, v, tail = self._project(x, segments, state)
        q, k = (rotate(self.position, a, positions) for a in (q, k))
        if keys_only:
            return x, KVCache(k, v, positions, segments, None)

        keys, cache = (k, v, positions, segment_ids), None
        if state is not None:
            cache = _cache(state).push(k, v, positions, segments)
            keys = (cache.k.astype(x.dtype), cache.v.astype(x.dtype), cache.positions, cache.segment_ids)
        o = attend(
            q,
            keys[0],
            keys[1],
            mask=self.mask,
            q_positions=positions,
            k_positions=keys[2],
            q_segments=segment_ids if state is None else segments,
            k_segments=keys[3],
            alibi_slopes=self.position.slopes(self.heads) if isinstance(self.position, Alibi) else None,
            scale=self._scale(),
            soft_cap=self.soft_cap,
            sinks=vector(self, "sinks", (self.heads,), ("heads",)) if self.sinks else None,
            backend=self.backend,
        )
        if self.gate:
            o *= jax.nn.sigmoid(to_heads(self, "wg", x, self.heads, self.head_dim))
        y = from_heads(self, "wo", o, x.shape[-1])
        return y, cache if tail is None or state is None else (cache, tail)

    @property
    def reads_keys(self) -> bool:
        return not self.conv

    def _scale(self) -> float:
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        return scale * self.position.softmax_scale if isinstance(self.position, Rope) else scale

    def _project(self, x: Array, segments: Array, state: Any) -> tuple[Array, Array, Array, ConvTail | None]:
        """q [B T H C], k and v [B T K C] before the rotation, and the convolution's new tail."""
        q = to_heads(self, "wq", x, self.heads, self.head_dim)
        k, v = (to_heads(self, name, x, self.kv_heads, self.head_dim, "kv_heads") for name in ("wk", "wv"))
        if self.bias:
            q += vector(self, "bq", q.shape[2:], ("heads", "head_dim")).astype(x.dtype)
            k += vector(self, "bk", k.shape[2:], ("kv_heads", "head_dim")).astype(x.dtype)
            v += vector(self, "bv", v.shape[2:], ("kv_heads", "head_dim")).astype(x.dtype)
        tail = None
        if self.conv:
            qk = jnp.concatenate([q, k], axis=2)
            flat = qk.reshape(*qk.shape[:2], -1)
            kernel = vector(self, "conv", (self.conv, flat.shape[-1]), (None, None), _identity_conv)
            flat, tail = short_conv(flat, kernel, segments, None if state is None else state[1], backend=self.backend)
            q, k = jnp.split(flat.reshape(qk.shape), [self.heads], axis=2)
        if self.qk_norm:
            q = rms_norm(q, vector(self, "q_norm", (self.head_dim,), ("head_dim",), nn.initializers.ones))
            k = rms_norm(k, vector(self, "k_norm", (self.head_dim,), ("head_dim",), nn.initializers.ones))
        return q, k, v, tail

    def init_state(self, batch: int, max_len: int, *, width: int, max_chunk: int, dtype: Any) -> Any:
        reach = self.mask.reach()
        slots = max_len if reach is None else min(max_len, reach + max_chunk - 1)
        cache = KVCache.empty(batch, slots, self.kv_heads, self.head_dim, self.head_dim, dtype)
        if not self.conv:
            return cache
        channels = (self.heads + self.kv_heads) * self.head_dim
        return cache, ConvTail.empty(batch, self.conv, channels, dtype)

    def state_bytes(self, batch: int, max_len: int, *, width: int, max_chunk: int, itemsize: int) -> int:
        """Bytes of the state by the formula above (segments and positions are int32; one counter)."""
        reach = self.mask.reach()
        slots = max_len if reach is None else min(max_len, reach + max_chunk - 1)
        cache = batch * slots * (2 * self.kv_heads * self.head_dim * itemsize + 8) + 4
        channels = (self.heads + self.kv_heads) * self.head_dim
        return cache + (batch * (self.conv - 1) * (channels * itemsize + 4) if self.conv else 0)

    def mixing_flops(self, length: int) -> float:
        """Forward flops a token in rows of `length` tokens, beyond 2 a parameter."""
        reach = self.mask.reach()
        seen = (length + 1) / 2 if reach is None or reach > length else reach - reach * (reach - 1) / (2 * length)
        return 4 * self.heads * self.head_dim * seen

    @classmethod
    def examples(cls) -> dict[str, GQA]:
        """Small settings that cover the fields; the laws and the benchmark run on each."""
        small = cls(heads=4, kv_heads=2, head_dim=8)
        return {
            "gqa": small,
            "mha": small.clone(kv_heads=4, position=Alibi()),
            "mqa": small.clone(kv_heads=1, position=NoPE(), soft_cap=5.0),
            "window": small.clone(mask=sliding(5), sinks=True),
            "full": small.clone(
                qk_norm=True, bias=True, gate=True, conv=4, position=Rope(base=500.0, rotary_dim=4, interleaved=True)
            ),
            "window_conv": small.clone(mask=sliding(6), conv=3, qk_norm=True),
        }


def _cache(state: Any) -> KVCache:
    return state if isinstance(state, KVCache) else state[0]


def _identity_conv(key: Array, shape: tuple[int, int], dtype: Any) -> Array:
    """Passes each token through, plus noise that breaks the symmetry between channels."""
    return jax.random.normal(key, shape, dtype) * shape[0] ** -0.5 * 0.5 + jnp.zeros(shape, dtype).at[-1].set(1.0)

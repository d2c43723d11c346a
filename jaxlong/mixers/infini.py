"""Infini-attention: local softmax attention beside a compressive memory of all earlier segments."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.mask import Mask, causal, dilated
from jaxlong.core.position import NoPE, Rope
from jaxlong.core.state import KVCache, Recurrent
from jaxlong.core.types import State
from jaxlong.mixers.base import (
    check_state,
    from_heads,
    require,
    require_divides,
    require_one_of,
    require_rotation,
    require_spans,
    to_heads,
    vector,
)
from jaxlong.ops.attend import Backend, attend
from jaxlong.ops.compressive import UPDATES, compressive_memory, empty_memory
from jaxlong.ops.rotate import rotate, softmax_scale


class InfiniAttention(nn.Module):
    """Causal attention inside segments of N tokens, and a matrix memory of the segments before.

        o_dot = softmax(R q (R k)^T / sqrt(C)) v        over t's own segment, R the rotation
        o_mem = s(q) M / (s(q) z),  s(x) = elu(x) + 1   M, z of the segments before; 0 in the first
        M += s(k)^T (v - s(k) M / (s(k) z)),  z += sum s(k)      at a segment's end; "linear": M += s(k)^T v
        y = (sigmoid(beta_h) o_mem + (1 - sigmoid(beta_h)) o_dot) Wo

    A segment is N positions of a document: the grid starts anew with each. The memory knows no positions; queries
    of a group share that of their key head. In one segment alone this is local attention times 1 - sigmoid(beta).

    Paper: Munkhdalai et al., arXiv 2404.07143 (its section 2, not later variants).
    Training cost: 4 D C (H + K) T + 2 H C T (N + 1) flops of local attention + 4 C^2 (H + 2 K) T of the memory.
    State: 2 K C elements and 8 bytes for each of min(max_len, N + max_chunk - 1) tokens, and 2 K C (C + 1) float32:
    constant in length.

    Fields:
        segment: N, tokens of a segment (2048 in the paper).
        update: what a segment adds: "delta", what the memory does not hold yet, or "linear", everything.
        position: how positions enter local attention.
    """

    heads: int
    kv_heads: int
    head_dim: int
    segment: int = 2048
    update: str = "delta"
    position: Rope | NoPE = Rope()
    backend: Backend = Backend()

    def __post_init__(self):
        require(self, 1, "heads", "kv_heads", "head_dim", "segment")
        require_divides(self, "kv_heads", "heads")
        require_one_of(self, "update", *UPDATES)
        require_rotation(self.position, self.head_dim)
        require_spans(self)
        super().__post_init__()

    @property
    def mask(self) -> Mask:
        """Looking back inside one segment."""
        return causal() & dilated(self.segment, 1)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: State | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[KVCache, Recurrent] | None]:
        if state is not None:
            check_state(self, state, x)
        segments = jnp.zeros_like(positions) if segment_ids is None else segment_ids
        q = to_heads(self, "wq", x, self.heads, self.head_dim)
        k = to_heads(self, "wk", x, self.kv_heads, self.head_dim, "kv_heads")
        v = to_heads(self, "wv", x, self.kv_heads, self.head_dim, "kv_heads")
        recalled, memory = compressive_memory(
            q,
            k,
            v,
            positions=positions,
            segment_ids=segments,
            segment=self.segment,
            update=self.update,
            state=None if state is None else state[1],
            backend=self.backend,
        )
        q, k = (rotate(self.position, a, positions) for a in (q, k))
        keys, cache = (k, v, positions, segment_ids), None
        if state is not None:
            cache = state[0].push(k, v, positions, segments)
            keys = (cache.k, cache.v, cache.positions, cache.segment_ids)
        local = attend(
            q,
            keys[0],
            keys[1],
            mask=self.mask,
            q_positions=positions,
            k_positions=keys[2],
            q_segments=segment_ids if state is None else segments,
            k_segments=keys[3],
            scale=softmax_scale(self.position, self.head_dim),
            backend=self.backend,
        )
        gate = jax.nn.sigmoid(vector(self, "beta", (self.heads,), ("heads",)))[:, None]
        o = (gate * recalled + (1 - gate) * local).astype(x.dtype)
        return from_heads(self, "wo", o, x.shape[-1]), None if state is None else (cache, memory)

    def _slots(self, max_len: int, max_chunk: int) -> int:
        return min(max_len, self.segment + max_chunk - 1)

    def init_state(
        self, batch: int, max_len: int, *, width: int, max_chunk: int, dtype: Any
    ) -> tuple[KVCache, Recurrent]:
        cache = KVCache.empty(
            batch, self._slots(max_len, max_chunk), self.kv_heads, self.head_dim, self.head_dim, dtype
        )
        return cache, empty_memory(batch, self.kv_heads, self.head_dim, self.head_dim)

    def state_bytes(self, batch: int, max_len: int, *, width: int, max_chunk: int, itemsize: int) -> int:
        """Bytes of the state by the formula above (positions and segments are int32; one counter, one segment)."""
        slots = self._slots(max_len, max_chunk)
        cache = batch * slots * (2 * self.kv_heads * self.head_dim * itemsize + 8) + 4
        return cache + batch * (8 * self.kv_heads * self.head_dim * (self.head_dim + 1) + 4)

    def mixing_flops(self, length: int) -> float:
        """Forward flops a token in rows of `length` tokens, beyond 2 a parameter."""
        local = 4 * self.heads * self.head_dim * (min(self.segment, length) + 1) / 2
        writes = 2 if self.update == "delta" else 1
        return local + 4 * (self.heads + writes * self.kv_heads) * self.head_dim * (self.head_dim + 1)

    @classmethod
    def examples(cls) -> dict[str, InfiniAttention]:
        """Small settings that cover the fields; the laws and the benchmark run on each."""
        small = cls(heads=4, kv_heads=2, head_dim=6, segment=4)
        return {"delta": small, "linear": small.clone(segment=3, update="linear", position=NoPE(), kv_heads=4)}

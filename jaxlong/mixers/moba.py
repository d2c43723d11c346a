"""MoBA: softmax attention over the few blocks of keys that each query's gate picks."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.mask import causal
from jaxlong.core.position import NoPE, Rope
from jaxlong.core.state import KVCache
from jaxlong.core.types import State
from jaxlong.mixers.base import (
    check_state,
    from_heads,
    in_text_order,
    require,
    require_divides,
    require_rotation,
    require_spans,
    to_heads,
)
from jaxlong.ops.attend import Backend
from jaxlong.ops.rotate import rotate, softmax_scale
from jaxlong.ops.select import Selection, attend_selected, map_queries, top_k
from jaxlong.ops.spans import Summaries, read_windows, windows


class MoBAState(NamedTuple):
    """Keys and values, and the mean key of each finished block."""

    cache: KVCache
    means: Summaries


class MoBA(nn.Module):
    """Mixture of block attention: each head of each query reads its own block and the best of those before it.

        q, k, v = x Wq, x Wk, x Wv  [rotation]
        s_(h,t,n) = q_(h,t) . mean_(j in block n) k_(g,j),   g = h // (H / K)
        o_(h,t) = softmax over the tokens up to t of t's block and of the top_k - 1 earlier blocks of largest s
        y = o Wo

    Paper: Lu et al., arXiv 2502.13189. Blocks are counted from the start of each document. The choice has no
    gradient: keys and queries learn through the attention of what was chosen.
    Rows of another layout than contiguous are put in the order of the text, and the outputs back.
    Training cost: 4 D C (H + K) T + 4 H C T top_k block + H C T^2 / block flops; gathers the keys a query reads.
    State: 2 K C elements and 8 bytes a token, K C float32 numbers and 4 bytes a block.

    Fields:
        block: tokens a block.
        top_k: blocks that a query reads, its own included; as many as there are is full attention.
        position: rotates keys before their means are taken.
    """

    heads: int
    kv_heads: int
    head_dim: int
    block: int = 512
    top_k: int = 3
    position: Rope | NoPE = Rope()
    backend: Backend = Backend()

    def __post_init__(self):
        require(self, 1, "heads", "kv_heads", "head_dim", "block", "top_k")
        require_divides(self, "kv_heads", "heads")
        require_rotation(self.position, self.head_dim)
        require_spans(self)
        super().__post_init__()

    @nn.compact
    @in_text_order
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: State | None = None,
    ) -> tuple[Float[Array, "B T D"], MoBAState | None]:
        (H, K, C), (T, D) = (self.heads, self.kv_heads, self.head_dim), x.shape[1:]
        segments = jnp.zeros_like(positions) if segment_ids is None else segment_ids
        q = rotate(self.position, to_heads(self, "wq", x, H, C), positions)
        k = rotate(self.position, to_heads(self, "wk", x, K, C, "kv_heads"), positions)
        v = to_heads(self, "wv", x, K, C, "kv_heads")

        if state is None:
            seen, cache = 0, KVCache(k, v, positions, segments, jnp.int32(T))
        else:
            check_state(self, state, x)
            seen, cache = state.cache.next, state.cache.push(k, v, positions, segments)
        found = windows(
            positions, length=self.block, stride=self.block, before=None if state is None else state.means.count
        )
        blocks = read_windows(cache.k, seen + found.ends, self.block)
        means = Summaries.of(found, segments, jax.lax.stop_gradient(blocks).astype(jnp.float32).mean(2))
        means = means if state is None else state.means.push(means)

        tokens = jnp.broadcast_to(seen + jnp.arange(T, dtype=jnp.int32), positions.shape)
        choose = lambda queries: self._choose(*queries, means=means, oldest=cache.next - cache.k.shape[1])
        o, _ = attend_selected(
            q,
            cache.k.astype(x.dtype),
            cache.v.astype(x.dtype),
            map_queries(choose, (q, positions, tokens, found.first)),
            mask=causal(),
            q_positions=positions,
            k_positions=cache.positions,
            q_segments=segments,
            k_segments=cache.segment_ids,
            block=self.block,
            scale=softmax_scale(self.position, C),
        )
        y = from_heads(self, "wo", o, D)
        return y, None if state is None else MoBAState(cache, means)

    def _choose(
        self,
        q: Float[Array, "B T H C"],
        positions: Int[Array, "B T"],
        tokens: Int[Array, "B T"],
        first: Int[Array, "B T"],
        *,
        means: Summaries,
        oldest: Int[Array, ""],
    ) -> Selection:
        """First slots of the blocks that each head of a query reads, its own block first.

        Args:
            tokens: the slots of the queries, not yet modulo those of a cache. first: see `ops.spans.Windows`.
            oldest: the oldest token that is still cached.
        """
        q = jax.lax.stop_gradient(q).reshape(*q.shape[:2], self.kv_heads, -1, self.head_dim).astype(jnp.float32)
        scores = jnp.einsum("btkgc,bmkc->btkgm", q, means.values[0], precision=jax.lax.Precision.HIGHEST)
        numbers = means.numbers()[:, None]
        block = numbers - first[..., None]  # of the query's document, if it has that many behind it
        start = (tokens - positions)[..., None] + block * self.block
        past = (numbers >= 0) & (block >= 0) & (block < (positions // self.block)[..., None]) & (start >= oldest)
        chosen = top_k(scores.reshape(*scores.shape[:2], self.heads, -1), self.top_k - 1, past[:, :, None])

        chosen_start = jnp.take_along_axis(start[:, :, None], chosen.indices, axis=-1)
        own = (tokens - positions % self.block)[..., None, None]
        own = jnp.broadcast_to(own, (*chosen_start.shape[:3], 1))
        join = lambda a, b: jnp.concatenate([a, b], axis=-1)
        return Selection(join(own, chosen_start), join(jnp.ones_like(own, bool), chosen.valid))

    def init_state(self, batch: int, max_len: int, *, width: int, max_chunk: int, dtype: Any) -> MoBAState:
        K, C = self.kv_heads, self.head_dim
        cache = KVCache.empty(batch, max_len, K, C, C, dtype)
        return MoBAState(cache, Summaries.empty(batch, -(-max_len // self.block), ((K, C), jnp.float32)))

    def state_bytes(self, batch: int, max_len: int, *, width: int, max_chunk: int, itemsize: int) -> int:
        """Bytes of the state by the formula above, and its counters."""
        size = self.kv_heads * self.head_dim
        cache = batch * max_len * (2 * size * itemsize + 8) + 4
        return cache + batch * (-(-max_len // self.block) * (4 * size + 4) + 4)

    def mixing_flops(self, length: int) -> float:
        """Forward flops a token in rows of `length` tokens, beyond 2 a parameter: attention and the gate."""
        t = np.arange(length)
        seen = np.minimum(t // self.block, self.top_k - 1) * self.block + t % self.block + 1
        return self.heads * self.head_dim * float(4 * seen.mean() + 2 * (t // self.block).mean())

    @classmethod
    def examples(cls) -> dict[str, MoBA]:
        """Small settings that cover the fields; the laws and the benchmark run on each."""
        return {
            "gqa": cls(heads=4, kv_heads=2, head_dim=8, block=3, top_k=2),
            "mqa": cls(heads=3, kv_heads=1, head_dim=4, block=2, top_k=3, position=NoPE()),
        }

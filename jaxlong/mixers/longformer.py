"""Longformer: a window and global tokens that have projections of their own."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.mask import Mask, causal, longformer, sinks, sliding
from jaxlong.core.position import NoPE, Rope
from jaxlong.core.state import EMPTY, KVCache
from jaxlong.core.types import BadInput, State
from jaxlong.mixers.base import (
    check_state,
    from_heads,
    in_text_order,
    require,
    require_divides,
    require_one_of,
    require_rotation,
    require_spans,
    to_heads,
    vector,
)
from jaxlong.ops.attend import Backend, attend
from jaxlong.ops.rotate import rotate, softmax_scale

DIRECTIONS = ("causal", "both")


class GlobalTokens(NamedTuple):
    """Keys and values of a document's first tokens, by both projections; slot n is position n."""

    k: Float[Array, "B N K C"]
    v: Float[Array, "B N K C"]
    k_global: Float[Array, "B N K C"]
    v_global: Float[Array, "B N K C"]
    segment_ids: Int[Array, "B N"]

    def push(self, new: tuple[Array, ...], positions: Int[Array, "B T"], segments: Int[Array, "B T"]) -> GlobalTokens:
        """What holds after T more tokens: the first tokens of the last one's document."""
        last = segments[:, -1:]
        match = (segments == last)[:, None] & (positions[:, None] == self.places(len(segments))[..., None])
        found, index = match.any(-1), match.argmax(-1)
        pick = lambda old, x: jnp.where(
            found[..., None, None], jnp.take_along_axis(x, index[..., None, None], axis=1).astype(old.dtype), old
        )
        held = found | (self.segment_ids == last)
        return GlobalTokens(*map(pick, self[:4], new), segment_ids=jnp.where(held, last, EMPTY))

    def places(self, batch: int) -> Int[Array, "B N"]:
        return jnp.broadcast_to(jnp.arange(self.k.shape[1], dtype=jnp.int32), (batch, self.k.shape[1]))


class LongformerAttention(nn.Module):
    """Sliding-window attention in which the first tokens of a document see all and are seen by all.

        o_i = softmax over j in window(i) or j < n_global of q_i k_j / sqrt(C), times v_j        i >= n_global
        o_i = softmax over all j of qg_i kg_j / sqrt(C), times vg_j                              i < n_global
        y = o Wo                                     "causal": j <= i in both

    Paper: Beltagy et al., arXiv 2004.05150. A global token has its own q, k and v for what it looks at; others look at
    it by the ordinary ones.
    Rows of another layout than contiguous are put in the order of the text, and the outputs back.
    Training cost: 4 D C (H + K) T, about twice that with global projections, + 4 H C T (window + n_global) flops.
    State: 2 K C elements and 8 bytes for each of min(max_len, window + max_chunk - 1) tokens, and 4 K C elements and
    4 bytes for each of n_global: constant in length. Both directions have no state.

    Fields:
        window: "causal": the last `window` keys, the query's own included; "both": window / 2 on each side.
        n_global: how many first tokens of each document are global.
        direction: "causal" or "both" (an encoder).
        bias: biases of queries, keys and values (as the published models).
        position: how positions enter.
    """

    heads: int
    kv_heads: int
    head_dim: int
    window: int = 512
    n_global: int = 1
    direction: str = "causal"
    bias: bool = False
    position: Rope | NoPE = Rope()
    backend: Backend = Backend()

    def __post_init__(self):
        require(self, 1, "heads", "kv_heads", "head_dim", "window")
        require(self, 0, "n_global")
        require_divides(self, "kv_heads", "heads")
        require_one_of(self, "direction", *DIRECTIONS)
        if self.direction == "both" and self.window % 2:
            raise BadInput("window", self.window, "both sides of a window see equally many", "even")
        require_rotation(self.position, self.head_dim)
        require_spans(self)
        super().__post_init__()

    @property
    def mask(self) -> Mask:
        """What an ordinary query sees."""
        if self.direction == "causal":
            return causal() & longformer(self.window, self.n_global)
        return sliding(self.window // 2 + 1, self.window // 2) | longformer(1, self.n_global)

    @property
    def global_mask(self) -> Mask:
        """What a global query sees; other rows are not used."""
        return sinks(self.n_global) if self.direction == "causal" else longformer(1, self.n_global)

    @nn.compact
    @in_text_order
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: State | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[KVCache, GlobalTokens] | None]:
        if state is not None:
            check_state(self, state, x)
            segment_ids = jnp.zeros_like(positions) if segment_ids is None else segment_ids
        q = self._heads("q", x, positions)
        keys = (*self._keys("k", "v", x, positions), positions, segment_ids)
        cache = store = None
        new = keys[:2]
        if state is not None:
            cache, store = state[0].push(*keys), state[1]
            keys = _beside(store, cache)
        o = self._attend(q, self.mask, keys, positions, segment_ids)
        if self.n_global:
            o, whole = self._global_rows(o, x, positions, segment_ids, store)
            if store is not None:
                store = store.push((*new, *whole), positions, segment_ids)
        return from_heads(self, "wo", o, x.shape[-1]), None if state is None else (cache, store)

    def _global_rows(
        self, o: Array, x: Array, positions: Array, segments: Array | None, store: GlobalTokens | None
    ) -> tuple[Array, tuple[Array, Array]]:
        """o with the rows of global tokens replaced, and keys and values by the global projections.

        Where a row is one document, global tokens are its first, and need no others if they only look back.
        """
        first = slice(self.n_global) if segments is None else slice(None)
        seen = first if self.direction == "causal" else slice(None)
        q = self._heads("q_global", x[:, first], positions[:, first])
        k, v = self._keys("k_global", "v_global", x[:, seen], positions[:, seen])
        keys = (k, v, positions[:, seen], segments)
        if store is not None:
            before = (store.k_global, store.v_global, store.places(len(x)), store.segment_ids)
            keys = tuple(jnp.concatenate([a.astype(b.dtype), b], axis=1) for a, b in zip(before, keys, strict=True))
        rows = self._attend(q, self.global_mask, keys, positions[:, first], segments)
        if segments is None:
            return jnp.concatenate([rows, o[:, first.stop :]], axis=1), (k, v)
        return jnp.where((positions < self.n_global)[..., None, None], rows, o), (k, v)

    def _attend(self, q: Array, mask: Mask, keys: tuple, positions: Array, segments: Array | None) -> Array:
        k, v, k_positions, k_segments = keys
        return attend(
            q,
            k.astype(q.dtype),
            v.astype(q.dtype),
            mask=mask,
            q_positions=positions,
            k_positions=k_positions,
            q_segments=segments,
            k_segments=k_segments,
            scale=softmax_scale(self.position, self.head_dim),
            backend=self.backend,
        )

    def _heads(self, name: str, x: Array, positions: Array, heads: int | None = None, turn: bool = True) -> Array:
        heads, axis = (self.heads, "heads") if heads is None else (heads, "kv_heads")
        out = to_heads(self, f"w{name}", x, heads, self.head_dim, axis)
        if self.bias:
            out += vector(self, f"b{name}", (heads, self.head_dim), (axis, "head_dim")).astype(x.dtype)
        return rotate(self.position, out, positions) if turn else out

    def _keys(self, k: str, v: str, x: Array, positions: Array) -> tuple[Array, Array]:
        keys = self._heads(k, x, positions, self.kv_heads)
        return keys, self._heads(v, x, positions, self.kv_heads, turn=False)

    def _slots(self, max_len: int, max_chunk: int) -> int:
        return min(max_len, self.window + max_chunk - 1)

    def init_state(
        self, batch: int, max_len: int, *, width: int, max_chunk: int, dtype: Any
    ) -> tuple[KVCache, GlobalTokens]:
        if self.direction != "causal":
            raise BadInput("direction", self.direction, "tokens to come would change the past: no state", "causal")
        shape = (batch, self.n_global, self.kv_heads, self.head_dim)
        first = GlobalTokens(*(jnp.zeros(shape, dtype) for _ in range(4)), jnp.full(shape[:2], EMPTY, jnp.int32))
        slots = self._slots(max_len, max_chunk)
        return KVCache.empty(batch, slots, self.kv_heads, self.head_dim, self.head_dim, dtype), first

    def state_bytes(self, batch: int, max_len: int, *, width: int, max_chunk: int, itemsize: int) -> int:
        """Bytes of the state by the formula above (positions and segments are int32; one counter)."""
        token = 2 * self.kv_heads * self.head_dim * itemsize
        slots = self._slots(max_len, max_chunk)
        return batch * (slots * (token + 8) + self.n_global * (2 * token + 4)) + 4

    def mixing_flops(self, length: int) -> float:
        """Forward flops a token in rows of `length` tokens, beyond 2 a parameter."""
        window = self.window if self.direction == "causal" else self.window + 1
        return 4 * self.heads * self.head_dim * min(window + self.n_global, (length + 1) / 2)

    @classmethod
    def examples(cls) -> dict[str, LongformerAttention]:
        """Small causal settings that cover the fields; the laws and the benchmark run on each."""
        small = cls(heads=4, kv_heads=2, head_dim=6, window=3, n_global=2)
        return {"causal": small, "biased": small.clone(kv_heads=4, window=4, n_global=1, bias=True, position=NoPE())}


def _beside(store: GlobalTokens, cache: KVCache) -> tuple[Array, Array, Array, Array]:
    """Keys, values, positions and segments of both, each token once."""
    places = store.places(len(cache.positions))
    same = cache.segment_ids[:, None] == store.segment_ids[..., None]
    twice = (same & (cache.positions[:, None] == places[..., None])).any(-1)
    first = (store.k, store.v, places, jnp.where(twice, EMPTY, store.segment_ids))
    return tuple(jnp.concatenate(pair, axis=1) for pair in zip(first, cache[:4], strict=True))

"""Hierarchical attention: the own segment token by token, everything before as summaries, coarser the farther."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.mask import Mask, causal, dilated
from jaxlong.core.position import NoPE, Rope
from jaxlong.core.state import EMPTY, KVCache
from jaxlong.core.types import BadInput
from jaxlong.mixers.base import (
    check_state,
    from_heads,
    in_text_order,
    require,
    require_divides,
    require_rotation,
    require_spans,
    to_heads,
    vector,
)
from jaxlong.ops.attend import Backend, attend_with_lse, merge
from jaxlong.ops.rotate import rotate, softmax_scale
from jaxlong.ops.summaries import Running, Units, summarize


class Hierarchical(nn.Module):
    """Causal attention in which each past token is seen through exactly one level of summaries.

        level 0: the tokens;  unit of level l: W_l = N (N / r)^(l-1) tokens, r summaries
        k', v' of a unit: p_lr pools the level below, a = softmax(p_lr k / sqrt(C)), k' = sum a k, v' = sum a v
        query i sees at level 0 its own block of W_1 tokens up to itself, at level l the units before its own W_l
            inside its own W_(l+1), at the top level all units before its own
        o = softmax over all of these of q k / sqrt(C) + b_lh, times v;  y = o Wo

    So N = `segment` keys (r units of the level below pool again N keys) stand for each level, which makes a logarithmic
    number of keys once there are enough levels. Units are counted by positions from each document's start; a unit's
    summaries are rotated to its last position, and pooled before the rotation.

    Paper: no single one; segments with summaries as in Hierarchical Memory Transformer (He et al., arXiv 2405.06067),
    exact near and coarse far as in H-Transformer-1D (Zhu and Soricut, arXiv 2107.11906).
    Rows of another layout than contiguous are put in the order of the text, and the outputs back.
    Training cost: 4 D C (H + K) T + 2 H C T (levels - 1) N + 2 H C T^2 r / W_top flops + pooling, 12 r K C T.
    State: 2 K C elements and 8 bytes for each of min(max_len, N + max_chunk - 1) tokens; a level has 2 r K C elements
    and 8 bytes for each of ceil(max_len / W_l) units, at most N / r of them below the top, and r K (2 C + 1) float32.

    Fields:
        segment: N, tokens of a level-1 unit.
        summaries: r, summaries a unit; at least two units make one of the next level.
        levels: how many, with level 0.
        position: how positions enter.
    """

    heads: int
    kv_heads: int
    head_dim: int
    segment: int = 256
    summaries: int = 8
    levels: int = 3
    position: Rope | NoPE = Rope()
    backend: Backend = Backend()

    def __post_init__(self):
        require(self, 1, "heads", "kv_heads", "head_dim", "summaries")
        require(self, 2, "segment", "levels")
        require_divides(self, "kv_heads", "heads")
        require_divides(self, "summaries", "segment")
        if self.summaries == self.segment:
            raise BadInput(
                "summaries", self.summaries, "as many as tokens", f"at most segment / 2 = {self.segment // 2}"
            )
        require_rotation(self.position, self.head_dim)
        require_spans(self)
        super().__post_init__()

    @property
    def fan(self) -> int:
        """Units of a level that make one of the next."""
        return self.segment // self.summaries

    def span(self, level: int) -> int:
        """Tokens of a unit."""
        return self.segment * self.fan ** (level - 1) if level else 1

    def mask(self, level: int) -> Mask:
        """What a query sees at a level, where any position of a unit stands for it."""
        seen = causal() & ~dilated(self.span(level), 1) if level else causal()
        return seen & dilated(self.span(level + 1), 1) if level < self.levels - 1 else seen

    @nn.compact
    @in_text_order
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
        segments = jnp.zeros_like(positions) if segment_ids is None else segment_ids
        q = rotate(self.position, to_heads(self, "wq", x, self.heads, self.head_dim), positions)
        k = to_heads(self, "wk", x, self.kv_heads, self.head_dim, "kv_heads")
        v = to_heads(self, "wv", x, self.kv_heads, self.head_dim, "kv_heads")
        shape = (self.levels - 1, self.summaries, self.kv_heads, self.head_dim)
        pools = vector(self, "pools", shape, (None, None, "kv_heads", "head_dim"), nn.initializers.normal(1.0))
        bias = vector(self, "bias", (self.levels - 1, self.heads), (None, "heads"))

        keys, cache, kept = (rotate(self.position, k, positions), v, positions, segments), None, []
        if state is not None:
            cache = state[0].push(*keys)
            keys = cache[:4]
        total = self._attend(q, keys, positions, segments, 0)
        parts = Units(k[:, :, None], v[:, :, None], positions, segments)
        for level in range(1, self.levels):
            shape = (len(x), self.summaries, self.kv_heads, 2 * self.head_dim)
            store, running = (None, Running.empty(*shape)) if state is None else state[1][level - 1]
            fan = self.segment if level == 1 else self.fan
            parts, running = summarize(parts, pools[level - 1], fan=fan, running=running, backend=self.backend)
            new = self._placed(parts, level, x.dtype)
            seen = new if store is None else Units(*(jnp.concatenate(pair, 1) for pair in zip(store, new, strict=True)))
            out, lse = self._attend(q, self._keys(seen, level), positions, segments, level)
            total = merge(total, (out, lse + bias[level - 1]))
            if store is not None:
                kept.append((self._stored(store, new, positions[:, -1:], segments[:, -1:], level), running))
        y = from_heads(self, "wo", total[0].astype(x.dtype), x.shape[-1])
        return y, None if state is None else (cache, tuple(kept))

    def _attend(self, q: Array, keys: tuple, positions: Array, segments: Array, level: int) -> tuple[Array, Array]:
        k, v, k_positions, k_segments = keys
        out, lse = attend_with_lse(
            q,
            k.astype(q.dtype),
            v.astype(q.dtype),
            mask=self.mask(level),
            q_positions=positions,
            k_positions=k_positions,
            q_segments=segments,
            k_segments=k_segments,
            scale=softmax_scale(self.position, self.head_dim),
            backend=self.backend,
        )
        return out.astype(jnp.float32), lse

    def _placed(self, units: Units, level: int, dtype: Any) -> Units:
        """Keys rotated to the last position of their unit."""
        k, _, positions, _ = self._keys(units, level)
        k = rotate(self.position, k, positions).reshape(units.k.shape)
        return units._replace(k=k.astype(dtype), v=units.v.astype(dtype))

    def _keys(self, units: Units, level: int) -> tuple[Array, Array, Array, Array]:
        """Each summary as a key: k, v [B S K C], the last position of its unit, segments."""
        flat = lambda a: a.reshape(a.shape[0], -1, *a.shape[3:])
        each = lambda a: jnp.repeat(a, self.summaries, axis=1)
        last = (units.index + 1) * self.span(level) - 1
        return flat(units.k), flat(units.v), each(last), each(units.segment_ids)

    def _stored(self, store: Units, new: Units, position: Array, segment: Array, level: int) -> Units:
        """The units that a next token may see: those of the last token's document, inside its unit a level up.

        Slot n holds a unit whose number is n modulo the slots. What is not overwritten tells by its own number and
        document that it is old.
        """
        slots = store.index.shape[1]
        mine = new.segment_ids == segment
        if level < self.levels - 1:
            mine &= new.index // self.fan == position // self.span(level + 1)
        slot = jnp.where(mine, new.index % slots, slots)
        rows = jnp.arange(len(slot))[:, None]
        return Units(*(a.at[rows, slot].set(b, mode="drop") for a, b in zip(store, new, strict=True)))

    def _slots(self, max_len: int, max_chunk: int) -> list[int]:
        """Tokens of the cache, and units of each level."""
        units = [-(-max_len // self.span(level)) for level in range(1, self.levels)]
        below = [min(n, self.fan) for n in units[:-1]]
        return [min(max_len, self.segment + max_chunk - 1), *below, units[-1]]

    def init_state(self, batch: int, max_len: int, *, width: int, max_chunk: int, dtype: Any) -> Any:
        slots, *units = self._slots(max_len, max_chunk)
        heads = (self.summaries, self.kv_heads)

        def level(count: int) -> tuple[Units, Running]:
            key = jnp.zeros((batch, count, *heads, self.head_dim), dtype)
            none = jnp.full((batch, count), EMPTY, jnp.int32)
            return Units(key, key, jnp.zeros_like(none), none), Running.empty(batch, *heads, 2 * self.head_dim)

        cache = KVCache.empty(batch, slots, self.kv_heads, self.head_dim, self.head_dim, dtype)
        return cache, tuple(level(count) for count in units)

    def state_bytes(self, batch: int, max_len: int, *, width: int, max_chunk: int, itemsize: int) -> int:
        """Bytes of the state by the formula above (numbers and segments are int32; one counter)."""
        slots, *units = self._slots(max_len, max_chunk)
        pair = 2 * self.kv_heads * self.head_dim * itemsize
        running = self.summaries * self.kv_heads * (2 * self.head_dim + 1) * 4 + 8
        return batch * (slots * (pair + 8) + sum(n * (self.summaries * pair + 8) + running for n in units)) + 4

    def mixing_flops(self, length: int) -> float:
        """Forward flops a token in rows of `length` tokens, beyond 2 a parameter."""
        between = [(min(self.fan, length / self.span(n)) - 1) / 2 for n in range(1, self.levels - 1)]
        units = sum(max(n, 0) for n in between) + length / self.span(self.levels - 1) / 2
        seen = (min(self.segment, length) + 1) / 2 + self.summaries * units
        # each key of a level is scored and pooled (key and value) for the unit that ends and the one that goes on
        keys = 1 + sum(self.summaries / self.span(level) for level in range(1, self.levels - 1))
        pooling = 12 * self.summaries * self.kv_heads * self.head_dim * keys
        return 4 * self.heads * self.head_dim * seen + pooling

    @classmethod
    def examples(cls) -> dict[str, Hierarchical]:
        """Small settings that cover the fields; the laws and the benchmark run on each."""
        small = cls(heads=4, kv_heads=2, head_dim=6, segment=2, summaries=1, levels=3)
        two = small.clone(segment=4, summaries=2, levels=2, kv_heads=4, position=NoPE())
        return {"two": two, "three": small}

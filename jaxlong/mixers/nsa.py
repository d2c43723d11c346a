"""NSA: compressed, selected and local attention side by side, mixed by gates."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.mask import causal, sliding
from jaxlong.core.position import NoPE, Rope
from jaxlong.core.state import ConvTail, KVCache
from jaxlong.core.types import BadInput, State
from jaxlong.mixers.base import (
    check_state,
    from_heads,
    in_text_order,
    projection,
    require,
    require_divides,
    require_rotation,
    require_spans,
    to_heads,
    vector,
)
from jaxlong.ops.attend import Backend, attend, attend_with_lse
from jaxlong.ops.rotate import rotate, softmax_scale
from jaxlong.ops.select import Selection, attend_selected, map_queries, top_k
from jaxlong.ops.spans import Summaries, Windows, read_windows, sum_by_blocks, windows


class NSAState(NamedTuple):
    """Caches of the selected and the local branch, compressed keys and values, and tokens of unfinished windows."""

    selected: KVCache
    local: KVCache
    compressed: Summaries
    pending: ConvTail


class NSA(nn.Module):
    """Native sparse attention: three softmax attentions with their own keys and values, summed by gates.

        k^c_i, v^c_i = phi(keys, values of tokens i stride .. i stride + compress - 1)     (finished ones are seen)
        p_t = softmax_i(q_t . k^c_i);   score_(t,n) = sum of p_(t,i) over windows i that overlap block n, and over
              the heads of a key head;  blocks_t = the first `initial`, the last `recent`, and the best, top_k in all
        o_t = g1 attn(q_t, k^c, v^c) + g2 attn(q_t, k^s, v^s of blocks_t) + g3 attn(q_t, k^w, v^w of the window)
        g = sigmoid(x Wg) a head;   y = o Wo

    Paper: Yuan et al., arXiv 2502.11089. Windows and blocks are counted from the start of each document. The choice
    has no gradient: scores learn through the compressed branch alone. Keys are compressed before their rotation, which
    is then that of a window's first token, so a window is the same wherever it lies.
    Rows of another layout than contiguous are put in the order of the text, and the outputs back.
    Training cost: 4 D C (H + 3 K) T + 4 H C T (window + top_k block) + 3 H C T^2 / stride flops.
    State: 2 K C elements and 8 bytes for each token of the selected branch and for window + max_chunk - 1 of the local
    one, 2 K C elements and 4 bytes for each finished window and for compress - 1 tokens.

    Fields:
        compress, stride: length and distance of the windows that are compressed.
        hidden: width of phi, a two-layer perceptron on the tokens of a window and their places in it; 0 is their mean.
        block, top_k: tokens of a block of the selected branch, and blocks that a query reads.
        initial, recent: of them, always the first ones, and the last ones up to a query's own.
        window: tokens of the local branch.
    """

    heads: int
    kv_heads: int
    head_dim: int
    compress: int = 32
    stride: int = 16
    hidden: int = 256
    block: int = 64
    top_k: int = 16
    initial: int = 1
    recent: int = 2
    window: int = 512
    position: Rope | NoPE = Rope()
    backend: Backend = Backend()

    def __post_init__(self):
        require(self, 1, "heads", "kv_heads", "head_dim", "compress", "stride", "block", "recent", "window")
        require(self, 0, "hidden", "initial")
        require(self, self.initial + self.recent, "top_k")
        require_divides(self, "kv_heads", "heads")
        if self.stride > self.compress:
            raise BadInput("stride", self.stride, "leaves tokens out of all windows", f"compress = {self.compress}")
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
    ) -> tuple[Float[Array, "B T D"], NSAState | None]:
        (H, K, C), D = (self.heads, self.kv_heads, self.head_dim), x.shape[-1]
        segments = jnp.zeros_like(positions) if segment_ids is None else segment_ids
        if state is not None:
            check_state(self, state, x)
        pair = lambda name: projection(
            self, name, (D, 3, K, C), ("embed", None, "kv_heads", "head_dim"), inputs=1, dtype=x.dtype
        )
        q = rotate(self.position, to_heads(self, "wq", x, H, C), positions)
        k = jnp.moveaxis(jnp.einsum("btd,dnkc->btnkc", x, pair("wk")), 2, 0)
        v = jnp.moveaxis(jnp.einsum("btd,dnkc->btnkc", x, pair("wv")), 2, 0)

        compressed, pending, found = self._compress(k[0], v[0], positions, segments, state)
        selected, local = (rotate(self.position, k[1], positions), v[1]), (rotate(self.position, k[2], positions), v[2])
        if state is None:
            caches = [KVCache(*kv, positions, segments, jnp.int32(x.shape[1])) for kv in (selected, local)]
        else:
            caches = [
                cache.push(*kv, positions, segments)
                for cache, kv in zip((state.selected, state.local), (selected, local), strict=True)
            ]
        out = jnp.stack(self._attend(q, positions, segments, compressed, found, *caches), axis=-1)
        wg = projection(self, "wg", (D, H, 3), ("embed", "heads", None), inputs=1, dtype=x.dtype)
        gates = jax.nn.sigmoid(jnp.einsum("btd,dhn->bthn", x, wg).astype(jnp.float32))
        o = jnp.einsum("bthcn,bthn->bthc", out.astype(jnp.float32), gates).astype(x.dtype)
        y = from_heads(self, "wo", o, D)
        return y, None if state is None else NSAState(*caches, compressed, pending)

    def _compress(
        self,
        k: Float[Array, "B T K C"],
        v: Float[Array, "B T K C"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        state: NSAState | None,
    ) -> tuple[Summaries, ConvTail, Windows]:
        """All windows finished so far, and the tokens that later ones will need."""
        B, T, K, C = k.shape
        tail = ConvTail.empty(B, self.compress, 2 * K * C, k.dtype) if state is None else state.pending
        new = jnp.concatenate([k, v], axis=2).reshape(B, T, -1)
        tokens = jnp.concatenate([tail.x.astype(k.dtype), new], axis=1)
        ids = jnp.concatenate([tail.segment_ids, segments], axis=1)

        count = None if state is None else state.compressed.count
        found = windows(positions, length=self.compress, stride=self.stride, before=count)
        tokens_of = read_windows(tokens, self.compress - 1 + found.ends, self.compress)
        tokens_of = tokens_of.reshape(*tokens_of.shape[:3], 2, K, C)
        start = jnp.maximum(jnp.take_along_axis(positions, found.ends, axis=1) + 1 - self.compress, 0)
        keys = rotate(self.position, self._phi("k", tokens_of[:, :, :, 0]), start)
        compressed = Summaries.of(found, segments, keys, self._phi("v", tokens_of[:, :, :, 1]))
        if state is not None:
            compressed = state.compressed.push(compressed)
        return compressed, ConvTail(tokens[:, T:], ids[:, T:]), found

    def _phi(self, name: str, x: Float[Array, "B N l K C"]) -> Float[Array, "B N K C"]:
        """One vector for each window."""
        length, C = x.shape[2], x.shape[-1]
        if not self.hidden:
            return x.astype(jnp.float32).mean(2).astype(x.dtype)
        place = vector(self, f"phi_{name}_place", (length, C), (None, "head_dim")).astype(x.dtype)
        wide = projection(
            self, f"phi_{name}_in", (length, C, self.hidden), (None, "head_dim", "mlp"), inputs=2, dtype=x.dtype
        )
        back = projection(self, f"phi_{name}_out", (self.hidden, C), ("mlp", "head_dim"), inputs=1, dtype=x.dtype)
        hidden = jax.nn.silu(jnp.einsum("bnlkc,lcf->bnkf", x + place[:, None], wide))
        return jnp.einsum("bnkf,fc->bnkc", hidden, back)

    def _attend(
        self,
        q: Float[Array, "B T H C"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        compressed: Summaries,
        found: Windows,
        selected: KVCache,
        local: KVCache,
    ) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H C"], Float[Array, "B T H C"]]:
        """The three branches."""
        scale = softmax_scale(self.position, self.head_dim)
        coarse, lse = attend_with_lse(
            q,
            *(a.astype(q.dtype) for a in compressed.values),
            mask=causal(),
            q_positions=found.finished,
            k_positions=jnp.maximum(compressed.numbers() + 1, 0),
            q_segments=segments,
            k_segments=compressed.segment_ids,
            scale=scale,
            backend=Backend(sequence="none"),  # windows are no tokens
        )
        tokens = selected.next - q.shape[1] + jnp.arange(q.shape[1], dtype=jnp.int32)
        tokens = jnp.broadcast_to(tokens, positions.shape)
        choose = lambda queries: self._choose(*queries, keys=compressed.values[0], scale=scale, cache=selected)
        of_cache = lambda cache: dict(
            q_positions=positions, k_positions=cache.positions, q_segments=segments, k_segments=cache.segment_ids
        )
        fine, _ = attend_selected(
            q,
            selected.k.astype(q.dtype),
            selected.v.astype(q.dtype),
            map_queries(choose, (q, lse, positions, tokens, found.first, found.finished)),
            mask=causal(),
            block=self.block,
            scale=scale,
            **of_cache(selected),
        )
        near = attend(
            q,
            local.k.astype(q.dtype),
            local.v.astype(q.dtype),
            mask=sliding(self.window),
            scale=scale,
            backend=self.backend,
            **of_cache(local),
        )
        return coarse, fine, near

    def _choose(
        self,
        q: Float[Array, "B T H C"],
        lse: Float[Array, "B T H"],
        positions: Int[Array, "B T"],
        tokens: Int[Array, "B T"],
        first: Int[Array, "B T"],
        finished: Int[Array, "B T"],
        *,
        keys: Float[Array, "B M K C"],
        scale: float,
        cache: KVCache,
    ) -> Selection:
        """First slots of the blocks that the heads of a key head read.

        Args:
            lse: of the compressed branch. tokens: the slots of the queries, not yet modulo those of the cache.
            first, finished: see `ops.spans.Windows`.
        """
        K, slots = self.kv_heads, cache.k.shape[1]
        q, keys, lse = jax.lax.stop_gradient((q, keys.astype(jnp.float32), lse))
        q = q.reshape(*q.shape[:2], K, -1, self.head_dim).astype(jnp.float32)
        logits = scale * jnp.einsum("btkgc,bmkc->btkgm", q, keys, precision=jax.lax.Precision.HIGHEST)

        weights = jnp.exp(logits - jnp.where(lse == -jnp.inf, 0, lse).reshape(*q.shape[:4], 1)).sum(3)
        grid = dict(length=self.compress, stride=self.stride, block=self.block, blocks=-(-slots // self.block))
        scores = sum_by_blocks(weights, first, finished, **grid)

        block, own = jnp.arange(scores.shape[-1]), (positions // self.block)[..., None]
        start = (tokens - positions)[..., None] + block * self.block
        forced = (block < self.initial) | (block > own - self.recent)
        there = (block <= own) & (start >= cache.next - slots)
        chosen = top_k(jnp.where(forced[:, :, None], jnp.inf, scores), self.top_k, there[:, :, None])
        return chosen._replace(indices=jnp.take_along_axis(start[:, :, None], chosen.indices, axis=-1))

    def init_state(self, batch: int, max_len: int, *, width: int, max_chunk: int, dtype: Any) -> NSAState:
        K, C = self.kv_heads, self.head_dim
        return NSAState(
            selected=KVCache.empty(batch, max_len, K, C, C, dtype),
            local=KVCache.empty(batch, min(max_len, self.window + max_chunk - 1), K, C, C, dtype),
            compressed=Summaries.empty(batch, -(-max_len // self.stride), ((K, C), dtype), ((K, C), dtype)),
            pending=ConvTail.empty(batch, self.compress, 2 * K * C, dtype),
        )

    def state_bytes(self, batch: int, max_len: int, *, width: int, max_chunk: int, itemsize: int) -> int:
        """Bytes of the state by the formula above, and its counters."""
        pair = 2 * self.kv_heads * self.head_dim * itemsize
        cached = max_len + min(max_len, self.window + max_chunk - 1)
        rest = -(-max_len // self.stride) + self.compress - 1
        return batch * (cached * (pair + 8) + rest * (pair + 4) + 4) + 8

    def mixing_flops(self, length: int) -> float:
        """Forward flops a token in rows of `length` tokens, beyond 2 a parameter: attention, scores and phi."""
        t = np.arange(length)
        read = np.minimum(t // self.block * self.block, (self.top_k - 1) * self.block) + t % self.block + 1
        near, windows = np.minimum(t + 1, self.window), np.maximum(t + 1 - self.compress, 0) / self.stride
        phi = 2 * self.hidden * self.head_dim * (self.compress + 1)
        attention = self.heads * self.head_dim * float((4 * (read + near) + 6 * windows).mean())
        return attention + 2 * phi * (self.kv_heads / self.stride - 1)

    @classmethod
    def examples(cls) -> dict[str, NSA]:
        """Small settings that cover the fields; the laws and the benchmark run on each."""
        small = cls(
            heads=4, kv_heads=2, head_dim=4, compress=4, stride=2, hidden=6, block=3, top_k=3, recent=1, window=3
        )
        return {
            "mlp": small,
            "mean": small.clone(
                kv_heads=1, compress=3, stride=3, hidden=0, block=2, initial=0, recent=2, position=NoPE()
            ),
        }

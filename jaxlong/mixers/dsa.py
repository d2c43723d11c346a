"""DeepSeek Sparse Attention: latent attention over the keys that a cheap, separately trained indexer chooses."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from jaxlong.core.mask import sliding
from jaxlong.core.position import NoPE, Rope, apply_rope
from jaxlong.core.state import LatentCache
from jaxlong.core.types import BadInput, State
from jaxlong.mixers.base import in_text_order, projection, require, require_spans, vector
from jaxlong.mixers.mla import MLA, Keys
from jaxlong.ops.indexer import Sight, float8, index_loss, select_by_index
from jaxlong.ops.select import Selection, attend_selected

STAGES = ("dense", "sparse")
INDEXER_DTYPES = ("float32", "float8")


class DSA(MLA):
    """Latent attention over the `top_k` keys of largest index score, the same ones for all heads.

        qI_j = rot(sg(norm(x Wqa)) WqI_j);  kI = rot(LayerNorm(sg(x) WkI));  w = sg(x) Ww     [sg: no gradient]
        I_ts = sum_j w_tj relu(qI_tj . kI_s) / sqrt(H_I d_I)
        S_t = the top_k keys s of largest I_ts among those that t sees; of equal scores the lower position
        y = MLA, absorbed, over S_t;   with top_k keys or fewer it is MLA itself

    The model learns from the outputs only and the indexer from its own loss only, the mean over tokens of

        KL(p_t || softmax(I_t)),  p_t = the mean of the attention probabilities over heads

    over all visible keys in stage "dense", over S_t in stage "sparse". It is sown as "indexer_kl" in the collection
    "losses", and not computed unless that is mutable in `apply`.

    Paper: DeepSeek-V3.2, arXiv 2512.02556. Half-split rotation of the first d_r dimensions of qI and kI, as in the
    published weights (those of the latents are interleaved).
    Rows of another layout than contiguous are put in the order of the text, and the outputs back.
    Training cost: MLA's weights and the indexer's; 2 H_I (d_I + 1) T S flops to score and 4 H (d_c + d_r) T top_k to
    attend (stage "dense": what MLA costs); the loss of stage "dense" 2 H (d_c + d_r) T S more.
    State: d_c + d_r + d_I elements and 8 bytes a token, for as many tokens as MLA.

    Fields, beside those of `MLA`:
        top_k: keys a query attends to.
        index_heads, index_dim: H_I, d_I.
        indexer_dtype: "float32", or "float8" for index queries and keys as DeepSeek's kernels round them
            (`ops.indexer.float8`), with the gradient of the numbers before rounding.
        stage: "dense" to warm up an indexer, "sparse" to go on training and to use it. Both have the same state.
    """

    top_k: int = 2048
    index_heads: int = 64
    index_dim: int = 128
    indexer_dtype: str = "float32"
    stage: str = "sparse"

    def __post_init__(self):
        require(self, 1, "top_k", "index_heads", "index_dim")
        for name, allowed in (("stage", STAGES), ("indexer_dtype", INDEXER_DTYPES)):
            if getattr(self, name) not in allowed:
                raise BadInput(name, getattr(self, name), "no such choice", f"one of {', '.join(allowed)}")
        if self.index_dim < self.rope_dim:
            raise BadInput(
                "index_dim", self.index_dim, "rotates as many dimensions", f"rope_dim = {self.rope_dim} or more"
            )
        if self.indexer_dtype == "float8" and self.index_dim & (self.index_dim - 1):
            raise BadInput("index_dim", self.index_dim, "float8 needs a Hadamard transform", "a power of two")
        require_spans(self)
        super().__post_init__()

    @property
    def reads_keys(self) -> bool:
        return False

    @nn.compact
    @in_text_order
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: State | None = None,
    ) -> tuple[Float[Array, "B T D"], LatentCache | None]:
        inner = self._query_input(x)
        q, latent = self._queries(x, inner, positions), self._latents(x, positions)
        index_q, index_w, index_k = self._index(lax.stop_gradient(x), lax.stop_gradient(inner), positions)
        keys, cache, segments = self._remember(x, latent, index_k, positions, segment_ids, state)
        if cache is not None:
            index_k = cache.index
        sight = Sight(positions, keys.positions, segments, keys.segment_ids)

        chosen = None
        if self.stage == "sparse" and self.top_k < index_k.shape[1]:
            ring = cache is not None and self.mask.reach() is not None
            chosen = select_by_index(
                index_q,
                index_w,
                index_k,
                sight,
                mask=self.mask,
                heads=self.heads,
                count=self.top_k,
                oldest=cache.next % index_k.shape[1] if ring else None,
            )
        weights = self._weights(x)
        if self.is_mutable_collection("losses") and not self.is_initializing():
            attention = self._absorb(q, weights[0]), keys.latent
            index = index_q, index_w, index_k
            loss = index_loss(attention, index, sight, chosen, mask=self.mask, scale=self._scale())
            self.sow("losses", "indexer_kl", loss.mean())
        if chosen is None:
            return self._attend(q, keys, positions, segments, weights), cache
        return self._attend_chosen(q, keys, sight, chosen, weights), cache

    def _index(
        self, x: Float[Array, "B T D"], inner: Float[Array, "B T R"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T I C"], Float[Array, "B T I"], Float[Array, "B T C"]]:
        """Queries, weights (float32) and keys of the indexer, rounded as they are kept."""
        heads, dim, first = self.index_heads, self.index_dim, "embed" if self.q_rank is None else None
        shape = (inner.shape[-1], heads, dim)
        wq = projection(self, "index_wq", shape, (first, "heads", "head_dim"), inputs=1, dtype=x.dtype)
        wk = projection(self, "index_wk", (x.shape[-1], dim), ("embed", "head_dim"), inputs=1, dtype=x.dtype)
        ww = projection(self, "index_w", (x.shape[-1], heads), ("embed", "heads"), inputs=1, dtype=jnp.float32)
        k = _layer_norm(
            x @ wk,
            vector(self, "index_norm", (dim,), ("head_dim",), nn.initializers.ones),
            vector(self, "index_bias", (dim,), ("head_dim",)),
        )
        q, k = jnp.einsum("btr,ric->btic", inner, wq), k[:, :, None]
        if isinstance(self.position, Rope):
            freqs = self.position.frequencies(self.rope_dim)
            q, k = apply_rope(q, positions, freqs), apply_rope(k, positions, freqs)
        if self.indexer_dtype == "float8":
            q, k = float8(q), float8(k)
        return q, x.astype(jnp.float32) @ ww, k[:, :, 0]

    def _attend_chosen(
        self, q: Float[Array, "B T H C"], keys: Keys, sight: Sight, chosen: Selection, weights: tuple[Array, ...]
    ) -> Float[Array, "B T D"]:
        wk, wv, wo = weights
        latent = keys.latent[:, :, None]
        u, _ = attend_selected(
            self._absorb(q, wk),
            latent,
            latent,
            chosen,
            mask=self.mask,
            q_positions=sight.q_positions,
            k_positions=sight.k_positions,
            q_segments=sight.q_segments,
            k_segments=sight.k_segments,
            scale=self._scale(),
        )
        return self._project(self._expand(u, wv), wo)

    def init_state(self, batch: int, max_len: int, *, width: int, max_chunk: int, dtype: Any) -> LatentCache:
        slots, latent = self._slots(max_len, max_chunk), self.kv_rank + self.rope_dim
        return LatentCache.empty(batch, slots, latent, self.index_dim, dtype)

    def state_bytes(self, batch: int, max_len: int, *, width: int, max_chunk: int, itemsize: int) -> int:
        """Bytes of the state by the formula above (segments and positions are int32; one counter)."""
        elements = self.kv_rank + self.rope_dim + self.index_dim
        return batch * self._slots(max_len, max_chunk) * (elements * itemsize + 8) + 4

    def mixing_flops(self, length: int) -> float:
        """Forward flops a token in rows of `length` tokens, without the indexer's loss, beyond 2 a parameter."""
        if self.stage == "dense" or self.top_k >= length:
            return super().mixing_flops(length)
        score = 2 * self.index_heads * (self.index_dim + 1) * self._seen(length)
        return score + 4 * self.heads * (self.kv_rank + self.rope_dim) * self._seen(length, self.top_k)

    @classmethod
    def examples(cls) -> dict[str, DSA]:
        """Small settings that cover the fields; the laws and the benchmark run on each."""
        small = cls(
            heads=2, kv_rank=8, nope_dim=4, rope_dim=4, value_dim=6, q_rank=5, top_k=3, index_heads=3, index_dim=8
        )
        return {
            "dsa": small,
            "window": small.clone(q_rank=None, mask=sliding(5), indexer_dtype="float8", position=NoPE()),
            "dense": small.clone(stage="dense"),
        }


def _layer_norm(x: Float[Array, "B T C"], scale: Float[Array, "C"], bias: Float[Array, "C"]) -> Float[Array, "B T C"]:
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
    return (wide * scale + bias).astype(x.dtype)

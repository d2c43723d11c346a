"""Multi-head latent attention: the cache holds one small vector a token, from which all heads make keys and values."""

from __future__ import annotations

from dataclasses import field
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.mask import Mask, causal, sliding
from jaxlong.core.position import NoPE, Rope, Yarn
from jaxlong.core.state import KeysOnly, LatentCache
from jaxlong.core.types import BadInput, State
from jaxlong.mixers.base import check_state, projection, require, require_rotation, rms_norm, vector
from jaxlong.ops.attend import Backend
from jaxlong.ops.dense import precision
from jaxlong.ops.latent import attend_latent
from jaxlong.ops.rotate import rotate

FORMS = ("auto", "expanded", "absorbed")


class Keys(NamedTuple):
    """What queries look at: the tokens of the input alone, or the slots of a cache."""

    latent: Float[Array, "B S R"]
    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"] | None


class MLA(nn.Module):
    """Multi-head latent attention, expanded over long inputs and absorbed over short ones.

        q_h = norm(x Wqa) Wqb_h = [qn_h ; rot(qr_h)]         [Wqa and norm absent: q_h = x Wq_h]
        [c | r] = x Wkva;  the cache holds [norm(c) ; rot(r)]
        expanded   k_h = [c Wk_h ; r],  v_h = c Wv_h;        o_h = softmax(q_h k_h^T scale) v_h
        absorbed   q~_h = [qn_h Wk_h^T ; qr_h];              o_h = (softmax(q~_h [c ; r]^T scale) c) Wv_h
        y = o Wo

    Both forms are the same function. In multiply-adds a head, T queries on S keys cost
        expanded   S d_c (d_n + d_v) + T S (d_n + d_r + d_v)
        absorbed   T d_c (d_n + d_v) + T S 2 (d_c + d_r)
    and `form="auto"` takes the smaller by T and S (the slots of a cache) as they are known to the compiler: at
    DeepSeek-V3's sizes, chunks of 157 or fewer tokens on a long cache are absorbed. An expanded chunk holds keys and
    values of all heads for all S.

    Paper: DeepSeek-V2, arXiv 2405.04434, section 2.1. With `position=NoPE()` the d_r part is not rotated (Kimi
    Linear, arXiv 2510.26692).
    Training cost: 2 flops a weight and token, and 2 H (d_n + d_r + d_v) T S flops, S the keys that the mask shows
    a query on average.
    State: d_c + d_r elements and 8 bytes a token, for min(max_len, mask.reach() + max_chunk - 1) tokens.

    Fields:
        q_rank: rank of the queries' bottleneck; None has none.
        kv_rank, nope_dim, rope_dim, value_dim: d_c, d_n, d_r, d_v.
        position: rotates the d_r part; DeepSeek's weights interleave its pairs.
        scale: factor of the scores; None is (d_n + d_r) ** -0.5. `Rope.softmax_scale` multiplies either.
        form: "auto", "expanded" or "absorbed".
    """

    heads: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    q_rank: int | None = None
    position: Rope | NoPE = Rope(interleaved=True)
    mask: Mask = field(default_factory=causal)
    scale: float | None = None
    form: str = "auto"
    backend: Backend = Backend()

    def __post_init__(self):
        require(self, 1, "heads", "kv_rank", "nope_dim", "rope_dim", "value_dim")
        if self.q_rank is not None:
            require(self, 1, "q_rank")
        if self.form not in FORMS:
            raise BadInput("form", self.form, "no such form", f"one of {', '.join(FORMS)}")
        if not isinstance(self.position, Rope | NoPE):
            raise BadInput("position", repr(self.position), "keys of all heads share one rotation", "Rope or NoPE")
        require_rotation(self.position, self.rope_dim)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: State | None = None,
    ) -> tuple[Float[Array, "B T D"], LatentCache | None]:
        if isinstance(state, KeysOnly):
            segments = jnp.zeros_like(positions) if segment_ids is None else segment_ids
            return x, LatentCache(self._latents(x, positions), None, positions, segments, None)
        q = self._queries(x, self._query_input(x), positions)
        latent = self._latents(x, positions)
        keys, cache, segments = self._remember(x, latent, None, positions, segment_ids, state)
        return self._attend(q, keys, positions, segments, self._weights(x)), cache

    @property
    def reads_keys(self) -> bool:
        return True

    def _query_input(self, x: Float[Array, "B T D"]) -> Float[Array, "B T R"]:
        """What queries are projected from: x, or its normed bottleneck."""
        if self.q_rank is None:
            return x
        down = projection(self, "wq_a", (x.shape[-1], self.q_rank), ("embed", None), inputs=1, dtype=x.dtype)
        return rms_norm(x @ down, vector(self, "q_norm", (self.q_rank,), (None,), nn.initializers.ones))

    def _queries(
        self, x: Float[Array, "B T D"], inner: Float[Array, "B T R"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T H C"]:
        """[qn ; rot(qr)] of every head."""
        first = "embed" if self.q_rank is None else None
        shape = (inner.shape[-1], self.heads, self.nope_dim + self.rope_dim)
        wq = projection(self, "wq", shape, (first, "heads", "head_dim"), inputs=1, dtype=x.dtype)
        q = jnp.einsum("btr,rhc->bthc", inner, wq)
        return jnp.concatenate([q[..., : self.nope_dim], rotate(self.position, q[..., self.nope_dim :], positions)], -1)

    def _latents(self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]) -> Float[Array, "B T R"]:
        """[norm(c) ; rot(r)], all that is kept of a token."""
        shape = (x.shape[-1], self.kv_rank + self.rope_dim)
        both = x @ projection(self, "wkv_a", shape, ("embed", None), inputs=1, dtype=x.dtype)
        c = rms_norm(both[..., : self.kv_rank], vector(self, "kv_norm", (self.kv_rank,), (None,), nn.initializers.ones))
        r = rotate(self.position, both[..., None, self.kv_rank :], positions)[:, :, 0]
        return jnp.concatenate([c, r], -1)

    def _remember(
        self,
        x: Float[Array, "B T D"],
        latent: Float[Array, "B T R"],
        index: Float[Array, "B T I"] | None,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
        state: State | None,
    ) -> tuple[Keys, LatentCache | None, Int[Array, "B T"] | None]:
        """The keys that x looks at, the new state, and the segments of the queries."""
        if state is None:
            return Keys(latent, positions, segment_ids), None, segment_ids
        check_state(self, state, x)
        segments = jnp.zeros_like(positions) if segment_ids is None else segment_ids
        cache = state.push(latent, index, positions, segments)
        return Keys(cache.latent, cache.positions, cache.segment_ids), cache, segments

    def _attend(
        self,
        q: Float[Array, "B T H C"],
        keys: Keys,
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"] | None,
        weights: tuple[Array, ...],
    ) -> Float[Array, "B T D"]:
        """Attention over all visible keys, in the form that `form` says, projected to the output."""
        wk, wv, wo = weights
        form = self._cheaper(q.shape[1], keys.latent.shape[1]) if self.form == "auto" else self.form
        absorbed = form == "absorbed"  # queries for the latents themselves, with the rope part behind
        o = attend_latent(
            self._absorb(q, wk) if absorbed else q,
            keys.latent,
            None if absorbed else (wk, wv),
            mask=self.mask,
            q_positions=positions,
            k_positions=keys.positions,
            q_segments=segments,
            k_segments=keys.segment_ids,
            scale=self._scale(),
            backend=self.backend,
        )
        return self._project(self._expand(o, wv) if absorbed else o, wo)

    def _weights(self, x: Float[Array, "B T D"]) -> tuple[Array, Array, Array]:
        """Wk [d_c H d_n], Wv [d_c H d_v] and Wo [H d_v D]."""
        axes = (None, "heads", "head_dim")
        wk = projection(self, "wk", (self.kv_rank, self.heads, self.nope_dim), axes, inputs=1, dtype=x.dtype)
        wv = projection(self, "wv", (self.kv_rank, self.heads, self.value_dim), axes, inputs=1, dtype=x.dtype)
        shape, axes = (self.heads, self.value_dim, x.shape[-1]), ("heads", "head_dim", "embed")
        return wk, wv, projection(self, "wo", shape, axes, inputs=2, dtype=x.dtype)

    def _absorb(self, q: Float[Array, "B T H C"], wk: Float[Array, "R H N"]) -> Float[Array, "B T H M"]:
        """Queries for the latents themselves: [qn Wk^T ; qr]."""
        wide = _einsum("bthc,rhc->bthr", q[..., : self.nope_dim], wk)
        return jnp.concatenate([wide, q[..., self.nope_dim :]], -1)

    def _expand(self, u: Float[Array, "B T H M"], wv: Float[Array, "R H V"]) -> Float[Array, "B T H V"]:
        """Values of heads from sums of latents."""
        return _einsum("bthr,rhv->bthv", u[..., : self.kv_rank], wv)

    def _project(self, o: Float[Array, "B T H V"], wo: Float[Array, "H V D"]) -> Float[Array, "B T D"]:
        return jnp.einsum("bthv,hvd->btd", o, wo)

    def _cheaper(self, queries: int, keys: int) -> str:
        """The form that multiplies less, by the formulas above."""
        remake, wide = self.kv_rank * (self.nope_dim + self.value_dim), 2 * (self.kv_rank + self.rope_dim)
        expanded = keys * remake + queries * keys * (self.nope_dim + self.rope_dim + self.value_dim)
        return "absorbed" if queries * remake + queries * keys * wide < expanded else "expanded"

    def _scale(self) -> float:
        scale = (self.nope_dim + self.rope_dim) ** -0.5 if self.scale is None else self.scale
        return scale * self.position.softmax_scale if isinstance(self.position, Rope) else scale

    def _slots(self, max_len: int, max_chunk: int) -> int:
        reach = self.mask.reach()
        return max_len if reach is None else min(max_len, reach + max_chunk - 1)

    def init_state(self, batch: int, max_len: int, *, width: int, max_chunk: int, dtype: Any) -> LatentCache:
        return LatentCache.empty(batch, self._slots(max_len, max_chunk), self.kv_rank + self.rope_dim, None, dtype)

    def state_bytes(self, batch: int, max_len: int, *, width: int, max_chunk: int, itemsize: int) -> int:
        """Bytes of the state by the formula above (segments and positions are int32; one counter)."""
        return batch * self._slots(max_len, max_chunk) * ((self.kv_rank + self.rope_dim) * itemsize + 8) + 4

    def mixing_flops(self, length: int) -> float:
        """Forward flops a token in rows of `length` tokens, expanded, beyond 2 a parameter."""
        return 2 * self.heads * (self.nope_dim + self.rope_dim + self.value_dim) * self._seen(length)

    def _seen(self, length: int, most: int | None = None) -> float:
        """Keys that the mask shows a query, on average; of each query's at most `most` count."""
        bounds = [bound for bound in (self.mask.reach(), most, length) if bound is not None]
        return min(bounds) - min(bounds) * (min(bounds) - 1) / (2 * length)

    @classmethod
    def examples(cls) -> dict[str, MLA]:
        """Small settings that cover the fields; the laws and the benchmark run on each."""
        small = cls(heads=2, kv_rank=8, nope_dim=4, rope_dim=4, value_dim=6, q_rank=5)
        yarn = Yarn(factor=4.0, original=16, mscale=1.0, mscale_all_dim=0.8)
        return {
            "mla": small.clone(position=Rope(interleaved=True, scaling=yarn)),
            "window": small.clone(q_rank=None, mask=sliding(5), scale=0.4),
            "nope": small.clone(position=NoPE(), form="absorbed", value_dim=3),
        }


def _einsum(formula: str, x: Array, w: Array) -> Array:
    """A product that only one of the two forms has: in full float32 if it is float32."""
    return jnp.einsum(formula, x, w, precision=precision(x.dtype))

"""Routing attention: tokens attend within clusters that online k-means finds; other heads attend to a local window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from jaxlong.core.mask import Mask, causal, sliding
from jaxlong.core.position import NoPE, Rope
from jaxlong.core.state import KVCache
from jaxlong.core.types import BadInput, State
from jaxlong.mixers.base import (
    check_state,
    from_heads,
    in_text_order,
    require,
    require_rotation,
    require_spans,
    to_heads,
    vector,
)
from jaxlong.ops.attend import Backend, attend, attend_with_lse
from jaxlong.ops.rotate import rotate, softmax_scale
from jaxlong.ops.select import Selection, attend_selected, map_queries, top_k

_WHOLE = "without a state the members of a cluster are the best of the whole row"


class RoutingState(NamedTuple):
    """The cache of the routed heads, the cluster of each of its keys [B S R], and the cache of the local heads."""

    routed: KVCache
    clusters: Int[Array, "B S R"]
    local: KVCache


class Routing(nn.Module):
    """Routing Transformer: some heads attend within clusters of tokens, the others to a window.

        q, k = norm(x Wq), norm(x Wk) (or k = q);   score_(t,c) = mu_c . q_t / sqrt(C),   mu_c a head's centroids
        whole rows: a cluster is its `members` best tokens (queries by q, keys by k); attention in it is causal in true
            positions; a token's output is the mean over the clusters it is in, 0 if there are none
        with a state: a token's cluster is its best one; it attends to the last `members` keys of that cluster
        with k = q a token attends to itself only if there is nothing else
        y = o Wo, over the local heads and the routed ones

    Paper: Roy et al., arXiv 2003.05997. Clusters of whole rows look at the whole row BY CONSTRUCTION: what comes later
    decides which earlier tokens are members, and documents that share a row compete. Attention itself never looks
    ahead nor into another document. Evaluate and decode with a state, which is causal.

    Centroids follow the data, not the loss. The sown value losses/centroids is the commitment loss
    `commitment mean |q - mu|^2` of q (and k) of length 1, which moves q and k alone; its gradient on a centroid is
    rate (mu - mean), with the normalised mean of the tokens whose best centroid it is (0 where there are none). An
    optimizer that subtracts just this, as `train.optim.self_moving` does, makes mu a moving average.

    Rows of another layout than contiguous are put in the order of the text, and the outputs back.
    Training cost: 8 D C H T + 4 C T (local window + (heads - local)(members clusters members / T + clusters)) flops;
    T^1.5 for sqrt(T) clusters of sqrt(T) members.
    State: 2 C elements and 4 bytes a token for each routed head, and 2 C elements for each local head for
    window + max_chunk - 1 tokens; 8 bytes a token of each cache.

    Fields:
        local: how many of the heads attend to the window, the first ones.
        clusters: centroids of a head. members: tokens of a cluster.
        shared: queries are their own keys in routed heads (the paper's language models).
        commitment: factor of the loss.    rate: 1 less the decay of the centroids' moving average.
        position: rotation of q and k in attention; clusters know no positions.
    """

    heads: int
    head_dim: int
    local: int
    window: int = 256
    clusters: int = 16
    members: int = 256
    shared: bool = True
    commitment: float = 1e-4
    rate: float = 1e-3
    position: Rope | NoPE = Rope()
    backend: Backend = Backend()

    exceptions: ClassVar[Mapping[str, str]] = {
        "test_one_token_alone": _WHOLE,
        "test_causality_bit_for_bit": _WHOLE,
        "test_chunks_equal_the_whole": _WHOLE,
        "test_gradients_of_chunks_equal_those_of_the_whole": _WHOLE,
        "test_packed_documents_equal_separate_runs": f"{_WHOLE}, whatever their document",
        "test_gradients_of_packed_documents": f"{_WHOLE}, whatever their document",
    }
    """Laws of mixers that whole rows break, and why; calls with a state keep all of them."""

    def __post_init__(self):
        require(self, 1, "heads", "local", "window", "clusters", "members")
        require(self, 2, "head_dim")
        if self.local >= self.heads:
            raise BadInput("local", self.local, "leaves no head to route", f"below heads = {self.heads}")
        if not 0 < self.rate <= 1:
            raise BadInput("rate", self.rate, "is no share of a moving average", "above 0, at most 1")
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
    ) -> tuple[Float[Array, "B T D"], RoutingState | None]:
        (H, C, L), D = (self.heads, self.head_dim, self.local), x.shape[-1]
        segments = jnp.zeros_like(positions) if segment_ids is None else segment_ids
        if state is not None:
            check_state(self, state, x)
        project = lambda name, heads: to_heads(self, name, x, heads, C)
        q, k, v = project("wq", H), project("wk", L if self.shared else H), project("wv", H)
        near, local = self._near(q[:, :, :L], k[:, :, :L], v[:, :, :L], positions, segments, state)

        routed = q[:, :, L:], q[:, :, L:] if self.shared else k[:, :, L:]
        units = [_unit(a) for a in routed]
        centroids = vector(self, "centroids", (H - L, self.clusters, C), ("heads", None, "head_dim"), _directions)
        scores = [_scores(a, centroids) for a in (units[:1] if self.shared else units)]
        if not self.is_initializing():
            self.sow("losses", "centroids", self._loss(units[: len(scores)], scores, centroids))
        q, k = (rotate(self.position, (a * C**0.5).astype(x.dtype), positions) for a in units)
        v = v[:, :, L:]
        if state is None:
            far, new = self._within_clusters(q, k, v, scores, positions, segments), None
        else:
            far, new = self._recent(q, k, v, scores, positions, segments, state)
        o = jnp.concatenate([near, far], axis=2)
        y = from_heads(self, "wo", o, D)
        return y, None if state is None else RoutingState(*new, local)

    def _near(self, q, k, v, positions, segments, state) -> tuple[Float[Array, "B T L C"], KVCache | None]:
        """The local heads."""
        q, k = rotate(self.position, q, positions), rotate(self.position, k, positions)
        cache = None if state is None else state.local.push(k, v, positions, segments)
        if cache is not None:
            k, v = cache.k.astype(q.dtype), cache.v.astype(q.dtype)
        out = attend(
            q,
            k,
            v,
            mask=sliding(self.window),
            q_positions=positions,
            k_positions=positions if cache is None else cache.positions,
            q_segments=segments,
            k_segments=segments if cache is None else cache.segment_ids,
            scale=softmax_scale(self.position, self.head_dim),
            backend=self.backend,
        )
        return out, cache

    def _within_clusters(
        self,
        q: Float[Array, "B T R C"],
        k: Float[Array, "B T R C"],
        v: Float[Array, "B T R C"],
        scores: list[Float[Array, "B T R N"]],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
    ) -> Float[Array, "B T R C"]:
        """Whole rows: dense attention in each cluster, and the mean over a token's clusters."""
        (B, T, R, C), N = q.shape, self.clusters
        best = lambda s: lax.top_k(lax.stop_gradient(jnp.moveaxis(s, 1, -1)), min(self.members, T))[1]
        members = [jnp.sort(best(s), axis=-1) for s in scores]  # [B R N w], in order of the row
        queries, keys = members[0], members[-1]
        rows = jnp.arange(B)[:, None, None, None]
        heads = jnp.arange(R)[:, None, None]
        of_heads = lambda a, index: a[rows, index, heads].reshape(B * R * N, -1, 1, C)
        of_row = lambda a, index: a[rows, index].reshape(B * R * N, -1)
        out, lse = attend_with_lse(
            of_heads(q, queries),
            of_heads(k, keys),
            of_heads(v, keys),
            mask=self._mask(),
            q_positions=of_row(positions, queries),
            k_positions=of_row(positions, keys),
            q_segments=of_row(segments, queries),
            k_segments=of_row(segments, keys),
            scale=softmax_scale(self.position, self.head_dim),
            backend=Backend(sequence="none"),  # members are no contiguous tokens
        )
        out = self._or_own(out, lse, of_heads(v, queries)).reshape(B, R, N, -1, C).astype(jnp.float32)
        total = jnp.zeros((B, T, R, C), jnp.float32).at[rows, queries, heads].add(out)
        count = jnp.zeros((B, T, R), jnp.float32).at[rows, queries, heads].add(1.0)
        return (total / jnp.maximum(count, 1)[..., None]).astype(v.dtype)

    def _recent(
        self,
        q: Float[Array, "B T R C"],
        k: Float[Array, "B T R C"],
        v: Float[Array, "B T R C"],
        scores: list[Float[Array, "B T R N"]],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        state: RoutingState,
    ) -> tuple[Float[Array, "B T R C"], tuple[KVCache, Int[Array, "B S R"]]]:
        """With a state: attention to the last members of a token's own cluster."""
        own = [s.argmax(-1).astype(jnp.int32) for s in scores]
        index = (state.routed.next + jnp.arange(q.shape[1])) % state.clusters.shape[1]
        clusters = state.clusters.at[:, index].set(own[-1], unique_indices=True)
        cache = state.routed.push(k, v, positions, segments)

        def choose(queries: tuple[Array, Array, Array]) -> Selection:
            cluster, t, segment = queries
            allowed: Bool[Array, "B t R S"] = cluster[..., None] == clusters.swapaxes(1, 2)[:, None]
            same = (segment[..., None] == cache.segment_ids[:, None]) & (cache.positions[:, None] <= t[..., None])
            recency = jnp.broadcast_to(cache.positions[:, None, None].astype(jnp.float32), allowed.shape)
            return top_k(recency, self.members, allowed & same[:, :, None])

        out, lse = attend_selected(
            q,
            cache.k.astype(q.dtype),
            cache.v.astype(q.dtype),
            map_queries(choose, (own[0], positions, segments)),
            mask=self._mask(),
            q_positions=positions,
            k_positions=cache.positions,
            q_segments=segments,
            k_segments=cache.segment_ids,
            scale=softmax_scale(self.position, self.head_dim),
        )
        return self._or_own(out, lse, v), (cache, clusters)

    def _mask(self) -> Mask:
        """Of routed heads: causal, without the token itself where queries are their own keys."""
        return causal() & ~sliding(1) if self.shared else causal()

    def _or_own(self, out: Array, lse: Array, own: Array) -> Array:
        """Where queries are their own keys, the `own` value of a token that sees nothing else."""
        return jnp.where((lse == -jnp.inf)[..., None], own, out) if self.shared else out

    def _loss(self, units, scores, centroids: Float[Array, "R N C"]) -> Float[Array, ""]:
        """The commitment loss, with the moving average as its gradient on the centroids."""
        x, best = jnp.concatenate(units, axis=1), jnp.concatenate(scores, axis=1).argmax(-1)
        nearest = lax.stop_gradient(centroids)[jnp.arange(centroids.shape[0]), best]
        commit = self.commitment * jnp.square(x - nearest).sum(-1).mean()
        member = jax.nn.one_hot(best, self.clusters, dtype=jnp.float32)
        total = jnp.einsum("btrn,btrc->rnc", member, lax.stop_gradient(x), precision=lax.Precision.HIGHEST)
        norm = jnp.sqrt(jnp.square(total).sum(-1, keepdims=True))
        held = norm > 0
        away = jnp.where(held, centroids - total / jnp.where(held, norm, 1), 0)
        pull = 0.5 * self.rate * jnp.square(away).sum()
        return commit + pull - lax.stop_gradient(pull)

    def init_state(self, batch: int, max_len: int, *, width: int, max_chunk: int, dtype: Any) -> RoutingState:
        R, C = self.heads - self.local, self.head_dim
        return RoutingState(
            routed=KVCache.empty(batch, max_len, R, C, C, dtype),
            clusters=jnp.zeros((batch, max_len, R), jnp.int32),
            local=KVCache.empty(batch, min(max_len, self.window + max_chunk - 1), self.local, C, C, dtype),
        )

    def state_bytes(self, batch: int, max_len: int, *, width: int, max_chunk: int, itemsize: int) -> int:
        """Bytes of the state by the formula above, and two counters."""
        pair, routed = 2 * self.head_dim * itemsize, self.heads - self.local
        near = min(max_len, self.window + max_chunk - 1)
        return batch * (max_len * (routed * (pair + 4) + 8) + near * (self.local * pair + 8)) + 8

    def mixing_flops(self, length: int) -> float:
        """Forward flops a token in rows of `length` tokens, beyond 2 a parameter (which counts q's scores)."""
        near = float(np.minimum(np.arange(length) + 1, self.window).mean())
        members = min(self.members, length)
        far = self.clusters * members * (members + 1) / (2 * length)
        scores = 0 if self.shared else 2 * self.clusters
        return self.head_dim * (4 * self.local * near + (self.heads - self.local) * (4 * far + scores))

    @classmethod
    def examples(cls) -> dict[str, Routing]:
        """Small settings that cover the fields; the laws and the benchmark run on each."""
        return {
            "shared": cls(heads=3, head_dim=4, local=1, window=3, clusters=3, members=4),
            "separate": cls(4, 4, local=2, window=4, clusters=2, members=5, shared=False, position=NoPE()),
        }


def _unit(x: Float[Array, "B T R C"]) -> Float[Array, "B T R C"]:
    """Layer normalisation of each head without parameters, scaled to length 1, in float32."""
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(-1, keepdims=True)
    return wide * lax.rsqrt(jnp.square(wide).sum(-1, keepdims=True) + 1e-6)


def _scores(x: Float[Array, "B T R C"], centroids: Float[Array, "R N C"]) -> Float[Array, "B T R N"]:
    return lax.stop_gradient(jnp.einsum("btrc,rnc->btrn", x, centroids, precision=lax.Precision.HIGHEST))


def _directions(key: Array, shape: tuple[int, ...], dtype: Any) -> Float[Array, "R N C"]:
    """Random vectors of length 1."""
    x = jax.random.normal(key, shape, dtype)
    return x / jnp.sqrt(jnp.square(x).sum(-1, keepdims=True))

"""LongNet: dilated attention at several scales."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.mask import dilated
from jaxlong.core.position import NoPE, Rope
from jaxlong.core.state import KVCache
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
)
from jaxlong.ops.attend import Backend
from jaxlong.ops.dilated import OFFSETS, WEIGHTS, gathered_branch, head_offsets, masked_branch, mix
from jaxlong.ops.rotate import rotate, softmax_scale


class LongNet(nn.Module):
    """Causal attention in branches (w, r): among every r-th token of segments of w.

        branch b, head h: tokens of one segment of w_b positions whose offset in it is s_h modulo r_b
        o = sum_b a_b o_b,  a_b = exp(lse_b) / sum_b exp(lse_b)     lse_b = -inf where a branch keeps no row
        y = o Wo

    Segments are counted by positions, from each document's start. A key in two branches counts twice, as published.
    With the one branch (T, 1) this is full attention.

    Paper: Ding et al., arXiv 2307.02486.
    Rows of another layout than contiguous are put in the order of the text, and the outputs back.
    Training cost: 4 D C (H + K) T + sum_b 2 H C T w_b / r_b^2 flops where each row is one document, which gathers the
    kept rows; packed rows mask instead, 2 H C T w_b a branch.
    State: 2 K C elements and 8 bytes a token, for min(max_len, reach + max_chunk - 1) tokens, reach the widest
    branch's first to last kept token.

    Fields:
        branches: pairs (w, r); one has r = 1, so that every token is seen.
        offsets: s_h, "cyclic": h mod r (the paper), "grouped": floor(h r / H) (the published code).
        weights: whether gradients flow through a_b: "attached", or "detached" as in the published code.
        position: how positions enter.
    """

    heads: int
    kv_heads: int
    head_dim: int
    branches: tuple[tuple[int, int], ...] = ((2048, 1), (4096, 2), (8192, 4), (16384, 6), (32768, 12))
    offsets: str = "cyclic"
    weights: str = "attached"
    position: Rope | NoPE = Rope()
    backend: Backend = Backend()

    def __post_init__(self):
        require(self, 1, "heads", "kv_heads", "head_dim")
        require_divides(self, "kv_heads", "heads")
        require_one_of(self, "offsets", *OFFSETS)
        require_one_of(self, "weights", *WEIGHTS)
        if 1 not in [dilated(*branch).rate for branch in self.branches]:
            raise BadInput("branches", self.branches, "some tokens are in none", "a rate of 1 in one of them")
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
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        if state is not None:
            check_state(self, state, x)
        q = rotate(self.position, to_heads(self, "wq", x, self.heads, self.head_dim), positions)
        k = rotate(self.position, to_heads(self, "wk", x, self.kv_heads, self.head_dim, "kv_heads"), positions)
        v = to_heads(self, "wv", x, self.kv_heads, self.head_dim, "kv_heads")

        segments, keys = segment_ids, (k, v, positions, segment_ids)
        if state is not None:
            segments = jnp.zeros_like(positions) if segment_ids is None else segment_ids
            state = state.push(k, v, positions, segments)
            keys = (state.k, state.v, state.positions, state.segment_ids)

        def branch(segment: int, rate: int) -> tuple[Array, Array]:
            offsets, scale = head_offsets(self.heads, rate, self.offsets), softmax_scale(self.position, self.head_dim)
            if segments is None:
                return gathered_branch(
                    q, k, v, segment=segment, rate=rate, offsets=offsets, scale=scale, backend=self.backend
                )
            return masked_branch(
                q,
                keys[0],
                keys[1],
                segment=segment,
                rate=rate,
                offsets=offsets,
                q_positions=positions,
                k_positions=keys[2],
                q_segments=segments,
                k_segments=keys[3],
                scale=scale,
                backend=self.backend,
            )

        o = mix([branch(*sizes) for sizes in self.branches], self.weights).astype(x.dtype)
        return from_heads(self, "wo", o, x.shape[-1]), state

    def _slots(self, max_len: int, max_chunk: int) -> int:
        return min(max_len, max(dilated(*branch).reach() for branch in self.branches) + max_chunk - 1)

    def init_state(self, batch: int, max_len: int, *, width: int, max_chunk: int, dtype: Any) -> KVCache:
        slots = self._slots(max_len, max_chunk)
        return KVCache.empty(batch, slots, self.kv_heads, self.head_dim, self.head_dim, dtype)

    def state_bytes(self, batch: int, max_len: int, *, width: int, max_chunk: int, itemsize: int) -> int:
        """Bytes of the state by the formula above (positions and segments are int32; one counter)."""
        return batch * self._slots(max_len, max_chunk) * (2 * self.kv_heads * self.head_dim * itemsize + 8) + 4

    def mixing_flops(self, length: int) -> float:
        """Forward flops a token in rows of `length` tokens, beyond 2 a parameter."""
        rows = [(-(-min(segment, length) // rate), rate) for segment, rate in self.branches]
        return 4 * self.heads * self.head_dim * sum((kept + 1) / 2 / rate for kept, rate in rows)

    @classmethod
    def examples(cls) -> dict[str, LongNet]:
        """Small settings that cover the fields; the laws and the benchmark run on each."""
        small = cls(heads=4, kv_heads=2, head_dim=6, branches=((3, 1), (8, 2)))
        return {
            "cyclic": small,
            "grouped": small.clone(
                branches=((2, 1), (7, 3), (64, 4)), offsets="grouped", weights="detached", position=NoPE()
            ),
        }

"""RWKV-6: gated linear attention whose decays, and shares of the previous token, depend on the data."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.state import ConvTail, Recurrent
from jaxlong.mixers.base import check_state, from_heads, require, require_spans, to_heads, vector
from jaxlong.mixers.rwkv_parts import by_channel, head_norm, low_rank, share, toward
from jaxlong.ops.attend import Backend
from jaxlong.ops.chunks import starts
from jaxlong.ops.scan import linear_attention
from jaxlong.ops.token_shift import token_shift


class RWKV6(nn.Module):
    """Time mixing of RWKV-6: a matrix state that decays by channel, with a bonus for the token itself.

        m = tanh(lerp(x, x', mu_x) A);   x_n = lerp(x, x', mu_n + m_n B_n) for n in w, k, v, r, g
        r, k, v, g = x_r W_r, x_k W_k, x_v W_v, silu(x_g W_g);   d = w0 + tanh(x_w W1) W2
        o_t = r_t^T (S_(t-1) + Diag(u) k_t v_t^T);   S_t = Diag(exp(-exp(d_t))) S_(t-1) + k_t v_t^T
        y = (groupnorm(o) * g) W_o,   a group a head

    x' is the token before x in its document, lerp(x, x', mu) is x + (x' - x) mu.
    Paper: Peng et al., Eagle and Finch, arXiv 2404.05892.
    Training cost: 10 D H C T flops, and 4 H C (chunk + C) T for the state.
    State: H C C float32, D elements and 8 bytes.

    Fields:
        mix_rank: rank of each B_n.    decay_rank: rank of W2.
        chunk: tokens a chunk of the scan; the result does not depend on it.
    """

    heads: int
    head_dim: int
    mix_rank: int = 32
    decay_rank: int = 64
    chunk: int = 64
    backend: Backend = Backend()

    def __post_init__(self):
        require(self, 1, "heads", "head_dim", "mix_rank", "decay_rank", "chunk")
        require_spans(self)
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
        if state is not None:
            check_state(self, state, x)
        tail, memory = (None, None) if state is None else state
        before = None if memory is None else memory.segment_ids
        aligned = segment_ids is None and state is None
        segments = jnp.zeros_like(positions) if segment_ids is None else segment_ids
        previous, tail = token_shift(x, segments, tail, backend=self.backend)
        shape, axes = (self.heads, self.head_dim), ("heads", "head_dim")
        x_w, x_k, x_v, x_r, x_g = self._interpolate(x, previous)

        speed = vector(self, "w0", shape, axes, _decays)
        speed += low_rank(self, "w", x_w, (self.decay_rank, *shape), jnp.tanh, _small)
        o, s = linear_attention(
            to_heads(self, "wr", x_r, self.heads, self.head_dim).astype(jnp.float32),
            to_heads(self, "wk", x_k, self.heads, self.head_dim).astype(jnp.float32),
            to_heads(self, "wv", x_v, self.heads, self.head_dim).astype(jnp.float32),
            -jnp.exp(speed),
            bonus=vector(self, "bonus", shape, axes, _bonuses),
            s0=None if memory is None else memory.memory,
            resets=None if aligned else starts(segments, before, backend=self.backend),
            chunk=self.chunk,
            backend=self.backend,
        )
        o = head_norm(self, o).astype(x.dtype) * jax.nn.silu(to_heads(self, "wg", x_g, self.heads, self.head_dim))
        y = from_heads(self, "wo", o, x.shape[-1])
        return y, None if state is None else (tail, Recurrent(s, segments[:, -1]))

    def _interpolate(self, x: Array, previous: Array) -> list[Array]:
        """x_w, x_k, x_v, x_r, x_g."""
        width, rank = x.shape[-1], self.mix_rank
        powers = {"w": 0.5, "k": 0.5, "v": 0.5, "r": 0.25, "g": 0.25}
        down = vector(self, "mix1", (width, len(powers), rank), ("embed", None, None)).astype(x.dtype)
        up = vector(self, "mix2", (len(powers), rank, width), (None, None, "embed"), _small).astype(x.dtype)
        both = toward(x, previous, share(self, "mu_x", width, 0.5))
        hidden = jnp.tanh(jnp.einsum("btd,dnr->btnr", both, down))
        more = jnp.einsum("btnr,nrd->nbtd", hidden, up, preferred_element_type=jnp.float32)
        shares = [share(self, f"mu_{n}", width, power, 0.15 * (n == "v")) for n, power in powers.items()]
        return [toward(x, previous, mu + m) for mu, m in zip(shares, more, strict=True)]

    def init_state(self, batch: int, max_len: int, *, width: int, max_chunk: int, dtype: Any) -> Any:
        memory = Recurrent.empty(batch, (self.heads, self.head_dim, self.head_dim))
        return ConvTail.empty(batch, 2, width, dtype), memory

    def state_bytes(self, batch: int, max_len: int, *, width: int, max_chunk: int, itemsize: int) -> int:
        """Bytes of the state by the formula above (two segments are int32)."""
        return batch * (self.heads * self.head_dim**2 * 4 + width * itemsize + 8)

    def mixing_flops(self, length: int) -> float:
        """Forward flops a token in rows of `length` tokens, beyond 2 a parameter."""
        return 4 * self.heads * self.head_dim * (min(self.chunk, length) + self.head_dim)

    @classmethod
    def examples(cls) -> dict[str, RWKV6]:
        """Heads wider than the residual stream, in chunks that do not divide a row."""
        return {"rwkv6": cls(heads=2, head_dim=8, mix_rank=3, decay_rank=5, chunk=4)}


_small = nn.initializers.uniform(0.01)
_decays = by_channel(lambda ramp, zigzag: -6 + 5 * ramp**1.35)


@by_channel
def _bonuses(ramp: Array, zigzag: Array) -> Array:
    """Less for later channels, and a tenth more, less or the same in turn."""
    return 0.5 * (1 - ramp) + 0.1 * ((jnp.arange(ramp.size).reshape(ramp.shape) + 1) % 3 - 1)

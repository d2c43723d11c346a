"""Mamba: a state space model whose step size, input and output maps depend on the token."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.state import ConvTail, Recurrent
from jaxlong.mixers.base import check_state, projection, require, require_spans, vector
from jaxlong.mixers.scan_parts import convolve, entry, pack, step_bias, unpack
from jaxlong.ops.attend import Backend
from jaxlong.ops.scan import selective_scan


class Mamba(nn.Module):
    """The selective state space layer of Mamba, which expands the width and gates the result itself.

        u, z = x Wu, x Wz;   u = silu(conv(u));   B, C = u Wb, u Wc;   dt = softplus(u Wr Wdt + b)
        h_t = exp(dt_t A) h_(t-1) + (dt_t u_t) B_t^T;   y = ((h_t C_t + D u) * silu(z)) Wo

    Paper: Gu and Dao, arXiv 2312.00752.
    Training cost: 6 D I T + 2 I (2 R + 2 N) T flops for the maps, and about 8 I N T elementwise for the scan.
    State: I N float32 and 4 bytes, and (W - 1) I elements with their segments.

    Fields:
        inner: I, channels; 2 D in the paper.    state_dim: N.    conv: W, width of the convolution.
        step_rank: R, rank of the step sizes; None is D / 16, rounded up.
        chunk: tokens whose states [I N] exist at a time; the result does not depend on it.
    """

    inner: int
    state_dim: int = 16
    conv: int = 4
    step_rank: int | None = None
    chunk: int = 64
    backend: Backend = Backend()

    def __post_init__(self):
        require(self, 1, "inner", "state_dim", "chunk")
        require(self, 2, "conv")
        if self.step_rank is not None:
            require(self, 1, "step_rank")
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
        memory, tail = unpack(state)
        segments, h0, resets = entry(positions, segment_ids, memory, self.backend)
        width, inner = x.shape[-1], self.inner
        weight = lambda name, shape, axes: projection(self, name, shape, axes, inputs=1, dtype=x.dtype)

        z = x @ weight("wz", (width, inner), ("embed", "mlp"))
        u = x @ weight("wu", (width, inner), ("embed", "mlp"))
        (u,), tail = convolve(self, (u,), segments, tail, width=self.conv, backend=self.backend)
        u = jax.nn.silu(u)
        rank = -(-width // 16) if self.step_rank is None else self.step_rank
        low = u @ weight("wr", (inner, rank), ("mlp", None))
        step = (low @ weight("w_step", (rank, inner), (None, "mlp"))).astype(jnp.float32)
        y, h = selective_scan(
            u,
            jax.nn.softplus(step + vector(self, "step_bias", (inner,), ("mlp",), step_bias)),
            -jnp.exp(vector(self, "a_log", (inner, self.state_dim), ("mlp", None), _log_of_one_to_n)),
            u @ weight("wb", (inner, self.state_dim), ("mlp", None)),
            u @ weight("wc", (inner, self.state_dim), ("mlp", None)),
            vector(self, "d", (inner,), ("mlp",), nn.initializers.ones),
            h0=h0,
            resets=resets,
            chunk=self.chunk,
            backend=self.backend,
        )
        y = (y * jax.nn.silu(z)) @ weight("wo", (inner, width), ("mlp", "embed"))
        return y, None if state is None else pack(Recurrent(h, segments[:, -1]), tail)

    def init_state(self, batch: int, max_len: int, *, width: int, max_chunk: int, dtype: Any) -> Any:
        return Recurrent.empty(batch, (self.inner, self.state_dim)), ConvTail.empty(batch, self.conv, self.inner, dtype)

    def state_bytes(self, batch: int, max_len: int, *, width: int, max_chunk: int, itemsize: int) -> int:
        """Bytes of the state by the formula above (segments are int32)."""
        return batch * (self.inner * self.state_dim * 4 + 4 + (self.conv - 1) * (self.inner * itemsize + 4))

    def mixing_flops(self, length: int) -> float:
        """Forward flops a token in rows of `length` tokens, beyond 2 a parameter (a_log counts as one)."""
        return 6.0 * self.inner * self.state_dim

    @classmethod
    def examples(cls) -> dict[str, Mamba]:
        """Small settings that cover the fields."""
        return {
            "mamba": cls(inner=24, state_dim=3, chunk=4),
            "narrow": cls(inner=10, state_dim=4, conv=2, step_rank=3, chunk=8),
        }


def _log_of_one_to_n(key: Array, shape: tuple[int, int], dtype: Any) -> Array:
    """log 1, ..., log N in each channel (S4D-real)."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=dtype)), shape)

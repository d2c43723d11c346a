"""The feed-forward layer of the RWKV family, which looks one token back."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.state import ConvTail
from jaxlong.mixers.base import check_state, projection, require, require_spans
from jaxlong.mixers.rwkv_parts import share, toward
from jaxlong.ops.attend import Backend
from jaxlong.ops.token_shift import token_shift


class RWKVChannelMix(nn.Module):
    """A squared-ReLU layer on each token and its predecessor; it stands where other models have an MLP.

        x_k, x_r = x + (x' - x) mu_k, x + (x' - x) mu_r,   x' the previous token of the document
        y = [sigmoid(x_r W_r) *] relu(x_k W_k)^2 W_v

    Paper: Peng et al., RWKV, arXiv 2305.13048; without the gate RWKV-7, arXiv 2503.14456. Checkpoints of
    RWKV-4 store 1 - mu.
    Training cost: 4 D F T flops, and 2 D D T for the gate.
    State: the previous token, D elements and 4 bytes.

    Fields:
        hidden: F.
        gate: the receptance sigmoid(x_r W_r) of RWKV-4, 5 and 6; RWKV-7 has none.
    """

    hidden: int
    gate: bool = True
    backend: Backend = Backend()

    def __post_init__(self):
        require(self, 1, "hidden")
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
        width = x.shape[-1]
        segments = jnp.zeros_like(positions) if segment_ids is None else segment_ids
        previous, tail = token_shift(x, segments, state, backend=self.backend)
        mu = share(self, "mu_k", width, 0.5 if self.gate else 0.5**4)
        wk = projection(self, "wk", (width, self.hidden), ("embed", "mlp"), inputs=1, dtype=x.dtype)
        wv = projection(self, "wv", (self.hidden, width), ("mlp", "embed"), inputs=1, dtype=x.dtype)
        y = jax.nn.relu(toward(x, previous, mu) @ wk) ** 2 @ wv
        if self.gate:
            wr = projection(self, "wr", (width, width), ("embed", "mlp"), inputs=1, dtype=x.dtype)
            y *= jax.nn.sigmoid(toward(x, previous, share(self, "mu_r", width, 0.5)) @ wr)
        return y, None if state is None else tail

    def init_state(self, batch: int, max_len: int, *, width: int, max_chunk: int, dtype: Any) -> ConvTail:
        return ConvTail.empty(batch, 2, width, dtype)

    def state_bytes(self, batch: int, max_len: int, *, width: int, max_chunk: int, itemsize: int) -> int:
        """Bytes of the state by the formula above."""
        return batch * (width * itemsize + 4)

    def mixing_flops(self, length: int) -> float:
        """Forward flops a token beyond 2 a parameter: none."""
        return 0.0

    @classmethod
    def examples(cls) -> dict[str, RWKVChannelMix]:
        """With and without the gate."""
        return {"gate": cls(hidden=20), "plain": cls(hidden=16, gate=False)}

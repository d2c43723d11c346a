"""Kimi Delta Attention: a delta rule in which each channel of the keys fades at its own rate."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxlong.core.types import BadInput
from jaxlong.mixers.base import projection, require, vector
from jaxlong.mixers.delta_net import DeltaNet
from jaxlong.mixers.scan_parts import log_rate, step_bias


class KDA(DeltaNet):
    """DeltaNet with a decay a channel and a sigmoid gate on the output, both of low rank.

        q, k, v, beta as in DeltaNet;   log alpha = -A_h softplus(x W1 W2 + b)   [l sigmoid(A_h (x W1 W2 + b))]
        S_t = (I - beta_t k_t k_t^T) Diag(alpha_t) S_(t-1) + beta_t k_t v_t^T;   o_t = S_t^T q_t / sqrt(K)
        y = (rmsnorm_head(o) * sigmoid(x W3 W4)) Wo

    Paper: Kimi Linear, arXiv 2510.26692.
    Training cost, state and fields: as DeltaNet, and 2 R (2 D + H (K + V)) T flops for W1 to W4.

    Further fields:
        rank: R, of the decay's and the gate's projections; None is K.
        lower_bound: l < 0, the least log decay of a token; None is the form without bound.
    """

    norm_eps: float = 1e-5
    rank: int | None = None
    lower_bound: float | None = None

    def __post_init__(self):
        if self.rank is not None:
            require(self, 1, "rank")
        if self.lower_bound is not None and self.lower_bound >= 0:
            raise BadInput("lower_bound", self.lower_bound, "is no log decay", "below 0, or None")
        super().__post_init__()

    def _log_decay(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H K"]:
        shape, axes = (self.heads, self.head_dim), ("heads", "head_dim")
        step = self._low_rank("decay", x, self.head_dim) + vector(self, "step_bias", shape, axes, step_bias)
        bounded = self.lower_bound is not None
        init = nn.initializers.zeros if bounded else log_rate(1.0)
        rate = jnp.exp(vector(self, "a_log", (self.heads,), ("heads",), init))[:, None]
        return self.lower_bound * jax.nn.sigmoid(rate * step) if bounded else -rate * jax.nn.softplus(step)

    def _gate(self, o: Float[Array, "B T H V"], x: Float[Array, "B T D"]) -> Float[Array, "B T H V"]:
        return o * jax.nn.sigmoid(self._low_rank("gate", x, o.shape[-1]))

    def _low_rank(self, name: str, x: Float[Array, "B T D"], size: int) -> Float[Array, "B T H C"]:
        """x times a matrix of rank R for each head, float32."""
        rank = self.head_dim if self.rank is None else self.rank
        down = projection(self, f"{name}_down", (x.shape[-1], rank), ("embed", None), inputs=1, dtype=x.dtype)
        shape, axes = (rank, self.heads, size), (None, "heads", "head_dim")
        up = projection(self, f"{name}_up", shape, axes, inputs=1, dtype=x.dtype)
        return jnp.einsum("btr,rhc->bthc", x @ down, up).astype(jnp.float32)

    @classmethod
    def examples(cls) -> dict[str, DeltaNet]:
        """Small settings that cover the fields; the laws and the benchmark run on each."""
        small = super().examples()
        return {"plain": small["plain"], "bounded": small["shared_keys"].clone(rank=2, lower_bound=-5.0)}

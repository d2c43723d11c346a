"""Gated DeltaNet: a delta rule whose state also fades, at a rate that each token chooses for each head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxlong.mixers.base import to_heads, vector
from jaxlong.mixers.delta_net import DeltaNet, by_head
from jaxlong.mixers.scan_parts import log_rate, step_bias


class GatedDeltaNet(DeltaNet):
    """DeltaNet with a decay a head and a SiLU gate on the output.

        q, k, v, beta as in DeltaNet;   alpha = exp(-A_h softplus(x Wa + b_h))
        S_t = (I - beta_t k_t k_t^T) alpha_t S_(t-1) + beta_t k_t v_t^T;   o_t = S_t^T q_t / sqrt(K)
        y = (rmsnorm_head(o) * silu(x Wz)) Wo

    Paper: Yang et al., arXiv 2412.06464; the layer of Qwen3-Next, where H = 2 Hk.
    Training cost, state and fields: as DeltaNet, and 2 D H (V + 1) T flops for Wz and Wa.
    """

    def _log_decay(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H"]:
        step = by_head(self, "w_step", x, self.heads) + vector(self, "step_bias", (self.heads,), ("heads",), step_bias)
        rate = jnp.exp(vector(self, "a_log", (self.heads,), ("heads",), log_rate(0.01)))
        return -rate * jax.nn.softplus(step)

    def _gate(self, o: Float[Array, "B T H V"], x: Float[Array, "B T D"]) -> Float[Array, "B T H V"]:
        z = to_heads(self, "wz", x, *o.shape[2:])
        return o * jax.nn.silu(z.astype(jnp.float32))

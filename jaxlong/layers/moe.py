"""Mixture of experts: each token goes through a few of many feed-forward layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.types import BadInput
from jaxlong.layers.mlp import SwiGLU
from jaxlong.ops.experts import mixture
from jaxlong.ops.weights import whole

ROUTERS: Mapping[str, Callable[[Array], Array]] = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}
"""Logits -> affinities of a token to the experts, by name."""


class MoE(nn.Module):
    """y = shared(x) + c sum_(e in top-k) p_e swiglu_e(x).

        s = softmax(x W_r) or sigmoid(x W_r);  top-k of s + b;  p = s over the chosen, divided by their sum

    Papers: Shazeer et al., arXiv 1701.06538; shared experts: Dai et al., arXiv 2401.06066; the bias b, which only
    chooses: Wang et al., arXiv 2408.15664. Tokens are sorted by expert and multiplied group by group
    (`jax.lax.ragged_dot`); none is dropped.
    Training cost: 6 D F (k + shared) flops a token forward, whatever E. Parameters: 3 D F (E + shared) + D E.

    Sows "metrics": `expert_load`, the busiest expert's tokens over the mean (1 is balanced), and
    `router_entropy`, of the mean affinities over log E. Sows "losses": `balance`, if its weight is not 0, and
    `selection_bias`, of value 0, whose gradient moves b by `bias_rate` towards balance.

    Fields:
        hidden: F of one expert.    experts: E.    top_k: experts a token.    shared: experts every token takes.
        router: a name in `ROUTERS`.
        normalize: divide the chosen affinities by their sum.    scale: c.
        bias_rate: step of b a training step, against the sign of an expert's surplus; 0 is no bias.
        balance: weight of the loss E sum_e f_e P_e, f the share of choices and P of the affinities that go to e
            (Fedus et al., arXiv 2101.03961, equation 4).
    """

    hidden: int
    experts: int
    top_k: int
    shared: int = 0
    router: str = "softmax"
    normalize: bool = True
    scale: float = 1.0
    bias_rate: float = 0.0
    balance: float = 0.0

    blockwise = False  # loads are of all tokens at once

    def __post_init__(self):
        for name, least in (
            ("hidden", 1),
            ("experts", 1),
            ("top_k", 1),
            ("shared", 0),
            ("bias_rate", 0),
            ("balance", 0),
        ):
            if getattr(self, name) < least:
                raise BadInput(name, getattr(self, name), "is too small", f"{least} or more")
        if self.top_k > self.experts:
            raise BadInput("top_k", self.top_k, f"there are {self.experts} experts", f"1 to {self.experts}")
        if self.router not in ROUTERS:
            raise BadInput("router", self.router, "no such router", f"one of {', '.join(ROUTERS)}")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        width = x.shape[-1]
        chosen, weights = self._route(x)
        y = mixture(
            x,
            chosen,
            weights,
            self._experts("gate", (width, self.hidden), ("experts", "embed", "mlp")),
            self._experts("up", (width, self.hidden), ("experts", "embed", "mlp")),
            self._experts("down", (self.hidden, width), ("experts", "mlp", "embed")),
        )
        return y + SwiGLU(self.shared * self.hidden, name="shared")(x) if self.shared else y

    def _experts(self, name: str, shape: tuple[int, int], axes: tuple[str, ...]) -> Array:
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=(0,))
        return self.param(name, nn.with_logical_partitioning(init, axes), (self.experts, *shape))

    def _route(self, x: Float[Array, "B T D"]) -> tuple[Int[Array, "B T k"], Float[Array, "B T k"]]:
        """The experts of each token and what they count."""
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", None))
        router = self.param("router", init, (x.shape[-1], self.experts), jnp.float32)
        scores = ROUTERS[self.router](x.astype(jnp.float32) @ whole(router, ("embed", None), jnp.float32))
        bias = jnp.zeros(self.experts)
        if self.bias_rate:
            init = nn.with_logical_partitioning(nn.initializers.zeros, (None,))
            bias = self.param("selection_bias", init, (self.experts,), jnp.float32)
        experts = jax.lax.top_k(jax.lax.stop_gradient(scores + bias), self.top_k)[1]
        # by comparison, not by indexing: the compiler can split that over tokens, and has it sooner
        chosen = experts[..., None] == jnp.arange(self.experts)
        weights = jnp.where(chosen, scores[..., None, :], 0).sum(-1)
        if self.normalize:
            weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
        load = chosen.sum((0, 1, 2), dtype=jnp.float32)
        self._report(scores.reshape(-1, self.experts), bias, load / load.sum())
        return experts, weights * self.scale

    def _report(self, scores: Float[Array, "n E"], bias: Float[Array, "E"], share: Float[Array, "E"]) -> None:
        mean = scores.mean(0) / scores.mean(0).sum()
        self.sow("metrics", "expert_load", share.max() * self.experts)
        entropy = -jnp.sum(mean * jnp.log(jnp.maximum(mean, 1e-20)))
        self.sow("metrics", "router_entropy", entropy / math.log(max(self.experts, 2)))
        if self.balance:
            self.sow("losses", "balance", self.balance * self.experts * jnp.sum(share * mean))
        if self.bias_rate:
            move = jnp.sum(jnp.sign(share - 1 / self.experts) * bias) * self.bias_rate
            self.sow("losses", "selection_bias", move - jax.lax.stop_gradient(move))

    def idle_params(self, width: int) -> int:
        """Parameters that a token does not use."""
        return 3 * width * self.hidden * (self.experts - self.top_k)


MIXTURES = {"moe": MoE}

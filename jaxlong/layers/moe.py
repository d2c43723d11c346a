"""Mixture of experts: each token goes through a few of many feed-forward layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.types import BadInput
from jaxlong.layers.mlp import SwiGLU
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
        tokens = x.reshape(-1, width)
        routes = self._route(tokens)
        weight = lambda name, a, b, axes: self._experts(name, (a, b), axes, x.dtype)
        y = mixture(
            tokens,
            routes,
            weight("gate", width, self.hidden, ("embed", "mlp")),
            weight("up", width, self.hidden, ("embed", "mlp")),
            weight("down", self.hidden, width, ("mlp", "embed")),
        )
        y = y.reshape(x.shape)
        return y + SwiGLU(self.shared * self.hidden, name="shared")(x) if self.shared else y

    def _experts(self, name: str, shape: tuple[int, int], axes: tuple[str, str], dtype: Any) -> Array:
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=(0,))
        names = ("experts", *axes)
        weight = self.param(name, nn.with_logical_partitioning(init, names), (self.experts, *shape))
        return whole(weight, names, dtype)

    def _route(self, tokens: Float[Array, "n D"]) -> Routes:
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", None))
        router = self.param("router", init, (tokens.shape[-1], self.experts), jnp.float32)
        router = whole(router, ("embed", None), jnp.float32)
        scores = ROUTERS[self.router](tokens.astype(jnp.float32) @ router)
        bias = jnp.zeros(self.experts)
        if self.bias_rate:
            init = nn.with_logical_partitioning(nn.initializers.zeros, (None,))
            bias = self.param("selection_bias", init, (self.experts,), jnp.float32)
        experts = jax.lax.top_k(jax.lax.stop_gradient(scores + bias), self.top_k)[1]
        weights = jnp.take_along_axis(scores, experts, axis=1)
        if self.normalize:
            weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
        load = jnp.bincount(experts.reshape(-1), length=self.experts)
        self._report(scores, bias, load / load.sum())
        return Routes(experts, weights * self.scale, load.astype(jnp.int32))

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


class Routes(NamedTuple):
    """Where each token goes: k experts with their weights, and how many choices each expert got."""

    experts: Int[Array, "n k"]
    weights: Float[Array, "n k"]
    load: Int[Array, "E"]


def mixture(
    tokens: Float[Array, "n D"],
    routes: Routes,
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
) -> Float[Array, "n D"]:
    """sum_k weights_k swiglu(tokens; experts_k): rows sorted by expert, three grouped matmuls, rows back in order."""
    count, k = routes.experts.shape
    order = jnp.argsort(routes.experts.reshape(-1), stable=True)
    rows = tokens[order // k]
    grouped: Any = lambda x, w: jax.lax.ragged_dot(x, w, routes.load)
    out = grouped(jax.nn.silu(grouped(rows, gate)) * grouped(rows, up), down)
    back = jnp.argsort(order)
    chosen = out[back].reshape(count, k, -1)
    return jnp.einsum("nkd,nk->nd", chosen, routes.weights.astype(tokens.dtype))


MIXTURES = {"moe": MoE}

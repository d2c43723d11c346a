"""Multi-token prediction: a block that turns features of the next token into features of the one after."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxlong.layers.norm import RMSNorm
from jaxlong.ops.weights import whole


class MultiToken(nn.Module):
    """h' = block([norm(h_t); norm(embed(x_(t+m)))] W), for the token m + 1 after t.

    DeepSeek-V3, arXiv 2412.19437, section 2.2: one such module a depth, in a chain; embedding and head are the
    model's. `block` is called as `block((x, first), positions, segment_ids, None)` and returns `((x, first), _)`.
    """

    block: nn.Module

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        embedded: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
        first: object = None,
    ) -> Float[Array, "B T D"]:
        width = hidden.shape[-1]
        both = jnp.concatenate([RMSNorm(name="hidden_norm")(hidden), RMSNorm(name="embed_norm")(embedded)], -1)
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), (None, "embed"))
        project = self.param("project", init, (2 * width, width), jnp.float32)
        x = both @ whole(project, (None, "embed"), hidden.dtype)
        return self.block((x, first), positions, segment_ids, None)[0][0]

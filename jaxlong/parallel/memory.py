"""What the backward pass keeps and what it computes again."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax

from jaxlong.core.types import BadInput

POLICIES: Mapping[str, Callable | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attn_out": jax.checkpoint_policies.save_only_these_names("attend_out", "attend_lse"),
}
"""Remat of a block by name: keep everything; only its input; its matmuls; its input and attention's output."""


def policy(name: str) -> Callable | None:
    """The checkpoint policy of that name. Raises BadInput for an unknown name."""
    if name not in POLICIES:
        raise BadInput("model.remat", name, "no such remat policy", f"one of {', '.join(POLICIES)}")
    return POLICIES[name]

"""What the backward pass keeps, what it computes again, and what waits in the host's memory meanwhile.

    none            everything is kept
    full            the input of a group of layers (one round of the model's pattern); the rest is computed again
    dots            matmuls without batch dimensions
    attn_out        names(attend_out, attend_lse): attention, or its ring, never runs again
    names(a, b)     the values of these names
    offload(a, b)   these move to the host's memory in the forward pass, and back when they are needed
    names(a)+offload(b)

Offloading `block_in` leaves the input of no layer on the device: memory for two of them instead of all.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from jaxlong.core.types import BadInput

POLICIES: Mapping[str, Callable | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attn_out": jax.checkpoint_policies.save_only_these_names("attend_out", "attend_lse"),
}
"""Those without arguments."""

NAMES: Mapping[str, str] = {
    "block_in": "[B T D], what a block of the model takes",
    "mixer_out": "[B T D], what its mixer adds",
    "attend_out": "[B T H V], attention's output before it is projected",
    "attend_lse": "[B T H], the logs of its softmax denominators, float32",
}
"""Values that a policy can name."""

_TERM = re.compile(r"(names|offload)\(([^()]*)\)")


def named(x: Array, name: str) -> Array:
    """x under a name in `NAMES`, by which a policy can choose it."""
    if name not in NAMES:
        raise BadInput("name", name, "no policy can choose it", f"one of {', '.join(NAMES)}")
    return checkpoint_name(x, name)


def policy(text: str) -> Callable | None:
    """The checkpoint policy that a line of the menu above describes.

    Raises:
        BadInput: another text, or a name that no value carries.
    """
    if text in POLICIES:
        return POLICIES[text]
    terms = [_TERM.fullmatch(part.strip()) for part in text.split("+")]
    if not all(terms):
        menu = f"one of {', '.join(POLICIES)}, names(...), offload(...)"
        raise BadInput("model.remat", text, "no such remat policy", menu)
    chosen: dict[str, list[str]] = {"names": [], "offload": []}
    for term in terms:
        chosen[term[1]] += [_known(name.strip(), text) for name in term[2].split(",")]
    if twice := sorted(set(chosen["names"]) & set(chosen["offload"])):
        raise BadInput("model.remat", text, f"{twice[0]} is both kept and offloaded", "each name once")
    if not chosen["offload"]:
        return jax.checkpoint_policies.save_only_these_names(*chosen["names"])
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=chosen["names"],
        names_which_can_be_offloaded=chosen["offload"],
        offload_src="device",
        offload_dst="pinned_host",
    )


def _known(name: str, text: str) -> str:
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1)
        allowed = f"did you mean {near[0]}?" if near else f"names are {', '.join(NAMES)}"
        raise BadInput("model.remat", text, f"no value has the name '{name}'", allowed)
    return name

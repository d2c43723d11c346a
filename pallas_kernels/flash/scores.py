"""From products of queries and keys to scores, as all flash kernels compute them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from pallas_kernels.plan import Predicate

LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Spec:
    """What is known while tracing of one attention."""

    mask: Predicate
    scale: float
    soft_cap: float | None
    slopes: bool

    @property
    def cooked(self) -> bool:
        """Whether scores are more than scaled products; `cook` then leaves them in natural units, else as products."""
        return self.soft_cap is not None or self.slopes

    @property
    def base(self) -> float:
        """From what `cook` leaves to logarithms of base 2."""
        return LOG2E if self.cooked else self.scale * LOG2E


def cook(spec: Spec, scores: Any, slope: Any, away: Any) -> tuple[Any, Any]:
    """Scores with soft cap and slopes, and d score / d product over the scale where a cap makes that less than 1.

    tanh is made of exp2, whose error is that of float32; a GPU's own is good to 2**-11.
    """
    damp = None
    if spec.soft_cap is not None:
        grown = jnp.exp2(scores * (2 * LOG2E * spec.scale / spec.soft_cap))
        tanh = 1 - 2 / (grown + 1)
        scores, damp = spec.soft_cap * tanh, 1 - tanh * tanh
    elif spec.cooked:
        scores = scores * spec.scale
    if spec.slopes:
        scores = scores - slope * away
    return scores, damp

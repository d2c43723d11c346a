"""The vocabulary that every module shares.

Dimension letters, used in every annotation and einsum:

    B batch        T query time     S key time      D width
    H query heads  K key/value heads  G = H / K queries a key head
    C head dim     V value head dim (and vocabulary size in ops.loss and model)
    N state size   E experts        F hidden        L layers

Segment ids mark packed documents: tokens of a row interact only where their ids are equal. Ids are
non-negative; 0 marks padding in batches made by `jaxlong.data`. Positions are int32 and count from 0
in each document.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from jax import Array
from jaxtyping import Float, Int

State = Any
"""What a mixer remembers: any pytree of arrays with a leading batch axis (scalars count tokens)."""


class Batch(NamedTuple):
    """One batch of training rows; every field is `[B, T]`.

    `targets` are the labels of `tokens`, already shifted. `loss_weights` are 0 where a label does not
    count (padding, the last token of a document).
    """

    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    loss_weights: Float[Array, "B T"]


class BadInput(ValueError):
    """Input that cannot be used, told in one line: `field: value: why; allowed`.

    Args:
        field: dotted name of the field, flag or argument.
        value: what was given.
        why: what is wrong with it.
        allowed: what would be accepted, or the nearest thing that would.
    """

    def __init__(self, field: str, value: object, why: str, allowed: str = ""):
        self.field, self.value, self.why, self.allowed = field, value, why, allowed
        line = f"{field}: {value}: {why}" + (f"; {allowed}" if allowed else "")
        super().__init__(" ".join(line.split()))

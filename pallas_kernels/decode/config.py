"""What may be tuned in the decode kernel, and what decoding costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.decode.blocks import LANES, Inputs, Setting

BUFFER = 2**20
"""Bytes of a block of keys, and of its scores. Two blocks of keys and of values and a few copies of the scores lie in
VMEM."""


@dataclass(frozen=True)
class Config:
    """No result depends on it beyond rounding.

    Args:
        block: slots of a step: a multiple of `grain`, at most the cache's.
        splits: parts into which the visited blocks of a row are cut; the results of parts are merged.
        stages: blocks in VMEM, those on their way included.
        form: how keys lie, one of `blocks.FORMS`.
    """

    block: int
    splits: int = 1
    stages: int = 2
    form: str = "lines"

    @classmethod
    def of(cls, setting: Setting, inputs: Inputs) -> Config:
        """As many slots as `BUFFER` holds. A single row is cut in two for chips of two cores, which more rows fill."""
        (_, T, H, C), form, unit = inputs.q.shape, form_of(setting, inputs), grain(inputs)
        heads, item = inputs.k.shape[2], max(jnp.dtype(x.dtype).itemsize for x in (inputs.k, inputs.q))
        queries = T * H * (heads if form == "lines" else 1)
        keys = heads * (C if form == "lanes" else -(-C // LANES) * LANES)
        block = BUFFER // max(4 * max(queries, 16), keys * item) // unit * unit
        whole = _whole(inputs, unit)
        most = min(max(block, unit), whole)
        # one that divides the cache, if that is no less than half as large
        block = next((b for b in range(most, most // 2, -unit) if whole % b == 0), most)
        return cls(block, splits=2 if len(inputs.q) % 2 and inputs.slots >= 2 * block else 1, form=form)


def grain(inputs: Inputs) -> int:
    """What divides the slots of a block."""
    return LANES if inputs.pages is None else math.lcm(LANES, inputs.k.shape[1])


def form_of(setting: Setting, inputs: Inputs) -> str:
    """The order in which the TPU's compiler lays the cache out by default: the one with the least padding."""
    length, heads, C = inputs.k.shape[1:]
    dims = {C} if inputs.v is None else {C, setting.values(inputs)}
    if any(dim % LANES for dim in dims):
        return "lanes" if length % LANES == 0 or inputs.pages is None else "lines"
    packed = 4 // jnp.dtype(inputs.k.dtype).itemsize
    return "lines" if heads == 1 or heads % 8 == 0 or (heads in (2, 4) and heads >= packed) else "heads"


def search_space(setting: Setting, inputs: Inputs) -> tuple[Config, ...]:
    """What a tuner tries; all of one form."""
    best, unit = Config.of(setting, inputs), grain(inputs)
    sizes = sorted({max(unit, best.block // by // unit * unit) for by in (1, 2, 4)})
    splits = (1, 2) if inputs.slots > best.block else (1,)
    return tuple(Config(size, s, stages, best.form) for size in sizes for s in splits for stages in (2, 3))


def cost(setting: Setting, inputs: Inputs) -> pl.CostEstimate:
    """Of a full cache, each slot read once; what masks leave out is not known while tracing."""
    (B, T, H, C), heads, V = inputs.q.shape, inputs.k.shape[2], setting.values(inputs)
    item = lambda x: jnp.dtype(x.dtype).itemsize
    factors = sum(x is not None for x in (inputs.k_scale, inputs.v_scale))
    slot = heads * (C * item(inputs.k) + (0 if inputs.v is None else V * item(inputs.v)) + 4 * factors) + 4
    pairs = B * T * H * inputs.slots
    return pl.CostEstimate(
        flops=2 * pairs * (C + V),
        transcendentals=pairs,
        bytes_accessed=B * inputs.slots * slot + B * T * H * (C * item(inputs.q) + 4 * V),
    )


def _whole(inputs: Inputs, unit: int) -> int:
    """Slots that blocks can cover: whole pages, filled up, or whole lanes."""
    return -(-inputs.slots // unit) * unit if inputs.pages is not None else inputs.slots // unit * unit

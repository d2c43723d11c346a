"""What may be tuned in the kernels of the selective scan, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jax.experimental import pallas as pl


@dataclass(frozen=True)
class Config:
    """No result depends on it beyond rounding.

    Args:
        rows: tokens of a block, a multiple of 128: a state a block is kept from forward to backward, and backward all
            states of one block are in VMEM, 4 rows N lanes bytes.
        lanes: channels of a block, a multiple of 128.
        interpret: simulates the kernels on any device (`pl.pallas_call`).
    """

    rows: int = 128
    lanes: int = 512
    interpret: Any = False

    @classmethod
    def of(cls, width: int, states: int) -> Config:
        """As many channels as leave the states of a block 4 MiB; not measured on a TPU."""
        lanes = 512
        while lanes > 128 and (lanes * states > 8192 or width <= lanes // 2):
            lanes //= 2
        return cls(lanes=lanes)


def search_space() -> tuple[Config, ...]:
    """What a tuner tries."""
    return tuple(Config(rows, lanes) for rows in (128, 256) for lanes in (128, 256, 512))


def cost(batch: int, length: int, width: int, states: int, itemsize: int, *, backward: bool = False) -> pl.CostEstimate:
    """Of one pass: elementwise arithmetic on states, an exponential each, and each row read or written once.

    Backward the states come again first, and two more rows are read and two written.
    """
    tokens = batch * length * width
    flops, exponentials, rows = (22, 2, 3) if backward else (6, 1, 2)
    moved = tokens * (rows * itemsize + (8 if backward else 4))
    return pl.CostEstimate(
        flops=flops * tokens * states, transcendentals=exponentials * tokens * states, bytes_accessed=moved
    )

"""What may be tuned in the kernels of the delta rule, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jax.experimental import pallas as pl

from pallas_kernels.delta.chunk import CHUNK


@dataclass(frozen=True)
class Config:
    """No result depends on it beyond rounding.

    Args:
        stages: chunks that the passes over states hold in shared memory.
        terms: 16-bit parts of a log decay in sums; one keeps 8 bits of it, two 16.
    """

    stages: int = 3
    terms: int = 2

    @classmethod
    def of(cls, key_dim: int, value_dim: int) -> Config:
        """The quickest on an H200, where stages make no difference from two on."""
        return cls()


def cost(
    batch: int, length: int, heads: int, key_dim: int, value_dim: int, *, backward: bool = False
) -> pl.CostEstimate:
    """What the rule itself takes: chunked arithmetic, and each input read and each output written once, 16 bits wide.

    A chunk of C tokens with keys of K and values of V: scores of queries and of keys, the inverse, its products with
    keys and values, two products with the state and two for the outputs. A backward pass takes about twice as much.
    """
    tokens = batch * length * heads
    flops = 2 * tokens * (2 * CHUNK * key_dim + CHUNK**2 + CHUNK * (key_dim + 2 * value_dim) + 3 * key_dim * value_dim)
    moved = tokens * (2 * (2 * key_dim + 2 * value_dim) + 4 * key_dim + 4)
    times = 3 if backward else 1
    return pl.CostEstimate(
        flops=times * flops, transcendentals=times * 7 * tokens * key_dim, bytes_accessed=times * moved
    )


@dataclass(frozen=True)
class Blocks:
    """What may be tuned on a TPU; no result depends on it beyond rounding.

    Args:
        chunks: that one step of a program unrolls, even. Backward they are held in VMEM at once, 1 to 2 MiB each, and
            the states at the entries of every so many chunks are kept from forward to backward.
        interpret: simulates the kernels on any device (`pl.pallas_call`).
    """

    chunks: int = 4
    interpret: Any = False

    @classmethod
    def of(cls, key_dim: int, value_dim: int) -> Blocks:
        """As many as the TPU compiler fits into the VMEM that v5e grants a program; not measured on a TPU."""
        return cls(4 if max(key_dim, value_dim) <= 128 else 2)

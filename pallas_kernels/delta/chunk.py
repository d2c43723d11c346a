"""Geometry of a chunk that the kernels and their twin share: cuts, masks and weights of sums of decays."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

CHUNK = 64
"""Tokens of a chunk: the rows of one warpgroup's matrix instruction."""

BASE = 8
"""Rows of a block on the diagonal, whose decays are taken about its middle."""

CUTS = (8, 16, 32)
"""Half widths of the blocks that are cut in two, from the diagonal outwards."""

LEAST = -16.0
"""The least log decay of a token: exp(-16) is 1e-7, and four of them about a middle stay far within float32."""

LEAST_BETA = 1e-6
"""Writes are at least this strong, so that what a token wrote tells what it would have written."""


def between(i: Array, t: Array, half: int) -> Array:
    """Does the sum of decays from the cut to row i hold row t? True for the rows between, the first of the two not.

    The cut lies after the first `half` rows of the block of 2 half rows in which i lies.
    """
    cut = (i // (2 * half)) * (2 * half) + half - 1
    return ((t > cut) & (t <= i)) | ((t > i) & (t <= cut))


def across(i: Array, j: Array, half: int) -> Array:
    """Pairs of one block of 2 half rows with its cut between them, i after j."""
    return (i // (2 * half) == j // (2 * half)) & (i % (2 * half) >= half) & (j % (2 * half) < half)


def about_middle(i: Array, t: Array) -> Array:
    """Weights -1, 0, 1 of row t in the sum of decays from the middle of i's block on the diagonal to row i."""
    middle = (i // BASE) * BASE + BASE // 2 - 1
    return ((t > middle) & (t <= i)).astype(jnp.float32) - ((t > i) & (t <= middle)).astype(jnp.float32)


def near(i: Array, j: Array) -> Array:
    """Pairs of one block on the diagonal, i after j."""
    return (i // BASE == j // BASE) & (i > j)

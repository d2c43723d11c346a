"""The order in which chips that are wired to their neighbours form a ring: round trips of single links.

Chips of a pod have coordinates in a box. Taken row by row, the end of one row and the start of the next are no
neighbours, nor are the last chip and the first: a transfer around takes as long as its longest way, and on TPU v5e
from 32 chips on the compiler makes it synchronous.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


def round_trip(coords: Sequence[tuple[int, ...]]) -> Int[np.ndarray, "n"] | None:
    """The order in which n chips form a closed walk of neighbours; None if they fill no box that has one.

    A box of a x b, with a even: along one side, then back and forth through the rest,

        0 1 2 3        of a = 2 .. any even number of rows; more dimensions are snaked into one first
        7 6 5 4
    """
    places = {tuple(c): i for i, c in enumerate(coords)}
    axes = [sorted(set(values)) for values in zip(*coords, strict=True)]
    size = int(np.prod([len(values) for values in axes]))
    even = next((axis for axis, values in enumerate(axes) if len(values) % 2 == 0), None)
    if len(places) != len(coords) or size != len(coords) or even is None or size == len(axes[even]):
        return None
    rows = axes.pop(even)
    lines = _snake(axes)
    walk = [(row, lines[0]) for row in reversed(rows)]
    for i, row in enumerate(rows):
        walk += [(row, line) for line in (lines[1:] if i % 2 == 0 else reversed(lines[1:]))]
    return np.array([places[(*line[:even], row, *line[even:])] for row, line in walk], np.int32)


def _snake(sides: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """All places of a box, each a neighbour of the one before."""
    walk: list[tuple[int, ...]] = [()]
    for side in sides:
        turns = itertools.cycle((list(side), list(reversed(side))))
        walk = [(*place, value) for place, turn in zip(walk, turns, strict=False) for value in turn]
    return walk

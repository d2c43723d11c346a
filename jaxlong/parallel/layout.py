"""Which tokens of a row lie on which device of the sequence axis: a permutation of the row, made once, where data
enters.

    contiguous  device r holds the r-th of n equal parts: right for windows; causal work is 2 - 1/n times the ideal
    zigzag      of 2n parts device r holds parts r and 2n - 1 - r: causal work is even, and a device holds two spans
    striped     device r holds tokens r, r + n, r + 2n, ...: work is even for packed documents too, but no span is
                left, so nothing that is recurrent, convolves or counts in blocks can run on it

Attention asks no layout: masks see positions, which move with their tokens. Zigzag: Llama 3, arXiv 2407.21783, section
3.3.2; striped: Brandon et al., arXiv 2311.09431.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int

from jaxlong.core.types import BadInput

LAYOUTS = ("contiguous", "zigzag", "striped")


def parts(layout: str, devices: int) -> int:
    """What the length of a row must be a multiple of.

    Raises:
        BadInput: there is no such layout.
    """
    if layout not in LAYOUTS:
        raise BadInput("layout", layout, "no such layout", f"one of {', '.join(LAYOUTS)}")
    return 2 * devices if layout == "zigzag" else devices


@functools.lru_cache(maxsize=8)  # asked for every array of every batch
def order(layout: str, length: int, devices: int) -> Int[np.ndarray, "T"]:
    """`order[i]` is the place in the text of the token at place i of the row; not to be written.

    Raises:
        BadInput: there is no such layout, or the length does not divide into its parts.
    """
    count = parts(layout, devices)
    if length % count:
        near = max(count, round(length / count) * count)
        raise BadInput("length", length, f"does not divide into the {count} parts of {layout}", f"nearest: {near}")
    places = np.arange(length, dtype=np.int32)
    if layout == "striped":
        places = places.reshape(-1, devices).T.reshape(-1)
    elif layout == "zigzag":
        places = places.reshape(count, -1)[spans(devices)].reshape(-1)
    places.flags.writeable = False
    return places


def spans(devices: int) -> Int[np.ndarray, "n"]:
    """Of zigzag's 2n parts of a row, those of device 0, then those of device 1, and so on."""
    first = np.arange(devices, dtype=np.int32)
    return np.stack([first, 2 * devices - 1 - first], axis=1).reshape(-1)


def permute(x: Array | np.ndarray, layout: str, devices: int, *, axis: int = 1) -> Array | np.ndarray:
    """A row of text in the order of a layout; NumPy arrays stay NumPy arrays."""
    return _take(x, order(layout, x.shape[axis], devices), axis)


def restore(x: Array | np.ndarray, layout: str, devices: int, *, axis: int = 1) -> Array | np.ndarray:
    """The inverse of `permute`."""
    return _take(x, np.argsort(order(layout, x.shape[axis], devices)), axis)


def _take(x: Array | np.ndarray, places: np.ndarray, axis: int) -> Array | np.ndarray:
    if np.array_equal(places, np.arange(len(places))):
        return x
    return jnp.take(x, places, axis=axis) if isinstance(x, jax.Array) else np.take(x, places, axis=axis)

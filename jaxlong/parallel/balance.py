"""How evenly a layout shares the work of attention among devices."""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Int

from jaxlong.core.mask import Mask
from jaxlong.core.types import BadInput
from jaxlong.parallel.layout import order, permute


def critical_path(layout: str, devices: int, length: int, mask: Mask, block: int) -> float:
    """The work of the slowest device at every hop of a ring, over an even share of all work: 1 is ideal.

    Work is tiles of block x block in which the mask may show something, as blockwise attention visits them; devices
    wait for each other at every hop. Causal: 1 in zigzag, 2 - 1/n in contiguous rows as blocks become small.

    Raises:
        BadInput: the length does not divide into the parts of the layout, or a device's part into blocks.
    """
    if length % (devices * block):
        near = max(1, round(length / devices / block)) * devices * block
        raise BadInput("length", length, f"{devices} devices hold no whole blocks of {block}", f"nearest: {near}")
    tiles = order(layout, length, devices).reshape(-1, block)
    first, last = tiles.min(-1), tiles.max(-1)
    visited, _ = mask.tile(first[:, None], last[:, None], first[None], last[None])
    by_device = np.broadcast_to(visited, (len(tiles),) * 2).reshape(devices, -1, devices, len(tiles) // devices)
    work = by_device.sum((1, 3))  # [queries' device, keys' device]
    device = np.arange(devices)
    hops = [work[device, (device - i) % devices].max() for i in range(devices)]
    return float(sum(hops) * devices / work.sum())


def cp_imbalance(segment_ids: Int[np.ndarray, "B T"] | Int[jax.Array, "B T"], layout: str, devices: int) -> float:
    """The causal work of the busiest device over the mean, for packed rows in the order of the text: 1 is even.

    A token's work is the number of tokens up to it in its document. Over a whole step, without waiting at hops.

    Raises:
        BadInput: the length does not divide into the parts of the layout.
    """
    ids = np.asarray(segment_ids)
    place = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    begins = np.concatenate([np.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=1)
    seen = place - np.maximum.accumulate(np.where(begins, place, 0), axis=1) + 1
    work = permute(seen, layout, devices).reshape(len(ids), devices, -1).sum((0, 2))
    return float(work.max() / work.mean())

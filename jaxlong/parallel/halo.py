"""Windows: a device needs its own keys and those around them in the text, as far as the mask can reach.

A row is a line of equal parts, and a layout says who holds which: contiguous gives one to each device, zigzag two.
The tokens before (or after) a part come straight from their owner, a part's distance at a time.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from jaxlong.core.mask import Mask
from jaxlong.parallel.layout import spans
from jaxlong.parallel.partial import Local, Meta

PARTS = {"contiguous": 1, "zigzag": 2}
"""Parts of a row on a device, by layout; the others have none."""


def window(mask: Mask, length: int, layout: str | None, devices: int) -> tuple[int, int] | None:
    """How many tokens before and after a part its queries may see, if a device so gets less than all keys; else None.

    Args:
        length: tokens of a device.
    """
    back, ahead = mask.reach(), mask.ahead()
    if layout not in PARTS or length % PARTS[layout] or back is None or ahead is None:
        return None
    before = back - 1
    return (before, ahead) if PARTS[layout] * (before + ahead) < (devices - 1) * length else None


def halo(
    local: Local,
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T K M"],
    v: Float[Array, "B T K V"] | None,
    meta: Meta,
    *,
    axis: str | tuple[str, ...],
    layout: str,
    before: int,
    after: int,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """Inside `jax.shard_map`: attention of a device's queries over its keys and the tokens around them.

    Each part is a row of its own: `local` sees B times as many rows as there are parts. For every distance in parts
    numbers travel in one permute and integers in another; in zigzag there are three ways from a half to a half.
    Autodiff sends gradients back.

    Args:
        q, k, v, meta: the device's part of each; without a bias. Tokens lie in the row as the layout has them.
        before, after: how many tokens before and after a part its queries may see, see `window`.
    """
    n = lax.axis_size(axis)
    held = np.arange(n)[:, None] if layout == "contiguous" else spans(n).reshape(n, 2)
    parts = held.shape[1]
    split = lambda x: x.reshape(len(x), parts, -1, *x.shape[2:])
    row = lambda x: x.reshape(-1, *x.shape[2:])
    join = lambda x: x.reshape(len(q), -1, *x.shape[2:])

    zeros = jnp.zeros_like(meta.q_positions)
    q_segments, k_segments = (zeros if x is None else x for x in (meta.q_segments, meta.k_segments))
    # what nobody sends is 0 where it arrives: with segment ids sent plus one, it is an empty slot
    places = jnp.stack([meta.k_positions, k_segments + 1], axis=-1)
    kv = k if v is None else jnp.concatenate([k, v], axis=-1)
    kv, places = (row(_around(split(x), held, before, after, axis)) for x in (kv, places))
    meta = meta._replace(
        q_positions=row(split(meta.q_positions)),
        k_positions=places[..., 0],
        q_segments=row(split(q_segments)),
        k_segments=places[..., 1] - 1,
    )
    out, lse = local(row(split(q)), kv[..., : k.shape[-1]], None if v is None else kv[..., k.shape[-1] :], meta)
    return join(out), join(lse)


def _around(x: Array, held: Int[np.ndarray, "n p"], before: int, after: int, axis: str | tuple[str, ...]) -> Array:
    """[B p t ...] -> [B p before + t + after ...], of which nobody's tokens are 0."""
    size = x.shape[2]
    pieces = [x]
    for distance in range(1, -(-before // size) + 1):
        tail = max(0, distance * size - before)
        pieces.insert(0, _fetch(x[:, :, tail:], held, -distance, axis))
    for distance in range(1, -(-after // size) + 1):
        pieces.append(_fetch(x[:, :, : min(size, after - (distance - 1) * size)], held, distance, axis))
    return jnp.concatenate(pieces, axis=2)


def _fetch(x: Array, held: Int[np.ndarray, "n p"], distance: int, axis: str | tuple[str, ...]) -> Array:
    """For each own part, the one at a distance from it in the row; 0 where the row has ended."""
    owner = {part: place for place, part in np.ndenumerate(held)}
    came = [jnp.zeros_like(x[:, 0])] * held.shape[1]
    for source in range(held.shape[1]):
        for slot in range(held.shape[1]):
            wanted = {device: owner.get(part + distance) for device, part in enumerate(held[:, slot])}
            ways = [(there[0], device) for device, there in wanted.items() if there and there[1] == source]
            if ways:
                came[slot] = came[slot] + lax.ppermute(x[:, source], axis, ways)
    return jnp.stack(came, axis=1)

"""Dilated attention (LongNet): several (segment, rate) branches, mixed by their softmax denominators."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.mask import causal, dilated
from jaxlong.ops.attend import Backend, attend_with_lse, merge

OFFSETS = ("cyclic", "grouped")
WEIGHTS = ("attached", "detached")


def head_offsets(heads: int, rate: int, offsets: str) -> tuple[int, ...]:
    """Which rows of a segment, modulo the rate, each head keeps: h mod r, or floor(h r / H)."""
    return tuple(h % rate if offsets == "cyclic" else h * rate // heads for h in range(heads))


def masked_branch(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K V"],
    *,
    segment: int,
    rate: int,
    offsets: tuple[int, ...],
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B T"] | None = None,
    k_segments: Int[Array, "B S"] | None = None,
    scale: float | None = None,
    backend: Backend,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """One branch as a mask over all keys: for any positions, documents and caches.

    Head h attends, looking back, among those positions of a segment whose offset in it is `offsets[h]` modulo `rate`.
    Rows that it does not keep give 0 with lse -inf.
    """
    return attend_with_lse(
        q,
        k,
        v,
        mask=causal() & dilated(segment, rate),
        q_positions=q_positions,
        k_positions=k_positions,
        q_segments=q_segments,
        k_segments=k_segments,
        heads=jnp.asarray(offsets, jnp.int32),
        scale=scale,
        backend=backend,
    )


def gathered_branch(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T K C"],
    v: Float[Array, "B T K V"],
    *,
    segment: int,
    rate: int,
    offsets: tuple[int, ...],
    scale: float | None = None,
    backend: Backend,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """The same for one document a row, token t at position t, over the kept rows alone.

    2 T C (V + C) segment / (2 rate^2) flops a head: causal attention in rows of segment / rate tokens.
    """
    B, T, H, _ = q.shape
    segment = min(segment, T)
    count, rows = -(-T // segment), -(-segment // rate)
    keep = np.arange(rate)[:, None] == np.array(offsets)

    def kept(x):
        x = jnp.pad(x, [(0, 0), (0, count * segment - T), (0, 0), (0, 0)]).reshape(B * count, segment, *x.shape[2:])
        x = jnp.pad(x, [(0, 0), (0, rows * rate - segment), (0, 0), (0, 0)]).reshape(-1, rows, rate, *x.shape[2:])
        if rate == 1:
            return x[:, :, 0]
        return jnp.where(keep[..., None], jnp.repeat(x, H // x.shape[3], axis=3), 0).sum(2)

    def spread(x, rest):
        x = jnp.where(keep.reshape(*keep.shape, *[1] * (x.ndim - 3)), x[:, :, None], rest)
        x = x.reshape(B * count, rows * rate, *x.shape[3:])[:, :segment]
        return x.reshape(B, count * segment, *x.shape[2:])[:, :T]

    q, k, v = kept(q), kept(k), kept(v)
    places = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32), q.shape[:2])  # what pads lies behind: nobody sees it
    out, lse = attend_with_lse(
        q, k, v, mask=causal(), q_positions=places, k_positions=places, scale=scale, backend=backend
    )
    return spread(out, 0), spread(lse, -jnp.inf)


def mix(branches: list[tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]], weights: str) -> Float[Array, "B T H V"]:
    """sum_b a_b out_b with a_b = exp(lse_b) / sum_b exp(lse_b), float32; "detached" keeps gradients out of a_b."""
    pin = jax.lax.stop_gradient if weights == "detached" else lambda lse: lse
    total, *others = [(out.astype(jnp.float32), pin(lse)) for out, lse in branches]
    for branch in others:
        total = merge(total, branch)
    return total[0]

"""Flash attention for TPUs, forward, in Mosaic TPU.

A grid step holds a block of queries; keys and values stream by (`tpu_tiles`). A tile is worked on in parts whose
products and softmax the compiler can overlap. Maxima and sums are kept in all lanes of a register, as Mosaic's
reductions leave them. Tiles that the plan calls full take no predicate.

Not measured: no TPU was at hand. Sizes of blocks follow what is published for kernels of this form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash.scores import LOG2E, Spec, cook
from pallas_kernels.flash.tpu_tiles import (
    LANES,
    Held,
    Tiles,
    Walk,
    cost,
    distance,
    lanes,
    launch,
    lying,
    present,
    product,
    upright,
    visible,
)
from pallas_kernels.plan import Tokens, Visits

SMALL = ("TPU v2", "TPU v3", "TPU v4", "TPU v4 lite")
"""Kinds of devices with little vector memory."""


@dataclass(frozen=True)
class Config:
    """How a kernel runs.

    block_q, block_k: the blocks of the plan, multiples of 128.
    part: of the side that streams by, what is worked on at a time; it divides the blocks.
    vmem: bytes of vector memory that a kernel may use; None leaves it to the compiler.
    interpret: as `pl.pallas_call` takes it: False on a TPU.
    """

    block_q: int = 1024
    block_k: int = 1024
    part: int = 512
    vmem: int | None = 64 * 2**20
    interpret: Any = False

    @staticmethod
    def of(C: int, V: int, T: int, S: int, dtype: Any, kind: str) -> Config:
        """The heuristic by dims of keys and values, lengths, type, and the device's kind."""
        small = kind in SMALL
        most = 512 if small or max(C, V) > 128 or jnp.dtype(dtype).itemsize > 2 else 1024
        block_q, block_k = _fit(T, most), _fit(S, most)
        fits = [n for n in (512, 384, 256, 128) if block_q % n == 0 and block_k % n == 0]
        return Config(block_q, block_k, fits[0], None if small else Config.vmem)


def _fit(length: int, most: int) -> int:
    """The size of as few equal blocks as there can be."""
    blocks = pl.cdiv(length, most)
    unit = 2 * LANES if length > LANES else LANES
    return pl.cdiv(pl.cdiv(length, blocks), unit) * unit


def forward(
    spec: Spec,
    config: Config,
    q: Array,
    k: Array,
    v: Array,
    visits: Visits,
    tokens: Tokens,
    heads: Array,
    slopes: Array | None,
    sinks: Array | None,
    dtype: Any,
) -> tuple[Array, Array]:
    """(out [B padded T H V] in `dtype`, lse [B H padded T], natural logarithms)."""
    c = config
    q, k, v = head_major(q, c.block_q), head_major(k, c.block_k), head_major(v, c.block_k)
    (B, H, T, C), (K, V) = q.shape, (k.shape[1], v.shape[-1])
    walk = Walk(B=B, heads=H, blocks=T // c.block_q, group=1, shared=H // K)
    own = present({"q": q, "q_positions": by_head(tokens.q_positions), "q_segments": by_head(tokens.q_segments)})
    streamed = {"k": k, "v": v, "k_positions": by_head(tokens.k_positions), "k_segments": by_head(tokens.k_segments)}
    streamed = present(streamed)
    out = {
        "out": jax.ShapeDtypeStruct((B, H, T, V), dtype),
        "lse": jax.ShapeDtypeStruct((B, H, 1, T), jnp.float32),
    }
    column = pltpu.VMEM((c.block_q, LANES), jnp.float32)
    scratch = {"top": column, "total": column, "sums": pltpu.VMEM((c.block_q, V), jnp.float32)}
    scratch |= columns(own, c.block_q)
    found = launch(
        lambda at, tiles: _Forward(spec, c, at, tiles).run(),
        name="flash_forward",
        walk=walk,
        visits=visits,
        scalars=present({"heads": heads, "slopes": slopes, "sinks": sinks}),
        own=own,
        streamed=streamed,
        out=out,
        scratch=scratch,
        block=c.block_q,
        size=c.block_k,
        most=cost(walk, visits, c.block_q * c.block_k, C + V, own | streamed | out),
        config=c,
    )
    return jnp.swapaxes(found["out"], 1, 2), found["lse"][:, :, 0]


def head_major(x: Array, block: int) -> Array:
    """[B T H C] as [B H T C], padded to whole blocks of tokens."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0))) if x.shape[1] % block else x
    return jnp.swapaxes(x, 1, 2)


def by_head(x: Any) -> Array | None:
    """[P T] as rows that do not vary over heads."""
    return None if x is None else jnp.asarray(x)[:, None, None]


def columns(own: Any, block: int) -> dict[str, Any]:
    """Room to have the rows of this side upright."""
    rows = {name: x for name, x in own.items() if x.shape[2] == 1}
    return {f"{name}_upright": pltpu.VMEM((block, LANES), x.dtype) for name, x in rows.items()}


def stand(at: Any) -> None:
    """Turns the rows of this side upright."""
    for name in at:
        if name.endswith("_upright"):
            at[name][...] = upright(at[name.removesuffix("_upright")][...])


@dataclass(frozen=True)
class _Forward:
    """The kernel's body."""

    spec: Spec
    config: Config
    at: Any
    tiles: Tiles

    def run(self) -> None:
        at, head = self.at, self.tiles.head
        sinks = "sinks" in at
        top = at["sinks"][head] * LOG2E if sinks else -jnp.inf
        at["top"][...] = jnp.full(at["top"].shape, top, jnp.float32)
        at["total"][...] = jnp.full(at["total"].shape, 1.0 if sinks else 0.0, jnp.float32)
        at["sums"][...] = jnp.zeros(at["sums"].shape, jnp.float32)
        stand(at)
        self.tiles.each(self.tile)
        total = at["total"][...]
        empty = total == 0
        safe = jnp.where(empty, 1.0, total)
        share = jnp.where(empty, 0.0, 1.0 / safe)
        out = at["sums"][...] * lanes(share, at["sums"].shape[1])
        at["out"][...] = out.astype(at["out"].dtype)
        at["lse"][...] = lying(jnp.where(empty, -jnp.inf, at["top"][...] * (1 / LOG2E) + jnp.log(safe)))

    def tile(self, slot: Any, masked: bool) -> None:
        for start in range(0, self.config.block_k, self.config.part):
            self.part(slot, pl.ds(start, self.config.part), masked)

    def part(self, slot: Any, keys: Any, masked: bool) -> None:
        """Some keys of a tile."""
        at, spec, width = self.at, self.spec, self.config.part
        v = at["v_here"][slot, keys]
        scores = product(at["q"][...], at["k_here"][slot, keys], 1)
        head = self.tiles.head
        queries, these = here(at, "q"), passing(at, "k", slot, keys)
        slope, away = (at["slopes"][head], distance(queries, these)) if spec.slopes else (None, None)
        scores, _ = cook(spec, scores, slope, away)
        if masked:
            scores = jnp.where(visible(spec, queries, these, at["heads"][head], 1), scores, -jnp.inf)
        top = at["top"][...]
        new_top = jnp.maximum(top, scores.max(axis=1, keepdims=True) * spec.base)
        pivot = jnp.where(new_top == -jnp.inf, 0.0, new_top) if masked else new_top
        decay = jnp.exp2(top - pivot)
        weights = jnp.exp2(scores * spec.base - lanes(pivot, width))
        at["top"][...] = new_top
        at["total"][...] = at["total"][...] * decay + weights.sum(axis=1, keepdims=True)
        sums = at["sums"]
        sums[...] = sums[...] * lanes(decay, sums.shape[1]) + product(weights.astype(v.dtype), v, 0)


def here(at: Any, side: str) -> Held:
    """The tokens of this side, upright."""
    read = lambda name: at[name][:, :1] if name in at else None
    return Held(read(f"{side}_positions_upright"), read(f"{side}_segments_upright"))


def passing(at: Any, side: str, slot: Any, these: Any) -> Held:
    """Some tokens of the other side, lying."""
    read = lambda name: at[name][slot, :, these] if name in at else None
    return Held(read(f"{side}_positions_here"), read(f"{side}_segments_here"))

"""Flash attention for TPUs, backward, in Mosaic TPU: one kernel for queries, one for keys and values.

Both recompute the weights of a tile from the lse, so no two grid steps write one result and gradients are the same bits
in every run. In the kernel for keys, tiles are the other way round (keys by queries), so that what is known of queries
lies along lanes as it comes; the query heads of a key head pass one after another and add up in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash.scores import Spec, cook
from pallas_kernels.flash.tpu import Config, by_head, columns, head_major, here, passing, stand
from pallas_kernels.flash.tpu_tiles import (
    LANES,
    Tiles,
    Walk,
    cost,
    distance,
    lanes,
    launch,
    lying,
    present,
    product,
    visible,
)
from pallas_kernels.plan import MaskPlan, Tokens


def gradients(
    spec: Spec,
    config: Config,
    q: Array,
    k: Array,
    v: Array,
    dout: Array,
    lse: Array,
    delta: Array,
    plan: MaskPlan,
    tokens: Tokens,
    heads: Array,
    slopes: Array | None,
    dtype: Any,
) -> tuple[Array, Array, Array, Array | None]:
    """(dq, dk, dv) in `dtype`, of padded lengths, and the gradient of slopes by query, [B H padded T].

    Args:
        lse: [B H padded T] in logarithms of base 2, +inf for queries that saw nothing.
        delta: [B H padded T] sum of out * dout, less the gradient of the lse.
    """
    rows = {name: by_head(x) for name, x in tokens._asdict().items()}
    queries = {name: head_major(x, config.block_q) for name, x in (("q", q), ("dout", dout))}
    queries |= {"lse": lse[:, :, None], "delta": delta[:, :, None]}
    queries |= present({name: rows[name] for name in ("q_positions", "q_segments")})
    keys = {name: head_major(x, config.block_k) for name, x in (("k", k), ("v", v))}
    keys |= present({name: rows[name] for name in ("k_positions", "k_segments")})
    scalars = present({"heads": heads, "slopes": slopes})
    dq, dslopes = _queries(spec, config, scalars, queries, keys, plan, dtype)
    dk, dv = _keys(spec, config, scalars, queries, keys, plan, dtype)
    dq, dk, dv = (jnp.swapaxes(x, 1, 2) for x in (dq, dk, dv))
    return dq, dk, dv, None if dslopes is None else dslopes[:, :, 0]


def _queries(
    spec: Spec, c: Config, scalars: dict, queries: dict, keys: dict, plan: MaskPlan, dtype: Any
) -> tuple[Array, Array | None]:
    (B, H, T, C), (K, V) = queries["q"].shape, (keys["k"].shape[1], keys["v"].shape[-1])
    walk = Walk(B=B, heads=H, blocks=T // c.block_q, group=1, shared=H // K)
    out = {"dq": jax.ShapeDtypeStruct((B, H, T, C), dtype)}
    scratch = {"sums": pltpu.VMEM((c.block_q, C), jnp.float32)} | columns(queries, c.block_q)
    if spec.slopes:
        out["dslopes"] = jax.ShapeDtypeStruct((B, H, 1, T), jnp.float32)
        scratch["away_sums"] = pltpu.VMEM((c.block_q, LANES), jnp.float32)
    found = launch(
        lambda at, tiles: _Queries(spec, c, at, tiles).run(),
        name="flash_dq",
        walk=walk,
        visits=plan.by_query,
        scalars=scalars,
        own=queries,
        streamed=keys,
        out=out,
        scratch=scratch,
        block=c.block_q,
        size=c.block_k,
        most=cost(walk, plan.by_query, c.block_q * c.block_k, 2 * C + V, queries | keys | out),
        config=c,
    )
    return found["dq"], found.get("dslopes")


@dataclass(frozen=True)
class _Queries:
    spec: Spec
    config: Config
    at: Any
    tiles: Tiles

    def run(self) -> None:
        at = self.at
        for name in ("sums", "away_sums"):
            if name in at:
                at[name][...] = jnp.zeros(at[name].shape, jnp.float32)
        stand(at)
        self.tiles.each(self.tile)
        at["dq"][...] = (at["sums"][...] * self.spec.scale).astype(at["dq"].dtype)
        if "dslopes" in at:
            at["dslopes"][...] = lying(at["away_sums"][...])

    def tile(self, slot: Any, masked: bool) -> None:
        for start in range(0, self.config.block_k, self.config.part):
            self.part(slot, pl.ds(start, self.config.part), masked)

    def part(self, slot: Any, these: Any, masked: bool) -> None:
        """Some keys of a tile."""
        at, spec, width = self.at, self.spec, self.config.part
        k = at["k_here"][slot, these]
        head = self.tiles.head
        queries, keys = here(at, "q"), passing(at, "k", slot, these)
        slope, away = (at["slopes"][head], distance(queries, keys)) if spec.slopes else (None, None)
        scores, damp = cook(spec, product(at["q"][...], k, 1), slope, away)
        weights = jnp.exp2(scores * spec.base - lanes(at["lse_upright"][...], width))
        dweights = product(at["dout"][...], at["v_here"][slot, these], 1)
        dscores = weights * (dweights - lanes(at["delta_upright"][...], width))
        if masked:
            dscores = jnp.where(visible(spec, queries, keys, at["heads"][head], 1), dscores, 0.0)
        if spec.slopes:
            at["away_sums"][...] -= (dscores * away).sum(axis=1, keepdims=True)
        if damp is not None:
            dscores = dscores * damp
        at["sums"][...] += product(dscores.astype(k.dtype), k, 0)


def _keys(
    spec: Spec, c: Config, scalars: dict, queries: dict, keys: dict, plan: MaskPlan, dtype: Any
) -> tuple[Array, Array]:
    (B, K, S, C), (H, V) = keys["k"].shape, (queries["q"].shape[1], keys["v"].shape[-1])
    walk = Walk(B=B, heads=K, blocks=S // c.block_k, group=H // K, shared=1)
    out = {name: jax.ShapeDtypeStruct(keys[x].shape, dtype) for name, x in (("dk", "k"), ("dv", "v"))}
    sums = {f"{name}_sums": pltpu.VMEM((c.block_k, n), jnp.float32) for name, n in (("dk", C), ("dv", V))}
    found = launch(
        lambda at, tiles: _Keys(spec, c, at, tiles).run(),
        name="flash_dkv",
        walk=walk,
        visits=plan.by_key,
        scalars=scalars,
        own=keys,
        streamed=queries,
        out=out,
        scratch=sums | columns(keys, c.block_k),
        block=c.block_k,
        size=c.block_q,
        most=cost(walk, plan.by_key, c.block_q * c.block_k, 2 * C + 2 * V, queries | keys | out),
        config=c,
    )
    return found["dk"], found["dv"]


@dataclass(frozen=True)
class _Keys:
    spec: Spec
    config: Config
    at: Any
    tiles: Tiles

    def run(self) -> None:
        at, group = self.at, self.tiles.walk.group
        turn = jax.lax.rem(self.tiles.item, group)

        @pl.when(turn == 0)
        def _():
            for name in ("dk_sums", "dv_sums"):
                at[name][...] = jnp.zeros(at[name].shape, jnp.float32)
            stand(at)

        self.tiles.each(self.tile)

        @pl.when(turn == group - 1)
        def _():
            at["dk"][...] = (at["dk_sums"][...] * self.spec.scale).astype(at["dk"].dtype)
            at["dv"][...] = at["dv_sums"][...].astype(at["dv"].dtype)

    def tile(self, slot: Any, masked: bool) -> None:
        for start in range(0, self.config.block_q, self.config.part):
            self.part(slot, pl.ds(start, self.config.part), masked)

    def part(self, slot: Any, these: Any, masked: bool) -> None:
        """Some queries of a tile, which is keys by queries."""
        at, spec = self.at, self.spec
        q, dout = at["q_here"][slot, these], at["dout_here"][slot, these]
        head = self.tiles.other
        queries, keys = passing(at, "q", slot, these), here(at, "k")
        slope, away = (at["slopes"][head], distance(queries, keys)) if spec.slopes else (None, None)
        scores, damp = cook(spec, product(at["k"][...], q, 1), slope, away)
        weights = jnp.exp2(scores * spec.base - at["lse_here"][slot, :, these])
        dweights = product(at["v"][...], dout, 1)
        dscores = weights * (dweights - at["delta_here"][slot, :, these])
        if masked:
            seen = visible(spec, queries, keys, at["heads"][head], 0)
            weights, dscores = jnp.where(seen, weights, 0.0), jnp.where(seen, dscores, 0.0)
        if damp is not None:
            dscores = dscores * damp
        at["dk_sums"][...] += product(dscores.astype(q.dtype), q, 0)
        at["dv_sums"][...] += product(weights.astype(dout.dtype), dout, 0)

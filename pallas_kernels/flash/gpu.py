"""Flash attention for Hopper (sm_90a), forward, in Mosaic GPU.

One CTA an SM walks a list of (head, block of queries), longest first, and streams the key blocks that the plan names. A
warpgroup issues the scores of the next tile and the product with the values of this one together, and begins the
softmax of the former while the latter runs, so the tensor cores see no gap. Tiles that the plan calls full take no
predicate, except the first of a block.

Measured on an H200 and dropped: warpgroups that take turns at the tensor cores (by mbarriers or by hardware barriers,
the turn passed on at issue or at completion) are 5 to 25 % slower, and a work list that finishes one head before it
starts the next is 8 to 25 % slower than one that alternates between heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash.scores import LOG2E, Spec, cook
from pallas_kernels.flash.tiles import (
    BY_COLUMN,
    BY_ROW,
    COMPUTE,
    ROWS,
    Kernel,
    Place,
    along,
    cost,
    distance,
    held,
    launch,
    load,
    present,
    ring,
    sizes,
    staging,
    tiled,
    vector,
    visible,
    write,
    zeros,
)
from pallas_kernels.plan import Tokens, Visits


@dataclass(frozen=True)
class Config:
    """How the forward kernel runs.

    block_q: queries of a CTA, 64 a compute warpgroup.
    block_k: keys of a tile.
    stages: buffers of the ring, for keys and values each.
    heads_together: heads whose blocks alternate in the work list.
    ctas: of the grid, one an SM.
    """

    block_q: int = COMPUTE * ROWS
    block_k: int = 128
    stages: int = 2
    heads_together: int = 16
    ctas: int = 132

    @staticmethod
    def of(C: int, V: int, segments: bool) -> Config:
        """The heuristic by dims of keys and values; segments take their share of shared memory."""
        if C > 192:
            return Config(block_k=64)
        if C == 192 and segments:
            return Config(block_k=64, stages=3)
        return Config(stages=3) if C == 64 else Config()


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
    """(out [B T H V] in `dtype`, lse [B H padded T], natural logarithms). T and S must be multiples of 8."""
    c = config
    n = sizes(q, k, v, visits.order, heads=q.shape[2], heads_together=c.heads_together, ctas=c.ctas)
    operands = {"q": q, "k": k, "v": v, "heads": heads, "slopes": slopes, "sinks": sinks}
    operands = present(operands | visits._asdict() | tokens._asdict())
    extra = [name for name in ("k_positions", "k_segments") if name in operands]
    scratch = {
        "q": tiled((c.block_q, n.C), q.dtype),
        "k": tiled((c.stages, c.block_k, n.C), k.dtype),
        "v": tiled((c.stages, c.block_k, n.V), v.dtype),
        "lse": plgpu.SMEM((COMPUTE, ROWS), jnp.float32),
        **{name: plgpu.SMEM((c.stages, c.block_k), jnp.int32) for name in extra},
    }
    barriers = {
        "q_ready": plgpu.Barrier(),
        "k_ready": ring(c.stages, 1),
        "v_ready": ring(c.stages, 1 + len(extra)),
        "q_free": plgpu.Barrier(num_arrivals=COMPUTE),
        "k_free": ring(c.stages, COMPUTE),
        "v_free": ring(c.stages, COMPUTE),
    }
    scratch = {"out": staging(scratch, (n.V,), dtype), **scratch, **barriers}
    out = {
        "out": jax.ShapeDtypeStruct((n.B, n.T, n.H, n.V), dtype),
        "lse": jax.ShapeDtypeStruct((n.B, n.H, n.blocks * c.block_q), jnp.float32),
    }

    most = cost(n, visits.order, c.block_q * c.block_k, 1, 1)
    found = launch(partial(_Forward, spec, c), operands, out, scratch, n, "flash_forward", most)
    return found["out"], found["lse"]


class _Forward(Kernel):
    def tokens(self, place: Place, m: Any) -> Any:
        block_k = self.config.block_k
        return pl.ds(self.at["order"][place.plan_row, place.block, m] * block_k, block_k)

    def block(self, i: Any, place: Place, steps: Any) -> None:
        """64 queries over the tiles that their block visits."""
        c, n, at, here, spec = self.config, self.n, self.at, self.here, self.spec
        shape = (ROWS, c.block_k)
        dtype = at["q"].dtype
        q = here["q"].at[pl.ds(self.warpgroup * ROWS, ROWS)]
        rows, queries = self.own(place)
        head = at["heads"][place.head]
        slope = at["slopes"][place.head] if spec.slopes else None
        sinks = "sinks" in at
        top = vector(at["sinks"][place.head] * LOG2E if sinks else -jnp.inf, ROWS, BY_ROW)
        total = vector(1.0 if sinks else 0.0, ROWS, BY_ROW)
        slot_of = lambda m: lax.rem(steps + m, c.stages)

        def softmax(m, scores, top, total, masked):
            """The weights of tile m, the new maximum and sum, and what the sums so far shrink by."""
            slot = slot_of(m)
            if masked or spec.slopes:
                plgpu.barrier_wait(here["v_ready"].at[slot])
                keys = held(lambda name: load(here[name].at[slot], BY_COLUMN), "k", here)
            away = distance(queries, keys, shape, 1) if spec.slopes else None
            scores, _ = cook(spec, scores, slope, away)
            if masked:
                scores = jnp.where(visible(spec, queries, keys, head, shape, 1), scores, -jnp.inf)
            new_top = jnp.maximum(top, scores.max(axis=1) * spec.base)
            pivot = jnp.where(new_top == -jnp.inf, 0.0, new_top) if masked else new_top
            decay = jnp.exp2(top - pivot)
            weights = jnp.exp2(scores * spec.base - along(0, pivot, shape))
            total = total * decay + weights.sum(axis=1)
            if not (masked or spec.slopes):
                plgpu.barrier_wait(here["v_ready"].at[slot])
            return weights, new_top, total, decay

        def step(masked):
            """The values of tile m and the scores of the next, whose softmax begins while the former are summed."""

            def body(m, carry):
                out, top, total, weights = carry
                slot, following = slot_of(m), slot_of(m + 1)
                plgpu.barrier_wait(here["k_ready"].at[following])

                def products(refs):
                    out, scores, *results = refs
                    plgpu.wgmma(scores, q, here["k"].at[following].T)
                    plgpu.wgmma(out, weights, here["v"].at[slot])
                    found = plgpu.wgmma_accumulator_load(scores, wait_n=1)
                    plgpu.barrier_arrive(here["k_free"].at[following])
                    for ref, value in zip(results, softmax(m + 1, found, top, total, masked), strict=True):
                        ref[...] = value

                blank = zeros(shape)
                refs = (plgpu.ACC.init(out), plgpu.ACC.init(blank), blank, top, total, top)
                out, _, weights, new_top, new_total, decay = pl.run_state(products)(refs)
                plgpu.barrier_arrive(here["v_free"].at[slot])
                return out * along(0, decay, out.shape), new_top, new_total, weights.astype(dtype)

            return body

        def attend():
            plgpu.barrier_wait(here["k_ready"].at[slot_of(0)])

            def product(scores):
                plgpu.wgmma(scores, q, here["k"].at[slot_of(0)].T)
                return scores[...]

            scores = pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))
            plgpu.barrier_arrive(here["k_free"].at[slot_of(0)])
            weights, new_top, new_total, _ = softmax(0, scores, top, total, True)
            carry = zeros((ROWS, n.V)), new_top, new_total, weights.astype(dtype)
            plain, last = jnp.maximum(place.full - 1, 0), place.count - 1
            carry = lax.fori_loop(0, plain, step(False), carry)
            out, new_top, new_total, weights = lax.fori_loop(plain, last, step(True), carry)
            plgpu.barrier_arrive(here["q_free"])
            out = pl.run_state(lambda out: plgpu.wgmma(out, weights, here["v"].at[slot_of(last)]))(plgpu.ACC.init(out))
            plgpu.barrier_arrive(here["v_free"].at[slot_of(last)])
            return out, new_top, new_total

        def nothing():
            plgpu.barrier_arrive(here["q_free"])
            return zeros((ROWS, n.V)), top, total

        plgpu.barrier_wait(here["q_ready"])
        out, top, total = lax.cond(place.count > 0, attend, nothing)
        empty = total == 0
        safe = jnp.where(empty, 1.0, total)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        lse = here["lse"].at[self.warpgroup]
        lse[...] = jnp.where(empty, -jnp.inf, top * (1 / LOG2E) + jnp.log(safe))
        share = jnp.where(empty, 0.0, 1.0 / safe)
        write(
            here["out"].at[self.warpgroup], out * along(0, share, out.shape), at["out"].at[place.row, rows, place.head]
        )
        plgpu.copy_smem_to_gmem(lse, at["lse"].at[place.row, place.head, rows])

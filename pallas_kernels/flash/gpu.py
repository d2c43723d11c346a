"""Flash attention for Hopper (sm_90a), forward, in Mosaic GPU.

One CTA an SM walks a list of (head, block of queries), longest first. A memory warpgroup streams the key blocks that
the plan names through a ring of buffers (TMA); two compute warpgroups of 64 queries each take turns: while one has the
tensor cores, the other does its softmax. A turn issues the product with the values of one tile and the scores of the
next together, so the tensor cores see no gap between them. Tiles that the plan calls full take no predicate; the last
tile of a block takes it always, which costs nothing in masks that end in a partial tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.plan import EMPTY, Predicate, Tokens, Visits
from pallas_kernels.predicate import on_tile

LOG2E = math.log2(math.e)
ROWS = 64
"""Queries of a warpgroup: the height of a wgmma tile."""
COMPUTE = 2
"""Warpgroups that compute; the one behind them moves memory."""
SHARED = 232448 - 1024
"""Bytes of shared memory of a CTA, less what barriers and alignment take."""

TILE = plgpu.Layout.WGMMA
BY_ROW = plgpu.Layout.WGMMA.reduce(1)
BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)


@dataclass(frozen=True)
class Spec:
    """What is known while tracing of one attention."""

    mask: Predicate
    scale: float
    soft_cap: float | None
    out_dtype: Any


@dataclass(frozen=True)
class Config:
    """How the forward kernel runs.

    block_q: queries of a CTA, 64 a compute warpgroup.
    block_k: keys of a tile.
    stages: buffers of the ring, for keys and values each.
    heads_together: heads whose blocks alternate in the work list, so that their keys stay in the L2 cache.
    ctas: of the grid, one an SM.
    """

    block_q: int = COMPUTE * ROWS
    block_k: int = 128
    stages: int = 2
    heads_together: int = 1
    ctas: int = 132


@dataclass(frozen=True, kw_only=True)
class Sizes:
    B: int
    T: int
    H: int
    K: int
    C: int
    V: int
    blocks: int
    """Blocks of the side that the kernel walks."""


class Place(NamedTuple):
    """One item of the work list."""

    row: Any
    head: Any
    block: Any
    shared_row: Any
    """The row of the plan, 0 if all batch rows share one."""
    count: Any
    full: Any


def tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory as wgmma and TMA want it: rows of 128 swizzled bytes."""
    columns = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128)))


def by_row(x: Any, shape: tuple[int, int]) -> Any:
    return lax.broadcast_in_dim(x, shape, (0,))


def by_column(x: Any, shape: tuple[int, int]) -> Any:
    return lax.broadcast_in_dim(x, shape, (1,))


def load(ref: Any, layout: Any) -> Any:
    """A vector from global or shared memory, in any layout."""
    return plgpu.load(ref, layout=layout, optimized=False)


def vector(value: Any, length: int, layout: Any) -> Any:
    return plgpu.layout_cast(jnp.full((length,), value, jnp.float32), layout)


def zeros(shape: tuple[int, int]) -> Any:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), TILE)


def present(operands: Mapping[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in operands.items() if x is not None}


def walk(
    sizes: Sizes, ctas: int, heads_together: int, at: Mapping[str, Any], visit: Callable[[Any, Place, Any], None]
) -> None:
    """Calls `visit(i, place, steps)` for the items of this CTA; `steps` tiles went through its ring before.

    Rounds run over the CTAs back and forth, so that the longer items of each round even out.
    """
    items, cta = sizes.B * sizes.H * sizes.blocks, lax.axis_index("cta")
    rounds, rest = divmod(items, ctas)
    backwards = ctas - 1 - cta
    if rest:
        last = backwards if rounds % 2 else cta
        rounds = rounds + (last < rest).astype(jnp.int32)
    rows = at["order"].shape[0]

    def one(i: Any, steps: Any) -> Any:
        item = i * ctas + jnp.where(lax.rem(i, 2) == 1, backwards, cta)
        row, item = lax.div(item, sizes.H * sizes.blocks), lax.rem(item, sizes.H * sizes.blocks)
        group, item = lax.div(item, heads_together * sizes.blocks), lax.rem(item, heads_together * sizes.blocks)
        shared = row if rows > 1 else jnp.int32(0)
        block = at["schedule"][shared, lax.div(item, heads_together)]
        head = group * heads_together + lax.rem(item, heads_together)
        place = Place(row, head, block, shared, at["count"][shared, block], at["full"][shared, block])
        visit(i, place, steps)
        return steps + place.count

    lax.fori_loop(0, rounds, one, jnp.int32(0))


class Seen(NamedTuple):
    """What the predicate needs of the rows of a tile."""

    positions: Any
    segments: Any
    head: Any


def visible(spec: Spec, rows: Seen, columns: Seen, shape: tuple[int, int]) -> Any:
    """Which pairs of a tile attend, with queries along rows."""
    seen = on_tile(spec.mask, rows.positions, columns.positions, rows.head)
    seen = seen & (by_column(columns.positions, shape) != EMPTY)
    if rows.segments is not None:
        seen = seen & (by_row(rows.segments, shape) == by_column(columns.segments, shape))
    return seen


def cooked(spec: Spec, slopes: bool) -> bool:
    """Whether scores are more than scaled products: they then leave `cook` in natural units."""
    return spec.soft_cap is not None or slopes


def to_log2(spec: Spec, slopes: bool) -> float:
    return LOG2E if cooked(spec, slopes) else spec.scale * LOG2E


def capped(spec: Spec, scores: Any) -> Any:
    """cap tanh(scale s / cap); tanh by exp2, whose error is that of float32 (the hardware's tanh is good to 2**-11)."""
    grown = jnp.exp2(scores * (2 * LOG2E * spec.scale / spec.soft_cap))
    return spec.soft_cap - (2 * spec.soft_cap) / (grown + 1)


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
) -> tuple[Array, Array]:
    """(out [B T H V], lse [B H padded T], natural logarithms). T and S must be multiples of 8."""
    (B, T, H, C), K, V = q.shape, k.shape[2], v.shape[-1]
    blocks = visits.order.shape[1]
    sizes = Sizes(B=B, T=T, H=H, K=K, C=C, V=V, blocks=blocks)
    operands = present(
        {"q": q, "k": k, "v": v, "heads": heads, "slopes": slopes, "sinks": sinks}
        | visits._asdict()
        | tokens._asdict()
    )
    kernel = Forward(spec, config, sizes, tuple(operands), min(config.ctas, B * H * blocks))
    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((B, T, H, V), spec.out_dtype),
            jax.ShapeDtypeStruct((B, H, blocks * config.block_q), jnp.float32),
        ),
        scratch_types=kernel.scratch(q.dtype),
        grid=(kernel.ctas,),
        grid_names=("cta",),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        kernel_name="flash_forward",
    )(*operands.values())


@dataclass(frozen=True)
class Forward:
    """The body of the kernel."""

    spec: Spec
    config: Config
    sizes: Sizes
    names: tuple[str, ...]
    ctas: int

    def scratch(self, dtype: Any) -> dict[str, Any]:
        c, n = self.config, self.sizes
        item = jnp.dtype(dtype).itemsize
        out = jnp.dtype(self.spec.out_dtype)
        tokens = 2 if "q_segments" in self.names else 1
        taken = item * (c.block_q * n.C + c.stages * c.block_k * (n.C + n.V))
        taken += 4 * (tokens * c.stages * c.block_k + c.block_q)
        widths = [n.V // part for part in (1, 2, 4, 8) if n.V % part == 0 and n.V // part * out.itemsize % 128 == 0]
        fit = [width for width in widths if taken + c.block_q * width * out.itemsize <= SHARED]
        if not fit:
            raise NotImplementedError(f"{c} needs more shared memory than a CTA has, {SHARED} bytes")
        ring = lambda arrivals: plgpu.Barrier(num_arrivals=arrivals, num_barriers=c.stages)
        found = {
            "q": tiled((c.block_q, n.C), dtype),
            "k": tiled((c.stages, c.block_k, n.C), dtype),
            "v": tiled((c.stages, c.block_k, n.V), dtype),
            "out": tiled((COMPUTE, ROWS, fit[0]), out),
            "lse": plgpu.SMEM((COMPUTE, ROWS), jnp.float32),
            "k_positions": plgpu.SMEM((c.stages, c.block_k), jnp.int32),
            "q_ready": plgpu.Barrier(),
            "k_ready": ring(1),
            "v_ready": ring(1 + tokens),
            "q_free": plgpu.Barrier(num_arrivals=COMPUTE),
            "k_free": ring(COMPUTE),
            "v_free": ring(COMPUTE),
            "turn": plgpu.Barrier(num_barriers=COMPUTE),
        }
        if tokens > 1:
            found["k_segments"] = plgpu.SMEM((c.stages, c.block_k), jnp.int32)
        return found

    def __call__(self, *refs: Any, **scratch: Any) -> None:  # noqa: the kernel's scratch comes by name
        *given, out, lse = refs
        at = dict(zip(self.names, given, strict=True)) | {"out": out, "lse": lse}
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < COMPUTE)
        def _():
            plgpu.set_max_registers(240, action="increase")
            self.compute(at, scratch, warpgroup)

        @pl.when(warpgroup == COMPUTE)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            self.memory(at, scratch)

    def memory(self, at: Mapping[str, Any], here: Mapping[str, Any]) -> None:
        """Fills the ring in the order in which the other warpgroups empty it."""
        c, n = self.config, self.sizes

        def visit(i: Any, place: Place, steps: Any) -> None:
            @pl.when(i > 0)
            def _():
                plgpu.barrier_wait(here["q_free"])

            rows = pl.ds(place.block * c.block_q, c.block_q)
            plgpu.copy_gmem_to_smem(at["q"].at[place.row, rows, place.head], here["q"], here["q_ready"])
            key_head = lax.div(place.head, n.H // n.K)
            tokens_row = place.row if at["k_positions"].shape[0] > 1 else 0

            @pl.loop(0, place.count)
            def _(m):
                step = steps + m
                slot = lax.rem(step, c.stages)
                keys = pl.ds(at["order"][place.shared_row, place.block, m] * c.block_k, c.block_k)

                def fetch(name, ref):
                    ready = here["k_ready" if name == "k" else "v_ready"].at[slot]
                    plgpu.copy_gmem_to_smem(ref, here[name].at[slot], ready)

                @pl.when(step >= c.stages)
                def _():
                    plgpu.barrier_wait(here["k_free"].at[slot])

                fetch("k", at["k"].at[place.row, keys, key_head])

                @pl.when(step >= c.stages)
                def _():
                    plgpu.barrier_wait(here["v_free"].at[slot])

                for name in ("k_positions", "k_segments"):
                    if name in here:
                        fetch(name, at[name].at[tokens_row, keys])
                fetch("v", at["v"].at[place.row, keys, key_head])

        walk(n, self.ctas, c.heads_together, at, visit)

    def compute(self, at: Mapping[str, Any], here: Mapping[str, Any], warpgroup: Any) -> None:
        c, n, spec = self.config, self.sizes, self.spec
        shape = (ROWS, c.block_k)
        has_slopes = "slopes" in at
        base = to_log2(spec, has_slopes)
        mine, other = here["turn"].at[warpgroup], here["turn"].at[1 - warpgroup]
        q = here["q"].at[pl.ds(warpgroup * ROWS, ROWS)]
        dtype = at["q"].dtype

        @pl.when(warpgroup == 1)
        def _():
            plgpu.barrier_arrive(other)  # the first turn

        def visit(i: Any, place: Place, steps: Any) -> None:
            first_row = place.block * c.block_q + warpgroup * ROWS
            tokens_row = place.row if at["q_positions"].shape[0] > 1 else 0
            of_rows = lambda name: load(at[name].at[tokens_row, pl.ds(first_row, ROWS)], BY_ROW) if name in at else None
            rows = Seen(of_rows("q_positions"), of_rows("q_segments"), at["heads"][place.head])
            slope = at["slopes"][place.head] if has_slopes else None
            sink = at["sinks"][place.head] * LOG2E if "sinks" in at else -jnp.inf
            top = vector(sink, ROWS, BY_ROW)
            total = vector(1.0 if "sinks" in at else 0.0, ROWS, BY_ROW)
            slot_of = lambda m: lax.rem(steps + m, c.stages)

            def softmax(m, carry, masked):
                """The weights of tile m, with maximum, sum and output brought to the new maximum."""
                out, top, total, scores = carry
                slot = slot_of(m)
                if masked or has_slopes:
                    plgpu.barrier_wait(here["v_ready"].at[slot])
                    of_columns = lambda name: load(here[name].at[slot], BY_COLUMN) if name in here else None
                    columns = Seen(of_columns("k_positions"), of_columns("k_segments"), None)
                if spec.soft_cap is not None:
                    scores = capped(spec, scores)
                elif cooked(spec, has_slopes):
                    scores = scores * spec.scale
                if has_slopes:
                    away = jnp.abs(by_row(rows.positions, shape) - by_column(columns.positions, shape))
                    scores = scores - slope * away.astype(jnp.float32)
                if masked:
                    scores = jnp.where(visible(spec, rows, columns, shape), scores, -jnp.inf)
                new_top = jnp.maximum(top, scores.max(axis=1) * base)
                pivot = jnp.where(new_top == -jnp.inf, 0.0, new_top) if masked else new_top
                decay = jnp.exp2(top - pivot)
                weights = jnp.exp2(scores * base - by_row(pivot, shape))
                total = total * decay + weights.sum(axis=1)
                out = out * by_row(decay, out.shape)
                carry = out, new_top, total, weights.astype(dtype)
                carry = lax.optimization_barrier(carry)
                if not (masked or has_slopes):
                    plgpu.barrier_wait(here["v_ready"].at[slot])
                return carry

            def step(masked):
                def body(m, carry):
                    out, top, total, weights = softmax(m, carry, masked)
                    slot, following = slot_of(m), slot_of(m + 1)
                    plgpu.barrier_wait(here["k_ready"].at[following])
                    plgpu.barrier_wait(mine)

                    def products(refs):
                        out, scores = refs
                        plgpu.wgmma(out, weights, here["v"].at[slot])
                        plgpu.wgmma(scores, q, here["k"].at[following].T)
                        plgpu.barrier_arrive(other)

                    out, scores = pl.run_state(products)((plgpu.ACC.init(out), plgpu.ACC.init(zeros(shape))))
                    plgpu.barrier_arrive(here["v_free"].at[slot])
                    plgpu.barrier_arrive(here["k_free"].at[following])
                    return out, top, total, scores

                return body

            def attend():
                plgpu.barrier_wait(here["k_ready"].at[slot_of(0)])
                plgpu.barrier_wait(mine)

                def product(scores):
                    plgpu.wgmma(scores, q, here["k"].at[slot_of(0)].T)
                    plgpu.barrier_arrive(other)
                    return scores[...]

                scores = pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))
                plgpu.barrier_arrive(here["k_free"].at[slot_of(0)])
                last = place.count - 1
                plain = jnp.minimum(place.full, last)
                carry = zeros((ROWS, n.V)), top, total, scores
                carry = lax.fori_loop(0, plain, step(False), carry)
                carry = lax.fori_loop(plain, last, step(True), carry)
                plgpu.barrier_arrive(here["q_free"])
                out, new_top, new_total, weights = softmax(last, carry, True)
                plgpu.barrier_wait(mine)

                def final(out):
                    plgpu.wgmma(out, weights, here["v"].at[slot_of(last)])
                    plgpu.barrier_arrive(other)

                out = pl.run_state(final)(plgpu.ACC.init(out))
                plgpu.barrier_arrive(here["v_free"].at[slot_of(last)])
                return out, new_top, new_total

            def nothing():
                plgpu.barrier_arrive(here["q_free"])
                return zeros((ROWS, n.V)), top, total

            plgpu.barrier_wait(here["q_ready"])
            out, top, total = lax.cond(place.count > 0, attend, nothing)
            self.store(at, here, warpgroup, place, first_row, out, top, total)

        walk(n, self.ctas, c.heads_together, at, visit)
        plgpu.wait_smem_to_gmem(0)

    def store(
        self,
        at: Mapping[str, Any],
        here: Mapping[str, Any],
        warpgroup: Any,
        place: Place,
        first_row: Any,
        out: Any,
        top: Any,
        total: Any,
    ) -> None:
        """Normalizes and writes; the copies end while the next item runs."""
        empty = total == 0
        share = jnp.where(empty, 0.0, 1.0 / jnp.where(empty, 1.0, total))
        lse = jnp.where(empty, -jnp.inf, top * (1 / LOG2E) + jnp.log(jnp.where(empty, 1.0, total)))
        out = out * by_row(share, out.shape)
        rows = pl.ds(first_row, ROWS)
        staged = here["out"].at[warpgroup]
        width = staged.shape[1]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        here["lse"].at[warpgroup][...] = lse
        for start in range(0, self.sizes.V, width):
            if start:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            staged[...] = out[:, start : start + width].astype(staged.dtype)
            plgpu.commit_smem()
            columns = pl.ds(start, width)
            plgpu.copy_smem_to_gmem(staged, at["out"].at[place.row, rows, place.head, columns])
            if not start:
                plgpu.copy_smem_to_gmem(here["lse"].at[warpgroup], at["lse"].at[place.row, place.head, rows])

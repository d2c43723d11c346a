"""What the flash kernels for Hopper share: the launch, shared memory, the work list and the scores of a tile.

All of them are one CTA an SM: a memory warpgroup fills a ring of buffers by TMA, two compute warpgroups of 64 rows each
empty it. Rows are those of the side whose results stay in registers, columns those that stream by.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.flash.scores import Spec
from pallas_kernels.plan import EMPTY
from pallas_kernels.predicate import on_tile

ROWS = 64
"""Rows of a warpgroup: the height of a wgmma tile."""
COMPUTE = 2
"""Warpgroups that compute; the one behind them moves memory."""
SHARED = 232448 - 512
"""Bytes of shared memory of a CTA, less what barriers take."""

TILE = plgpu.Layout.WGMMA
BY_ROW = plgpu.Layout.WGMMA.reduce(1)
BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the operands: batch, queries, keys, heads, key heads, dims of keys and values; and what a kernel walks."""

    B: int
    T: int
    S: int
    H: int
    K: int
    C: int
    V: int
    heads: int
    blocks: int
    ctas: int
    heads_together: int


def sizes(q: Any, k: Any, v: Any, order: Any, *, heads: int, heads_together: int, ctas: int) -> Sizes:
    """For a kernel that walks `heads` times the blocks of `order`; heads alternate in groups that divide them."""
    (B, T, H, C), (S, K), V = q.shape, k.shape[1:3], v.shape[-1]
    together = max(n for n in range(1, min(heads, heads_together) + 1) if heads % n == 0)
    blocks = order.shape[1]
    ctas = min(ctas, B * heads * blocks)
    return Sizes(B=B, T=T, S=S, H=H, K=K, C=C, V=V, heads=heads, blocks=blocks, ctas=ctas, heads_together=together)


# ---------------------------------------------------------------------------------------------- launch


def cost(n: Sizes, order: Any, pairs: int, of_keys: int, of_values: int) -> pl.CostEstimate:
    """Of a kernel that does so many products of either width on tiles of `pairs`, if every list of visits is full."""
    scores = n.B * n.heads * order.shape[1] * order.shape[2] * pairs
    return pl.CostEstimate(
        flops=2 * scores * (of_keys * n.C + of_values * n.V),
        transcendentals=scores,
        bytes_accessed=2 * n.B * (n.T * n.H + n.S * n.K) * (n.C + n.V),
    )


def launch(
    make: Callable[..., Kernel],
    operands: Mapping[str, Any],
    out: Mapping[str, Any],
    scratch: Mapping[str, Any],
    n: Sizes,
    name: str,
    most: pl.CostEstimate,
) -> dict[str, Any]:
    """Runs `make(n, at, here, warpgroup)`: global references by name, those of `out` too, and shared memory by name."""
    names = (*operands, *out)

    def body(*refs: Any) -> None:
        *given, here = refs
        warpgroup = lax.axis_index("warpgroup")
        kernel = make(n, dict(zip(names, given, strict=True)), here, warpgroup)

        @pl.when(warpgroup < COMPUTE)
        def _():
            plgpu.set_max_registers(240, action="increase")
            kernel.compute()

        @pl.when(warpgroup == COMPUTE)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            kernel.memory()

    found = plgpu.kernel(
        body,
        out_type=tuple(out.values()),
        scratch_types=(dict(scratch),),
        grid=(n.ctas,),
        grid_names=("cta",),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        kernel_name=name,
        **hopper.told(most),
    )(*operands.values())
    return dict(zip(out, found, strict=True))


def present(operands: Mapping[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in operands.items() if x is not None}


def wait_when(condition: Any, barrier: Any) -> None:
    pl.when(condition)(lambda: plgpu.barrier_wait(barrier))


def tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory as wgmma and TMA want it: rows of 128 swizzled bytes."""
    columns = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128)))


def ring(stages: int, arrivals: int) -> Any:
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages)


def spent(scratch: Mapping[str, Any]) -> int:
    """Bytes of the arrays in shared memory, each of which begins at a multiple of 1024."""
    sizes = [math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in scratch.values() if hasattr(x, "dtype")]
    return sum(-(-size // 1024) * 1024 for size in sizes)


def staging(scratch: Mapping[str, Any], columns: Sequence[int], dtype: Any) -> Any:
    """Room to write 64 rows a warpgroup from, as many columns at a time as fit beside `scratch`.

    Raises:
        NotImplementedError: not even 128 bytes of a row fit.
    """
    item = jnp.dtype(dtype).itemsize
    narrow = math.gcd(*columns)
    for width in [narrow // part for part in (1, 2, 3, 4, 6, 8) if narrow % part == 0]:
        if width * item % 128 == 0 and spent(scratch) + COMPUTE * ROWS * width * item <= SHARED:
            return tiled((COMPUTE, ROWS, width), dtype)
    raise NotImplementedError(f"tiles of {spent(scratch)} bytes and results of {columns} columns outgrow shared memory")


def write(staged: Any, values: Any, target: Any) -> None:
    """Writes a tile of registers to rows of global memory by TMA; the last copies may still run when it returns."""
    width = staged.shape[1]
    for start in range(0, values.shape[1], width):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        staged[...] = values[:, start : start + width].astype(staged.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, target.at[:, pl.ds(start, width)])


# ---------------------------------------------------------------------------------------------- the work list


class Place(NamedTuple):
    """One item of the work list, and the row of the plan that tells its visits."""

    row: Any
    head: Any
    block: Any
    plan_row: Any
    count: Any
    full: Any


def walk(
    n: Sizes, at: Mapping[str, Any], steps_of: Callable[[Place], Any], visit: Callable[[Any, Place, Any], None]
) -> None:
    """Calls `visit(i, place, steps)` for the items of this CTA; `steps` tiles went through its ring before.

    Rounds run over the CTAs back and forth, so that the longer items of each round even out.
    """
    items, cta = n.B * n.heads * n.blocks, lax.axis_index("cta")
    rounds, rest = divmod(items, n.ctas)
    backwards = n.ctas - 1 - cta
    if rest:
        last = backwards if rounds % 2 else cta
        rounds = rounds + (last < rest).astype(jnp.int32)
    shared = at["order"].shape[0] == 1

    def one(i: Any, steps: Any) -> Any:
        item = i * n.ctas + jnp.where(lax.rem(i, 2) == 1, backwards, cta)
        row, item = lax.div(item, n.heads * n.blocks), lax.rem(item, n.heads * n.blocks)
        group, item = lax.div(item, n.heads_together * n.blocks), lax.rem(item, n.heads_together * n.blocks)
        plan_row = jnp.int32(0) if shared else row
        block = at["schedule"][plan_row, lax.div(item, n.heads_together)]
        head = group * n.heads_together + lax.rem(item, n.heads_together)
        place = Place(row, head, block, plan_row, at["count"][plan_row, block], at["full"][plan_row, block])
        visit(i, place, steps)
        return steps + steps_of(place)

    lax.fori_loop(0, rounds, one, jnp.int32(0))


# ---------------------------------------------------------------------------------------------- kernels


@dataclass(frozen=True)
class Kernel(ABC):
    """What a CTA does: the operands `stay` are there for an item of the work list, others stream by in tiles.

    `at` is global memory, `here` shared memory and its barriers, by name.
    """

    spec: Spec
    config: Any
    n: Sizes
    at: Mapping[str, Any]
    here: Mapping[str, Any]
    warpgroup: Any

    stay = ("q",)
    """The first names the barriers of all."""
    streams = "k"
    """One that streams by."""

    @property
    def stages(self) -> int:
        return self.here[self.streams].shape[0]

    def steps(self, place: Place) -> Any:
        """Tiles of an item."""
        return place.count

    def tokens_row(self, place: Place, side: str) -> Any:
        return place.row if self.at[f"{side}_positions"].shape[0] > 1 else 0

    def own(self, place: Place) -> tuple[Any, Held]:
        """Which rows of an item are the warpgroup's, and their tokens."""
        side = self.stay[0]
        rows = pl.ds(place.block * self.here[side].shape[0] + self.warpgroup * ROWS, ROWS)
        row = self.tokens_row(place, side)
        return rows, held(lambda name: load(self.at[name].at[row, rows], BY_ROW), side, self.at)

    def memory(self) -> None:
        """Fills the ring in the order in which the compute warpgroups empty it."""
        at, here, side = self.at, self.here, self.stay[0]

        def visit(i: Any, place: Place, steps: Any) -> None:
            wait_when(i > 0, here[f"{side}_free"])
            size = here[side].shape[0]
            rows = pl.ds(place.block * size, size)
            for name in self.stay:
                plgpu.copy_gmem_to_smem(at[name].at[place.row, rows, place.head], here[name], here[f"{side}_ready"])
            tile = self.tiles(place)

            @pl.loop(0, self.steps(place))
            def _(m):
                step = steps + m
                slot = lax.rem(step, self.stages)
                for free, ready, name, source in tile(m):
                    if free:
                        wait_when(step >= self.stages, here[free].at[slot])
                    plgpu.copy_gmem_to_smem(source, here[name].at[slot], here[ready].at[slot])

        walk(self.n, at, self.steps, visit)

    def compute(self) -> None:
        walk(self.n, self.at, self.steps, self.block)
        plgpu.wait_smem_to_gmem(0)

    @abstractmethod
    def block(self, i: Any, place: Place, steps: Any) -> None:
        """64 rows of an item, over its tiles."""

    @abstractmethod
    def tokens(self, place: Place, m: Any) -> Any:
        """The tokens of part m of the blocks that an item visits."""

    def tiles(self, place: Place) -> Callable[[Any], Any]:
        """What tile m is copied from: (barrier to wait for or None, barrier to arrive at, name, part of the operand).

        These are keys and values; other kernels say otherwise.
        """
        at, here = self.at, self.here
        key_head = lax.div(place.head, self.n.H // self.n.K)
        row = self.tokens_row(place, "k")

        def tile(m):
            keys = self.tokens(place, m)
            for name in ("k", "v"):
                yield f"{name}_free", f"{name}_ready", name, at[name].at[place.row, keys, key_head]
            for name in ("k_positions", "k_segments"):
                if name in here:
                    yield None, "v_ready", name, at[name].at[row, keys]

        return tile


# ---------------------------------------------------------------------------------------------- values


def load(ref: Any, layout: Any) -> Any:
    """A vector from global or shared memory, in any layout."""
    return plgpu.load(ref, layout=layout, optimized=False)


def vector(value: Any, length: int, layout: Any) -> Any:
    return plgpu.layout_cast(jnp.full((length,), value, jnp.float32), layout)


def zeros(shape: tuple[int, int]) -> Any:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), TILE)


def along(axis: int, x: Any, shape: tuple[int, int]) -> Any:
    """A vector on an axis of a tile."""
    return lax.broadcast_in_dim(x, shape, (axis,))


class Held(NamedTuple):
    """Positions and segments of the tokens on one side of a tile."""

    positions: Any
    segments: Any


def held(read: Callable[[str], Any], side: str, names: Mapping[str, Any]) -> Held:
    """The tokens of a side, "q" or "k"; segments if there are any."""
    segments = f"{side}_segments"
    return Held(read(f"{side}_positions"), read(segments) if segments in names else None)


def visible(spec: Spec, q: Held, k: Held, head: Any, shape: tuple[int, int], keys_axis: int) -> Any:
    """Which pairs of a tile attend."""
    seen = on_tile(spec.mask, q.positions, k.positions, head, keys_axis)
    seen = seen & (along(keys_axis, k.positions, shape) != EMPTY)
    if q.segments is not None:
        seen = seen & (along(1 - keys_axis, q.segments, shape) == along(keys_axis, k.segments, shape))
    return seen


def distance(q: Held, k: Held, shape: tuple[int, int], keys_axis: int) -> Any:
    away = along(1 - keys_axis, q.positions, shape) - along(keys_axis, k.positions, shape)
    return jnp.abs(away).astype(jnp.float32)

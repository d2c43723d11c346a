"""What the flash kernels for TPUs share: the launch, the walk over the tiles of a plan, and what a tile is made of.

A grid step holds one block of this side (queries, or keys for their own gradients) and loops over the tiles that the
plan lists for it; the blocks of the other side come by copies of the kernel's own, one ahead of the one that is worked
on. Scalar memory holds the counts of all blocks and the list of one, so it is linear in the number of blocks (at 1M
tokens a list of all tiles would be several times that memory), a tile that is not visited costs nothing, and lists may
be known when the program runs only. The last tile of a block sends for the first of the next: only the first block of
a head waits.

Arrays are [B H T C] (matrices) or [B H 1 T] (rows of numbers a token), with 1 for a B or H over which they do not vary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash.scores import Spec
from pallas_kernels.plan import EMPTY, Visits
from pallas_kernels.predicate import on_tile

LANES = 128
"""Numbers of a vector register's row; blocks of tokens are whole multiples."""
SLOTS = 2
"""Buffers of what comes by copies."""


class Walk(NamedTuple):
    """What a kernel walks: for each row and head, `blocks` times `group` items one after another, on one core.

    An item is a block of this side and one head of the other, of which each block meets `group` in turn; `shared`
    heads of this side meet the same head of the other.
    """

    B: int
    heads: int
    blocks: int
    group: int
    shared: int

    def block(self, item: Any) -> Any:
        return lax.div(item, self.group) if self.group > 1 else item

    def other(self, head: Any, item: Any) -> Any:
        """The head of the other side."""
        head = lax.div(head, self.shared) if self.shared > 1 else head
        return head * self.group + lax.rem(item, self.group) if self.group > 1 else head


@dataclass(frozen=True)
class Tiles:
    """The tiles of a grid step: of an item of a head of a row.

    at: references by name; to what streams by there are two, `x` in main memory and `x_here`.
    size: tokens of a block of the other side.
    shared: whether all rows have one plan.
    """

    walk: Walk
    at: Mapping[str, Any]
    streamed: tuple[str, ...]
    size: int
    shared: bool
    row: Any
    head: Any
    item: Any

    @property
    def other(self) -> Any:
        """The head of the other side."""
        return self.walk.other(self.head, self.item)

    def each(self, visit: Callable[[Any, bool], None]) -> None:
        """Calls `visit(slot, masked)` for every tile; slot says where in the buffers the other side's block lies."""
        at, item, last = self.at, self.item, self.walk.blocks * self.walk.group - 1
        following = jnp.minimum(item + 1, last)
        more = (item < last) & (at["count"][self._place(following)] > 0)
        count, full = (at[name][self._place(item)] for name in ("count", "full"))
        first = lambda item: at["lead"][self._place(item)]
        widest = at["order"].shape[1] - 1

        @pl.when(item == 0)
        def _():
            at["steps"][0] = 0
            pl.when(count > 0)(lambda: self._start(item, first(item), 0))

        def tile(masked: bool) -> Callable[[Any, Any], Any]:
            def run(m: Any, step: Any) -> Any:
                slot, within = lax.rem(step, SLOTS), m + 1 < count

                @pl.when(within | more)
                def _():
                    block = jnp.where(within, at["order"][0, jnp.minimum(m + 1, widest)], first(following))
                    self._start(jnp.where(within, item, following), block, 1 - slot)

                for copy in self._copies(item, 0, slot):
                    copy.wait()
                visit(slot, masked)
                return step + 1

            return run

        step = lax.fori_loop(0, full, tile(False), at["steps"][0])
        step = lax.fori_loop(full, count, tile(True), step)
        at["steps"][0] = step
        pl.when((count == 0) & more)(lambda: self._start(following, first(following), lax.rem(step, SLOTS)))

    def _place(self, item: Any) -> Any:
        """Of an item's block in lists of all blocks."""
        block = self.walk.block(item)
        return block if self.shared else self.row * self.walk.blocks + block

    def _start(self, item: Any, block: Any, slot: Any) -> None:
        for copy in self._copies(item, block, slot):
            copy.start()

    def _copies(self, item: Any, block: Any, slot: Any) -> Iterator[Any]:
        """Those that bring a block of the other side into a slot."""
        row, head = self.row, self.walk.other(self.head, item)
        tokens = pl.ds(pl.multiple_of(block * self.size, self.size), self.size)
        for i, name in enumerate(self.streamed):
            x = self.at[name]
            one = x.at[row if x.shape[0] > 1 else 0, head if x.shape[1] > 1 else 0]
            source = one.at[:, tokens] if x.shape[2] == 1 else one.at[tokens]
            yield pltpu.make_async_copy(source, self.at[f"{name}_here"].at[slot], self.at["arrived"].at[slot, i])


def launch(
    body: Callable[[Mapping[str, Any], Tiles], None],
    name: str,
    walk: Walk,
    visits: Visits,
    scalars: Mapping[str, Array],
    own: Mapping[str, Array],
    streamed: Mapping[str, Array],
    out: Mapping[str, Any],
    scratch: Mapping[str, Any],
    block: int,
    size: int,
    most: pl.CostEstimate,
    config: Any,
) -> dict[str, Array]:
    """Runs `body(at, tiles)` for every item, with references by name.

    Args:
        visits: of this side's blocks.
        scalars: arrays [H], wholly in scalar memory.
        own, streamed: arrays of this and of the other side, in blocks of `block` and of `size` tokens.
        out: shapes of results, in blocks like `own`.
        config: `tpu.Config`.
    """
    P, n, W = visits.order.shape
    row = lambda b: b if P > 1 else 0
    lists = {"count": visits.count, "full": visits.full, "lead": visits.order[..., 0]}
    lists = {name: jnp.asarray(x, jnp.int32).reshape(-1) for name, x in lists.items()}
    order = jnp.asarray(visits.order, jnp.int32).reshape(P * n, 1, W)
    of_order = pl.BlockSpec(
        (None, 1, W), lambda b, h, t, *_: (row(b) * n + walk.block(t), 0, 0), memory_space=pltpu.SMEM
    )
    here = {f"{name}_here": pltpu.VMEM((SLOTS, *_cut(x, size)), x.dtype) for name, x in streamed.items()}
    scratch = {
        **scratch,
        **here,
        "steps": pltpu.SMEM((1,), jnp.int32),
        "arrived": pltpu.SemaphoreType.DMA((SLOTS, len(streamed))),
    }
    names = (*lists, "order", *scalars, *own, *streamed, *out, *scratch)

    def kernel(*refs: Any) -> None:
        at = dict(zip(names, refs, strict=True))
        body(at, Tiles(walk, at, tuple(streamed), size, P == 1, *map(pl.program_id, range(3))))

    varies = jax.typeof(next(iter(own.values()))).manual_axis_type  # of all arrays alike
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varies) for x in out.values())
    in_scalar_memory, where_they_lie = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pl.ANY)
    call = pl.pallas_call(
        kernel,
        out_shape=shapes,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(lists),
            grid=(walk.B, walk.heads, walk.blocks * walk.group),
            in_specs=[
                of_order,
                *(in_scalar_memory for _ in scalars),
                *(_block(walk, x, block) for x in own.values()),
                *(where_they_lie for _ in streamed),
            ],
            out_specs=tuple(_block(walk, x, block) for x in out.values()),
            scratch_shapes=tuple(scratch.values()),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=config.vmem
        ),
        cost_estimate=most,
        name=name,
        interpret=config.interpret,
    )
    call = jax.custom_batching.sequential_vmap(call)  # there is no other way to map copies that a kernel starts itself
    found = call(*lists.values(), order, *scalars.values(), *own.values(), *streamed.values())
    return dict(zip(out, found, strict=True))


def _cut(x: Any, tokens: int) -> tuple[int, int]:
    """The shape of so many tokens of an array."""
    return (1, tokens) if x.shape[2] == 1 else (tokens, x.shape[3])


def _block(walk: Walk, x: Any, tokens: int) -> pl.BlockSpec:
    def index(b: Any, h: Any, item: Any, *_: Any) -> tuple[Any, ...]:
        at = walk.block(item)
        where = (0, at) if x.shape[2] == 1 else (at, 0)
        return b if x.shape[0] > 1 else 0, h if x.shape[1] > 1 else 0, *where

    return pl.BlockSpec((None, None, *_cut(x, tokens)), index)


def present(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in arrays.items() if x is not None}


# ---------------------------------------------------------------------------------------------- values


def upright(row: Any) -> Any:
    """[1 n] to [n LANES], the same in every lane."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def lying(column: Any) -> Any:
    """[n LANES], the same in every lane, to [1 n]."""
    return column.T[:1]


def lanes(column: Any, width: int) -> Any:
    """[n LANES], the same in every lane, to [n width]."""
    whole = jnp.concatenate([column] * pl.cdiv(width, LANES), axis=1)
    return whole if width % LANES == 0 else whole[:, :width]


def product(a: Any, b: Any, axis: int) -> Any:
    """a [n x] times b, [x m] or, where x is its axis 1, [m x]; float32 sums, and float32 products of float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((1,), (axis,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


class Held(NamedTuple):
    """Positions and segments of the tokens on one side of a tile: [n 1] or [1 m]."""

    positions: Any
    segments: Any


def visible(spec: Spec, q: Held, k: Held, head: Any, keys_axis: int) -> Any:
    """Which pairs of a tile attend."""
    seen = on_tile(spec.mask, q.positions, k.positions, head, keys_axis)
    seen = seen & (jnp.broadcast_to(k.positions, seen.shape) != EMPTY)
    return seen if q.segments is None else seen & (q.segments == k.segments)


def distance(q: Held, k: Held) -> Any:
    return jnp.abs(q.positions - k.positions).astype(jnp.float32)


def cost(walk: Walk, visits: Visits, pairs: int, width: int, arrays: Mapping[str, Any]) -> pl.CostEstimate:
    """Of tiles of `pairs` whose products have `width` terms together, if every list of visits is full."""
    scores = walk.B * walk.heads * walk.group * visits.order.shape[1] * visits.order.shape[2] * pairs
    sizes = (x.size * jnp.dtype(x.dtype).itemsize for x in arrays.values())
    return pl.CostEstimate(flops=2 * scores * width, transcendentals=scores, bytes_accessed=sum(sizes))

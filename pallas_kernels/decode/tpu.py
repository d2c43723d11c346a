"""Decode attention for TPUs, in Mosaic TPU.

A program is a part of a row's visited blocks. It copies block after block from the cache to VMEM, pages by the table
in scalar memory, the next ones while it works on one, and writes its part of the result, to be merged.

Not measured: no TPU was at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode.blocks import Blocks, Inputs, Setting, by_token, grouped, spread, view, wanted
from pallas_kernels.decode.config import Config, cost
from pallas_kernels.decode.fold import Carry, Spec, finish, fold, lines_of, start

VMEM = 32 * 2**20
"""Bytes of VMEM that a program may use, of 64 MiB or more on the chips that are meant (v5e, v5p, v6e). Half of it is
enough, but where a row has hundreds of queries."""


class Held(NamedTuple):
    """Keys, values (None: a part of the keys) and what is told of slots: in HBM, or blocks of them in VMEM."""

    k: Any
    v: Any
    told: Any


@dataclass(frozen=True)
class Plan:
    """What else is known while tracing: n blocks a row, P pieces a block, of `size` lines each, the first of which is
    `unit` times the number in the table, or those of a page."""

    spec: Spec
    config: Config
    blocks: int
    pieces: int
    size: int
    unit: int
    paged: bool


def parts(setting: Setting, inputs: Inputs, found: Blocks, config: Config, interpret: Any) -> tuple[Array, Array]:
    """(out [B splits T H V], lse [B splits T H]) float32 over disjoint sets of slots."""
    (B, T, H, C), heads, form = inputs.q.shape, inputs.k.shape[2], config.form
    spec = spec_of(setting, inputs, form)
    q = grouped(inputs.q, heads, form)
    want = grouped(wanted(inputs, form), heads, form, fill=-1)
    n, pieces, unit = found.order.shape[1], found.pieces.shape[2], heads if spec.mixed else 1
    X = config.block * unit
    plan = Plan(spec, config, n, pieces, X // pieces, unit, inputs.pages is not None)
    held = Held(view(inputs.k, form), None if inputs.v is None else view(inputs.v, form), found.told)
    (g, R), V = q.shape[1:3], spec.values
    tables = spread(heads, form)
    own = lambda c: pl.BlockSpec((1, g, R, c), lambda b, *_: (b, 0, 0, 0))
    of_part = lambda c: pl.BlockSpec((1, 1, g, R, c), lambda b, s, *_: (b, s, 0, 0, 0))
    lying = lambda dim: (dim, X) if spec.lanes else (X, dim)
    room = lambda shape, dtype: pltpu.VMEM((config.stages, *shape), dtype)
    scratch = Held(
        room((g, *lying(C)), inputs.k.dtype),
        None if inputs.v is None else room((g, *lying(V)), inputs.v.dtype),
        room(found.told.shape[2:], jnp.float32),
    )
    out, lse = pl.pallas_call(
        partial(_program, plan),
        name="decode_attention",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, config.splits),
            in_specs=[
                own(C),
                own(4),
                jax.tree.map(lambda x: pl.BlockSpec(x.shape, lambda *_: (0, 0)), tables),
                jax.tree.map(lambda _: pl.BlockSpec(memory_space=pltpu.HBM), held),
            ],
            out_specs=[of_part(V), of_part(1)],
            scratch_shapes=[
                scratch,
                Carry(*(pltpu.VMEM((g, R, c), jnp.float32) for c in (V, 1, 1))),
                pltpu.SemaphoreType.DMA((config.stages,)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((B, config.splits, g, R, c), jnp.float32) for c in (V, 1)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM),
        cost_estimate=cost(setting, inputs),
        interpret=interpret,
    )(found.order.reshape(-1), found.count, found.pieces.reshape(-1), q, want, tables, held)
    return by_token(out, T, H, heads), by_token(lse, T, H, heads)[..., 0]


def spec_of(setting: Setting, inputs: Inputs, form: str) -> Spec:
    """What the arithmetic of a block needs to know."""
    there = tuple(x is not None for x in (inputs.k_scale, inputs.v_scale, inputs.slopes))
    heads, order = inputs.k.shape[2], (form == "lines", form == "lanes")
    return Spec(heads, *order, setting.scale, setting.soft_cap, *there, inputs.v is None, setting.values(inputs))


def _program(plan: Plan, order: Any, count: Any, table: Any, *refs: Any) -> None:
    """Folds the visited blocks first..last - 1 of row b."""
    q, want, tables, held, out, lse, here, carry, arrived = refs
    config, spec = plan.config, plan.spec
    b, part = pl.program_id(0), pl.program_id(1)
    each = (count[b] + config.splits - 1) // config.splits
    first = part * each
    last = jnp.minimum(first + each, count[b])

    def copies(i: Any) -> list[Any]:
        slot = lax.rem(i - first, config.stages)
        block = order[b * plan.blocks + i]
        found = [pltpu.make_async_copy(held.told.at[b, block], here.told.at[slot], arrived.at[slot])]
        for source, room in ((held.k, here.k), (held.v, here.v)):
            if source is not None:
                for p in range(plan.pieces):
                    place = table[(b * plan.blocks + block) * plan.pieces + p]
                    whence, whither = _piece(plan, source, b, place), _along(plan, room.at[slot], p * plan.size)
                    found.append(pltpu.make_async_copy(whence, whither, arrived.at[slot]))
        return found

    def fetch(i: Any) -> None:
        @pl.when(i < last)
        def _():
            for copy in copies(i):
                copy.start()

    for group in range(spec.groups):
        for room, fill in zip(carry, start(*carry.sums.shape[1:]), strict=True):
            room[group] = fill
    for ahead in range(config.stages - 1):
        fetch(first + ahead)

    def step(i: Any, _: None) -> None:
        fetch(i + config.stages - 1)
        for copy in copies(i):
            copy.wait()
        slot = lax.rem(i - first, config.stages)
        for group in range(spec.groups):
            k = here.k[slot, group]
            v = (k[: spec.values] if spec.lanes else k[:, : spec.values]) if here.v is None else here.v[slot, group]
            lines = lines_of(spec, group, here.told[slot], *(x[...] for x in tables))
            so_far = Carry(*(room[group] for room in carry))
            found = fold(spec, q[0, group], want[0, group], k, v, lines, so_far)
            for room, value in zip(carry, found, strict=True):
                room[group] = value

    lax.fori_loop(first, last, step, None)
    for group in range(spec.groups):
        out[0, 0, group], lse[0, 0, group] = finish(Carry(*(room[group] for room in carry)))


def _piece(plan: Plan, source: Any, b: Any, place: Any) -> Any:
    """A page, or lines of a row's own slots."""
    if plan.paged:
        return source.at[place]
    return _along(plan, source.at[b], pl.multiple_of(place * plan.unit, 128 * plan.unit))


def _along(plan: Plan, room: Any, first: Any) -> Any:
    """`size` lines of [group, line, dim] or [group, dim, line]."""
    lines = pl.ds(first, plan.size)
    return room.at[:, :, lines] if plan.spec.lanes else room.at[:, lines]

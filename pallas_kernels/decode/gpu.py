"""Decode attention for Hopper (sm_90a), in Mosaic GPU.

A worker is a warpgroup with a ring of tiles of its own: 64 slots of a key head and their values, which it has copied
by TMA, multiplies, and has copied over, so workers wait for memory alone. The queries that share a key head are padded
to the 64 rows of a matrix instruction. That wastes products, not time: they take a third of what the copies take.

The visited tiles of all rows, one after another, are divided evenly among units of workers, each worker of a unit
taking another key head, so that heads that lie side by side in memory are read at once. What a unit finds of a row is
a part, to be merged by its lse.

Values of more columns than a worker's registers hold are split between workers that share a ring and compute the same
scores. Keys and values in 8 bits become 16 bits in shared memory before they are multiplied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.decode.blocks import Inputs, Setting, code, merged, of_slots
from pallas_kernels.decode.config import cost
from pallas_kernels.flash.scores import LOG2E, Spec, cook
from pallas_kernels.flash.tiles import BY_COLUMN, BY_ROW, ROWS, TILE, along, load, ring, tiled, vector, zeros

SLOTS = 64
"""Of a tile."""
SHARED = 232448 - 2048
"""Bytes of shared memory of a CTA, less what barriers take."""
TYPES = ("bfloat16", "float16")
"""Of queries, and of keys and values if they are alike."""
EIGHT_BITS = ("int8", "float8_e4m3fn")
"""Of keys and values of queries in bfloat16."""
DIMS = (64, 128, 256)
"""Of keys, and of values."""
LATENTS = (64, 128, 256, 512, 576)
"""Columns of keys that are values, too."""
WIDEST = 256
"""Columns of values that a worker sums at most."""
TOGETHER = 8
"""Key heads that are read at once, at most."""


@dataclass(frozen=True)
class Config:
    """No result depends on it beyond rounding.

    Args:
        workers: warpgroups of a CTA.
        stages: tiles of a worker's ring.
        ctas: of the grid, one an SM.
    """

    workers: int = 2
    stages: int = 3
    ctas: int = 132

    @classmethod
    def of(cls, setting: Setting, inputs: Inputs) -> Config:
        """Two workers, if there is room for two tiles of each, or as many as share a ring."""
        split = split_of(setting, inputs)
        workers = (2, 1) if split == 1 else (split,)
        choices = [cls(count, stages) for count in workers for stages in (4, 3, 2, 1)]
        fits = lambda c: c.bytes(setting, inputs) <= SHARED and (c.stages > 1 or c.workers == workers[-1])
        return next((c for c in choices if fits(c)), choices[-1])

    def bytes(self, setting: Setting, inputs: Inputs) -> int:
        """Shared memory that a CTA needs."""
        C, V, item = inputs.q.shape[-1], setting.values(inputs), inputs.k.dtype.itemsize
        wide = SLOTS * max(C, V) if item == 1 else 0
        tile = SLOTS * (C if inputs.v is None else C + V) * item
        return self.workers // split_of(setting, inputs) * (2 * (ROWS * C + wide) + self.stages * tile)


def split_of(setting: Setting, inputs: Inputs) -> int:
    """Workers that share a ring, each of which sums some columns of values, no more than its registers hold."""
    return -(-setting.values(inputs) // WIDEST)


@dataclass(frozen=True)
class Sizes:
    """What else is known while tracing: B rows, of `heads` times 64 queries, each `spread` of which share a key head;
    C and V dims; `tiles` of a row; pieces of a tile that lie together, and of pages; units of `together` workers, and
    groups of as many heads; whether keys are `both`, values too; `split` as `split_of` tells."""

    B: int
    heads: int
    spread: int
    C: int
    V: int
    tiles: int
    piece: int
    per_page: int
    together: int
    groups: int
    units: int
    both: bool
    split: int

    @property
    def width(self) -> int:
        """Columns of values of a worker."""
        return self.V // self.split

    @classmethod
    def of(cls, setting: Setting, inputs: Inputs, config: Config) -> Sizes:
        (B, T, H, C), (_, L, K, _) = inputs.q.shape, inputs.k.shape
        spread = -(-T * (H // K) // ROWS)
        split = split_of(setting, inputs)
        heads, workers = K * spread, config.workers // split * config.ctas
        together = max(n for n in range(1, TOGETHER + 1) if heads % n == 0 and n <= workers)
        piece = SLOTS if inputs.pages is None else min(L, SLOTS)
        tiles = -(-inputs.k_positions.shape[1] // SLOTS)
        per_page = 0 if inputs.pages is None else max(L // SLOTS, 1)
        units = workers // together
        values = setting.values(inputs)
        groups, both = heads // together, inputs.v is None
        return cls(B, heads, spread, C, values, tiles, piece, per_page, together, groups, units, both, split)


def misfit(setting: Setting, inputs: Inputs, config: Config | None = None) -> str | None:
    """Why the kernel does not take these arguments."""
    q, k, v = inputs.q, inputs.k, inputs.k if inputs.v is None else inputs.v
    if q.dtype.name not in TYPES:
        return f"queries of {q.dtype}, not of {' or '.join(TYPES)}"
    stored = (q.dtype.name, *EIGHT_BITS) if q.dtype == jnp.bfloat16 else (q.dtype.name,)
    if k.dtype != v.dtype or k.dtype.name not in stored:
        return f"keys of {k.dtype} and values of {v.dtype} for queries of {q.dtype}, not both {' or '.join(stored)}"
    C, V = k.shape[-1], setting.values(inputs)
    if inputs.v is None:
        if k.dtype != q.dtype or V not in LATENTS or C % 64:
            return f"latents of {k.dtype}, {V} of {C} columns values; not of {q.dtype} and {LATENTS} of 64 n columns"
    elif not {C, V} <= {*DIMS}:
        return f"dims {C} and {V} of keys and values, not of {DIMS}"
    if not setting.scale > 0:
        return f"scale {setting.scale} is not positive"
    if inputs.pages is not None and k.shape[1] % SLOTS and k.shape[1] not in (8, 16, 32):
        return f"pages of {k.shape[1]} tokens, neither 8, 16 or 32 nor a multiple of {SLOTS}"
    config = Config.of(setting, inputs) if config is None else config
    size, split = config.bytes(setting, inputs), split_of(setting, inputs)
    if config.stages < 1 or config.workers < 1 or config.workers % split or size > SHARED:
        return f"{config.stages} tiles for each of {config.workers} workers, {size} bytes"
    return None


def attention(setting: Setting, inputs: Inputs, config: Config | None = None) -> tuple[Array, Array]:
    """(out [B T H V], lse [B T H] float32). Slots that are no multiple of 8 are copied to a cache that has one."""
    if inputs.pages is None and (over := -inputs.slots % 8):
        pad = lambda x, fill: jnp.pad(x, ((0, 0), (0, over), *((0, 0),) * (x.ndim - 2)), constant_values=fill)
        if inputs.q_segments is None:
            inputs = inputs._replace(
                q_segments=jnp.zeros_like(inputs.q_positions), k_segments=jnp.zeros_like(inputs.k_positions)
            )
        slots = {
            name: x for name, x in inputs._asdict().items() if name[0] in "kv" and x is not None and x.shape[1] > 1
        }
        inputs = inputs._replace(**{name: pad(x, -1 if name == "k_segments" else 0) for name, x in slots.items()})
    found = parts(setting, inputs, Config.of(setting, inputs) if config is None else config)
    out, lse = merged(*hopper.varying(inputs.q, found), inputs.sinks)
    return out.astype(setting.dtype), lse


class Plan(NamedTuple):
    """The work. A run is what a group of heads does of a row.

    code: [B S], of slots, as `blocks.code`, S a multiple of 64; 0 where there is none.
    order: [B tiles] the tiles of which some query sees a slot, ascending: twice their index, and 1 more if some query
        does not see a slot of it. Then anything.
    starts: [runs + 1] visited tiles of all runs before.
    first, last: [units] the first run of each unit, and the one behind its last.
    each: [1] tiles of a unit.
    """

    code: Array
    order: Array
    starts: Array
    first: Array
    last: Array
    each: Array


def plan_of(setting: Setting, inputs: Inputs, n: Sizes) -> Plan:
    found = code(setting, inputs)
    found = jnp.pad(found, ((0, 0), (0, n.tiles * SLOTS - found.shape[1])))
    of_tile = found.reshape(n.B, n.tiles, SLOTS)
    visited, whole = (of_tile > 0).any(-1), (of_tile == (1 << inputs.q.shape[1]) - 1).all(-1)
    places = jnp.arange(n.tiles, dtype=jnp.int32)
    order = jnp.sort(jnp.where(visited, 2 * places + ~whole, 2 * n.tiles), axis=-1)
    count = jnp.repeat(visited.sum(-1, dtype=jnp.int32), n.groups)
    ends = jnp.cumsum(count)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    each = jnp.maximum(-(-ends[-1] // n.units), 1)
    begin = each * jnp.arange(n.units, dtype=jnp.int32)[:, None]
    end = jnp.minimum(begin + each, ends[-1])
    first = (ends <= begin).sum(-1, dtype=jnp.int32)
    last = jnp.maximum((starts[:-1] < end).sum(-1, dtype=jnp.int32), first)
    return Plan(found, order, starts, first, last, each[None])


def parts(setting: Setting, inputs: Inputs, config: Config, interpret: Any = None) -> tuple[Array, Array]:
    """(out [B n T H V], lse [B n T H]) float32 over disjoint sets of slots; the slots are a multiple of 8."""
    n = Sizes.of(setting, inputs, config)
    plan = plan_of(setting, inputs, n)
    out, lse = _launch(setting, inputs, config, n, plan, interpret)
    return _by_row(inputs, n, plan, out, lse)


def _by_row(inputs: Inputs, n: Sizes, plan: Plan, out: Array, lse: Array) -> tuple[Array, Array]:
    """The parts of each row from those of all runs: part p of run r is at unit + r, of the p-th unit that has it."""
    (B, T, H, _), K = inputs.q.shape, inputs.k.shape[2]
    runs = jnp.arange(B * n.groups, dtype=jnp.int32)[:, None]
    first, last = (x[:, None] // plan.each for x in (plan.starts[:-1], plan.starts[1:] - 1))
    unit = first + jnp.arange(min(n.units // n.groups + 2, n.units), dtype=jnp.int32)
    found = (unit <= last) & (plan.starts[1:] > plan.starts[:-1])[:, None]
    place = jnp.where(found, unit + runs, 0)

    def of(x: Array, fill: float) -> Array:
        x = jnp.where(jnp.expand_dims(found, range(2, x.ndim + 1)), x[place], fill)
        x = x.reshape(B, n.groups, -1, n.together // n.spread, n.spread * ROWS, *x.shape[4:])[:, :, :, :, : T * H // K]
        x = x.reshape(*x.shape[:4], T, H // K, *x.shape[5:])
        return jnp.moveaxis(x, (2, 4), (1, 2)).reshape(B, -1, T, H, *x.shape[6:])

    return of(out, 0.0), of(lse, -jnp.inf)


def _queries(x: Array, n: Sizes, K: int, fill: float = 0) -> Array:
    """[B T H c] as [B heads 64 c]: those of a key head together, by token."""
    B, T, H, c = x.shape
    x = x.reshape(B, T, K, H // K, c).swapaxes(1, 2).reshape(B, K, -1, c)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, n.spread * ROWS - x.shape[2]), (0, 0)), constant_values=fill)
    return x.reshape(B, n.heads, ROWS, c)


def _pages(inputs: Inputs, n: Sizes) -> Array:
    """The table, with pages that exist, for whole tiles."""
    found = jnp.clip(inputs.pages.astype(jnp.int32), 0, len(inputs.k) - 1)
    return jnp.pad(found, ((0, 0), (0, -(-n.tiles * SLOTS // inputs.k.shape[1]) - found.shape[1])))


def _launch(
    setting: Setting, inputs: Inputs, config: Config, n: Sizes, plan: Plan, interpret: Any
) -> tuple[Array, Array]:
    """(out [units + runs, together, 64, V], lse without V), those that a unit has of a run."""
    K, (B, T, H, _) = inputs.k.shape[2], inputs.q.shape
    each = lambda x: _queries(jnp.broadcast_to(x, (B, T, H))[..., None], n, K)[..., 0]
    row = lambda x: each(x[:, :, None])
    spec = Spec(setting.mask, setting.scale, setting.soft_cap, inputs.slopes is not None)
    operands = plan._asdict() | {
        "q": _queries(inputs.q, n, K),
        "k": inputs.k,
        "v": inputs.v,
        "bits": row(jnp.broadcast_to(1 << jnp.arange(T, dtype=jnp.int32), (B, T))),
        "code_again": plan.code,  # a reference is read in one layout only
        "pages": None if inputs.pages is None else _pages(inputs, n),
    }
    if spec.slopes:
        over = n.tiles * SLOTS - inputs.k_positions.shape[1]
        operands |= {
            "slopes": each(inputs.slopes.astype(jnp.float32)),
            "q_positions": row(inputs.q_positions),
            "k_positions": jnp.pad(inputs.k_positions, ((0, 0), (0, over))),
        }
    for name, factor in (("k_scale", inputs.k_scale), ("v_scale", inputs.v_scale)):
        if factor is not None:
            found = of_slots(inputs, factor.astype(jnp.float32)).swapaxes(1, 2)
            operands[name] = jnp.pad(found, ((0, 0), (0, 0), (0, n.tiles * SLOTS - found.shape[2])))
    operands = {name: x for name, x in operands.items() if x is not None}
    rings, split = config.workers // n.split, (n.split,) if n.split > 1 else ()
    of_keys = n.C - n.V if n.both else n.C
    scratch = {
        "v": swizzled((rings, config.stages, *split, SLOTS, n.width), inputs.k.dtype),
        "ready": ring(rings * config.stages, (n.both * n.split + (not n.both) + (of_keys > 0)) * SLOTS // n.piece),
        "q_ready": ring(rings, n.both * n.split + (of_keys > 0)),
    }
    if of_keys:
        scratch["q"] = tiled((rings, ROWS, of_keys), inputs.q.dtype)
        scratch["k"] = swizzled((rings, config.stages, SLOTS, of_keys), inputs.k.dtype)
    if n.both:
        scratch["q_v"] = tiled((rings, *split, ROWS, n.width), inputs.q.dtype)
    if n.split > 1:
        scratch |= {"free": ring(rings * config.stages, n.split), "read": ring(rings, n.split)}
    if inputs.k.dtype.itemsize == 1:
        scratch["wide"] = tiled((rings, SLOTS, max(n.C, n.V)), inputs.q.dtype)
    count = n.units + B * n.groups - 1, n.together, ROWS
    out = {
        "out": jax.ShapeDtypeStruct((*count[:2], *split, ROWS, n.width), jnp.float32),
        "lse": jax.ShapeDtypeStruct(count, jnp.float32),
    }
    names = (*operands, *out)

    def body(*refs: Any) -> None:
        *given, here = refs
        wg = lax.axis_index("worker")
        _Worker(n, config, spec, dict(zip(names, given, strict=True)), here, wg).work()

    found = plgpu.kernel(
        body,
        out_type=tuple(out.values()),
        scratch_types=(scratch,),
        grid=(config.ctas,),
        grid_names=("cta",),
        num_threads=config.workers,
        thread_name="worker",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="decode_attention",
        interpret=interpret,
        **hopper.told(cost(setting, inputs)),
    )(*operands.values())
    sums, lse = found
    return (jnp.moveaxis(sums, 2, 3).reshape(*count, n.V) if split else sums), lse


def swizzled(shape: tuple[int, ...], dtype: Any) -> Any:
    """`tiled`, whose rows may be of fewer than 128 bytes."""
    item = jnp.dtype(dtype).itemsize
    width = min(128, shape[-1] * item)
    return plgpu.SMEM(
        shape, dtype, transforms=(plgpu.TilingTransform((8, width // item)), plgpu.SwizzleTransform(width))
    )


def product(pairs: list[tuple[Any, Any]]) -> Any:
    """The sum of left @ right, both in shared memory."""

    def run(acc: Any) -> Any:
        for left, right in pairs:
            plgpu.wgmma(acc, left, right)
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC((ROWS, SLOTS), jnp.float32))


def added(sums: Any, left: Any, right: Any) -> Any:
    """sums + left @ right, of which the latter is in shared memory."""
    return pl.run_state(lambda acc: plgpu.wgmma(acc, left, right))(plgpu.ACC.init(sums))


@dataclass(frozen=True)
class _Worker:
    """`at` is global memory, `here` shared memory and barriers, by name; `me` is the warpgroup's index."""

    n: Sizes
    config: Config
    spec: Spec
    at: dict[str, Any]
    here: dict[str, Any]
    me: Any

    @property
    def ring(self) -> Any:
        """The index of the ring."""
        return self.me if self.n.split == 1 else lax.div(self.me, self.n.split)

    @property
    def share(self) -> Any:
        """Which columns of values are the worker's; the first worker of a ring fills it."""
        return 0 if self.n.split == 1 else lax.rem(self.me, self.n.split)

    def part(self, h: Any) -> tuple[Any, ...]:
        """The index of a part of the values, where they have parts."""
        return (h,) if self.n.split > 1 else ()

    def once(self, run: Callable[[], None]) -> None:
        """Runs it in the first worker of a ring."""
        run() if self.n.split == 1 else pl.when(self.share == 0)(run)

    def work(self) -> None:
        n, at = self.n, self.at
        worker = lax.axis_index("cta") * (self.config.workers // n.split) + self.ring
        unit, lane = lax.div(worker, n.together), lax.rem(worker, n.together)

        @pl.when(unit < n.units)
        def _():
            each = at["each"][0]
            begin = unit * each

            def one(run: Any, steps: Any) -> Any:
                start = at["starts"][run]
                first = jnp.maximum(begin, start) - start
                last = jnp.minimum(begin + each, at["starts"][run + 1]) - start
                count = jnp.maximum(last - first, 0)
                pl.when(count > 0)(lambda: self.run(unit, lane, run, first, count, steps))
                return steps + count

            lax.fori_loop(at["first"][unit], at["last"][unit], one, jnp.int32(0))

    def run(self, unit: Any, lane: Any, run: Any, first: Any, count: Any, steps: Any) -> None:
        """Some tiles of a row; `steps` went through the ring before."""
        n, at, here, mine, stages = self.n, self.at, self.here, self.ring, self.config.stages
        b, group = lax.div(run, n.groups), lax.rem(run, n.groups)
        head = group * n.together + lane
        key_head = lax.div(head, n.spread)
        slot_of = lambda i: lax.rem(steps + i, stages)

        @self.once
        def _():
            for h, _, columns in self.columns("k"):
                target = here["q"].at[mine] if h is None else here["q_v"].at[mine, *self.part(h)]
                plgpu.copy_gmem_to_smem(at["q"].at[b, head, :, columns], target, here["q_ready"].at[mine])

        def fetch(i: Any) -> None:
            def copies():
                tile, slot = lax.div(at["order"][b, first + i], 2), slot_of(i)
                ready = here["ready"].at[mine * stages + slot]
                for part in range(SLOTS // n.piece):
                    rows = pl.ds(part * n.piece, n.piece)
                    for h, name, columns in self.columns("k", "v"):
                        where = (slot, rows) if h is None else (slot, *self.part(h), rows)
                        target = here["k" if h is None else "v"].at[mine, *where]
                        plgpu.copy_gmem_to_smem(self.piece(at[name], b, key_head, tile, part, columns), target, ready)

            self.once(lambda: pl.when(i < count)(copies))

        for i in range(stages):
            fetch(jnp.int32(i))
        plgpu.barrier_wait(here["q_ready"].at[mine])
        bits = load(at["bits"].at[b, head], BY_ROW)
        column = lambda fill: vector(fill, ROWS, BY_ROW)

        def step(i: Any, carry: Any) -> Any:
            out, top, total = carry
            slot, entry = slot_of(i), at["order"][b, first + i]
            slots, partly = pl.ds(lax.div(entry, 2) * SLOTS, SLOTS), lax.rem(entry, 2) == 1
            k_scale, v_scale = (self.factor(name, b, slots, key_head) for name in ("k_scale", "v_scale"))
            plgpu.barrier_wait(here["ready"].at[mine * stages + slot])
            scores = product(self.pairs(slot))
            if k_scale is not None:
                scores = scores * along(1, k_scale, scores.shape)
            scores = self.cooked(b, head, slots, scores)
            given = scores if v_scale is None else (scores, v_scale)
            found = lax.cond(partly, lambda: self.masked(b, slots, bits, given), lambda: given)
            scores, v_scale = (found, None) if v_scale is None else found
            new_top = jnp.maximum(top, scores.max(axis=1) * self.spec.base)
            pivot = jnp.where(new_top == -jnp.inf, 0.0, new_top)
            decay = jnp.exp2(top - pivot)
            weights = jnp.exp2(scores * self.spec.base - along(0, pivot, scores.shape))
            total = total * decay + weights.sum(axis=1)
            if v_scale is not None:
                weights = weights * along(1, v_scale, weights.shape)
            v = self.wide(here["v"].at[mine, slot, *self.part(self.share)])
            pl.when(partly)(lambda: self.clean(b, slots, v))
            out = added(out * along(0, decay, out.shape), weights.astype(at["q"].dtype), v)
            if n.split > 1:
                free = here["free"].at[mine * stages + slot]
                plgpu.barrier_arrive(free)
                self.once(lambda: plgpu.barrier_wait(free))
            fetch(i + stages)
            return out, new_top, total

        start = zeros((ROWS, n.width)), column(-jnp.inf), column(0.0)
        out, top, total = lax.fori_loop(0, count, step, start)
        empty = total == 0
        safe = jnp.where(empty, 1.0, total)
        place = unit + run
        at["out"].at[place, lane, *self.part(self.share)][...] = out * along(0, 1.0 / safe, out.shape)

        @self.once
        def _():
            at["lse"].at[place, lane][...] = jnp.where(empty, -jnp.inf, top * (1 / LOG2E) + jnp.log(safe))

    def columns(self, *names: str) -> list[tuple[int | None, str, Any]]:
        """What a tile is made of: (which part of the values or None for keys, where it comes from, its columns)."""
        n = self.n
        if not n.both:
            found = [(None, "k", pl.ds(0, n.C)), (0, "v", pl.ds(0, n.V))]
        else:
            found = [(h, "k", pl.ds(h * n.width, n.width)) for h in range(n.split)]
            found += [(None, "k", pl.ds(n.V, n.C - n.V))] if n.C > n.V else []
        return [part for part in found if part[1] in names]

    def pairs(self, slot: Any) -> list[tuple[Any, Any]]:
        """Queries and keys, whose products are to be added."""
        here, mine = self.here, self.ring
        found = [(here["q"].at[mine], self.wide(here["k"].at[mine, slot]).T)] if "k" in here else []
        if self.n.both:
            parts = map(self.part, range(self.n.split))
            found += [(here["q_v"].at[mine, *h], here["v"].at[mine, slot, *h].T) for h in parts]
        return found

    def piece(self, source: Any, b: Any, key_head: Any, tile: Any, part: int, columns: Any) -> Any:
        """Part of a tile, in global memory."""
        n, at = self.n, self.at
        if "pages" not in at:
            return source.at[b, pl.ds(tile * SLOTS, SLOTS), key_head, columns]
        page = at["pages"][b, lax.div(tile, n.per_page) * (SLOTS // n.piece) + part]
        return source.at[page, pl.ds(lax.rem(tile, n.per_page) * SLOTS, n.piece), key_head, columns]

    def cooked(self, b: Any, head: Any, slots: Any, scores: Any) -> Any:
        if not self.spec.cooked:
            return scores
        slope = away = None
        if self.spec.slopes:
            row = lambda name: along(0, load(self.at[name].at[b, head], BY_ROW), scores.shape)
            behind = row("q_positions") - along(1, load(self.at["k_positions"].at[b, slots], BY_COLUMN), scores.shape)
            slope, away = row("slopes"), jnp.abs(behind).astype(jnp.float32)
        return cook(self.spec, scores, slope, away)[0]

    def factor(self, name: str, b: Any, slots: Any, key_head: Any) -> Any:
        """Of the keys or values of a tile."""
        if name not in self.at:
            return None
        return load(self.at[name].at[b, key_head if self.at[name].shape[1] > 1 else 0, slots], BY_COLUMN)

    def wide(self, x: Any) -> Any:
        """A tile in shared memory, in the type of queries."""
        if "wide" not in self.here:
            return x
        wide = self.here["wide"].at[self.ring, :, pl.ds(0, x.shape[1])]
        width = min(128, x.shape[1])
        for first in range(0, x.shape[1], width):
            some = pl.ds(first, width)
            found = plgpu.load(x.at[:, some], layout=plgpu.Layout.WGMMA_UPCAST_2X)
            if jnp.issubdtype(x.dtype, jnp.floating):  # there is no instruction that goes straight to bfloat16
                found = found.astype(jnp.float32)
            wide.at[:, some][...] = found.astype(wide.dtype)
        plgpu.commit_smem()
        return wide

    def masked(self, b: Any, slots: Any, bits: Any, given: Any) -> Any:
        """Scores of what queries see, and factors of values that any of them sees, if there are factors."""
        code = load(self.at["code"].at[b, slots], BY_COLUMN)
        scores, v_scale = given if isinstance(given, tuple) else (given, None)
        seen = (along(1, code, scores.shape) & along(0, bits, scores.shape)) != 0
        scores = jnp.where(seen, scores, -jnp.inf)
        return scores if v_scale is None else (scores, jnp.where(code != 0, v_scale, 0.0))

    def clean(self, b: Any, slots: Any, v: Any) -> None:
        """Makes values 0 that no query sees, for 0 times NaN is NaN."""
        if self.n.split > 1:  # the others may still read these as keys
            read = self.here["read"].at[self.ring]
            plgpu.barrier_arrive(read)
            plgpu.barrier_wait(read)
        held = along(0, load(self.at["code_again"].at[b, slots], BY_ROW), (SLOTS, 64)) != 0
        for first in range(0, self.n.width, 64):  # all at once need too many registers
            some = v.at[:, pl.ds(first, 64)]
            some[...] = jnp.where(held, plgpu.load(some, layout=TILE, optimized=False), 0.0).astype(v.dtype)
        plgpu.commit_smem()

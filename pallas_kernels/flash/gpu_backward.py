"""Flash attention for Hopper (sm_90a), backward, in Mosaic GPU: one kernel for queries, one for keys and values.

Both recompute the weights of a tile from the lse, so seven products are done for the five of a single kernel; in return
no two CTAs write the same result, and gradients are the same bits in every run. A warpgroup issues the two products of
the next tile (scores, and the gradient of its weights) and those of this one together. Key heads sum over the query
heads they serve.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash.scores import Spec, cook
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
from pallas_kernels.plan import MaskPlan, Tokens


@dataclass(frozen=True)
class BackwardConfig:
    """How the two backward kernels run.

    block_q, block_k: the blocks of the plan; a CTA has one of them, 64 rows a warpgroup.
    tile_k: keys that stream by at a time, for the gradient of queries; it divides block_k.
    tile_q: queries that stream by at a time, for the gradients of keys and values; it divides block_q.
    stages_k, stages_q: buffers of the two rings.
    heads_together, ctas: as forward.
    """

    block_q: int = COMPUTE * ROWS
    block_k: int = COMPUTE * ROWS
    tile_k: int = 64
    tile_q: int = 64
    stages_k: int = 4
    stages_q: int = 3
    heads_together: int = 16
    ctas: int = 132

    @staticmethod
    def of(C: int, V: int) -> BackwardConfig:
        """The heuristic by dims of keys and values."""
        if C > 128:
            return BackwardConfig(stages_k=2, stages_q=2)
        return BackwardConfig(tile_k=128) if C == 64 else BackwardConfig()


def gradients(
    spec: Spec,
    config: BackwardConfig,
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
    """(dq, dk, dv) in `dtype` and the gradient of slopes by query, [B H padded T].

    Args:
        lse: [B H padded T] in logarithms of base 2, +inf for queries that saw nothing.
        delta: [B H padded T] sum of out * dout, less the gradient of the lse.
    """
    given = {"q": q, "k": k, "v": v, "dout": dout, "lse": lse, "delta": delta, "heads": heads, "slopes": slopes}
    given |= tokens._asdict()
    dq, dslopes = _queries(spec, config, present(given | plan.by_query._asdict()), dtype)
    return (dq, *_keys(spec, config, present(given | plan.by_key._asdict()), dtype), dslopes)


def _weights(spec: Spec, scores: Any, slope: Any, away: Any, lse: Any) -> tuple[Any, Any]:
    """The softmax weights of a tile of products, and what soft cap leaves of a score's slope."""
    scores, damp = cook(spec, scores, slope, away)
    return jnp.exp2(scores * spec.base - lse), damp


def _dscores(weights: Any, dweights: Any, delta: Any) -> Any:
    return weights * (dweights - delta)


def _part(order: Any, place: Place, m: Any, block: int, tile: int) -> Any:
    """The tokens of part m of the blocks that are visited, each in tiles."""
    parts = block // tile
    first = order[place.plan_row, place.block, lax.div(m, parts)] * block
    return pl.ds(first + lax.rem(m, parts) * tile, tile)


# ---------------------------------------------------------------------------------------------- queries


def _queries(spec: Spec, c: BackwardConfig, operands: dict[str, Array], dtype: Any) -> tuple[Array, Array | None]:
    q, k, v = (operands[name] for name in "qkv")
    n = sizes(q, k, v, operands["order"], heads=q.shape[2], heads_together=c.heads_together, ctas=c.ctas)
    extra = [name for name in ("k_positions", "k_segments") if name in operands]
    scratch = {
        "q": tiled((c.block_q, n.C), q.dtype),
        "dout": tiled((c.block_q, n.V), q.dtype),
        "k": tiled((c.stages_k, c.tile_k, n.C), k.dtype),
        "v": tiled((c.stages_k, c.tile_k, n.V), v.dtype),
        **{name: plgpu.SMEM((c.stages_k, c.tile_k), jnp.int32) for name in extra},
    }
    if spec.slopes:
        scratch["dslopes"] = plgpu.SMEM((COMPUTE, ROWS), jnp.float32)
    barriers = {
        "q_ready": plgpu.Barrier(num_arrivals=2),
        "k_ready": ring(c.stages_k, 1),
        "v_ready": ring(c.stages_k, 1 + len(extra)),
        "q_free": plgpu.Barrier(num_arrivals=COMPUTE),
        "k_free": ring(c.stages_k, COMPUTE),
        "v_free": ring(c.stages_k, COMPUTE),
    }
    scratch = {"staged": staging(scratch, (n.C,), dtype), **scratch, **barriers}
    out = {"dq": jax.ShapeDtypeStruct(q.shape, dtype)}
    if spec.slopes:
        out["dslopes"] = jax.ShapeDtypeStruct(operands["lse"].shape, jnp.float32)

    most = cost(n, operands["order"], c.block_q * c.block_k, 2, 1)
    found = launch(partial(_Queries, spec, c), operands, out, scratch, n, "flash_dq", most)
    return found["dq"], found.get("dslopes")


class _Queries(Kernel):
    stay = ("q", "dout")

    @property
    def parts(self) -> int:
        """Tiles of a block of keys."""
        return self.config.block_k // self.config.tile_k

    def steps(self, place: Place) -> Any:
        return place.count * self.parts

    def tokens(self, place: Place, m: Any) -> Any:
        return _part(self.at["order"], place, m, self.config.block_k, self.config.tile_k)

    def block(self, i: Any, place: Place, steps: Any) -> None:
        c, n, at, here, spec = self.config, self.n, self.at, self.here, self.spec
        shape = (ROWS, c.tile_k)
        dtype = at["q"].dtype
        mine = pl.ds(self.warpgroup * ROWS, ROWS)
        q, dout = here["q"].at[mine], here["dout"].at[mine]
        rows, queries = self.own(place)
        lse, delta = (load(at[name].at[place.row, place.head, rows], BY_ROW) for name in ("lse", "delta"))
        head = at["heads"][place.head]
        slope = at["slopes"][place.head] if spec.slopes else None
        slot_of = lambda m: lax.rem(steps + m, c.stages_k)

        def ready(m):
            plgpu.barrier_wait(here["k_ready"].at[slot_of(m)])
            plgpu.barrier_wait(here["v_ready"].at[slot_of(m)])

        def begin(m, scores, dweights):
            plgpu.wgmma(scores, q, here["k"].at[slot_of(m)].T)
            plgpu.wgmma(dweights, dout, here["v"].at[slot_of(m)].T)

        def finish(m, scores, dweights, behind, masked, dslopes):
            """The gradient of the scores of tile m, while `behind` products that were issued later still run."""
            if masked or spec.slopes:
                keys = held(lambda name: load(here[name].at[slot_of(m)], BY_COLUMN), "k", here)
            away = distance(queries, keys, shape, 1) if spec.slopes else None
            found = plgpu.wgmma_accumulator_load(scores, wait_n=behind + 1)
            weights, damp = _weights(spec, found, slope, away, along(0, lse, shape))
            seen = visible(spec, queries, keys, head, shape, 1) if masked else None
            if masked:
                weights = jnp.where(seen, weights, 0.0)
            found = plgpu.wgmma_accumulator_load(dweights, wait_n=behind)
            dscores = _dscores(weights, found, along(0, delta, shape))
            if masked:
                dscores = jnp.where(seen, dscores, 0.0)
            plgpu.barrier_arrive(here["v_free"].at[slot_of(m)])
            if spec.slopes:
                dslopes = dslopes - (dscores * away).sum(axis=1)
            return dscores if damp is None else dscores * damp, dslopes

        def step(masked):
            def body(m, carry):
                dq, dscores, dslopes = carry
                ready(m + 1)

                def products(refs):
                    dq, scores, dweights, *results = refs
                    begin(m + 1, scores, dweights)
                    plgpu.wgmma(dq, dscores, here["k"].at[slot_of(m)])
                    for ref, value in zip(results, finish(m + 1, scores, dweights, 1, masked, dslopes), strict=True):
                        ref[...] = value

                blank = zeros(shape)
                refs = (plgpu.ACC.init(dq), plgpu.ACC.init(blank), plgpu.ACC.init(blank), blank, dslopes)
                dq, _, _, following, new_dslopes = pl.run_state(products)(refs)
                plgpu.barrier_arrive(here["k_free"].at[slot_of(m)])
                return dq, following.astype(dtype), new_dslopes

            return body

        def attend():
            ready(0)

            def products(scores, dweights):
                begin(0, scores, dweights)
                return finish(0, scores, dweights, 0, True, vector(0.0, ROWS, BY_ROW))

            acc = plgpu.ACC(shape, jnp.float32)
            dscores, dslopes = pl.run_scoped(products, acc, acc)
            carry = zeros((ROWS, n.C)), dscores.astype(dtype), dslopes
            plain, last = jnp.maximum(place.full * self.parts - 1, 0), self.steps(place) - 1
            carry = lax.fori_loop(0, plain, step(False), carry)
            dq, dscores, dslopes = lax.fori_loop(plain, last, step(True), carry)
            plgpu.barrier_arrive(here["q_free"])
            dq = pl.run_state(lambda dq: plgpu.wgmma(dq, dscores, here["k"].at[slot_of(last)]))(plgpu.ACC.init(dq))
            plgpu.barrier_arrive(here["k_free"].at[slot_of(last)])
            return dq, dslopes

        def nothing():
            plgpu.barrier_arrive(here["q_free"])
            return zeros((ROWS, n.C)), vector(0.0, ROWS, BY_ROW)

        plgpu.barrier_wait(here["q_ready"])
        dq, dslopes = lax.cond(place.count > 0, attend, nothing)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if spec.slopes:
            here["dslopes"].at[self.warpgroup][...] = dslopes
        write(here["staged"].at[self.warpgroup], dq * spec.scale, at["dq"].at[place.row, rows, place.head])
        if spec.slopes:
            target = at["dslopes"].at[place.row, place.head, rows]
            plgpu.copy_smem_to_gmem(here["dslopes"].at[self.warpgroup], target)


# ---------------------------------------------------------------------------------------------- keys and values


def _keys(spec: Spec, c: BackwardConfig, operands: dict[str, Array], dtype: Any) -> tuple[Array, Array]:
    q, k, v = (operands[name] for name in "qkv")
    n = sizes(q, k, v, operands["order"], heads=k.shape[2], heads_together=c.heads_together, ctas=c.ctas)
    if n.C + n.V > 256:
        raise NotImplementedError(f"the gradients of keys of {n.C} and values of {n.V} need more registers than 240")
    extra = [name for name in ("q_positions", "q_segments") if name in operands]
    scratch = {
        "k": tiled((c.block_k, n.C), k.dtype),
        "v": tiled((c.block_k, n.V), v.dtype),
        "q": tiled((c.stages_q, c.tile_q, n.C), q.dtype),
        "dout": tiled((c.stages_q, c.tile_q, n.V), q.dtype),
        "lse": plgpu.SMEM((c.stages_q, c.tile_q), jnp.float32),
        "delta": plgpu.SMEM((c.stages_q, c.tile_q), jnp.float32),
        **{name: plgpu.SMEM((c.stages_q, c.tile_q), jnp.int32) for name in extra},
    }
    barriers = {
        "k_ready": plgpu.Barrier(num_arrivals=2),
        "q_ready": ring(c.stages_q, 2 + len(extra)),
        "dout_ready": ring(c.stages_q, 2),
        "k_free": plgpu.Barrier(num_arrivals=COMPUTE),
        "q_free": ring(c.stages_q, COMPUTE),
    }
    scratch = {"staged": staging(scratch, (n.C, n.V), dtype), **scratch, **barriers}
    out = {name: jax.ShapeDtypeStruct(x.shape, dtype) for name, x in (("dk", k), ("dv", v))}

    most = cost(n, operands["order"], c.block_q * c.block_k * (n.H // n.K), 2, 2)
    found = launch(partial(_Keys, spec, c), operands, out, scratch, n, "flash_dkv", most)
    return found["dk"], found["dv"]


class _Keys(Kernel):
    stay = ("k", "v")
    streams = "q"

    @property
    def parts(self) -> int:
        """Tiles of a block of queries."""
        return self.config.block_q // self.config.tile_q

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.n.H // self.n.K

    def steps(self, place: Place) -> Any:
        return place.count * (self.parts * self.group)

    def head(self, place: Place, m: Any) -> tuple[Any, Any]:
        """The query head of step m, and the step within it. Full tiles of all heads come first."""
        plain = place.full * (self.parts * self.group)
        behind = m >= plain
        each = jnp.maximum(jnp.where(behind, place.count - place.full, place.full) * self.parts, 1)
        step = jnp.where(behind, m - plain, m)
        within = lax.rem(step, each) + jnp.where(behind, place.full * self.parts, 0)
        return place.head * self.group + lax.div(step, each), within

    def tokens(self, place: Place, m: Any) -> Any:
        return _part(self.at["order"], place, m, self.config.block_q, self.config.tile_q)

    def tiles(self, place: Place) -> Callable[[Any], Any]:
        at, here = self.at, self.here
        row = self.tokens_row(place, "q")

        def tile(m):
            head, within = self.head(place, m)
            queries = self.tokens(place, within)
            yield "q_free", "q_ready", "q", at["q"].at[place.row, queries, head]
            yield None, "q_ready", "lse", at["lse"].at[place.row, head, queries]
            for name in ("q_positions", "q_segments"):
                if name in here:
                    yield None, "q_ready", name, at[name].at[row, queries]
            yield None, "dout_ready", "dout", at["dout"].at[place.row, queries, head]
            yield None, "dout_ready", "delta", at["delta"].at[place.row, head, queries]

        return tile

    def block(self, i: Any, place: Place, steps: Any) -> None:
        c, n, at, here, spec = self.config, self.n, self.at, self.here, self.spec
        shape = (ROWS, c.tile_q)
        dtype = at["q"].dtype
        mine = pl.ds(self.warpgroup * ROWS, ROWS)
        k, v = here["k"].at[mine], here["v"].at[mine]
        rows, keys = self.own(place)
        slot_of = lambda m: lax.rem(steps + m, c.stages_q)

        def begin(m, scores):
            plgpu.barrier_wait(here["q_ready"].at[slot_of(m)])
            plgpu.wgmma(scores, k, here["q"].at[slot_of(m)].T)

        def weigh(m, scores, masked):
            """The weights of tile m, and what they are times the slope of a soft cap. Keys are rows."""
            of_columns = lambda name: load(here[name].at[slot_of(m)], BY_COLUMN)
            head, _ = self.head(place, m)
            queries = held(of_columns, "q", here) if masked or spec.slopes else None
            away = distance(queries, keys, shape, 0) if spec.slopes else None
            slope = at["slopes"][head] if spec.slopes else None
            weights, damp = _weights(spec, scores, slope, away, along(1, of_columns("lse"), shape))
            if masked:
                weights = jnp.where(visible(spec, queries, keys, at["heads"][head], shape, 0), weights, 0.0)
            return (weights,) if damp is None else (weights, weights * damp)

        def descend(m, dv, dk, weights, dweights, behind):
            """Adds tile m to both gradients; the product for dweights, all but `behind` of those issued, is done."""
            plgpu.wgmma(dv, weights[0], here["dout"].at[slot_of(m)])
            found = plgpu.wgmma_accumulator_load(dweights, wait_n=behind + 1)
            delta = along(1, load(here["delta"].at[slot_of(m)], BY_COLUMN), shape)
            sloped = weights[-1].astype(jnp.float32)
            dscores = jnp.where(sloped == 0, 0.0, sloped * (found - delta))
            plgpu.wgmma(dk, dscores.astype(dtype), here["q"].at[slot_of(m)])

        narrow = lambda weights: tuple(x.astype(dtype) for x in weights)
        blank = zeros(shape)

        def step(masked):
            """Tile m, and the weights of the next while its last products run."""

            def body(m, carry):
                dk, dv, *weights = carry
                slot = slot_of(m)
                plgpu.barrier_wait(here["dout_ready"].at[slot])

                def products(refs):
                    dk, dv, scores, dweights, *results = refs
                    plgpu.wgmma(dweights, v, here["dout"].at[slot].T)
                    begin(m + 1, scores)
                    descend(m, dv, dk, weights, dweights, 1)
                    found = plgpu.wgmma_accumulator_load(scores, wait_n=2)
                    for ref, value in zip(results, weigh(m + 1, found, masked), strict=True):
                        ref[...] = value

                accs = [plgpu.ACC.init(x) for x in (dk, dv, blank, blank)]
                dk, dv, _, _, *found = pl.run_state(products)((*accs, *(blank for _ in weights)))
                plgpu.barrier_arrive(here["q_free"].at[slot])
                return dk, dv, *narrow(found)

            return body

        def attend():
            def first(scores):
                begin(0, scores)
                return weigh(0, scores[...], True)

            weights = narrow(pl.run_scoped(first, plgpu.ACC(shape, jnp.float32)))
            carry = zeros((ROWS, n.C)), zeros((ROWS, n.V)), *weights
            plain = jnp.maximum(place.full * (self.parts * self.group) - 1, 0)
            last = self.steps(place) - 1
            carry = lax.fori_loop(0, plain, step(False), carry)
            dk, dv, *weights = lax.fori_loop(plain, last, step(True), carry)
            slot = slot_of(last)
            plgpu.barrier_wait(here["dout_ready"].at[slot])

            def final(refs):
                dk, dv, dweights = refs
                plgpu.wgmma(dweights, v, here["dout"].at[slot].T)
                descend(last, dv, dk, weights, dweights, 0)

            dk, dv, _ = pl.run_state(final)(tuple(plgpu.ACC.init(x) for x in (dk, dv, blank)))
            plgpu.barrier_arrive(here["k_free"])
            plgpu.barrier_arrive(here["q_free"].at[slot])
            return dk, dv

        def nothing():
            plgpu.barrier_arrive(here["k_free"])
            return zeros((ROWS, n.C)), zeros((ROWS, n.V))

        plgpu.barrier_wait(here["k_ready"])
        dk, dv = lax.cond(place.count > 0, attend, nothing)
        staged = here["staged"].at[self.warpgroup]
        write(staged, dk * spec.scale, at["dk"].at[place.row, rows, place.head])
        write(staged, dv, at["dv"].at[place.row, rows, place.head])

"""The steps of the delta rule on Hopper, by Pallas Mosaic GPU.

The sequence is split into chunks of 64 tokens. What a chunk does with the state that enters it needs its own tokens
alone, so that `intra` and `outputs` run over all chunks at once; only `states`, two matrix products a chunk, goes
through them in order, a head's value channels in tiles. It keeps the state transposed, as rows of an accumulator: both
products take their left operand from registers, and nothing of the chain goes through shared memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.delta import twin
from pallas_kernels.delta.chunk import CHUNK, CUTS, LEAST, about_middle, across, between, near
from pallas_kernels.delta.config import Config
from pallas_kernels.delta.rule import Chunks, Gradients, Rows, Tokens

TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
ROWS = plgpu.Layout.WGMMA.reduce(1)
COLUMNS = plgpu.Layout.WGMMA.reduce(0)
LOG2E = math.log2(math.e)
VALUES = 64
"""Value channels of a state that one program carries through the sequence."""

GROUP = 256
"""Chunks whose gradients are found at once."""


@dataclass(frozen=True)
class Kernels:
    """`rule.Steps` on a GPU."""

    config: Config

    def intra(self, tokens: Tokens, rows: Rows) -> Chunks:
        return intra(tokens, rows, self.config)

    def states(self, chunks: Chunks, s0: Array) -> tuple[Array, Array, Array]:
        return states(chunks, s0, self.config)

    def outputs(self, chunks: Chunks, entries: Array, p: Array) -> Array:
        return outputs(chunks, entries, p)

    def reverse(self, chunks: Chunks, do: Array, ds: Array) -> tuple[Array, Array, Array]:
        return reverse(chunks, do, ds, self.config)

    def gradients(
        self, tokens: Tokens, rows: Rows, chunks: Chunks, entries: Array, p: Array, exits: Array, dp: Array, do: Array
    ) -> Gradients:
        return gradients(tokens, rows, chunks, entries, p, exits, dp, do)


def tile(rows: int, columns: int, dtype: Any) -> Any:
    """Shared memory as matrix instructions read it."""
    return plgpu.SMEM((rows, columns), dtype, transforms=TILED)


def product(*pairs: tuple, start: Array | None = None, during: Callable[[], None] = lambda: None) -> Array:
    """The sum of left @ right, of `[M K] [K N]` each, on top of `start`; left may be in registers.

    `during` runs while the products do.
    """
    if start is not None:
        return pl.run_state(lambda acc: _accumulate(acc, pairs, during))(plgpu.ACC.init(start))

    def run(acc):
        _accumulate(acc, pairs, during)
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC((pairs[0][0].shape[0], pairs[0][1].shape[1]), jnp.float32))


def _accumulate(acc, pairs, during) -> None:
    for left, right in pairs:
        plgpu.wgmma(acc, left, right)
    during()


def iotas(rows: int, columns: int) -> tuple[Array, Array]:
    """Indices of rows and columns of an accumulator."""
    return tuple(plgpu.broadcasted_iota(jnp.int32, (rows, columns), i, layout=plgpu.Layout.WGMMA) for i in (0, 1))


def spread(row: Array, columns: int) -> Array:
    """A number a row, over the columns."""
    return plgpu.layout_cast(lax.broadcast_in_dim(row, (row.shape[0], columns), (0,)), plgpu.Layout.WGMMA)


def stack(column: Array, rows: int) -> Array:
    """A number a column, over the rows."""
    return plgpu.layout_cast(lax.broadcast_in_dim(column, (rows, column.shape[0]), (1,)), plgpu.Layout.WGMMA)


def load(ref, layout=plgpu.Layout.WGMMA) -> Array:
    return plgpu.load(ref, layout=layout, optimized=False)


def write(value: Array, smem, gmem) -> None:
    """From registers to device memory, through shared memory; returns before it is there."""
    smem[...] = value.astype(smem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem, gmem)


def told(flops: int, exponentials: int, given: Sequence[Any], found: Sequence[Any]) -> dict[str, pl.CostEstimate]:
    """What a kernel costs that reads and writes each array once."""
    moved = sum(x.size * x.dtype.itemsize for x in (*given, *found))
    return hopper.told(pl.CostEstimate(flops=flops, transcendentals=exponentials, bytes_accessed=moved))


def outputs(chunks: Chunks, entries: Array, p: Array) -> Array:
    """Twin: `twin.outputs`."""
    B, H, N, C, K = chunks.read.shape
    V, low = p.shape[3], p.dtype

    def body(read, scores, entries, p, o, read_s, scores_s, entries_s, p_s, o_s, loaded):
        n, h, b = (lax.axis_index(name) for name in ("n", "h", "b"))
        for i, (gmem, smem) in enumerate(((read, read_s), (entries, entries_s), (scores, scores_s), (p, p_s))):
            plgpu.copy_gmem_to_smem(gmem.at[b, h, n], smem, loaded.at[i])
        for i in range(4):
            plgpu.barrier_wait(loaded.at[i])
        out = product((read_s, entries_s.transpose((1, 0))), (scores_s, p_s.transpose((1, 0))))
        write(out, o_s, o.at[b, pl.ds(n * C, C), h])
        plgpu.wait_smem_to_gmem(0)

    given, found = (chunks.read, chunks.scores, entries, p), jax.ShapeDtypeStruct((B, N * C, H, V), low)
    return plgpu.kernel(
        body,
        out_type=found,
        scratch_types=[
            tile(C, K, low),
            tile(C, C, low),
            tile(V, K, low),
            tile(V, C, low),
            tile(C, V, low),
            plgpu.Barrier(num_barriers=4),
        ],
        grid=(H, N, B),
        grid_names=("h", "n", "b"),
        **told(2 * B * H * N * C * V * (K + C), 0, given, [found]),
    )(*given)


def states(chunks: Chunks, s0: Array, config: Config) -> tuple[Array, Array, Array]:
    """Twin: `twin.states`."""
    low = chunks.w.dtype

    def step(s, entry, keep_entry, keep_wrote, w, u, write_, keep):
        wrote = product((entry, w.transpose((1, 0))), start=load(u).astype(jnp.float32), during=keep_entry).astype(low)
        kept = s * stack(load(keep, COLUMNS), VALUES)
        return product((wrote, write_), start=kept, during=lambda: keep_wrote(wrote))

    u = Part(chunks.u, (VALUES, CHUNK), lambda u, b, h, n, rows: u.at[b, h, n, rows])
    parts = (Part.of(chunks.w), u, Part.of(chunks.write), Part.of(chunks.keep))
    return through(step, parts, s0, lambda step: step, 2 * CHUNK * chunks.w.shape[4], config)


def reverse(chunks: Chunks, do: Array, ds: Array, config: Config) -> tuple[Array, Array, Array]:
    """Twin: `twin.reverse`."""
    low, N = chunks.w.dtype, chunks.w.shape[2]

    def step(ds, leaving, keep_leaving, keep_wrote, w, scores, read, write_, keep, do):
        do = do.transpose((1, 0))
        by_state = (leaving, write_.transpose((1, 0)))
        wrote = product(by_state, (do, scores), during=keep_leaving).astype(low)
        kept = ds * stack(load(keep, COLUMNS), VALUES)
        return product((wrote, w), (do, read), start=kept, during=lambda: keep_wrote(wrote))

    do = Part(do, (CHUNK, VALUES), lambda do, b, h, n, rows: do.at[b, pl.ds(n * CHUNK, CHUNK), h, rows])
    parts = (*map(Part.of, (chunks.w, chunks.scores, chunks.read, chunks.write, chunks.keep)), do)
    return through(step, parts, ds, lambda step: N - 1 - step, CHUNK * (3 * chunks.w.shape[4] + CHUNK), config)


class Part(NamedTuple):
    """What a step takes of an array: its shape, and `place(array, b, h, n, rows)`, for these rows of a state."""

    array: Array
    shape: tuple[int, ...]
    place: Callable[..., Any]

    @classmethod
    def of(cls, array: Array) -> Part:
        """All that an array `[B H N ...]` has of a chunk."""
        return cls(array, array.shape[3:], lambda array, b, h, n, rows: array.at[b, h, n])


def through(
    step: Callable[..., Array],
    parts: Sequence[Part],
    start: Array,
    order: Callable[[Any], Any],
    products: int,
    config: Config,
) -> tuple[Array, Array, Array]:
    """Carries states through the chunks, VALUES rows a program; the parts of `stages` chunks are in shared memory.

    Args:
        step: `f(state, the same in 16 bits, keep_state, keep_wrote, *parts)` to the state after it. It calls
            `keep_state()` and `keep_wrote(x)` with what it wrote, `[VALUES C]`, while products run.
        start: [B H V K].
        order: the chunk of a step.
        products: of numbers, for a row of a state in a step.

    Returns:
        The states that steps found [B H N V K], what they wrote [B H N V C], and the last state [B H V K].
    """
    (B, H, V, K), N, low = start.shape, parts[0].array.shape[2], parts[0].array.dtype
    stages, count = min(config.stages, N), len(parts)

    def body(*refs):
        given, (start, found, wrote, last), refs = refs[:count], refs[count : count + 4], refs[count + 4 :]
        given_s, (found_s, wrote_s, loaded) = refs[:count], refs[count:]
        v, h, b = (lax.axis_index(name) for name in ("v", "h", "b"))
        rows = pl.ds(v * VALUES, VALUES)

        def fetch(i):
            slot, n = lax.rem(i, stages), order(i)
            for part, gmem, smem in zip(parts, given, given_s, strict=True):
                plgpu.copy_gmem_to_smem(part.place(gmem, b, h, n, rows), smem.at[slot], loaded.at[slot])

        for i in range(stages):
            fetch(jnp.int32(i))

        def one(i, s):
            slot, n = lax.rem(i, stages), order(i)
            plgpu.barrier_wait(loaded.at[slot])
            state = s.astype(low)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            keep_state = lambda: write(state, found_s, found.at[b, h, n, rows])
            keep_wrote = lambda x: write(x, wrote_s, wrote.at[b, h, n, rows])
            s = step(s, state, keep_state, keep_wrote, *(smem.at[slot] for smem in given_s))
            pl.when(i + stages < N)(lambda: fetch(i + stages))
            return s

        last.at[b, h, rows][...] = lax.fori_loop(0, N, one, load(start.at[b, h, rows]))
        plgpu.wait_smem_to_gmem(0)

    ring = lambda shape, dtype: plgpu.SMEM((stages, *shape), dtype, transforms=TILED if len(shape) == 2 else ())
    out = lambda columns: jax.ShapeDtypeStruct((B, H, N, V, columns), low)
    given, found = (*(part.array for part in parts), start), (out(K), out(CHUNK), start)
    return plgpu.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in found),
        scratch_types=[
            *(ring(part.shape, part.array.dtype) for part in parts),
            tile(VALUES, K, low),
            tile(VALUES, CHUNK, low),
            plgpu.Barrier(num_arrivals=count, num_barriers=stages),
        ],
        grid=(V // VALUES, H, B),
        grid_names=("v", "h", "b"),
        **told(2 * B * H * N * V * products, 0, given, found),
    )(*given)


def weights(select: Callable[[Array, Array], Array], dtype: jnp.dtype) -> Array:
    """Weights of rows in sums over a chunk, as the left operand of a product."""
    i, t = iotas(CHUNK, CHUNK)
    chosen = select(i, t)
    return jnp.where(chosen, 1.0, 0.0).astype(dtype) if chosen.dtype == jnp.bool_ else chosen.astype(dtype)


def _documents(rows: Rows) -> tuple[Array, ...]:
    """What kernels take of documents; the numbers twice, since a reference is loaded in one layout only."""
    return () if rows.document is None else (rows.document, rows.document, rows.enter, rows.leave)


def intra(tokens: Tokens, rows: Rows, config: Config) -> Chunks:
    """Twin: `twin.intra`. Channels come in tiles of 64, so that what they need fits the registers of one warpgroup."""
    (B, T, H, K), V, low = tokens.q.shape, tokens.v.shape[-1], tokens.q.dtype
    N, C, documents = T // CHUNK, CHUNK, rows.document is not None

    def body(*refs):
        (q, k, v, g, beta), refs = refs[:5], refs[5:]
        (document, other, enter, leave), refs = (refs[:4], refs[4:]) if documents else ((None,) * 4, refs)
        (w, u, scores, read, write_, keep, solve), refs = refs[:7], refs[7:]
        q_s, k_s, parts_s, column_s, x_s, d_s, small_s, loaded, v_loaded = refs
        n, h, b = (lax.axis_index(name) for name in ("n", "h", "b"))
        span = pl.ds(n * C, C)
        channels = [pl.ds(first, C) for first in range(0, max(K, V), C)]
        keys = list(enumerate(channels[: K // C]))
        for c, some in keys:
            plgpu.copy_gmem_to_smem(q.at[b, span, h, some], q_s.at[c], loaded.at[0])
            plgpu.copy_gmem_to_smem(k.at[b, span, h, some], k_s.at[c], loaded.at[1])
        for c, some in keys:
            rest = jnp.maximum(load(g.at[b, span, h, some]), LEAST) * LOG2E
            for i in range(config.terms):
                part = rest.astype(low)
                parts_s.at[i, c][...] = part
                rest -= part.astype(jnp.float32)
        plgpu.commit_smem()
        sums = lambda select, c: product(*((weights(select, low), parts_s.at[i, c]) for i in range(config.terms)))
        wide = lambda ref: load(ref).astype(jnp.float32)
        plgpu.barrier_wait(loaded.at[0])
        plgpu.barrier_wait(loaded.at[1])
        i, j = iotas(C, C)
        zero = plgpu.layout_cast(jnp.zeros((C, C), jnp.float32), plgpu.Layout.WGMMA)
        seen, met = zero, zero
        for half in (None, *CUTS):
            select = about_middle if half is None else functools.partial(between, half=half)
            mask = near(i, j) if half is None else across(i, j, half)
            for_q, for_k = [], []
            for c, _ in keys:
                z = sums(select, c)
                row, k_wide = jnp.exp2(z), wide(k_s.at[c])
                for_q.append((wide(q_s.at[c]) * row).astype(low))
                for_k.append((k_wide * row).astype(low))
                column_s.at[c][...] = (k_wide * jnp.exp2(-z)).astype(low) if half is None else for_k[-1]
            plgpu.commit_smem()
            columns = [column_s.at[c].transpose((1, 0)) for c, _ in keys]
            seen = jnp.where(
                mask | (i == j) if half is None else mask, product(*zip(for_q, columns, strict=True)), seen
            )
            met = jnp.where(mask, product(*zip(for_k, columns, strict=True)), met)
        if documents:
            apart = spread(load(document.at[b, span], ROWS), C) - stack(load(other.at[b, span], COLUMNS), C)
            seen, met = jnp.where(apart == 0.0, seen, 0.0), jnp.where(apart == 0.0, met, 0.0)
        write(seen, small_s, scores.at[b, h, n])
        for c, some in keys:
            until, after = jnp.exp2(sums(lambda i, t: t <= i, c)), jnp.exp2(sums(lambda i, t: t > i, c))
            if documents:
                until *= spread(load(enter.at[b, span], ROWS), C)
                after *= spread(load(leave.at[b, span], ROWS), C)
            keep.at[b, h, n, some][...] = jnp.where(i == C - 1, until, 0.0).sum(axis=0)
            k_wide = wide(k_s.at[c])
            write(wide(q_s.at[c]) * until, q_s.at[c], read.at[b, h, n, :, some])
            k_s.at[c][...] = (k_wide * until).astype(low)
            write(k_wide * after, column_s.at[c], write_.at[b, h, n, :, some])
        for c, some in enumerate(channels[: V // C]):
            plgpu.copy_gmem_to_smem(v.at[b, span, h, some], parts_s.at[0, c], v_loaded)
        inverse = _inverse(met * spread(load(beta.at[b, h, span], ROWS), C), x_s, d_s)
        solved = (inverse * stack(load(beta.at[b, h, span], COLUMNS), C)).astype(low)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        write(solved, small_s, solve.at[b, h, n])
        for c, some in keys:
            write(-product((solved, k_s.at[c])), q_s.at[c], w.at[b, h, n, :, some])
        plgpu.barrier_wait(v_loaded)
        for c, some in enumerate(channels[: V // C]):
            found = product((parts_s.at[0, c].transpose((1, 0)), small_s.transpose((1, 0))))
            write(found, column_s.at[c], u.at[b, h, n, some])
        plgpu.wait_smem_to_gmem(0)

    out = lambda *shape, dtype=low: jax.ShapeDtypeStruct((B, H, N, *shape), dtype)
    tiles = lambda *counts: plgpu.SMEM((*counts, C, C), low, transforms=TILED)
    most, cuts = max(K, V) // C, 1 + len(CUTS)
    given = (*tokens, rows.beta, *_documents(rows))
    made = (out(C, K), out(V, C), out(C, C), out(C, K), out(C, K), out(K, dtype=jnp.float32), out(C, C))
    products = (config.terms * (cuts + 2) + 2 * cuts + 1) * C * C * K + C * C * V + 2 * (int(math.log2(C)) - 1) * C**3
    found = plgpu.kernel(
        body,
        out_type=made,
        scratch_types=[
            tiles(K // C),
            tiles(K // C),
            tiles(config.terms, most),
            tiles(most),
            tile(C, C, jnp.float16),
            tile(C, C, jnp.float16),
            tile(C, C, low),
            plgpu.Barrier(num_arrivals=K // C, num_barriers=2),
            plgpu.Barrier(num_arrivals=V // C),
        ],
        grid=(H, N, B),
        grid_names=("h", "n", "b"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **told(2 * B * H * N * products, B * H * N * (cuts + 3) * C * K, given, made),
    )(*given)
    return Chunks(*found)


def _inverse(lower: Array, x_s, d_s) -> Array:
    """Twin: `twin._inverse`; x_s and d_s hold its operands."""
    i, j = iotas(CHUNK, CHUNK)
    inverse = jnp.where(i == j, 1.0, 0.0) - jnp.where(across(i, j, 1), lower, 0.0)
    half = 2
    while half < CHUNK:
        rounded = inverse.astype(d_s.dtype)
        x_s[...] = jnp.where(across(i, j, half), lower, 0.0).astype(x_s.dtype)
        d_s[...] = rounded
        plgpu.commit_smem()
        below = product((rounded, x_s)).astype(d_s.dtype)
        inverse -= product((below, d_s))
        half *= 2
    return inverse


def gradients(
    tokens: Tokens, rows: Rows, chunks: Chunks, entries: Array, p: Array, exits: Array, dp: Array, do: Array
) -> Gradients:
    """`twin.gradients` itself, by XLA, GROUP chunks at a time so that its temporaries stay small."""
    N = chunks.w.shape[2]

    def some(first: Array | int, count: int) -> Gradients:
        along = lambda axis, unit: lambda x: lax.dynamic_slice_in_dim(x, first * unit, count * unit, axis)
        of_tokens, of_chunks = along(1, CHUNK), along(2, 1)
        cut = Rows(along(2, CHUNK)(rows.beta), *jax.tree.map(of_tokens, rows[1:]))
        given = jax.tree.map(of_chunks, (chunks, entries, p, exits, dp))
        return twin.gradients(jax.tree.map(of_tokens, tokens), cut, *given, of_tokens(do))

    whole, rest = divmod(N, GROUP)
    found = [some(N - rest, rest)] if rest else []
    if whole:
        groups = lax.map(lambda first: some(first, GROUP), jnp.arange(whole) * GROUP)
        by_head = lambda x: jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], -1)
        by_token = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])
        found.insert(0, Gradients(*map(by_token, groups[:4]), by_head(groups.beta)))
    joined = (
        jnp.concatenate(parts, axis) for parts, axis in zip(zip(*found, strict=True), (1,) * 4 + (2,), strict=True)
    )
    return Gradients(*joined)

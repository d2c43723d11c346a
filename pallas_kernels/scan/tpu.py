"""The selective scan on TPUs, by Pallas Mosaic.

One program carries the states `[N D]` of a block of channels, float32 in VMEM, through the row: channels on lanes,
states on sublanes, the grid (rows, blocks of channels, blocks of tokens), its last axis in order. Forward, the states
at the entries of blocks are kept; backward, a block makes its states again, in VMEM, and goes through its tokens
against the order of time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.scan.config import Config, cost
from pallas_kernels.scan.step import Token, advance, read, retreat

GROUP = 16
"""Tokens that are unrolled: the rows of a tile of 16-bit numbers."""

LANES = 128


class Tokens(NamedTuple):
    """Of a whole number of blocks: arrays, or the references of one block."""

    x: Any  # [B T D]
    dt: Any  # [B T D] float32
    b: Any  # [B N T] float32
    c: Any  # [B N T] float32
    keeps: Any  # [B 1 T] float32, 0 where a document begins, else 1; None: 1


class Rates(NamedTuple):
    """Of all tokens, float32."""

    a: Any  # [1 N D], of gradients [B N D]
    d: Any  # [1 1 D], of gradients [B 1 D]


def scan(
    config: Config,
    x: Array,
    dt: Array,
    a: Array,
    b: Array,
    c: Array,
    d: Array,
    h0: Array | None = None,
    resets: Array | None = None,
) -> tuple[Array, Array]:
    """The results of `ref.reference`, differentiable in all but resets."""
    (batch, length, width), states = x.shape, a.shape[1]
    lanes = min(config.lanes, pl.cdiv(width, LANES) * LANES)
    rows = min(config.rows, pl.cdiv(length, GROUP) * GROUP)
    config = Config(rows, lanes, config.interpret)
    wide = lambda array: jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, -width % lanes)])
    whole = lambda array: jnp.pad(array, [(0, 0), (0, -length % rows), (0, 0)])
    by_state = lambda array: jnp.swapaxes(whole(array.astype(jnp.float32)), 1, 2)
    keeps = None if resets is None else 1.0 - by_state(resets[..., None])
    h0 = jnp.zeros((batch, width, states)) if h0 is None else h0.astype(jnp.float32)
    rates = Rates(wide(a.astype(jnp.float32).T)[None], wide(d.astype(jnp.float32))[None, None])
    tokens = Tokens(whole(wide(x)), whole(wide(dt.astype(jnp.float32))), by_state(b), by_state(c), keeps)
    y, h = _scan(config, tokens, rates, wide(jnp.swapaxes(h0, 1, 2))[:, None])
    return y[:, :length, :width], jnp.swapaxes(h[:, 0, :, :width], 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(config: Config, tokens: Tokens, rates: Rates, h0: Array) -> tuple[Array, Array]:
    return forward(config, tokens, rates, h0, None)[:2]


def _scan_forward(config: Config, tokens: Tokens, rates: Rates, h0: Array) -> tuple[tuple[Array, Array], tuple]:
    y, h, entries = forward(config, tokens, rates, h0, jnp.float32)
    return (y, h), (tokens, rates, entries)


def _scan_backward(config: Config, kept: tuple, cotangents: tuple[Array, Array]) -> tuple[Tokens, Rates, Array]:
    tokens, rates, entries = kept
    found, of_rates, dh0 = backward(config, tokens, rates, entries, *cotangents)
    keeps = None if tokens.keeps is None else jnp.zeros_like(tokens.keeps)
    found = found._replace(b=found.b.sum(1), c=found.c.sum(1), keeps=keeps)
    return found, jax.tree.map(lambda x: x.sum(0, keepdims=True), of_rates), dh0


_scan.defvjp(_scan_forward, _scan_backward)


def forward(config: Config, tokens: Tokens, rates: Rates, h0: Array, entries: Any) -> tuple[Array, Array, Array | None]:
    """y `[B T D]`, the last states `[B 1 N D]`, and those at the entries of blocks `[B M N D]`, of a type or None."""
    (B, T, D), N, rows = tokens.x.shape, rates.a.shape[1], config.rows

    def body(tokens, rates, h0, y, last, kept, s):
        pl.when(pl.program_id(2) == 0)(lambda: _put(s, h0[...]))
        if kept is not None:
            _put(kept, s[...])
        a, d = rates.a[...], rates.d[...]

        def group(n, h):
            out = []
            for token in _tokens(tokens, n):
                h = advance(token, a, h)
                out.append(read(token, d, h))
            y[_rows(n), :] = jnp.concatenate(out).astype(y.dtype)
            return h

        s[...] = lax.fori_loop(0, rows // GROUP, group, s[...])
        _put(last, s[...])

    like = functools.partial(_like, tokens.x)
    kept = None if entries is None else like((B, T // rows, N, D), entries)
    out = like((B, T, D), tokens.x.dtype), like(h0.shape), kept
    spec, of_rate = functools.partial(_spec, config, lambda n: n), functools.partial(_rate_spec, config)
    return pl.pallas_call(
        body,
        out_shape=out,
        grid=(B, D // config.lanes, T // rows),
        in_specs=[_token_specs(spec, tokens), jax.tree.map(of_rate, rates), spec(h0)],
        out_specs=jax.tree.map(spec, out),
        scratch_shapes=[pltpu.VMEM((N, config.lanes), jnp.float32)],
        cost_estimate=cost(B, T, D, N, tokens.x.dtype.itemsize),
        compiler_params=_PARAMS,
        interpret=config.interpret,
        name="selective_scan_forward",
    )(tokens, rates, h0)


def backward(
    config: Config, tokens: Tokens, rates: Rates, entries: Array, dy: Array, dh: Array
) -> tuple[Tokens, Rates, Array]:
    """The gradients of tokens, those of b and c by block of channels `[B M N T]`, of rates by row, and of h0."""
    (B, T, D), N, rows, lanes = tokens.x.shape, rates.a.shape[1], config.rows, config.lanes
    M = T // rows

    def body(tokens, rates, entry, dy, dh, found, of_rates, first, states, back):
        @pl.when(pl.program_id(2) == 0)
        def _():
            _put(back, dh[...])
            _put(of_rates.a, jnp.zeros((N, lanes), jnp.float32))
            _put(of_rates.d, jnp.zeros((1, lanes), jnp.float32))

        a, d, width = rates.a[...], rates.d[...], GROUP
        states[0] = entry[...]

        def again(n, h):
            for i, token in enumerate(_tokens(tokens, n)):
                h = advance(token, a, h)
                states[n * width + i + 1] = h
            return h

        lax.fori_loop(0, rows // width, again, states[0])
        at = lax.broadcasted_iota(jnp.int32, (1, rows), 1)

        def group(step, carry):
            dh, da, dd, db, dc = carry
            n = rows // width - 1 - step
            cotangents, dx, ddt = dy[_rows(n), :].astype(jnp.float32), [], []
            for i, token in reversed(list(enumerate(_tokens(tokens, n)))):
                t = n * width + i
                dh, of = retreat(token, a, d, states[t], states[t + 1], cotangents[i : i + 1], dh)
                dx.insert(0, of.x)
                ddt.insert(0, of.dt)
                da, dd = da + of.a, dd + of.d
                db, dc = jnp.where(at == t, of.b, db), jnp.where(at == t, of.c, dc)
            found.x[_rows(n), :] = jnp.concatenate(dx).astype(found.x.dtype)
            found.dt[_rows(n), :] = jnp.concatenate(ddt)
            return dh, da, dd, db, dc

        zeros = jnp.zeros((N, rows), jnp.float32)
        carry = back[...], of_rates.a[...], of_rates.d[...], zeros, zeros
        refs = back, of_rates.a, of_rates.d, found.b, found.c
        for ref, value in zip(refs, lax.fori_loop(0, rows // width, group, carry), strict=True):
            _put(ref, value)
        _put(first, back[...])

    like = functools.partial(_like, tokens.x)
    part = like((B, D // lanes, N, T))
    out = (
        Tokens(like((B, T, D), tokens.x.dtype), like((B, T, D)), part, part, None),
        Rates(like((B, N, D)), like((B, 1, D))),
        like(dh.shape),
    )
    spec, of_rate = functools.partial(_spec, config, lambda n: M - 1 - n), functools.partial(_rate_spec, config)
    of_part = pl.BlockSpec((None, None, N, rows), lambda b, d, n: (b, d, 0, M - 1 - n))
    of_tokens = Tokens(spec(tokens.x), spec(tokens.dt), of_part, of_part, None)
    return pl.pallas_call(
        body,
        out_shape=out,
        grid=(B, D // lanes, M),
        in_specs=[_token_specs(spec, tokens), jax.tree.map(of_rate, rates), spec(entries), spec(dy), spec(dh)],
        out_specs=(of_tokens, jax.tree.map(of_rate, out[1]), spec(dh)),
        scratch_shapes=[pltpu.VMEM((rows + 1, N, lanes), jnp.float32), pltpu.VMEM((N, lanes), jnp.float32)],
        cost_estimate=cost(B, T, D, N, tokens.x.dtype.itemsize, backward=True),
        compiler_params=_PARAMS,
        interpret=config.interpret,
        name="selective_scan_backward",
    )(tokens, rates, entries, dy, dh)


_PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def _token_specs(spec: Callable[[Any], pl.BlockSpec], tokens: Tokens) -> Tokens:
    numbers = lambda x: spec(x, numbers=True)
    return Tokens(spec(tokens.x), spec(tokens.dt), *jax.tree.map(numbers, tokens[2:]))


def _spec(config: Config, order: Callable[[Any], Any], x: Any, numbers: bool = False) -> pl.BlockSpec:
    """Blocks of states `[B M N D]` or `[B 1 N D]`, of `numbers` `[B N T]`, or of rows `[B T D]`."""
    rows, lanes = config.rows, config.lanes
    if x.ndim == 4:
        return pl.BlockSpec(
            (None, None, x.shape[2], lanes), lambda b, d, n: (b, order(n) if x.shape[1] > 1 else 0, 0, d)
        )
    if numbers:
        return pl.BlockSpec((None, x.shape[1], rows), lambda b, d, n: (b, 0, order(n)))
    return pl.BlockSpec((None, rows, lanes), lambda b, d, n: (b, order(n), d))


def _rate_spec(config: Config, x: Any) -> pl.BlockSpec:
    """Blocks of `[1 N D]` or `[B N D]`."""
    row = lambda b: b if x.shape[0] > 1 else 0
    return pl.BlockSpec((None, x.shape[1], config.lanes), lambda b, d, n: (row(b), 0, d))


def _like(x: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """An output that varies over the manual axes that x varies over."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def _put(ref: Any, value: Array) -> None:
    ref[...] = value


def _rows(n: Any) -> Any:
    return pl.ds(pl.multiple_of(n * GROUP, GROUP), GROUP)


def _tokens(tokens: Tokens, n: Any) -> list[Token]:
    """Those of a group."""
    x, dt = tokens.x[_rows(n), :].astype(jnp.float32), tokens.dt[_rows(n), :]
    of_row = [None if ref is None else ref[...] for ref in tokens[2:]]
    lane = lax.broadcasted_iota(jnp.int32, (1, tokens.b.shape[1]), 1)
    column = lambda x, t: None if x is None else jnp.where(lane == t, x, 0.0).sum(1, keepdims=True)
    return [Token(x[i : i + 1], dt[i : i + 1], *(column(row, n * GROUP + i) for row in of_row)) for i in range(GROUP)]

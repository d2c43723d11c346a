"""The kernel's algorithm in jax.numpy: the same blocks in the same order, the same arithmetic, the same parts."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.decode.blocks import Blocks, Inputs, Setting, by_token, grouped, spread, view, wanted
from pallas_kernels.decode.config import Config
from pallas_kernels.decode.fold import finish, fold, lines_of, start
from pallas_kernels.decode.tpu import spec_of


def parts(setting: Setting, inputs: Inputs, found: Blocks, config: Config) -> tuple[Array, Array]:
    """(out [B splits T H V], lse [B splits T H]) float32 over disjoint sets of slots."""
    (B, T, H, _), heads, form = inputs.q.shape, inputs.k.shape[2], config.form
    spec = spec_of(setting, inputs, form)
    q = grouped(inputs.q, heads, form)
    want = grouped(wanted(inputs, form), heads, form, fill=-1)
    lines = lambda x: jnp.swapaxes(view(x, form), 2, 3) if spec.lanes else view(x, form)
    keys = lines(inputs.k)
    values = keys[..., : spec.values] if inputs.v is None else lines(inputs.v)
    unit = heads if spec.mixed else 1
    size, tables = config.block * unit // found.pieces.shape[2], spread(heads, form)

    def block(x: Array, b: int, j: Array, group: int) -> Array:
        if inputs.pages is not None:
            x = jnp.concatenate([x[page, group] for page in found.pieces[b, j]])
        else:
            x = lax.dynamic_slice_in_dim(x[b, group], found.pieces[b, j, 0] * unit, size)
        return x.T if spec.lanes else x

    def part(b: int, s: int, group: int) -> tuple[Array, Array]:
        each = -(-found.count[b] // config.splits)

        def step(i, carry):
            j = found.order[b, i]
            k, v = block(keys, b, j, group), block(values, b, j, group)
            lines = lines_of(spec, group, found.told[b, j], *tables)
            return fold(spec, q[b, group], want[b, group], k, v, lines, carry)

        last = jnp.minimum((s + 1) * each, found.count[b])
        return finish(lax.fori_loop(s * each, last, step, start(q.shape[2], spec.values)))

    of = range(B), range(config.splits), range(spec.groups)
    each = [[[part(b, s, group) for group in of[2]] for s in of[1]] for b in of[0]]
    out, lse = (jnp.array([[[x[i] for x in part] for part in row] for row in each]) for i in (0, 1))
    return by_token(out, T, H, heads), by_token(lse, T, H, heads)[..., 0]

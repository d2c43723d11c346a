"""Attention of a few new tokens a row to a cache, on TPUs and Hopper GPUs: ring buffers and pages, 8 bits, latents.

`attention` and `paged_attention` compute what `ref.attention` computes, and run where `refusal` returns None. The
visited blocks of a row are cut into parts whose results are merged by their lse (Flash-Decoding: Dao et al. 2023); the
queries that share a key head (on a TPU all others, too) are the rows of one product. Keys that are values too, latents
of which the first `value_dim` columns are summed (DeepSeek-V2, arXiv 2405.04434, absorbed), are read once.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import hopper, machine
from pallas_kernels.decode import ref
from pallas_kernels.decode.blocks import HEAD, LANES, QUERIES, Inputs, Setting, blocks_of, cut, merged
from pallas_kernels.decode.config import Config, grain
from pallas_kernels.plan import Predicate

EIGHT_BITS = ("int8", "float8_e4m3fn")
TABLE = 2**17
"""Blocks and pages of all rows together that scalar memory holds, with room for others."""
ROWS = 1024
"""Queries of all heads of a row at most."""


def refusal(setting: Setting, inputs: Inputs, config: Any = None) -> str | None:
    """Why the kernel does not take these arguments on this machine; None if it does."""
    if (found := machine.platform()) == "tpu":
        return _misfit(setting, inputs, config)
    if found not in hopper.PLATFORMS:
        return f"the default device is neither a TPU nor a Hopper GPU but {found}"
    if reason := hopper.refusal() or _shapes(setting, inputs):
        return reason
    from pallas_kernels.decode import gpu

    return gpu.misfit(setting, inputs, config)


def attention(setting: Setting, inputs: Inputs, config: Any = None, interpret: Any = None) -> tuple[Array, Array]:
    """(out [B T H V], lse [B T H] float32); a query that sees nothing gets 0 and -inf, or its sink. No gradient.

    Args:
        config: `Config` on a TPU, `gpu.Config` on a GPU; by default what these think best.
        interpret: the TPU's kernel anywhere, as `pl.pallas_call` takes it; None runs on a TPU or a GPU.

    Raises:
        NotImplementedError: with what `refusal` says.
    """
    why_not = refusal if interpret is None else _misfit
    if reason := why_not(setting, inputs, config):
        raise NotImplementedError(reason)
    if interpret is None and machine.platform() in hopper.PLATFORMS:
        from pallas_kernels.decode import gpu

        return gpu.attention(setting, inputs, config)
    from pallas_kernels.decode import tpu

    run = lambda *arguments: tpu.parts(*arguments, interpret or False)
    return in_parts(run, setting, inputs, Config.of(setting, inputs) if config is None else config)


def in_parts(parts: Any, setting: Setting, inputs: Inputs, config: Config) -> tuple[Array, Array]:
    """Attention by `parts` (of `tpu.py` or `twin.py`), merged with each other, with slots that are left, and sinks."""
    inputs, left = cut(inputs, config.block)
    out, lse = parts(setting, inputs, blocks_of(setting, inputs, config.block), config)
    if left is not None:
        wide = Setting(setting.mask, setting.scale, setting.soft_cap, jnp.float32, setting.value_dim)
        more = ref.attention(wide, left._replace(sinks=None))
        out, lse = (jnp.concatenate([x, y[:, None]], axis=1) for x, y in zip((out, lse), more, strict=True))
    out, lse = merged(out, lse, inputs.sinks)
    return out.astype(setting.dtype), lse


def paged_attention(
    q: Array,
    k: Array,
    v: Array | None,
    pages: Array,
    lengths: Array,
    *,
    mask: Predicate,
    scale: float | None = None,
    soft_cap: float | None = None,
    slopes: Array | None = None,
    sinks: Array | None = None,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    value_dim: int | None = None,
    config: Any = None,
    interpret: Any = None,
) -> tuple[Array, Array]:
    """(out [B T H V] of q's type, lse [B T H]): the last T tokens of each row attend to all of its tokens, in pages.

    Args:
        q: [B T H C], T at most 8; token t of a row has the position lengths - T + t. In rows of fewer tokens than T the
            first queries see nothing.
        k, v: [N L K C] and [N L K V], N pages of L tokens; bfloat16 or float32 as q, or int8 or float8_e4m3fn.
            v None: values are the first `value_dim` columns of k.
        pages: [B M] the pages of each row in order; what is behind the last token's page may be any number.
        lengths: [B] tokens of each row, the new ones included; 0 for a row without any.
        mask: as in `pallas_kernels.plan.Predicate`, of positions in the row.
        scale: C ** -0.5 unless given.    slopes, sinks: [H].
        k_scale, v_scale: [N L K] factors of the stored numbers, [N 1 K] for one a page.

    Raises:
        NotImplementedError: with what `refusal` says.
    """
    B, T, _, C = q.shape
    S = pages.shape[1] * k.shape[1]
    places = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
    q_positions = lengths[:, None] - T + jnp.arange(T, dtype=jnp.int32)
    k_segments = jnp.where(places < lengths[:, None], 0, -1)
    q_segments = jnp.where(q_positions < 0, -1, 0)
    setting = Setting(mask, C**-0.5 if scale is None else scale, soft_cap, q.dtype, value_dim)
    q_positions = jnp.maximum(q_positions, 0)
    inputs = Inputs(q, k, v, q_positions, places, q_segments, k_segments, slopes, sinks, k_scale, v_scale, pages)
    return attention(setting, inputs, config, interpret)


def _misfit(setting: Setting, inputs: Inputs, config: Config | None) -> str | None:
    """Why the TPU's kernel takes these arguments on no machine."""
    if reason := _shapes(setting, inputs) or _lines(inputs) or _types(inputs):
        return reason
    return _config(inputs, Config.of(setting, inputs) if config is None else config)


def _shapes(setting: Setting, inputs: Inputs) -> str | None:
    (B, T, H, C), (_, _, K, of_keys) = inputs.q.shape, inputs.k.shape
    if not 1 <= T <= QUERIES or not B:
        return f"{T} queries a row, not 1 to {QUERIES}"
    if of_keys != C or H % K:
        return f"queries of {H} heads of {C} to keys of {K} heads of {of_keys}"
    if inputs.v is None and not 0 < (setting.value_dim or 0) <= C:
        return f"no values, and {setting.value_dim} of {C} columns of keys for them"
    if inputs.k_positions.shape[1] != inputs.slots:
        return f"positions of {inputs.k_positions.shape[1]} keys for {inputs.slots} slots"
    if _differs(setting.mask, H):
        return "a mask that differs between heads"
    return None


def _lines(inputs: Inputs) -> str | None:
    (_, T, H, _), (_, L, K, _) = inputs.q.shape, inputs.k.shape
    if T * H > ROWS:
        return f"{T} queries of {H} heads, together more than {ROWS}"
    if K > HEAD:
        return f"keys of {K} heads, more than {HEAD}"
    if inputs.pages is None and L < LANES:
        return f"{L} slots, fewer than {LANES}"
    return None


def _differs(mask: Predicate, H: int) -> bool:
    """Whether the mask asks for the head: then its result has the heads' axis."""
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    return jax.eval_shape(mask, of(1, 1), of(1, 1), of(2, 1, 1)).shape != (1, 1)


def _types(inputs: Inputs) -> str | None:
    q, given = inputs.q.dtype.name, [x for x in (inputs.k, inputs.v) if x is not None]
    if q not in ("bfloat16", "float32"):
        return f"queries of {q}, neither bfloat16 nor float32"
    for x in given:
        if x.dtype.name not in (q, *EIGHT_BITS):
            return f"keys or values of {x.dtype}, neither {q} as the queries nor {' or '.join(EIGHT_BITS)}"
    if inputs.v is None and inputs.v_scale is not None:
        return "factors of values that are keys"
    return None


def _config(inputs: Inputs, config: Config) -> str | None:
    slots, unit = inputs.slots, grain(inputs)
    if config.block % unit or (inputs.pages is None and config.block > slots):
        return f"blocks of {config.block} of {slots} slots, not a multiple of {unit} and no more than these"
    if config.stages < 2 or config.splits < 1:
        return f"{config.stages} blocks in memory and {config.splits} parts, not at least 2 and 1"
    table = (
        len(inputs.q) * -(-slots // config.block) * (1 if inputs.pages is None else config.block // inputs.k.shape[1])
    )
    if table > TABLE:
        return f"a table of {table} pages or blocks, more than {TABLE}; larger pages make it smaller"
    rows = inputs.k.shape[1] * (inputs.k.shape[2] if config.form == "lines" else 1)
    tile = 32 // jnp.dtype(inputs.k.dtype).itemsize
    if inputs.pages is not None and rows % (LANES if config.form == "lanes" else tile):
        return f"pages of {rows} lines of {inputs.k.dtype}, not a multiple of {tile}"
    return None

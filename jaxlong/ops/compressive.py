"""Compressive memory (Infini-attention): what left the local window, folded into one matrix a key head."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxlong.core.state import EMPTY, Recurrent
from jaxlong.core.types import BadInput
from jaxlong.ops.attend import Backend
from jaxlong.ops.chunk_memory import Past, followed
from jaxlong.ops.chunks import join, split
from jaxlong.ops.dense import precision
from jaxlong.parallel.manual import vary_alike
from jaxlong.parallel.prefix import Chain, dense, earlier, final, prefix
from jaxlong.parallel.rows import over_spans, spread

UPDATES = ("linear", "delta")


def empty_memory(batch: int, kv_heads: int, key_dim: int, value_dim: int) -> Recurrent:
    """Nothing stored: (M, z) as the running segment found them, and (M, z) of what it will add."""
    matrix, vector = (kv_heads, key_dim, value_dim), (kv_heads, key_dim)
    return Recurrent.empty(batch, matrix, vector, matrix, vector)


def compressive_memory(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T K C"],
    v: Float[Array, "B T K V"],
    *,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    segment: int,
    update: str,
    state: Recurrent | None = None,
    backend: Backend = Backend(),
) -> tuple[Float[Array, "B T H V"], Recurrent]:
    """Reads a memory that changes at the end of each segment of `segment` tokens of a document.

        o_t = s(q_t) M / (s(q_t) z),  s(x) = elu(x) + 1,  M and z as the segments before t's left them
        M += sum_j s(k_j)^T (v_j - r_j),  z += sum_j s(k_j)   over a segment; r_j = s(k_j) M / (s(k_j) z), or 0

    An empty memory gives 0. Segments are counted by positions, from the start of each document. The row is walked in
    cells of at most `segment` tokens: in a cell the document that came in ends at most one segment, and those that
    start there are in their first, whose memory is empty. Memory and sums are float32. Rows in spans on several
    devices (`parallel.prefix`) begin with the text: each span runs once, with 2 C further columns.

    Args:
        update: "linear" (r_j = 0) or "delta".
        state: continues `empty_memory` or what a call returned, if the first token is of the same document.
        backend: its layout says how rows lie on the devices of a mesh; with a state they are left to the compiler.

    Returns:
        o in float32, and the state after the last token.

    Raises:
        BadInput: another update.

    Source: Munkhdalai et al. 2024, arXiv 2404.07143, section 2.1.
    """
    if update not in UPDATES:
        raise BadInput("update", update, "no such rule", f"one of {', '.join(UPDATES)}")
    if state is None and spread(q.shape[1], backend.layout):
        on_spans = functools.partial(_on_spans, segment, update)
        return over_spans(on_spans, (q, k, v, positions, segment_ids), None, layout=backend.layout)
    (B, T, H, C), K = q.shape, k.shape[2]
    exact = precision(q.dtype)
    state = vary_alike((segment_ids, empty_memory(B, K, C, v.shape[-1])))[1] if state is None else state
    size = min(segment, T)
    whole = jnp.pad(segment_ids, [(0, 0), (0, -T % size)], mode="edge")  # what pads has no keys and ends no segment
    q, k, v = _positive(q).reshape(B, T, K, H // K, C), _positive(k), v.astype(jnp.float32)

    def gathered(keys, values, mask, memory):
        """(M, z) that the keys of the mask add to a memory."""
        if update == "delta":
            values = values - _read(keys[..., None, :], memory, exact)[..., 0, :]
        keys = jnp.where(mask[..., None, None], keys, 0)
        return jnp.einsum("btkc,btkv->bkcv", keys, values, precision=exact), keys.sum(1)

    def cell(carry: Recurrent, tokens):
        q, k, v, edges, ids = tokens
        entry, pending = carry.memory[:2], carry.memory[2:]
        old = ids == carry.segment_ids[:, None]
        crossed = jnp.cumsum(edges & old, axis=1) > 0
        before, after = old & ~crossed, old & crossed

        grown = _add(_add(entry, pending), gathered(k, v, before, entry))
        at = lambda mask, memory: jnp.where(mask[..., None, None, None], _read(q, memory, exact), 0)
        out = at(before, entry) + at(after, grown)

        last, beyond = ids[:, -1], crossed[:, -1]
        same = last == carry.segment_ids
        entry = _where(same, _where(beyond, grown, entry), jax.tree.map(jnp.zeros_like, entry))
        running = (ids == last[:, None]) & (crossed == beyond[:, None])
        pending = _where(same & ~beyond, pending, jax.tree.map(jnp.zeros_like, pending))
        pending = _add(pending, gathered(k, v, running, entry))
        return Recurrent((*entry, *pending), last), out

    cells = tuple(split(x, size) for x in (q, k, v, positions % segment == 0, whole))
    state, out = jax.lax.scan(jax.checkpoint(cell), state, cells)
    return join(out, T).reshape(B, T, H, -1), state


def _on_spans(segment: int, update: str, tokens: tuple, _: None, chain: Chain) -> tuple[Array, Recurrent]:
    """First z before each span, by which what is read is divided; with those, M is an affine function of its entry.

    M and what is pending stand one above the other, 2 C rows, beside 2 C columns that write nothing and begin as the
    identity: as in the delta rule, what becomes of them is the map of the entry to the exit and to the outputs.
    """
    q, k, v, positions, ids = tokens
    (B, _, H, C), K, V = q.shape, k.shape[2], v.shape[-1]
    run = functools.partial(compressive_memory, q, k, positions=positions, segment_ids=ids, segment=segment)
    last = earlier(ids[:, -1] - EMPTY, 1, chain) + EMPTY
    flag = lambda rows: rows.astype(jnp.float32)[:, None, None]

    empty = vary_alike((last, empty_memory(B, K, C, 1)))[1]._replace(segment_ids=last)
    _, z, _, z_pending = run(v=v[..., :1], update="linear", state=empty)[1].memory
    turned = (positions % segment == 0).any(1)
    past = prefix(followed, Past(z, z + z_pending, flag(last == ids[:, -1]), flag(turned)), chain)
    z, z_pending = past.seen, past.later - past.seen

    wide = jnp.pad(v.astype(jnp.float32), [(0, 0)] * 3 + [(0, 2 * C)])
    unit = jnp.broadcast_to(jnp.eye(2 * C, V + 2 * C, V), (B, K, 2 * C, V + 2 * C))
    entry = vary_alike((z, Recurrent((unit[:, :, :C], z, unit[:, :, C:], z_pending), last)))[1]
    o, (memory, end) = run(v=wide, update=update, state=entry)
    both = jnp.concatenate([memory[0], memory[2]], axis=2)
    before = prefix(dense, both, chain)
    maps, values = o[..., V:].reshape(B, -1, K, H // K, 2 * C), slice(V)
    read = jnp.einsum("btkgc,bkcv->btkgv", maps, before[..., values], precision=precision(q.dtype))
    matrix, pending = jnp.split(dense(before, both)[..., values], 2, axis=2)
    return o[..., values] + read.reshape(*q.shape[:3], V), final(
        Recurrent((matrix, memory[1], pending, memory[3]), end), chain
    )


def _positive(x: Array) -> Array:
    return jax.nn.elu(x.astype(jnp.float32)) + 1


def _read(x: Float[Array, "B T K G C"], memory: tuple[Array, Array], exact) -> Float[Array, "B T K G V"]:
    """x M / (x z), and 0 where nothing is stored."""
    matrix, norm = memory
    weight = jnp.einsum("btkgc,bkc->btkg", x, norm, precision=exact)[..., None]
    value = jnp.einsum("btkgc,bkcv->btkgv", x, matrix, precision=exact)
    return jnp.where(weight > 0, value / jnp.where(weight > 0, weight, 1), 0)


def _add(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    return jax.tree.map(jnp.add, a, b)


def _where(rows: Bool[Array, "B"], a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    return jax.tree.map(lambda x, y: jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, y), a, b)

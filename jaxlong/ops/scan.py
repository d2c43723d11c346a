"""Diagonal linear recurrences: chunked linear attention, elementwise scans, the selective scan.

Rows that lie in spans on several devices (`parallel.prefix`) begin with the text: each span runs once, from an empty
state, and what its true entry adds is the decay since then times what a token reads of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxlong.ops.attend import Backend, first_taken
from jaxlong.ops.chunks import Documents, gated_scores, join, split
from jaxlong.ops.select import map_queries
from jaxlong.parallel.manual import vary_alike
from jaxlong.parallel.prefix import Chain, diagonal, final, prefix
from jaxlong.parallel.rows import over_rows, over_spans, spread
from pallas_kernels import delta as delta_kernels
from pallas_kernels import scan as scan_kernels

HIGHEST = jax.lax.Precision.HIGHEST


def linear_attention(
    q: Float[Array, "B T I K"],
    k: Float[Array, "B T J K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    *,
    bonus: Float[Array, "H K"] | None = None,
    s0: Float[Array, "B H K V"] | None = None,
    resets: Bool[Array, "B T"] | None = None,
    chunk: int = 64,
    backend: Backend = Backend(),
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Linear attention with diagonal decay, in chunks of matrix products.

        S_t = Diag(exp(g_t)) S_(t-1) + k_t v_t^T        o_t = S_t^T q_t
        o_t = (S_(t-1) + Diag(u) k_t v_t^T)^T q_t       with a bonus u: read before the update (RWKV-6)

    The heads of q and k may be fewer than H where they divide it: head h reads head h // (H / J) of J
    (groups of Mamba-2, grouped-query attention).

    Args:
        log_decay: g <= 0, finite, float32: one a head, or one a channel of the keys; None is no decay.
        s0: the state before the first token, float32; None is zeros.
        resets: True at a token that starts from an empty state.
        chunk: tokens a chunk; the result does not depend on it.
        backend: its layout says how rows lie on the devices of a mesh; with s0 they are left to the compiler.

    Returns:
        The outputs in v's type, and the state after the last token in float32. With chunks of C tokens this costs
        2 T H (C (K + V) + 2 K V) flops, and backward the memory of one state a chunk.
    """
    batch, length, heads, value_dim = v.shape
    if s0 is None and spread(length, backend.layout):
        on_spans = functools.partial(_attention_on_spans, chunk)
        return over_spans(on_spans, (q, k, v, log_decay, resets), bonus, layout=backend.layout)
    if s0 is None:
        s0 = vary_alike((v, jnp.zeros((batch, heads, k.shape[-1], value_dim), jnp.float32)))[1]
    return first_taken(
        "linear_attention", LINEAR, lambda name: LINEAR[name](chunk, q, k, v, log_decay, bonus, s0, resets)
    )


def _linear_by_kernels(
    chunk: int,
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None,
    bonus: Array | None,
    s0: Array,
    resets: Array | None,
) -> tuple[Array, Array]:
    """`linear_attention` by the Pallas kernels of the delta rule, less its correction; their chunks have 64 tokens.

    Raises:
        NotImplementedError: the kernels do not take these arguments on this machine; it says why.
    """
    if bonus is not None:
        raise NotImplementedError("a bonus is not taken")
    if v.shape[1] == 1:
        raise NotImplementedError("one token is one step")
    if reason := delta_kernels.linear_refusal(q, k, v):
        raise NotImplementedError(reason)
    tensor = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    shared = all(x.shape[2] == 1 or x.shape[2] % tensor == 0 for x in (q, k, v))
    heads = "heads" if shared else None  # a device holds the groups of its heads, or all
    of_tokens = "batch", None, heads
    run = lambda *arrays: delta_kernels.linear_attention(*arrays[:4], s0=arrays[4], resets=arrays[5])
    names = (*[of_tokens] * 4, ("batch", heads), ("batch",))
    return over_rows(run, (q, k, v, log_decay, s0, resets), names, like=(2, 4))


def _linear_by_chunks(
    chunk: int,
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None,
    bonus: Array | None,
    s0: Array,
    resets: Array | None,
) -> tuple[Array, Array]:
    """`linear_attention` in plain matrix products, on any device."""
    batch, length, heads = v.shape[:3]
    chunk = min(chunk, length)
    if log_decay is not None and resets is not None:  # the decay of what a reset drops would only cost precision
        log_decay = jnp.where(resets.reshape(batch, length, *[1] * (log_decay.ndim - 2)), 0.0, log_decay)
    step = _scalar_step if log_decay is None or log_decay.ndim == 3 else _channel_step

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(s, xs):
        *inputs, first = xs
        q, k, v, g = (None if x is None else jnp.moveaxis(x, 2, 1).astype(jnp.float32) for x in inputs)
        groups = max(q.shape[1], k.shape[1])
        s, o = step(s, _repeat(q, groups), _repeat(k, groups), v, g, Documents.of(first, chunk), bonus is not None)
        if bonus is not None:
            own = jnp.einsum("bhtk,hk,bhtk->bht", _repeat(q, heads), bonus, _repeat(k, heads))
            o += own[..., None] * v
        return s, jnp.moveaxis(o, 1, 2).astype(inputs[2].dtype)

    parts = tuple(None if x is None else split(x, chunk) for x in (q, k, v, log_decay, resets))
    s, o = jax.lax.scan(body, s0, parts)
    return join(o, length), s


LINEAR: Mapping[str, Callable[..., tuple[Array, Array]]] = {"pallas": _linear_by_kernels, "chunks": _linear_by_chunks}
"""Implementations of linear attention in the order in which they are tried; NotImplementedError: the next one."""


def _attention_on_spans(chunk: int, tokens: tuple, bonus: Array | None, chain: Chain) -> tuple[Array, Array]:
    q, k, v, log_decay, resets = tokens
    (batch, length, heads, _), keys = v.shape, k.shape[-1]
    o, s = linear_attention(q, k, v.astype(jnp.float32), log_decay, bonus=bonus, resets=resets, chunk=chunk)

    log_decay = jnp.zeros((batch, length, 1)) if log_decay is None else log_decay
    enter, keep = _decays(log_decay if log_decay.ndim == 4 else log_decay[..., None], resets, bonus is not None)
    (_, memory) = prefix(diagonal, (keep[..., None], s), chain)
    if enter.shape[-1] > 1:
        q, enter = jnp.repeat(q, heads // q.shape[2], axis=2) * enter, 1.0
    of_groups = memory.reshape(batch, q.shape[2], -1, keys, v.shape[-1])
    o += jnp.einsum("btgk,bgrkv->btgrv", q.astype(jnp.float32), of_groups).reshape(o.shape) * enter
    return o.astype(v.dtype), final(keep[..., None] * memory + s, chain)


def _decays(
    log_decay: Float[Array, "B T *N"], resets: Bool[Array, "B T"] | None, before: bool = False
) -> tuple[Float[Array, "B T *N"], Float[Array, "B *N"]]:
    """The decay of a span's entry state up to each token, or to the one before it, and to the end of the span."""
    total = jnp.cumsum(log_decay, axis=1)
    if resets is None:
        open_, whole = True, True
    else:
        open_ = (jnp.cumsum(resets, axis=1) == 0).reshape(*resets.shape, *[1] * (total.ndim - 2))
        whole = open_[:, -1]
    faded = lambda seen, total: jnp.exp(jnp.where(seen, total, -jnp.inf))
    return faded(open_, _shift(total, 1, 1) if before else total), faded(whole, total[:, -1])


def _repeat(x: Float[Array, "B J C K"], heads: int) -> Float[Array, "B H C K"]:
    return jnp.repeat(x, heads // x.shape[1], axis=1)


def _shift(x: Array, axis: int, by: int) -> Array:
    """Rows moved along an axis by so many places; zeros enter."""
    pad = [(0, 0)] * x.ndim
    pad[axis] = (max(by, 0), max(-by, 0))
    first = max(-by, 0)
    return jax.lax.slice_in_dim(jnp.pad(x, pad), first, first + x.shape[axis], axis=axis)


def _scalar_step(s: Array, q: Array, k: Array, v: Array, g: Array | None, documents: Documents, before: bool):
    """A chunk with one decay a head: q, k [B G C K], v [B H C V], g [B H C], s [B H K V].

    `before`: tokens read the state before their own update.
    """
    groups, length, shape = q.shape[1], q.shape[2], v.shape
    grouped = lambda x: x.reshape(x.shape[0], groups, -1, *x.shape[2:])
    if g is None:
        g = jnp.zeros((1, v.shape[1], length), jnp.float32)
    # The sums over j < l <= i of g_l, added up as such: differences of one cumulated sum lose digits as it grows.
    lower = jnp.tril(jnp.ones((length, length), jnp.float32))
    sums = jnp.matmul(g[:, :, None, :] * lower, jnp.tril(lower, -1), precision=HIGHEST)
    total = sums[..., 0] + g[..., :1]
    decay = jnp.exp(jnp.where(documents.pairs[:, None], sums, -jnp.inf))
    leave = decay[..., -1, :]
    keep = jnp.where(documents.old[:, None, -1:], jnp.exp(total[..., -1:]), 0.0)
    if before:
        decay, total = jnp.where(documents.pairs[:, None], _shift(decay, -2, 1), 0.0), _shift(total, -1, 1)
    enter = jnp.where(documents.old[:, None], jnp.exp(total), 0.0)

    scores = jnp.einsum("bgik,bgjk->bgij", q, k)[:, :, None] * grouped(decay)
    memory, v = grouped(s), grouped(v)
    o = jnp.einsum("bgrij,bgrjv->bgriv", scores, v)
    o += jnp.einsum("bgik,bgrkv->bgriv", q, memory) * grouped(enter)[..., None]
    new = jnp.einsum("bgjk,bgrjv->bgrkv", k, v * grouped(leave)[..., None])
    return keep[..., None] * s + new.reshape(s.shape), o.reshape(shape)


def _channel_step(s: Array, q: Array, k: Array, v: Array, g: Array, documents: Documents, before: bool):
    """A chunk with one decay a channel of the keys: q, k [B G C K], v [B H C V], g [B H C K], s [B H K V]."""
    heads, length = v.shape[1:3]
    q, k = _repeat(q, heads), _repeat(k, heads)
    lower = jnp.tril(jnp.ones((length, length), jnp.float32))
    total = jnp.einsum("ij,bhjk->bhik", lower, g, precision=HIGHEST)
    if documents.several:  # what passed before a document moves all its sums alike, so it has no gradient
        own = jnp.einsum("bij,bhjk->bhik", documents.pairs.astype(jnp.float32), g, precision=HIGHEST)
        total = own + jax.lax.stop_gradient(total - own)
    rest = jnp.einsum("ji,bhjk->bhik", jnp.tril(lower, -1), g, precision=HIGHEST)
    leave = k * jnp.where(documents.last[:, None, :, None], jnp.exp(rest), 0.0)
    keep = jnp.where(documents.old[:, None, -1:, None], jnp.exp(total[:, :, -1:]), 0.0)
    pairs = documents.pairs[:, None]
    if before:  # row i holds the query of row i + 1, so that the decay of its own row does not act on it
        above = gated_scores(_shift(q, -2, -1), k, g, jnp.tril(_shift(pairs, -2, -1)))
        scores, total = _shift(above, -2, 1), _shift(total, -2, 1)
    else:
        scores = gated_scores(q, k, g, pairs)
    enter = q * jnp.where(documents.old[:, None, :, None], jnp.exp(total), 0.0)
    o = jnp.einsum("bhij,bhjv->bhiv", scores, v) + jnp.einsum("bhik,bhkv->bhiv", enter, s)
    return keep.swapaxes(-1, -2) * s + jnp.einsum("bhjk,bhjv->bhkv", leave, v), o


def linear_scan(
    decay: Float[Array, "B T *N"],
    update: Float[Array, "B T *N"],
    *,
    h0: Float[Array, "B *N"] | None = None,
    resets: Bool[Array, "B T"] | None = None,
    chunk: int = 64,
    backend: Backend = Backend(),
) -> tuple[Float[Array, "B T *N"], Float[Array, "B *N"]]:
    """h_t = decay_t h_(t-1) + update_t elementwise: an associative scan inside chunks, chunks one after another.

    Args:
        decay: factors, float32 (not their logarithms; zero is allowed).
        h0: the state before the first token; None is zeros.
        resets: True at a token that starts from an empty state.
        backend: its layout says how rows lie on the devices of a mesh; with h0 they are left to the compiler.

    Returns:
        All states, and the last.
    """
    batch, length = decay.shape[:2]
    if h0 is None and spread(length, backend.layout):
        on_spans = functools.partial(_scan_on_spans, chunk)
        return over_spans(on_spans, (decay, update, resets), None, layout=backend.layout)
    if h0 is None:
        h0 = jnp.zeros_like(update[:, 0])
    if resets is not None:
        decay = jnp.where(resets.reshape(batch, length, *[1] * (decay.ndim - 2)), 0.0, decay)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(h, xs):
        states = _states(h, *xs)
        return states[:, -1], states

    chunk = min(chunk, length)
    states = join(jax.lax.scan(body, h0, (split(decay, chunk), split(update, chunk)))[1], length)
    return states, states[:, -1]


def _scan_on_spans(chunk: int, tokens: tuple, _: None, chain: Chain) -> tuple[Array, Array]:
    """With a second recurrence beside it, from 1 and without updates: the decay since the entry."""
    decay, update, resets = tokens
    both = lambda x, y: jnp.stack([x, y], axis=-1)
    zeros = jnp.zeros_like(update)
    entry = both(zeros[:, 0], zeros[:, 0] + 1)
    states, _ = linear_scan(both(decay, decay), both(update, zeros), h0=entry, resets=resets, chunk=chunk)
    h, fade = states[..., 0], states[..., 1]
    before = prefix(diagonal, (fade[:, -1], h[:, -1]), chain)[1]
    h += fade * before[:, None]
    return h, final(h[:, -1], chain)


@jax.custom_vjp
def _states(h: Float[Array, "B *N"], decay: Float[Array, "B C *N"], update: Float[Array, "B C *N"]) -> Array:
    """The states [B C *N] of one chunk that is entered with h.

    The gradient is the same recurrence backwards: an automatic one would keep each level of the scan's tree.
    """
    update = jnp.concatenate([update[:, :1] + decay[:, :1] * h[:, None], update[:, 1:]], axis=1)
    combine = lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1])
    return jax.lax.associative_scan(combine, (decay, update), axis=1)[1]


def _states_forward(h: Array, decay: Array, update: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    states = _states(h, decay, update)
    return states, (h, decay, states)


def _states_backward(kept: tuple[Array, Array, Array], d_states: Array) -> tuple[Array, Array, Array]:
    h, decay, states = kept
    following = _shift(decay, 1, -1)[:, ::-1]
    d_update = _states(jnp.zeros_like(h), following, d_states[:, ::-1])[:, ::-1]
    before = jnp.concatenate([h[:, None], states[:, :-1]], axis=1)
    return decay[:, 0] * d_update[:, 0], d_update * before, d_update


_states.defvjp(_states_forward, _states_backward)


def selective_scan(
    x: Float[Array, "B T D"],
    dt: Float[Array, "B T D"],
    a: Float[Array, "D N"],
    b: Float[Array, "B T N"],
    c: Float[Array, "B T N"],
    d: Float[Array, "D"],
    *,
    h0: Float[Array, "B D N"] | None = None,
    resets: Bool[Array, "B T"] | None = None,
    chunk: int = 64,
    backend: Backend = Backend(),
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """The selective scan of Mamba (arXiv 2312.00752), in float32.

        h_t = exp(dt_t a) h_(t-1) + (dt_t x_t) b_t^T        y_t = h_t c_t + d x_t

    Decays and updates [B C D N] exist for one chunk of C tokens at a time, backward too.

    Args:
        dt: step sizes, after their softplus; float32.
        a: negative rates.
        h0: the state before the first token, float32; None is zeros.
        resets: True at a token that starts from an empty state.
        backend: its layout says how rows lie on the devices of a mesh; with h0 they are left to the compiler.

    Returns:
        The outputs in x's type, and the state after the last token in float32.
    """
    batch, length, width = x.shape
    if h0 is None and spread(length, backend.layout):
        on_spans = functools.partial(_selective_on_spans, chunk)
        return over_spans(on_spans, (x, dt, b, c, resets), (a, d), layout=backend.layout)
    if h0 is None:
        h0 = vary_alike((x, jnp.zeros((batch, width, a.shape[-1]), jnp.float32)))[1]
    return first_taken("selective_scan", SELECTIVE, lambda name: SELECTIVE[name](chunk, x, dt, a, b, c, d, h0, resets))


def _by_kernels(
    chunk: int, x: Array, dt: Array, a: Array, b: Array, c: Array, d: Array, h0: Array, resets: Array | None
) -> tuple[Array, Array]:
    """`selective_scan` by the Pallas kernels.

    Raises:
        NotImplementedError: the kernels do not take these arguments on this machine; it says why.
    """
    if x.shape[1] == 1:
        raise NotImplementedError("one token is one step")
    if reason := scan_kernels.refusal(x, dt, a, b, c):
        raise NotImplementedError(reason)
    run = lambda *arrays: scan_kernels.selective_scan(*arrays[:6], h0=arrays[6], resets=arrays[7])
    wide, row = ("batch", None, "mlp"), ("batch",)
    names = wide, wide, ("mlp",), row, row, ("mlp",), ("batch", "mlp"), row
    return over_rows(run, (x, dt, a, b, c, d, h0, resets), names, like=(0, 6))


def _by_chunks(
    chunk: int, x: Array, dt: Array, a: Array, b: Array, c: Array, d: Array, h0: Array, resets: Array | None
) -> tuple[Array, Array]:
    """`selective_scan` by an associative scan a chunk, on any device."""
    length = x.shape[1]

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(h, xs):
        x, dt, b, c = (part.astype(jnp.float32) for part in xs[:-1])
        decay = jnp.exp(dt[..., None] * a)
        if resets is not None:
            decay = jnp.where(xs[-1][..., None, None], 0.0, decay)
        states = _states(h, decay, (dt * x)[..., None] * b[:, :, None, :])
        y = jnp.einsum("btdn,btn->btd", states, c) + d * x
        return states[:, -1], y.astype(xs[0].dtype)

    chunk = min(chunk, length)
    parts = tuple(None if part is None else split(part, chunk) for part in (x, dt, b, c, resets))
    h, y = jax.lax.scan(body, h0, parts)
    return join(y, length), h


SELECTIVE: Mapping[str, Callable[..., tuple[Array, Array]]] = {"pallas": _by_kernels, "chunks": _by_chunks}
"""Implementations of the selective scan in the order in which they are tried; NotImplementedError: the next one."""


def _selective_on_spans(chunk: int, tokens: tuple, shared: tuple[Array, Array], chain: Chain) -> tuple[Array, Array]:
    (x, dt, b, c, resets), (a, d) = tokens, shared
    y, h = selective_scan(x.astype(jnp.float32), dt, a, b, c, d, resets=resets, chunk=chunk)
    documents = jnp.zeros(x.shape[:2], jnp.int32) if resets is None else jnp.cumsum(resets, axis=1)
    total = jnp.cumsum(dt, axis=1)
    fade = lambda total, documents: jnp.exp(jnp.where(documents[..., None, None] == 0, total[..., None] * a, -jnp.inf))
    keep = fade(total[:, -1:], documents[:, -1:])[:, 0]
    before = prefix(diagonal, (keep, h), chain)[1]

    def read(tokens: tuple) -> Array:
        total, documents, c = tokens
        return jnp.einsum("btdn,bdn,btn->btd", fade(total, documents), before, c.astype(jnp.float32))

    y += map_queries(read, (total, documents, c), block=chunk)
    return y.astype(x.dtype), final(keep * before + h, chain)


def phase_scan(
    turn: Float[Array, "B T *N"],
    *,
    phase0: Float[Array, "B *N"] | None = None,
    resets: Bool[Array, "B T"] | None = None,
    chunk: int = 64,
    backend: Backend = Backend(),
) -> tuple[Float[Array, "B T *N"], Float[Array, "B *N"]]:
    """Cumulated angles, theta_t = theta_(t-1) + turn_t, kept modulo 2 pi so that no length costs precision.

    Args:
        turn: angles in radians, float32.
        phase0: the phase before the first token; None is zero.
        resets: True at a token that starts from phase zero.
        backend: its layout says how rows lie on the devices of a mesh; with phase0 they are left to the compiler.

    Returns:
        The phases, within a chunk's turns of [0, 2 pi), and the last one modulo 2 pi.
    """
    length = turn.shape[1]
    if phase0 is None and spread(length, backend.layout):
        return over_spans(functools.partial(_phase_on_spans, chunk), (turn, resets), None, layout=backend.layout)
    chunk = min(chunk, length)
    if phase0 is None:
        phase0 = jnp.zeros_like(turn[:, 0])

    def body(phase, xs):
        documents = Documents.of(xs[1], chunk)
        sums = jnp.einsum("bij,bj...->bi...", documents.pairs.astype(jnp.float32), xs[0], precision=HIGHEST)
        old = documents.old.reshape(*documents.old.shape, *[1] * (phase.ndim - 1))
        phases = sums + jnp.where(old, phase[:, None], 0.0)
        return jnp.mod(phases[:, -1], 2 * math.pi), phases

    last, phases = jax.lax.scan(body, phase0, (split(turn, chunk), None if resets is None else split(resets, chunk)))
    return join(phases, length), last


def _phase_on_spans(chunk: int, tokens: tuple, _: None, chain: Chain) -> tuple[Array, Array]:
    turn, resets = tokens
    phases, last = phase_scan(turn, resets=resets, chunk=chunk)
    stays, keep = _decays(jnp.zeros_like(turn), resets)
    modulo = lambda early, late: (early[0] * late[0], jnp.mod(early[1] * late[0] + late[1], 2 * math.pi))
    before = prefix(modulo, (keep, last), chain)[1]
    return phases + stays * before[:, None], final(modulo((keep, before), (keep, last))[1], chain)

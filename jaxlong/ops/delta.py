"""Delta rules in chunks: a matrix state that reads what it holds under a key before it writes there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxlong.ops.attend import Backend, first_taken
from jaxlong.ops.chunks import Documents, all_scores, corner, cumulated, decay_matrix, join, power_of_two, split
from jaxlong.parallel.manual import require_one_device, vary_alike
from jaxlong.parallel.prefix import Chain, dense, final, prefix
from jaxlong.parallel.rows import over_rows, over_spans, spread
from pallas_kernels import delta as kernels
from pallas_kernels.machine import platform

GROUP = 8
"""Chunks whose inner work is one batch; the backward pass keeps the state at each group's start only."""


def delta_rule(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None,
    beta: Float[Array, "B T H"],
    *,
    s0: Float[Array, "B H K V"] | None = None,
    resets: Bool[Array, "B T"] | None = None,
    chunk: int = 64,
    backend: Backend = Backend(),
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The gated delta rule in chunks, the same for any chunk up to rounding.

        S_t = (I - beta_t k_t k_t^T) Diag(exp(log_decay_t)) S_(t-1) + beta_t k_t v_t^T
        o_t = S_t^T q_t

    Yang et al., arXiv 2406.06484 (chunks) and 2412.06464 (a decay a head); Kimi Linear, arXiv 2510.26692 (a decay
    a channel). Memory is linear in T; with a state and T = 1 this is one step of the recurrence. Rows that lie in spans
    on several devices (`parallel.prefix`) begin with the text: each span runs once, with K further columns.

    Args:
        q, k: queries, scaled by the caller, and keys, of norm at most 1.
        log_decay: finite, at most 0, one a head or one a channel; None is 0.
        beta: strength of the write, 0 to 2; 0 leaves the state.
        s0: float32 state before the first token; None is 0.
        resets: tokens before which the state becomes 0, such as the first of each document.
        chunk: tokens that are worked on as matrices.
        backend: its layout says how rows lie on the devices of a mesh; with s0 they are left to the compiler.

    Returns:
        o, of v's type, and the float32 state after the last token.
    """
    decay = jnp.zeros_like(beta) if log_decay is None else log_decay
    run = lambda *arrays: first_taken("delta_rule", KERNELS, lambda name: KERNELS[name](chunk, *arrays))
    return _rows(run, (q, k, v, decay, beta), s0, resets, backend)


def generalized_delta_rule(
    r: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H K"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    *,
    s0: Float[Array, "B H K V"] | None = None,
    resets: Bool[Array, "B T"] | None = None,
    chunk: int = 32,
    backend: Backend = Backend(),
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """A decay a channel plus a matrix of rank one, in chunks, the same for any chunk up to rounding.

        S_t = Diag(exp(log_decay_t)) S_(t-1) + b_t (a_t^T S_(t-1)) + k_t v_t^T
        o_t = S_t^T r_t

    Note that a reads the state before its decay. Peng et al., arXiv 2503.14456 (RWKV-7: a = -kappa, b = kappa
    times a rate). The other arguments and the results are those of `delta_rule`; four kinds of scores instead of
    two make chunks of half the size quickest.
    """
    run = functools.partial(_run, _generalized_step, _generalized_chunks, chunk)
    return _rows(run, (r, k, v, log_decay, a, b), s0, resets, backend)


def pallas(
    chunk: int, tokens: tuple[Array, ...], s0: Array | None, resets: Array | None
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """`delta_rule` by the Pallas kernels, whose chunks have 64 tokens.

    Raises:
        NotImplementedError: the kernels do not take these arguments on this machine; it says why.
    """
    _, k, v, *_ = tokens
    if v.shape[1] == 1:
        raise NotImplementedError("one token is one step")
    if reason := kernels.refusal(*tokens):
        raise NotImplementedError(reason)
    s0 = jnp.zeros((k.shape[0], *k.shape[2:], v.shape[-1])) if s0 is None else s0
    run = lambda *arrays: kernels.delta_rule(*arrays[:5], s0=arrays[5], resets=arrays[6])
    arrays = (*tokens, s0, resets)
    if platform() != "tpu":
        require_one_device()
        return run(*arrays)
    names = (*[("batch", None, "heads")] * 5, ("batch", "heads"), ("batch",))
    return over_rows(run, arrays, names, like=(2, 5))


def chunks(
    chunk: int, tokens: tuple[Array, ...], s0: Array | None, resets: Array | None
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """`delta_rule` in plain matrix products, on any device."""
    q, k, v, decay, beta = tokens
    decay = decay if decay.ndim == 4 else decay[..., None]
    return _run(_delta_step, _delta_chunks, chunk, (q, k, v, decay, beta[..., None]), s0, resets)


KERNELS: Mapping[str, Callable[..., tuple[Array, Array]]] = {"pallas": pallas, "chunks": chunks}
"""Implementations of the delta rule in the order in which they are tried; NotImplementedError: the next one."""


class _Chunks(NamedTuple):
    """What chunks do with the state S at their entry.

    P = p + by_s S;   o = out + read S + seen P;   S becomes keep S + add + write P
    """

    p: Array  # [... C V]
    by_s: Array  # [... C K]
    seen: Array  # [... C C]
    read: Array  # [... C K]
    write: Array  # [... K C]
    keep: Array  # [... K 1] or [... 1 1]
    out: Array | float = 0.0  # [... C V]
    add: Array | None = None  # [... K V]


def _rows(
    run: Callable[..., tuple[Array, Array]],
    tokens: tuple[Array, ...],
    s0: Array | None,
    resets: Array | None,
    backend: Backend,
) -> tuple[Array, Array]:
    """A rule over rows: whole ones, or those that lie in spans on several devices."""
    if s0 is not None or not spread(tokens[0].shape[1], backend.layout):
        return run(tokens, s0, resets)
    return over_spans(functools.partial(_on_spans, run), (tokens, resets), None, layout=backend.layout)


def _on_spans(run: Callable[..., tuple[Array, Array]], tokens: Any, _: None, chain: Chain) -> tuple[Array, Array]:
    """Spans at once, each in a state of V + K columns, [0 | I], that turns into [S | A].

    Columns of a state do not know of each other. The last K write nothing, so what becomes of the identity is the map
    A of the state at the entry to that at the exit, and their outputs are q_t^T A_t, the map to the outputs.
    """
    (q, k, v, *rest), resets = tokens
    wide = jnp.pad(v.astype(jnp.float32), [(0, 0)] * 3 + [(0, k.shape[-1])])
    unit = jnp.eye(k.shape[-1], wide.shape[-1], v.shape[-1])
    unit = jnp.broadcast_to(unit, (*v.shape[::2], *unit.shape))
    o, s = run((q, k, wide, *rest), vary_alike((wide, unit))[1], resets)
    before = prefix(dense, s, chain)
    values = slice(v.shape[-1])
    o = o[..., values] + jnp.einsum("bthk,bhkv->bthv", o[..., values.stop :], before[..., values])
    return o.astype(v.dtype), final(dense(before, s)[..., values], chain)


def _run(
    step: Callable[..., tuple[Array, Array]],
    local: Callable[..., _Chunks],
    chunk: int,
    tokens: tuple[Array, ...],
    s0: Array | None,
    resets: Array | None,
) -> tuple[Array, Array]:
    """Apply `step` to one token, or `local` to groups of chunks and the result to the state, chunk by chunk."""
    (batch, length, heads, key_dim), v = tokens[0].shape, tokens[2]
    tokens = tuple(x.astype(jnp.float32) for x in tokens)
    if s0 is None:
        s0 = vary_alike((v, jnp.zeros((batch, heads, key_dim, v.shape[-1]), jnp.float32)))[1]
    if length == 1:
        s = s0 if resets is None else jnp.where(resets[:, :, None, None], 0, s0)
        o, s = step(*(x[:, 0] for x in tokens), s)
        return o[:, None].astype(v.dtype), s

    def group(s: Array, tokens_and_resets: tuple) -> tuple[Array, Array]:
        tokens, resets = jax.tree.map(lambda x: split(x, chunk), tokens_and_resets)
        by_head = None if resets is None else resets[:, :, None]
        chunks = local(*(jnp.swapaxes(x, 2, 3) for x in tokens), Documents.of(by_head, chunk))
        parts = (chunks.p, chunks.by_s, chunks.write, chunks.keep, chunks.add)
        s, (entry, p) = jax.lax.scan(_advance, s, parts)
        o = chunks.out + chunks.read @ entry + chunks.seen @ p
        return s, join(jnp.swapaxes(o, 2, 3), o.shape[0] * chunk)

    chunk = min(chunk, length)
    group_length = min(GROUP, -(-length // chunk)) * chunk
    groups = jax.tree.map(lambda x: split(x, group_length), (tokens, resets))
    s, o = jax.lax.scan(jax.checkpoint(group, prevent_cse=False), s0, groups)
    return join(o, length).astype(v.dtype), s


def _advance(s: Array, chunk: tuple[Array | None, ...]) -> tuple[Array, tuple[Array, Array]]:
    """The state after a chunk; the state before it, and what the chunk wrote."""
    p, by_s, write, keep, add = chunk
    p = p + by_s @ s
    after = keep * s + write @ p
    return after if add is None else after + add, (s, p)


def _delta_step(q: Array, k: Array, v: Array, decay: Array, beta: Array, s: Array) -> tuple[Array, Array]:
    s = jnp.exp(decay)[..., None] * s
    write = beta * (v - jnp.einsum("bhk,bhkv->bhv", k, s))
    s = s + k[..., None] * write[..., None, :]
    return jnp.einsum("bhk,bhkv->bhv", q, s), s


def _generalized_step(r: Array, k: Array, v: Array, decay: Array, a: Array, b: Array, s: Array) -> tuple[Array, Array]:
    held = jnp.einsum("bhk,bhkv->bhv", a, s)
    s = jnp.exp(decay)[..., None] * s + b[..., None] * held[..., None, :] + k[..., None] * v[..., None, :]
    return jnp.einsum("bhk,bhkv->bhv", r, s), s


def _delta_chunks(q: Array, k: Array, v: Array, decay: Array, beta: Array, docs: Documents) -> _Chunks:
    """A token writes k_i p_i^T, where p_i = beta_i (v_i - what k_i reads after the decay)."""
    enter, leave, keep = _gates(decay, docs)
    if decay.shape[-1] < k.shape[-1]:
        fade = decay_matrix(decay[..., 0], docs.pairs)
        seen, met = (jnp.einsum("...ic,...jc->...ij", x, k) * fade for x in (q, k))
    else:
        scores = all_scores(jnp.stack([q, k], -3), k[..., None, :, :], decay, docs.pairs)
        seen, met = scores[..., 0, 0, :, :], scores[..., 1, 0, :, :]
    solve = _inverse(-beta * jnp.tril(met, -1)) * jnp.swapaxes(beta, -1, -2)
    return _Chunks(*_apply(solve, v, -k * enter), seen, q * enter, jnp.swapaxes(k * leave, -1, -2), keep)


def _generalized_chunks(r: Array, k: Array, v: Array, decay: Array, a: Array, b: Array, docs: Documents) -> _Chunks:
    """A token writes b_i p_i^T + k_i v_i^T, where p_i is what a_i reads: row i - 1 after its decay."""
    enter, leave, keep = _gates(decay, docs)
    before = docs.old[..., None] * jnp.exp(_down(cumulated(decay)))
    scores = all_scores(jnp.stack([r, _up(a)], -3), jnp.stack([b, k], -3), decay, docs.pairs)
    seen_b, seen_k = scores[..., 0, 0, :, :], scores[..., 0, 1, :, :]
    met_b, met_k = (jnp.where(docs.pairs, _down(scores[..., 1, i, :, :]), 0) for i in (0, 1))
    p, by_s = _apply(_inverse(met_b), met_k @ v, a * before)
    write_b, write_k = (jnp.swapaxes(x * leave, -1, -2) for x in (b, k))
    return _Chunks(p, by_s, seen_b, r * enter, write_b, keep, out=seen_k @ v, add=write_k @ v)


def _gates(decay: Array, docs: Documents) -> tuple[Array, Array, Array]:
    """Decay from the entry to each row `[... C K]`, from each row to the exit, and of the state `[... K 1]`."""
    until = cumulated(decay)
    after = cumulated(_up(decay), reverse=True)
    enter, leave = docs.old[..., None] * jnp.exp(until), docs.last[..., None] * jnp.exp(after)
    return enter, leave, jnp.swapaxes(enter[..., -1:, :], -1, -2)


def _down(x: Array) -> Array:
    """Each row one further down, 0 in the first."""
    return jnp.pad(x[..., :-1, :], [(0, 0)] * (x.ndim - 2) + [(1, 0), (0, 0)])


def _up(x: Array) -> Array:
    """Each row one further up, 0 in the last."""
    return jnp.pad(x[..., 1:, :], [(0, 0)] * (x.ndim - 2) + [(0, 1), (0, 0)])


def _apply(solve: Array, p: Array, by_s: Array) -> tuple[Array, Array]:
    """A matrix times two others."""
    both = jnp.matmul(solve, jnp.concatenate([p, by_s], axis=-1), precision="highest")
    return both[..., : p.shape[-1]], both[..., p.shape[-1] :]


@jax.custom_vjp
def _inverse(lower: Float[Array, "*B C C"]) -> Float[Array, "*B C C"]:
    """(I - lower)^-1 of strictly lower triangular matrices, float32.

    Inverses of blocks on the diagonal grow from one row to all: [[P, 0], [Q X P, Q]] has the inverses P and Q
    of two neighbours and what X = lower holds between them. The powers of a product of (I + lower^(2^m)) would
    grow like binomials where keys repeat.
    """
    length = lower.shape[-1]
    size = power_of_two(length)
    lower = jnp.pad(lower, [(0, 0)] * (lower.ndim - 2) + [(0, size - length)] * 2)
    inverse, rows = jnp.ones((*lower.shape[:-2], size, 1, 1)), 1
    while rows < size:
        count = size // (2 * rows)
        blocks = lower.reshape(*lower.shape[:-2], count, 2 * rows, count, 2 * rows)
        blocks = jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-2), -1, -3)
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        x = jnp.matmul(blocks[..., rows:, :rows], first, precision="highest")
        inverse = corner(first, jnp.matmul(second, x, precision="highest"), second)
        rows *= 2
    return inverse[..., 0, :length, :length]


def _inverse_forward(lower: Array) -> tuple[Array, Array]:
    inverse = _inverse(lower)
    return inverse, inverse


def _inverse_backward(inverse: Array, d_inverse: Array) -> tuple[Array]:
    turned = jnp.swapaxes(inverse, -1, -2)
    return (jnp.matmul(jnp.matmul(turned, d_inverse, precision="highest"), turned, precision="highest"),)


_inverse.defvjp(_inverse_forward, _inverse_backward)

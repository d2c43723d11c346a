"""The weighted average of RWKV-4: a softmax over the past whose logits fall by a constant a token."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxlong.ops.attend import Backend
from jaxlong.ops.chunks import join, split
from jaxlong.parallel.prefix import Chain, final, prefix
from jaxlong.parallel.rows import over_spans, spread

NEVER = -1e30
"""A logit below that of any token: its exp is 0 beside any other, and sums of many stay finite."""

Sums = tuple[Float[Array, "B F"], Float[Array, "B F"], Float[Array, "B F"]]
"""Numerator and denominator, both divided by exp of the third array, the largest logit among them."""


def wkv(
    k: Float[Array, "B T F"],
    v: Float[Array, "B T F"],
    log_decay: Float[Array, "F"],
    bonus: Float[Array, "F"],
    *,
    s0: Sums | None = None,
    resets: Bool[Array, "B T"] | None = None,
    chunk: int = 64,
    backend: Backend = Backend(),
) -> tuple[Float[Array, "B T F"], Sums]:
    """o_t = sum_i p_i v_i / sum_i p_i,  p_i = exp(k_i + (t - 1 - i) log_decay) for i < t, p_t = exp(k_t + bonus).

    Sums are kept beside their largest logit, so that keys of any size neither overflow nor vanish (Peng et
    al., arXiv 2305.13048, appendix D). The sums before all tokens of a chunk come from one associative scan;
    chunks follow each other. Time and memory are linear in T; the backward pass recomputes each chunk from
    the sums before it. Rows that lie in spans on several devices (`parallel.prefix`) begin with the text: each span
    runs twice, for its own sums and from those before it.

    Args:
        k, v: float32.    log_decay: negative.    bonus: added to the logit of the token itself.
        s0: the sums before the first token, as returned (None: nothing was seen).
        resets: True where a document starts, for which the past does not count.
        chunk: tokens a scan; the result does not depend on it.
        backend: its layout says how rows lie on the devices of a mesh; with s0 they are left to the compiler.

    Returns:
        The averages, and the sums after the last token.
    """
    length, size = k.shape[1], min(chunk, k.shape[1])
    if s0 is None and spread(length, backend.layout):
        on_spans = functools.partial(_on_spans, chunk)
        return over_spans(on_spans, (k, v, resets), (log_decay, bonus), layout=backend.layout)
    if s0 is None:
        zero = jnp.zeros_like(k[:, 0])
        s0 = (zero, zero, zero + NEVER)
    decay = jnp.broadcast_to(log_decay, k.shape)
    if resets is not None:
        decay = jnp.where(resets[..., None], NEVER, decay)
    # what fills the last chunk neither counts nor decays what came before
    filled = jnp.pad(k, ((0, 0), (0, -length % size), (0, 0)), constant_values=NEVER)

    def step(sums: Sums, tokens: tuple[Array, Array, Array]) -> tuple[Sums, Array]:
        k, v, decay = tokens
        peak = jax.lax.stop_gradient(k)
        weight = jnp.exp(k - peak)
        runs = jax.lax.associative_scan(_after, (weight * v, weight, peak, decay), axis=1)
        s0 = tuple(x[:, None] for x in sums)
        after = _after((*s0, jnp.zeros_like(s0[0])), runs)[:3]
        before = (jnp.concatenate([first, x[:, :-1]], axis=1) for first, x in zip(s0, after, strict=True))
        kept = jnp.where(decay <= NEVER, NEVER, 0.0)
        num, den, *_ = _after((*before, jnp.zeros_like(k)), (v, jnp.ones_like(v), k + bonus, kept))
        return tuple(x[:, -1] for x in after), num / den

    chunks = (split(filled, size), split(v, size), split(decay, size))
    sums, o = jax.lax.scan(jax.checkpoint(step), s0, chunks)
    return join(o, length), sums


def _on_spans(chunk: int, tokens: tuple, shared: tuple[Array, Array], chain: Chain) -> tuple[Array, Sums]:
    """Summaries are the sums of a span and the log decay over it; of nothing they are zeros, with any logit."""
    (k, v, resets), (log_decay, bonus) = tokens, shared
    _, sums = wkv(k, v, log_decay, bonus, resets=resets, chunk=chunk)
    fade = jnp.broadcast_to(k.shape[1] * log_decay, k[:, 0].shape)
    if resets is not None:
        fade = jnp.where(resets.any(1)[:, None], NEVER, fade)
    held = lambda num, den, peak, *rest: (num, den, jnp.where(den > 0, peak, NEVER), *rest)
    before = prefix(lambda early, late: _after(held(*early), late), (*sums, fade), chain)
    o, sums = wkv(k, v, log_decay, bonus, s0=held(*before[:3]), resets=resets, chunk=chunk)
    return o, final(sums, chain)


def _after(early: tuple[Array, ...], late: tuple[Array, ...]) -> tuple[Array, ...]:
    """Sums and log decay over two runs of tokens, one after the other.

    The largest logit is only a scale. What the sums stand for does not depend on it, nor do gradients.
    """
    faded = early[2] + late[3]
    peak = jax.lax.stop_gradient(jnp.maximum(faded, late[2]))
    a, b = jnp.exp(faded - peak), jnp.exp(late[2] - peak)
    return early[0] * a + late[0] * b, early[1] * a + late[1] * b, peak, early[3] + late[3]

"""Cross-entropy over a vocabulary that never forms the logits of all tokens."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from jaxlong.core.types import BadInput
from jaxlong.ops.dense import accumulator, precision
from jaxlong.ops.feed_forward import join, split
from jaxlong.parallel.columns import Columns
from jaxlong.parallel.manual import auto_mesh, vary_alike
from jaxlong.parallel.tokens import gather, scatter, token_sum


class LossStats(NamedTuple):
    """Sums over tokens, weighted; no gradient flows through them. Divide by `weight_sum`."""

    nll_sum: Float[Array, ""]
    z_sum: Float[Array, ""]
    correct_sum: Float[Array, ""]
    weight_sum: Float[Array, ""]


def cross_entropy(
    hidden: Float[Array, "*B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "*B T"],
    weights: Float[Array, "*B T"],
    *,
    z_loss: float = 0.0,
    chunk: int = 1024,
    soft_cap: float | None = None,
) -> tuple[Float[Array, ""], LossStats]:
    """Weighted sum over tokens of the negative log-likelihood and the z-loss.

        logits = cap tanh(hidden head / cap);  loss = sum w (lse - logits[target] + z_loss lse^2)

    Holds the logits of `B * chunk` tokens at a time. A forward pass that will be differentiated computes the gradients
    of a chunk while it holds its logits, as the only later factor is one scalar: three products with the head in
    all, and residuals of the size of the gradients (that of `head` in float32). Without differentiation it computes
    the loss alone. Softmax and sums are float32.

    Under a mesh (`jax.set_mesh`) each device handles its own tokens and gathers `head`, whose gradient is added up
    across devices once, in float32, each part where it lies. Along an axis "tensor" that divides V each device has its
    own words: of the head and the logits it never sees another's, only the largest logit, two sums and the gradient of
    a chunk of `hidden` cross devices (vocabulary-parallel loss: Shoeybi et al., arXiv 1909.08053, section 3). Without a
    mesh, sharded inputs work too.

    Args:
        hidden: final hidden states, [T, D] or [B, T, D].
        targets: labels in 0..V-1. Any value will do where the weight is 0; elsewhere another value makes the loss NaN.
        weights: of each token's loss. Nothing of a token of weight 0 counts, not even NaN.
        z_loss: coefficient of the squared log of the softmax denominator (PaLM, Chowdhery et al. 2022, section 5).
        chunk: tokens of a row to handle at once, at least 1.
        soft_cap: bounds the logits (Gemma 2).

    Returns:
        The sum, z-loss included, and statistics. The mean is the caller's: over all hosts and accumulation steps it
        is not a mean of means.

    Raises:
        BadInput: `chunk` below 1.
    """
    if chunk < 1:
        raise BadInput("chunk", chunk, "a chunk holds at least one token", "1 or more")
    if hidden.ndim == 2:
        hidden, targets, weights = hidden[None], targets[None], weights[None]
    mesh = auto_mesh()
    columns = Columns.of(mesh, "tensor", head.shape[1])
    also = () if columns.axis is None else (columns.axis,)

    def local(tokens, head, held):
        static = _Static(z_loss, chunk, soft_cap, head.dtype, columns, held)
        return _sums(static, *vary_alike(tokens), vary_alike((tokens, head))[1])

    return token_sum(local, (hidden, targets, weights), head, P("embed", "vocab"), mesh=mesh, also=also)


class _Static(NamedTuple):
    z_loss: float
    chunk: int
    soft_cap: float | None
    head_dtype: jnp.dtype
    columns: Columns
    held: P  # how the head's rows lie over devices


class _Chunk(NamedTuple):
    hidden: Float[Array, "B m D"]
    targets: Int[Array, "B m"]
    weights: Float[Array, "B m"]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(static: _Static, hidden: Array, targets: Array, weights: Array, head: Array) -> tuple[Array, LossStats]:
    def step(sums, chunk):
        return jax.tree.map(jnp.add, sums, _measure(static, chunk, head)[0]), None

    head = _whole(static, head, hidden)
    chunks = _chunks(static, hidden, targets, weights)
    (loss, stats), _ = lax.scan(step, _nothing(chunks), chunks)
    return loss, stats


def _sums_fwd(static, hidden, targets, weights, head):
    def step(carry, chunk):
        sums, dhead = carry
        more, by_token, dlogits = _measure(static, chunk, head)
        dlogits = dlogits.astype(chunk.hidden.dtype)
        dhidden = static.columns.sum(_einsum("bmv,dv->bmd", dlogits, head)).astype(chunk.hidden.dtype)
        dhead = dhead + _einsum("bmd,bmv->dv", chunk.hidden, dlogits)
        return (jax.tree.map(jnp.add, sums, more), dhead), (dhidden, by_token.astype(weights.dtype))

    head = _whole(static, head, hidden)
    chunks = _chunks(static, hidden, targets, weights)
    start = _nothing(chunks), jnp.zeros_like(head, dtype=accumulator(head.dtype))
    (sums, dhead), by_token = lax.scan(step, start, chunks)
    dhead = scatter(dhead, static.held)  # here, not in the backward pass: what is kept until then is a part
    dhidden, dweights = (join(x, hidden.shape[1]) for x in by_token)
    return sums, (dhidden, dweights, dhead)


def _sums_bwd(static, residuals, cotangents):
    scaled = lambda x: cotangents[0] * x.astype(accumulator(x.dtype))
    dhidden, dweights, dhead = residuals
    return (
        scaled(dhidden).astype(dhidden.dtype),
        None,
        scaled(dweights).astype(dweights.dtype),
        scaled(dhead).astype(static.head_dtype),
    )


_sums.defvjp(_sums_fwd, _sums_bwd)


def _measure(static: _Static, chunk: _Chunk, head: Array):
    """Of one chunk: (loss, stats); the loss of each token; the gradient of the weighted loss in the product
    `hidden head` [B m V], which nothing computes where it is not used.

    Labels are found by comparison, not by indexing: the compiler can split that over a sharded vocabulary.
    """
    hidden, targets, weights = chunk
    columns, here = static.columns, head.shape[1]
    counts, weights = weights != 0, weights.astype(accumulator(weights.dtype))
    logits = _einsum("bmd,dv->bmv", hidden, head)
    if static.soft_cap is not None:
        logits = static.soft_cap * jnp.tanh(logits / static.soft_cap)
    top = columns.max(logits.max(-1))
    is_label = targets[..., None] == columns.first(here) + jnp.arange(here, dtype=targets.dtype)
    both = jnp.exp(logits - top[..., None]).sum(-1), jnp.where(is_label, logits, 0).sum(-1)
    total, label = columns.sum(both)
    lse = top + jnp.log(total)
    label = jnp.where((targets >= 0) & (targets < columns.count(here)), label, jnp.nan)

    nll, z = jnp.where(counts, lse - label, 0), jnp.where(counts, jnp.square(lse), 0)
    loss = nll + static.z_loss * z
    added = lambda x: (weights * x).sum()
    sums = added(loss), LossStats(added(nll), added(z), added(label >= top), weights.sum())

    dlogits = jnp.exp(logits - lse[..., None]) * (1 + 2 * static.z_loss * lse)[..., None] - is_label
    if static.soft_cap is not None:
        dlogits = dlogits * (1 - jnp.square(logits / static.soft_cap))
    return sums, loss, weights[..., None] * dlogits


def _whole(static: _Static, head: Array, hidden: Array) -> Array:
    """The head in the dtype of the hidden states, gathered."""
    return gather(head.astype(hidden.dtype), static.held)


def _chunks(static: _Static, hidden: Array, targets: Array, weights: Array) -> _Chunk:
    """Cuts tokens into chunks [n B m ...]; hidden states that do not count become 0."""
    hidden = jnp.where((weights != 0)[..., None], hidden, 0)
    return _Chunk(*(split(x, static.chunk, fill=0) for x in (hidden, targets, weights)))


def _nothing(chunks: _Chunk) -> tuple[Array, LossStats]:
    """Sums of no tokens."""
    zero = jnp.zeros_like(chunks.weights, shape=(), dtype=accumulator(chunks.weights.dtype))
    return zero, LossStats(zero, zero, zero, zero)


def _einsum(formula: str, x: Array, y: Array) -> Array:
    return jnp.einsum(formula, x, y, preferred_element_type=accumulator(x.dtype), precision=precision(x.dtype))

"""Losses, and the gradient functions built from them.

A loss is a mean over weighted labels: it returns the mean and metrics, of which `weight` is the sum of the
weights and every other entry a mean over them too. Micro-batches can then be put together exactly:
loss = sum_i w_i loss_i / sum_i w_i, and the same for gradients and metrics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.types import BadInput, Batch
from jaxlong.ops.loss import cross_entropy
from jaxlong.parallel.rows import from_text, to_text
from jaxlong.train.state import Params

Metrics = dict[str, Array]
"""Scalars by name."""

LossFn = Callable[[Params, Batch], tuple[Array, Metrics]]
"""(params, batch) -> (mean loss [], metrics). Finite, with weight 0, for a batch whose weights are all 0."""

GradFn = Callable[[Params, Batch], tuple[Params, Metrics]]
"""(params, batch) -> (gradient of the mean loss, metrics with `loss`)."""


@dataclass(frozen=True)
class Drawing:
    """A gradient function that draws at random: `fn(params, batch, draw)`, where equal numbers `draw` draw alike."""

    fn: Callable[[Params, Batch, Any], tuple[Params, Metrics]]

    def __call__(self, params: Params, batch: Batch, draw: Any = 0) -> tuple[Params, Metrics]:
        return self.fn(params, batch, draw)


@runtime_checkable
class Gradient(Protocol):
    """How gradients are taken, as a training recipe names it: `Whole`, `SeCO`, `SpaCO`."""

    in_text_order: bool
    """Whether rows must be in the order of the text."""

    def of(self, model: Any, *, z_loss: float, loss_chunk: int, mtp_weight: float, seed: int) -> GradFn | Drawing:
        """The gradient function of a model's `next_token_loss`; arguments as there, and the seed of what is drawn."""
        ...


def drawing(grad_fn: GradFn | Drawing, draw: Any) -> GradFn:
    """The gradient function of that draw, which is itself where nothing is drawn."""
    return partial(grad_fn, draw=draw) if isinstance(grad_fn, Drawing) else grad_fn


def next_token_loss(model: Any, *, z_loss: float = 0.0, chunk: int = 1024, mtp_weight: float = 0.3) -> LossFn:
    """Cross entropy of the targets that a batch carries, in nats a weighted label, and what layers add to it.

    Args:
        model: a `jaxlong.model.LM`, or anything with its `apply(..., method="features")`, `head`, `soft_cap`,
            `mtp` and `layout`. Scalars that its layers sow into "losses" are added; those in "metrics" are reported.
        z_loss: weight of the mean squared log partition function (PaLM, arXiv 2204.02311, section 5).
        chunk: tokens whose logits exist at once.
        mtp_weight: of the mean loss of multi-token prediction (DeepSeek-V3, arXiv 2412.19437, equation 25).

    Returns:
        A loss with metrics `nll` (mean, without the z-loss: perplexity is its exponential), `accuracy` (share of
        labels that have the largest logit) and `weight`; `mtp_nll` (mean over depths) of a model with `mtp`, and
        the mean over layers of each name that they sow.
    """

    def loss_fn(params: Params, batch: Batch) -> tuple[Array, Metrics]:
        where = {"positions": batch.positions, "segment_ids": batch.segment_ids}
        sown = {"mutable": ["losses", "metrics"]}
        (hidden, _), told = model.apply({"params": params}, batch.tokens, **where, **sown, method="features")
        head = model.head(params)

        def entropy(hidden: Array, targets: Array, weights: Array) -> tuple[Array, Any, Array]:
            total, stats = cross_entropy(
                hidden, head, targets, weights, z_loss=z_loss, chunk=chunk, soft_cap=model.soft_cap
            )
            count = jnp.where(stats.weight_sum > 0, stats.weight_sum, 1.0)
            return total / count, stats, count

        loss, stats, count = entropy(hidden, batch.targets, batch.loss_weights)
        metrics = {"nll": stats.nll_sum / count, "accuracy": stats.correct_sum / count, "weight": stats.weight_sum}
        if model.mtp:
            future = ahead(batch, model.mtp, layout=model.layout)
            further, more = model.apply(
                {"params": params}, hidden, future.tokens, **where, **sown, method="features_ahead"
            )
            told = (told, more)
            losses = [entropy(*depth) for depth in zip(further, future.targets, future.weights, strict=True)]
            loss += mtp_weight * sum(depth[0] for depth in losses) / model.mtp
            metrics["mtp_nll"] = sum(stats.nll_sum / count for _, stats, count in losses) / model.mtp
        added = reported(told, "losses")
        return loss + sum(map(jnp.sum, added.values())), metrics | means(added) | means(reported(told, "metrics"))

    return loss_fn


class Ahead(NamedTuple):
    """What multi-token prediction needs of a batch; `[m]` is m + 1 tokens after each token."""

    tokens: Int[Array, "M B T"]
    targets: Int[Array, "M B T"]
    weights: Float[Array, "M B T"]


def ahead(batch: Batch, depth: int, *, layout: str = "contiguous") -> Ahead:
    """The next tokens, their labels and those labels' weights: 0 where the label lies in another document.

    Args:
        layout: the order of the batch's tokens on the mesh of `jax.set_mesh`.
    """
    later = lambda x, n: jnp.concatenate([x[:, n:], jnp.zeros_like(x[:, :n])], axis=1)

    rows = (batch.targets, batch.loss_weights, batch.segment_ids)
    targets, weights, segments = to_text(rows, layout)
    same = lambda m: later(segments, m) == segments
    found = [
        (later(targets, m - 1), later(targets, m), jnp.where(same(m), later(weights, m), 0))
        for m in range(1, depth + 1)
    ]
    return Ahead(*map(jnp.stack, zip(*from_text(found, layout), strict=True)))


def reported(told: Any, collection: str) -> dict[str, Any]:
    """Everything that layers sowed into a collection, over layers and modules, as one float32 array a name."""
    found: dict[str, list[Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(told):
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if keys[0] == collection:
            found.setdefault(keys[-1], []).append(leaf.reshape(-1).astype(jnp.float32))
    return {name: jnp.concatenate(leaves) for name, leaves in found.items()}


def means(values: dict[str, Array]) -> Metrics:
    """The mean of each."""
    return {name: value.mean() for name, value in values.items()}


def full(loss_fn: LossFn) -> GradFn:
    """The gradient over the whole batch at once."""

    def grad_fn(params: Params, batch: Batch) -> tuple[Params, Metrics]:
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
        return grads, metrics | {"loss": loss}

    return grad_fn


@dataclass(frozen=True)
class Whole:
    """Whole rows at once."""

    in_text_order = False

    def of(self, model: Any, *, z_loss: float, loss_chunk: int, mtp_weight: float, seed: int) -> GradFn:
        return full(next_token_loss(model, z_loss=z_loss, chunk=loss_chunk, mtp_weight=mtp_weight))


def accumulated(grad_fn: GradFn | Drawing, steps: int) -> GradFn | Drawing:
    """The same gradient, from `steps` micro-batches one after another: memory for one of them.

    Equal to `grad_fn` in exact arithmetic, whatever the weights of the micro-batches, since each counts by
    its metric `weight`; sums are kept in float32. Micro-batch s takes rows s, s + steps, ...: a batch that is
    sharded over its rows then moves nothing between devices. A gradient that draws does so for each micro-batch.

    Raises:
        BadInput: when called with rows that `steps` does not divide.
    """
    if steps < 1:
        raise BadInput("train.accumulation", steps, "is no number of micro-batches", "1 or more")
    if steps == 1:
        return grad_fn

    def weighted(params: Params, batch: Batch, draw: Any) -> tuple[Params, Metrics]:
        grads, metrics = drawing(grad_fn, draw)(params, batch)
        weight = metrics["weight"].astype(jnp.float32)
        scale = lambda x: weight * x.astype(jnp.float32)
        return jax.tree.map(scale, grads), jax.tree.map(scale, metrics) | {"weight": weight}

    def summed(params: Params, batch: Batch, draw: Any = 0) -> tuple[Params, Metrics]:
        micro = jax.tree.map(lambda x: _split(x, steps), batch), draw * steps + jnp.arange(steps)
        shapes = jax.eval_shape(weighted, params, *jax.tree.map(lambda x: x[0], micro))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        add = lambda total, rows: (jax.tree.map(jnp.add, total, weighted(params, *rows)), None)
        (grads, metrics), _ = jax.lax.scan(add, zeros, micro)
        weight = metrics["weight"]
        count = jnp.where(weight > 0, weight, 1.0)
        grads = jax.tree.map(lambda g, p: (g / count).astype(p.dtype), grads, params)
        return grads, jax.tree.map(lambda m: m / count, metrics) | {"weight": weight}

    return Drawing(summed) if isinstance(grad_fn, Drawing) else summed


def _split(x: Any, steps: int) -> Any:
    """[B, ...] -> [steps, B / steps, ...]; row r goes to micro-batch r % steps."""
    if x.shape[0] % steps:
        raise BadInput("train.accumulation", steps, f"does not divide the batch of {x.shape[0]} rows", "a divisor")
    return x.reshape(x.shape[0] // steps, steps, *x.shape[1:]).swapaxes(0, 1)

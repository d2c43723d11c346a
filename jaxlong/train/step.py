"""One training step as a pure function of state and batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxlong.core.types import Batch
from jaxlong.train.grads import Drawing, GradFn, Metrics, drawing
from jaxlong.train.state import Params, TrainState, leaf_name

Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_step(
    grad_fn: GradFn | Drawing,
    tx: optax.GradientTransformation,
    learning_rate: Callable[[Array], Array] | None = None,
) -> Step:
    """A step that applies the gradient, or leaves everything as it was if a number is not finite.

    If the loss, the gradient, its norm, an updated parameter or the optimizer's new state holds NaN or
    infinity, parameters and optimizer state come back bit for bit; the step still counts as one, since its
    batch is consumed, and `skipped` and `streak` go up. Jit it with `donate_argnums=0`.

    Args:
        grad_fn: one that draws does so by the number of the step.
        learning_rate: applied steps -> rate, only for the metrics.

    Returns:
        (state, batch) -> (state, metrics): those of `grad_fn`, and `grad_norm` (before clipping), `skipped`
        (so far), `streak`, `first_bad` (index into `checked_names`, -1 if all is finite), `learning_rate`.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, metrics = drawing(grad_fn, state.step)(state.params, batch)
        norm = optax.tree.norm(optax.tree.cast(grads, jnp.float32))
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

        finite = _finite(metrics["loss"], norm, grads, params, opt_state)
        good = jnp.all(finite)
        keep = lambda new, old: jnp.where(good, new, old)
        after = replace(
            state,
            step=state.step + 1,
            params=jax.tree.map(keep, params, state.params),
            opt_state=jax.tree.map(keep, opt_state, state.opt_state),
            skipped=state.skipped + ~good,
            streak=jnp.where(good, 0, state.streak + 1),
        )
        metrics = metrics | {
            "grad_norm": norm,
            "skipped": after.skipped,
            "streak": after.streak,
            "first_bad": jnp.where(good, -1, jnp.argmin(finite)),
        }
        if learning_rate is not None:
            metrics["learning_rate"] = learning_rate(state.step - state.skipped)
        return after, metrics

    return step


def _finite(loss: Array, norm: Array, grads: Params, params: Params, opt_state: Any) -> Array:
    """Bool [n], whether each of `checked_names` holds no NaN and no infinity."""
    # Leaves of the gradient come before their norm: a leaf can be named, the norm only says that some leaf is bad.
    leaves = [loss, *jax.tree.leaves(grads), norm, *jax.tree.leaves(params), *jax.tree.leaves(opt_state)]
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves])


def checked_names(state: TrainState) -> list[str]:
    """What `first_bad` counts: the loss, leaves of the gradient, its norm, new parameters, new optimizer state."""
    params, opt_state = _names(state.params), _names(state.opt_state)
    return [
        "loss",
        *(f"gradient of {name}" for name in params),
        "norm of the gradient",
        *(f"new parameter {name}" for name in params),
        *(f"new optimizer state {name}" for name in opt_state),
    ]


def _names(tree: Any) -> list[str]:
    return [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]

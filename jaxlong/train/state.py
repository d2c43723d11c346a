"""The training state, a pytree, and the shardings that follow from those of its parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

Params = Any
"""A pytree of floating-point arrays."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a training step reads and writes.

    Fields are typed `Any` since the same tree also carries shapes, shardings and names.

    Fields:
        step: int32 [], steps taken, which is batches consumed, skipped ones included.
        params: the model's parameters.
        opt_state: the optimizer's state; its own counters count applied steps only.
        skipped: int32 [], steps left out because a number was not finite.
        streak: int32 [], how many of them came last, without a good step since.
    """

    step: Any
    params: Any
    opt_state: Any
    skipped: Any
    streak: Any

    @classmethod
    def create(cls, params: Params, tx: optax.GradientTransformation) -> TrainState:
        """The state before the first step. May be traced: jit it with `out_shardings`, or `jax.eval_shape` it."""
        zero = lambda: jnp.zeros((), jnp.int32)  # three buffers: a donated one must not appear twice
        return cls(step=zero(), params=params, opt_state=tx.init(params), skipped=zero(), streak=zero())


def leaf_name(path: tuple) -> str:
    """A leaf's path as one word: `params.layers.block_0.mixer.wq`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def state_shardings(abstract: TrainState, params: Any, other: jax.sharding.Sharding) -> TrainState:
    """A sharding for every leaf of a state.

    An optimizer's leaf is laid out as the parameter whose path ends its own and whose shape it has
    (moments, momenta); everything else (counters) takes `other`.

    Args:
        abstract: the state or its shapes.
        params: tree of shardings in the shape of `abstract.params`.
        other: sharding of the remaining leaves, as a rule replicated over the same mesh.
    """
    leaves = jax.tree_util.tree_leaves_with_path(abstract.params)
    pairs = zip(leaves, jax.tree.leaves(params), strict=True)
    known = {tuple(path): (leaf.shape, sharding) for (path, leaf), sharding in pairs}

    def choose(path: tuple, leaf: Any) -> jax.sharding.Sharding:
        for start in range(len(path)):
            shape, sharding = known.get(tuple(path[start:]), (None, None))
            if shape == leaf.shape:
                return sharding
        return other

    return jax.tree_util.tree_map_with_path(choose, abstract)


def abstract_state(state: TrainState, shardings: TrainState) -> TrainState:
    """Shapes, dtypes and shardings of a state: the target of a restore."""
    as_struct = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(as_struct, state, shardings)

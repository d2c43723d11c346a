"""Gradients of a mixer against central differences of a float64 loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def exact(tree: Any) -> Any:
    """The same tree in float64 NumPy."""
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def assert_gradients(grads: Any, loop: Callable[[Any], float], at: Any, tolerance: float = 1e-5) -> None:
    """Each array of `grads` along a random direction, relative to the largest of all derivatives.

    Args:
        loop: the loss, from a float64 tree like `at`.
    """
    leaves, tree = jax.tree.flatten(exact(at))
    found, wanted = [], []
    for n, grad in enumerate(jax.tree.leaves(grads)):
        way = np.random.default_rng(n).standard_normal(grad.shape)
        moved = [tree.unflatten([a + s * way if m == n else a for m, a in enumerate(leaves)]) for s in _STEPS]
        wanted.append((loop(moved[0]) - loop(moved[1])) / (_STEPS[0] - _STEPS[1]))
        found.append((np.asarray(grad, np.float64) * way).sum())
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * max(1.0, np.abs(wanted).max()))


_STEPS = (1e-5, -1e-5)

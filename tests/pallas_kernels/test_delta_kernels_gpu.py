"""The delta rule's kernels on a Hopper GPU: against the oracle in float32, within the errors of their twin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_delta_kernels import begins, by_twin, draw, off, values_and_gradients

from pallas_kernels import delta
from pallas_kernels.delta.ref import reference

pytestmark = pytest.mark.gpu


def by_kernels(q, k, v, g, beta, s0, resets):
    return delta.delta_rule(q, k, v, g, beta, s0=s0, resets=resets)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("decay", [0.02, 0.3, 30.0])
@pytest.mark.parametrize("dims", [(128, 128), (64, 64), (64, 128)])
@pytest.mark.parametrize("length", [300, 1024])
def test_values_and_gradients(length, dims, decay, documents):
    """No further from float32 than the twin is, which rounds in the same places."""
    inputs = draw(length, decay=decay, dims=dims, batch=2, dtype=jnp.bfloat16)
    resets = begins(length, 2) if documents else None
    wide = tuple(x.astype(jnp.float32) for x in inputs)
    wanted = values_and_gradients(reference, wide, resets)
    found, same = values_and_gradients(by_kernels, inputs, resets), values_and_gradients(by_twin, inputs, resets)
    for one, like, other in zip(found, same, wanted, strict=True):
        assert off(one, other) < 2 * off(like, other) + 1e-4


def test_repeats_bitwise():
    inputs = draw(4096, dims=(128, 128), heads=4, dtype=jnp.bfloat16)
    first, *others = (values_and_gradients(by_kernels, inputs, None) for _ in range(20))
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)

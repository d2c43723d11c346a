"""Short convolutions: values and gradients against a sum over taps, and what the gradient keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlong.core.state import ConvTail
from jaxlong.ops.short_conv import ROWS, short_conv


def plain(x, kernel, segments, tail):
    """The definition, token by token of the filter, with the gradients of automatic rules."""
    seen, ids = jnp.concatenate([tail.x, x], axis=1), jnp.concatenate([tail.segment_ids, segments], axis=1)
    length = x.shape[1]
    parts = [
        jnp.where((ids[:, n : n + length] == segments)[..., None], seen[:, n : n + length], 0) * row
        for n, row in enumerate(kernel)
    ]
    return sum(parts)


def case(length, width, channels=3):
    keys = jax.random.split(jax.random.key(0), 4)
    x, w = jax.random.normal(keys[0], (2, length, channels)), jax.random.normal(keys[1], (2, length, channels))
    kernel = jax.random.normal(keys[2], (width, channels))
    segments = jnp.cumsum(jax.random.bernoulli(keys[3], 0.1, (2, length)), axis=1)
    tail = ConvTail(x=jax.random.normal(keys[3], (2, width - 1, channels)), segment_ids=jnp.zeros((2, width - 1), int))
    return x, kernel, segments, tail, w


@pytest.mark.parametrize("length, width", [(1, 4), (7, 2), (2 * ROWS + 5, 3), (ROWS, 1)])
def test_values_and_gradients_are_those_of_the_definition(length, width):
    x, kernel, segments, tail, w = case(length, width)

    def loss(f, x, kernel, before):
        return jnp.sum(w * f(x, kernel, segments, ConvTail(before, tail.segment_ids)))

    for f in (lambda f: loss(f, x, kernel, tail.x), lambda f: jax.grad(loss, (1, 2, 3))(f, x, kernel, tail.x)):
        there, here = f(plain), f(lambda *a: short_conv(*a)[0])
        for a, b in zip(jax.tree.leaves(there), jax.tree.leaves(here), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def test_the_gradient_keeps_the_inputs_once():
    x, kernel, segments, tail, _ = case(512, 4, channels=64)
    kept = jax.eval_shape(lambda x, k: jax.vjp(lambda x, k: short_conv(x, k, segments, tail)[0], x, k)[1], x, kernel)
    assert sum(leaf.size for leaf in jax.tree.leaves(kept)) < 1.1 * (x.size + segments.size)

"""The token before, within its document."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlong.core.state import ConvTail
from jaxlong.ops.short_conv import short_conv
from jaxlong.ops.token_shift import token_shift


def test_first_token_of_each_document_has_none_before_it():
    x = jnp.arange(1.0, 7.0).reshape(1, 6, 1)
    segments = jnp.array([[3, 3, 3, 4, 5, 5]])
    np.testing.assert_array_equal(token_shift(x, segments)[0][0, :, 0], [0, 1, 2, 0, 0, 5])


def test_equals_a_convolution_of_width_two():
    x = jax.random.normal(jax.random.key(0), (2, 9, 3))
    segments = jnp.repeat(jnp.array([[1, 2, 3], [1, 2, 3]]), jnp.array([4, 1, 4]), axis=1, total_repeat_length=9)
    kernel = jnp.array([[1.0] * 3, [0.0] * 3])
    for tail in (None, ConvTail(x=jnp.ones((2, 1, 3)), segment_ids=jnp.array([[1], [2]]))):
        np.testing.assert_array_equal(token_shift(x, segments, tail)[0], short_conv(x, kernel, segments, tail)[0])


def test_continues_from_its_tail():
    x = jax.random.normal(jax.random.key(0), (2, 7, 3))
    segments = jnp.zeros((2, 7), jnp.int32)
    first, tail = token_shift(x[:, :3], segments[:, :3], ConvTail.empty(2, 2, 3, x.dtype))
    rest, _ = token_shift(x[:, 3:], segments[:, 3:], tail)
    np.testing.assert_array_equal(jnp.concatenate([first, rest], axis=1), token_shift(x, segments)[0])

"""Layouts are permutations that give every device its tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlong.core.types import BadInput
from jaxlong.parallel.layout import LAYOUTS, order, permute, restore


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("devices", [1, 2, 3, 7])
def test_a_permutation_and_its_inverse(layout, devices):
    length = 4 * devices
    assert sorted(order(layout, length, devices)) == list(range(length))
    x = np.arange(2 * length).reshape(2, length)
    there = permute(x, layout, devices)
    assert isinstance(there, np.ndarray) and np.array_equal(restore(there, layout, devices), x)
    back = jax.jit(lambda x: restore(permute(x, layout, devices), layout, devices))(jnp.asarray(x))
    assert np.array_equal(back, x)


def test_who_holds_what():
    assert order("contiguous", 6, 3).tolist() == [0, 1, 2, 3, 4, 5]
    assert order("zigzag", 12, 3).tolist() == [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]
    assert order("striped", 6, 3).tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize(
    "layout,length,words",
    [("zigzag", 10, "length: 10: .*nearest: 12"), ("striped", 2, "nearest: 3"), ("zigzg", 6, "^layout: zigzg")],
)
def test_refusals(layout, length, words):
    with pytest.raises(BadInput, match=words):
        order(layout, length, 3)

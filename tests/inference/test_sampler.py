"""Samplers keep and draw what NumPy says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlong.core.types import BadInput
from jaxlong.inference import Greedy, Sample, Sampler

LOGITS = np.array([[2.0, -1.0, 0.5, 2.0, 1.0, -3.0, 0.0], [0.0, 5.0, 0.1, 0.2, 0.3, 0.4, 4.5]], np.float32)


def distribution(logits, temperature, top_k, top_p):
    """Probabilities of one row, in float64, by going through tokens from the most likely on."""
    scaled = logits.astype(np.float64) / temperature
    order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))[: top_k or len(scaled)]
    p = np.exp([scaled[i] - scaled[order[0]] for i in order])
    p /= p.sum()
    kept, mass = {}, 0.0
    for i, share in zip(order, p, strict=True):
        if mass < top_p:
            kept[i] = share
        mass += share
    total = sum(kept.values())
    return np.array([kept.get(i, 0.0) / total for i in range(len(scaled))])


SETTINGS = [(1.0, None, 1.0), (0.7, None, 1.0), (1.0, 3, 1.0), (1.3, 1, 1.0), (1.0, None, 0.6), (2.0, 5, 0.8)]
SETTINGS += [(1.0, 99, 0.01)]


@pytest.mark.parametrize("setting", SETTINGS)
def test_cut_equals_numpy(setting):
    cut = np.asarray(jax.nn.softmax(Sample(*setting).cut(jnp.asarray(LOGITS)), axis=-1))
    expected = np.stack([distribution(row, *setting) for row in LOGITS])
    np.testing.assert_allclose(cut, expected, atol=1e-6)
    np.testing.assert_array_equal(cut == 0, expected == 0)


def test_draws_follow_the_distribution():
    draws, setting = 20_000, (1.5, 5, 0.9)
    rows = jnp.broadcast_to(LOGITS[0], (draws, LOGITS.shape[1]))
    tokens = np.asarray(jax.jit(Sample(*setting))(rows, jax.random.key(0)))
    frequencies = np.bincount(tokens, minlength=LOGITS.shape[1]) / draws
    np.testing.assert_allclose(frequencies, distribution(LOGITS[0], *setting), atol=0.015)
    assert tokens.dtype == np.int32


def test_greedy_and_temperature_zero_take_the_first_maximum():
    key = jax.random.key(1)
    for sampler in (Greedy(), Sample(temperature=0.0), Sample(temperature=1.0, top_k=1)):
        assert np.asarray(sampler(jnp.asarray(LOGITS), key)).tolist() == [0, 1]
        assert isinstance(sampler, Sampler) and hash(sampler) == hash(sampler)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Sample(temperature=-0.1), "temperature"),
        (lambda: Sample(temperature=float("nan")), "temperature"),
        (lambda: Sample(top_k=0), "top_k"),
        (lambda: Sample(top_p=0.0), "top_p"),
        (lambda: Sample(top_p=1.1), "top_p"),
    ],
)
def test_bad_input(make, field):
    with pytest.raises(BadInput) as error:
        make()
    assert error.value.field == field and error.value.allowed

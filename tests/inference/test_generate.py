"""Generation with a cache equals whole forward passes; ragged batches equal single rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_models import VOCAB, Bigram, greedy, model

from jaxlong.core.types import BadInput
from jaxlong.inference import Sample, generate, stream
from jaxlong.inference.generate import _generate, _prefill

KEY = jax.random.key(0)
PROMPTS = np.random.default_rng(0).integers(0, VOCAB, (3, 9))


@pytest.mark.thorough
@pytest.mark.parametrize(("length", "chunk"), [(9, None), (9, 3), (1, None)])
def test_greedy_equals_whole_forward_passes(length, chunk):
    lm, params = model()
    prompts = PROMPTS[:, :length]
    got = generate(lm, params, prompts, max_new=8, key=KEY, chunk=chunk)
    assert got.shape == (3, 8) and got.dtype == jnp.int32
    assert np.asarray(got).tolist() == [greedy(lm, params, row, 8) for row in prompts.tolist()]


@pytest.mark.thorough
@pytest.mark.parametrize("chunk", [None, 3])
def test_ragged_batch_equals_single_rows(chunk):
    lm, params = model()
    lengths = [9, 1, 4]
    got = np.asarray(generate(lm, params, PROMPTS, max_new=8, key=KEY, lengths=lengths, chunk=chunk))
    for row, prompt, length in zip(got, PROMPTS, lengths, strict=True):
        assert row.tolist() == greedy(lm, params, prompt[:length].tolist(), 8)


def test_what_stands_after_a_prompt_does_not_matter():
    lm, params = model()
    other = PROMPTS.copy()
    other[1, 4:] = 999_999  # not even an id
    runs = [generate(lm, params, p, max_new=8, key=KEY, lengths=[9, 4, 9]) for p in (PROMPTS, other)]
    np.testing.assert_array_equal(*runs)


SAMPLE = Sample(temperature=2.0, top_k=6)


@pytest.mark.slow
def test_stream_gives_the_same_tokens_one_by_one():
    lm, params = model()
    greedily = np.asarray(generate(lm, params, PROMPTS, max_new=8, key=KEY))[0].tolist()
    assert list(stream(lm, params, PROMPTS[0], max_new=8, key=KEY)) == greedily
    arguments = {"max_new": 8, "key": jax.random.key(5), "sampler": SAMPLE}
    sampled = np.asarray(generate(lm, params, PROMPTS[:1], **arguments))[0].tolist()
    assert list(stream(lm, params, PROMPTS[0], **arguments)) == sampled
    eos = sampled[3]
    assert list(stream(lm, params, PROMPTS[0], eos=eos, **arguments)) == sampled[: sampled.index(eos) + 1]


def test_rows_are_filled_after_eos():
    lm, params = model()
    free = np.asarray(generate(lm, params, PROMPTS, max_new=8, key=KEY))
    eos = int(free[0, 2])
    got = np.asarray(generate(lm, params, PROMPTS, max_new=8, key=KEY, eos=eos))
    for row, plain in zip(got.tolist(), free.tolist(), strict=True):
        end = plain.index(eos) + 1 if eos in plain else len(plain)
        assert row == plain[:end] + [eos] * (8 - end)


def test_randomness_is_the_key():
    lm, params = model()
    run = lambda key: np.asarray(generate(lm, params, PROMPTS[:1], max_new=8, key=key, sampler=SAMPLE)).tolist()
    assert run(KEY) == run(KEY) != run(jax.random.key(1))


def test_samples_follow_the_model():
    """Transitions drawn with the cache have the frequencies of the table."""
    lm, table = Bigram(), jax.random.normal(jax.random.key(2), (5, 5))
    tokens = np.asarray(generate(lm, table, np.zeros((512, 2), int), max_new=40, key=KEY, sampler=Sample()))
    counts = np.zeros((5, 5))
    np.add.at(counts, (tokens[:, :-1].ravel(), tokens[:, 1:].ravel()), 1)
    expected = np.asarray(jax.nn.softmax(table, axis=-1))
    np.testing.assert_allclose(counts / counts.sum(axis=1, keepdims=True), expected, atol=0.03)


@pytest.mark.parametrize(("chunk", "pushed"), [(None, 6), (2, 6), (4, 8), (100, 6)])
def test_prefill_marks_padding_and_leaves_room(chunk, pushed):
    lm = Bigram()
    tokens = jnp.asarray([[1, 2, 3, 4, 1, 2, 3], [4, 3, 0, 0, 0, 0, 0], [2, 9, 9, 9, 9, 9, 9]])
    seen, count = _prefill(lm, jnp.zeros((5, 5)), tokens, jnp.asarray([7, 2, 1]), 10, chunk, None)
    assert count == pushed and lm.max_len == pushed + 10 and lm.max_chunk == min(chunk or 6, 6)
    for row, prompt in zip(np.asarray(seen)[:, :pushed], ([1, 2, 3, 4, 1, 2], [4], []), strict=True):
        pads = pushed - len(prompt)
        assert row[:pads, 2].tolist() == [0] * pads  # padding has a segment of its own
        assert row[pads:].tolist() == [[token, i, 1] for i, token in enumerate(prompt)]


def test_compiles_once_a_shape():
    lm, params = model()
    generate(lm, params, PROMPTS, max_new=8, key=KEY)
    before = _generate._cache_size()
    for seed in range(3):
        prompts = (PROMPTS + seed) % VOCAB
        generate(lm, params, prompts, max_new=8, key=jax.random.key(seed), lengths=[2, 5, 1 + seed], eos=seed)
    assert _generate._cache_size() == before


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"tokens": np.array([[0, VOCAB]])}, "prompt"),
        ({"tokens": np.array([[0, -1]])}, "prompt"),
        ({"tokens": np.zeros((1, 0), int)}, "prompt"),
        ({"tokens": np.zeros((0, 3), int)}, "prompt"),
        ({"tokens": np.zeros(3, int)}, "prompt"),
        ({"tokens": np.zeros((1, 3))}, "prompt"),
        ({"max_new": 0}, "max_new"),
        ({"chunk": 0}, "chunk"),
        ({"lengths": [0, 1, 1]}, "lengths"),
        ({"lengths": [1, 1, 10]}, "lengths"),
        ({"lengths": [1]}, "lengths"),
    ],
)
def test_bad_input(changes, field):
    lm, params = model()
    arguments = {"tokens": PROMPTS, "max_new": 2, "key": KEY} | changes
    with pytest.raises(BadInput) as error:
        generate(lm, params, arguments.pop("tokens"), **arguments)
    assert error.value.field == field and error.value.allowed


def test_stream_refuses_before_the_first_token():
    lm, params = model()
    for tokens, max_new in ([], 3), ([VOCAB], 3), ([1], 0):
        with pytest.raises(BadInput):
            stream(lm, params, np.asarray(tokens, int), max_new=max_new, key=KEY)

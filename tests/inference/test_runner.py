"""Runner is a language model of texts: batches of any sizes give what single prompts give, with few compilations."""

import numpy as np
import pytest
from toy_models import Sums, greedy, logits

from jaxlong.core.types import BadInput
from jaxlong.evals import LanguageModel, Needle, evaluate, perplexity
from jaxlong.inference import Runner, Sample
from jaxlong.inference.generate import _generate
from jaxlong.inference.runner import _logprobs, bucketed


class Ascii:
    vocab_size, identity, eos = 128, "ascii", 0

    def encode(self, text):
        return np.frombuffer(text.encode("latin-1"), np.uint8).astype(np.int32)

    def decode(self, ids):
        return "".join(map(chr, np.asarray(ids)))


def runner(**changes):
    return Runner(Sums(), Sums().params(), Ascii(), **({"max_batch": 4, "bucket": 16} | changes))


PROMPTS = ["a", "bc" * 6, "some words", "b", "def f(x):\n", "c", "x" * 17]


def test_is_a_language_model():
    assert isinstance(runner(), LanguageModel)


def test_prompts_give_what_they_give_alone():
    lm = runner()
    for prompt, text in zip(PROMPTS, lm.generate(PROMPTS, 6), strict=True):
        row = greedy(lm.model, lm.params, Ascii().encode(prompt).tolist(), 6)
        assert text == Ascii().decode(row[: row.index(0)] if 0 in row else row)
    assert lm.generate([], 6) == []


class Ends(Ascii):
    def __init__(self, eos):
        self.eos = eos


def test_text_ends_before_eos():
    lm = runner()
    texts = lm.generate(PROMPTS[2:6], 6)
    end = texts[0][2]
    again = Runner(lm.model, lm.params, Ends(ord(end)), max_batch=4, bucket=16).generate(PROMPTS[2:6], 6)
    assert again == [text.partition(end)[0] for text in texts]


def test_sampling_is_repeatable():
    prompts, sampler = ["a", "b", "a", "a"], Sample(temperature=1.5)
    first = runner(sampler=sampler).generate(prompts, 6)
    assert first == runner(sampler=sampler).generate(prompts, 6)
    assert first != runner(sampler=sampler, seed=1).generate(prompts, 6)
    assert first[0] != first[2] or first[2] != first[3]  # rows of one batch do not share their randomness


@pytest.mark.parametrize(("rows", "length", "chunk"), [(1, 2, 4096), (7, 25, 4096), (7, 25, 4)])
def test_logprobs_equal_numpy(rows, length, chunk):
    lm = runner(chunk=chunk)
    tokens = np.random.default_rng(length).integers(0, 128, (rows, length))
    got = lm.logprobs(tokens)
    assert got.shape == (rows, length - 1) and got.dtype == np.float32
    scores = logits(lm.model, lm.params, tokens)[:, :-1]
    scores -= scores.max(-1, keepdims=True)
    scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
    np.testing.assert_allclose(got, np.take_along_axis(scores, tokens[:, 1:, None], -1)[..., 0], atol=2e-5)


def test_buckets():
    for block in (1, 16, 64, 100):
        sizes = [bucketed(n, block) for n in range(1, 5000)]
        assert all(n <= size < n + max(block, n / 4) for n, size in enumerate(sizes, 1))
        assert sizes == sorted(sizes)
    assert len({bucketed(n, 64) for n in range(1, 2**17 + 1)}) <= 40
    assert [bucketed(n, 64) for n in (61, 125, 253, 509)] == [64, 128, 256, 512]


def test_few_compilations():
    lm = runner()
    lm.generate(["x"] * 4, 6)
    before = _generate._cache_size()
    for rows in (3, 4, 8, 12, 15):
        lm.generate(["x" * n for n in range(1, rows + 1)], 6)  # all in the bucket of 16, in batches of 3 or 4
    assert _generate._cache_size() == before
    lm.logprobs(np.ones((4, 30), int))
    before = _logprobs._cache_size()
    for rows in (3, 4, 8, 12, 15):
        lm.logprobs(np.ones((rows, 30), int))
    assert _logprobs._cache_size() == before


def test_evaluations_run_on_it():
    lm = runner(max_batch=8, bucket=64)
    table = evaluate(lm, [Needle(("one line\n" * 50,))], [64], samples=5, seed=0)
    assert len(table) == 5 and all(len(record.prediction) <= 3 for record in table.records)
    loss = perplexity(lm, [Ascii().encode("words and words " * 20)], window=32, stride=16)
    assert np.isfinite(loss.nll) and loss.tokens == 319


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: runner().generate(["a", ""], 3), "prompt"),
        (lambda: runner().generate(["a"], 0), "max_new"),
        (lambda: runner().generate(["a\u00e9"], 3), "prompt"),
        (lambda: runner().logprobs(np.array([[0, 128]])), "prompt"),
        (lambda: runner().logprobs(np.array([[1]])), "tokens"),
        (lambda: runner(max_batch=0), "max_batch"),
        (lambda: runner(bucket=0), "bucket"),
        (lambda: runner(chunk=0), "chunk"),
    ],
)
def test_bad_input(call, field):
    with pytest.raises(BadInput) as error:
        call()
    assert error.value.field == field and error.value.allowed

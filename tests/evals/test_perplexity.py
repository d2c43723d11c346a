"""Sliding windows against brute force: every token scored once, from the context that its window gives."""

from itertools import pairwise

import numpy as np
import pytest

from jaxlong.core.types import BadInput
from jaxlong.evals.perplexity import Loss, loss_by_position, perplexity, position_buckets, truncated_perplexity


def surprise(context, token):
    """Loss of a token under a made-up model: depends on every token before it, and on how many they are."""
    weights = 0.7 ** np.arange(len(context))[::-1]
    return 1 + float(np.sin(weights @ np.asarray(context, float) + 0.3 * token) ** 2) + 0.01 * len(context)


class Toy:
    tokenizer = None

    def __init__(self):
        self.shapes = []

    def generate(self, prompts, max_new):
        raise NotImplementedError

    def logprobs(self, tokens):
        self.shapes.append(tokens.shape)
        rows = [[-surprise(row[:i], row[i]) for i in range(1, len(row))] for row in tokens.tolist()]
        return np.array(rows, np.float32)


def brute_force(document, window, stride, bos):
    """(window number, loss) of each scored token, one token at a time."""
    ids, body, first = list(document), window - (bos is not None), 0 if bos is not None else 1
    found = []
    for i in range(first, len(ids)):
        number = max(0, -(-(i + 1 - body) // stride))  # the first window that reaches token i
        context = ids[number * stride : i]
        found.append((number, surprise(([bos] if bos is not None else []) + context, ids[i])))
    return found


DOCUMENTS = [np.random.default_rng(i).integers(0, 50, n) for i, n in enumerate((37, 2, 16, 1, 0, 90))]


@pytest.mark.parametrize("bos", [None, 7])
@pytest.mark.parametrize(("window", "stride"), [(16, 1), (16, 4), (16, 5), (16, 15), (2, 1), (100, 30)])
def test_equals_brute_force(window, stride, bos):
    scored = [(i, *pair) for i, ids in enumerate(DOCUMENTS) for pair in brute_force(ids, window, stride, bos)]
    by_window = {}
    for document, number, loss in scored:
        by_window.setdefault((document, number), []).append(loss)
    lm = Toy()
    found = perplexity(lm, DOCUMENTS, window=window, stride=stride, bos=bos, batch=3)
    assert found.nll == pytest.approx(np.mean([loss for *_, loss in scored]), rel=1e-6)
    assert (found.tokens, found.windows) == (len(scored), len(by_window))
    assert found.perplexity == pytest.approx(np.exp(found.nll))
    assert {shape[1] for shape in lm.shapes} == {window} and max(shape[0] for shape in lm.shapes) <= 3
    yarn = perplexity(Toy(), DOCUMENTS, window=window, stride=stride, bos=bos, average="window")
    assert yarn.nll == pytest.approx(np.mean([np.mean(losses) for losses in by_window.values()]), rel=1e-6)


def test_context_of_a_token_is_at_least_window_less_stride():
    """A loss that is the length of the context shows which context each token had."""

    class Counter(Toy):
        def logprobs(self, tokens):
            return -np.broadcast_to(np.arange(1, tokens.shape[1], dtype=np.float32), (len(tokens), tokens.shape[1] - 1))

    found = perplexity(Counter(), [np.zeros(200, int)], window=32, stride=8)
    contexts = list(range(1, 32)) + [24 + i % 8 for i in range(200 - 32)]
    assert found.nll == pytest.approx(np.mean(contexts))


@pytest.mark.parametrize("bos", [None, 7])
def test_truncated_is_the_mean_of_first_windows(bos):
    means = []
    for document in DOCUMENTS:
        head = list(document[: 16 if bos is None else 15])
        row = head if bos is None else [bos, *head]
        if len(row) > 1:
            means.append(np.mean([surprise(row[:i], row[i]) for i in range(1, len(row))]))
    found = truncated_perplexity(Toy(), DOCUMENTS, window=16, bos=bos)
    assert found.nll == pytest.approx(np.mean(means), rel=1e-6)
    assert found.average == "window" and found.windows == len(means)


def test_loss_by_position_equals_brute_force():
    length, rows = 20, []
    for document in DOCUMENTS:
        for start in range(0, len(document) - length + 1, length):
            row = list(document[start : start + length])
            rows.append([surprise(row[:i], row[i]) for i in range(1, length)])
    mean = np.mean(rows, axis=0)  # mean[i - 1]: i tokens of context
    found = loss_by_position(Toy(), DOCUMENTS, length=length, batch=2, name="text", model="toy")
    for loss in found:
        assert loss.nll == pytest.approx(mean[loss.start - 1 : loss.end - 1].mean(), rel=1e-6)
        assert loss.tokens == (loss.end - loss.start) * len(rows) and loss.windows == len(rows)
    assert sum(loss.tokens for loss in found) == len(rows) * (length - 1)


@pytest.mark.parametrize("length", [2, 3, 5, 64, 100, 1 << 20])
@pytest.mark.parametrize("buckets", [1, 2, 8])
def test_buckets_tile_the_positions(length, buckets):
    edges = position_buckets(length, buckets)
    assert edges[0] == 1 and edges[-1] == length and all(a < b for a, b in pairwise(edges))
    if length == 100 and buckets == 1:
        assert edges == [1, 2, 4, 8, 16, 32, 64, 100]


def test_progress_counts_windows():
    seen = []
    perplexity(Toy(), [np.arange(40)], window=8, stride=4, batch=4, progress=lambda *p: seen.append(p))
    assert seen == [(4, 9), (8, 9), (9, 9)]


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: perplexity(Toy(), DOCUMENTS, window=16, stride=16), "stride"),
        (lambda: perplexity(Toy(), DOCUMENTS, window=16, stride=0), "stride"),
        (lambda: perplexity(Toy(), DOCUMENTS, window=1, stride=1), "window"),
        (lambda: perplexity(Toy(), DOCUMENTS, window=16, stride=4, average="mean"), "average"),
        (lambda: perplexity(Toy(), [np.array([3])], window=16, stride=4), "documents"),
        (lambda: perplexity(Toy(), [], window=16, stride=4, bos=1), "documents"),
        (lambda: loss_by_position(Toy(), DOCUMENTS, length=91), "length"),
        (lambda: loss_by_position(Toy(), DOCUMENTS, length=1), "window"),
    ],
)
def test_bad_input(call, field):
    with pytest.raises(BadInput) as error:
        call()
    assert error.value.field == field and error.value.allowed


def test_loss_is_a_value():
    loss = Loss("text", 16, 4, "token", 0.0, 10, 1)
    assert loss.perplexity == 1.0 and loss == Loss("text", 16, 4, "token", 0.0, 10, 1)

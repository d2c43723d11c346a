"""Making an example of a wanted number of tokens with a tokenizer that is only known by calling it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxlong.evals.base import Example, Tokenizer

PROBES = 64
"""Enough for any bisection; ends the search if the text does not grow with its size."""


class Draft(NamedTuple):
    """A prompt of some size, its answer, and where the prompt holds what the answer repeats.

    `value` is the character offset of the value to find, `depth` how deep it stands, `spans` the answers
    that the prompt itself carries, `position` the number of the item asked for among listed ones.
    """

    prompt: str
    answer: str
    value: int
    depth: float
    spans: tuple[tuple[int, int], ...] = ()
    position: int | None = None


def exact_example(
    make: Callable[[int, int], Draft], length: int, tokenizer: Tokenizer, *, guess: int, max_new: int
) -> Example | None:
    """The example whose prompt and answer have `length` tokens, or as few less as the tokenizer allows.

    `make(n, pad)` drafts it with n units of filler and `pad` extra characters, which make up for filler
    that is only available in pieces (a character of several bytes). None if it is too long without filler.
    """
    tokens = lambda draft: len(tokenizer.encode(draft.prompt + draft.answer))
    n = fit(lambda n: tokens(make(n, 0)), length, low=0, guess=guess)
    if n is None:
        return None
    draft = make(n, 0)
    realised = tokens(draft)
    if realised < length:
        padded = make(n, length - realised)
        if (padded_tokens := tokens(padded)) <= length:
            draft, realised = padded, padded_tokens
    meta = {
        "length": realised,
        "depth": draft.depth,
        "distance": len(tokenizer.encode(draft.prompt[draft.value :])),
        "position": draft.position,
        "max_new": max_new,
        "spans": (*draft.spans, (len(draft.prompt), len(draft.prompt) + len(draft.answer))),
    }
    return Example(draft.prompt, (draft.answer,), meta)


def fit(count: Callable[[int], int], length: int, *, low: int, guess: int) -> int | None:
    """The size n >= low whose text has `length` tokens, or else the largest found below.

    `count(n)` is the number of tokens at size n (characters, words, lines), nearly increasing in n. The
    search starts at `guess`, follows the slope until `length` lies between two sizes, then narrows that
    bracket. A count equal to `length` ends it at once, so a good guess costs one call.

    Returns:
        n, or None if even `low` is too long.
    """
    below, above = None, None  # (size, tokens) that fit, and that do not
    n = max(low, guess)
    for probe in range(PROBES):
        tokens = count(n)
        if tokens == length:
            return n
        if tokens < length:
            below = (n, tokens)
        elif n == low:
            return None
        else:
            above = (n, tokens)
        if below and above and above[0] - below[0] <= 1:
            break
        n = _next(below, above, length, low, bound=probe % 3 == 2)
    return below[0] if below else None


def _next(below: tuple[int, int] | None, above: tuple[int, int] | None, length: int, low: int, bound: bool) -> int:
    """The size to try: along the slope, and every third time a step that bounds the number of calls."""
    if above is None:
        n, tokens = below
        return 2 * n + 1 if bound else n + max(1, round((length - tokens) * n / max(tokens, 1)))
    if below is None:
        n, tokens = above
        return low if bound else max(low, min(n - 1, n - round((tokens - length) * n / tokens)))
    (n0, t0), (n1, t1) = below, above
    if bound or t1 <= t0:
        return (n0 + n1) // 2
    return min(n1 - 1, max(n0 + 1, n0 + round((n1 - n0) * (length - t0) / (t1 - t0))))

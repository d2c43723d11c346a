"""RULER's needle tasks and variable tracking, from a few hundred tokens on, and its summary figures.

Hsieh et al., "RULER: What's the real context size of your long-context language models?", arXiv 2404.06654.
Prompts, settings and scoring are RULER's. Samples are our own: each is a pure function of its random
stream and length, so that samples do not depend on each other or on a calibration. Below `OFFICIAL`
tokens, where RULER's own fixed parts would fill the context,

    the generation allowance is twice the tokens of the answers, at most RULER's;
    variable tracking shows no worked example before the question (RULER: one);
    haystacks grow by single words, lines and needles, where RULER's grow by 5 to 500.

Word lists and, unless given, essays are small ones of this library: scores compare with each other, not
with published ones.
"""

from __future__ import annotations

import itertools
import random
import re
import string
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from jaxlong.core.types import BadInput
from jaxlong.evals.base import Documents, Example, Tokenizer
from jaxlong.evals.prose import Prose
from jaxlong.evals.sizing import Draft, fit
from jaxlong.evals.words import ADJECTIVES, NOUNS

OFFICIAL = 4096
"""Shortest length of the published benchmark, in tokens."""

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
QUESTION = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided "
    "text? The special magic {kind} for {query} mentioned in the provided text are"
)
VARIABLES = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {query} in the text above."
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the "
    "value {query}, they are: "
)
DEPTHS = tuple(round(100 * i / 39) for i in range(40))
"""Percentages of an essay's sentences at which a needle may stand."""

LONGEST_SENTENCE = 40
"""Words after which text without sentences is cut, so that needles can stand in it."""

VALUES: Mapping[str, Callable[[random.Random], str]] = {
    "numbers": lambda rng: str(rng.randint(10**6, 10**7 - 1)),
    "words": lambda rng: f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}",
    "uuids": lambda rng: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
}
"""Kinds of keys and values."""


@dataclass(frozen=True)
class Niah:
    """Needles in a haystack: find all values of one key or several.

    Fields:
        haystack: "noise" (one line repeated), "essay", or "needle" (needles with other keys).
        key, value: kinds, names in VALUES.
        keys, values, queries: hidden keys (at least `queries`), values of each, keys asked for.
        essay: the text of the essay haystack; None is generated prose.
        max_new: RULER's generation allowance, in tokens.
    """

    haystack: str = "noise"
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1
    essay: Documents | None = None
    max_new: int = 128
    label: str = "niah"
    scoring: str = "all"

    def __post_init__(self):
        for name, known in (("haystack", HAYSTACKS), ("key", VALUES), ("value", VALUES)):
            if (value := getattr(self, name)) not in known:
                raise BadInput(f"{self.label}.{name}", value, "no such kind", f"one of {', '.join(known)}")
        for name, most in (("keys", 1000), ("values", 1000), ("queries", 1000), ("max_new", None)):
            _check_positive(self.label, name, getattr(self, name), most)

    def __call__(self, rng: random.Random, length: int, tokenizer: Tokenizer) -> Example:
        """Draw an example. Raises BadInput if the prompt exceeds `length` with the smallest haystack."""
        hidden = _draw_needles(rng, self)
        asked = rng.sample(list(hidden), self.queries)
        answers = tuple(f" {value}" for key in asked for value in hidden[key])
        needles = [self._sentence(key, value) for key, found in hidden.items() for value in found]
        rng.shuffle(needles)
        context = HAYSTACKS[self.haystack](self, rng.getrandbits(64), needles, length)
        first = self._sentence(asked[0], hidden[asked[0]][0])
        draft = lambda n: _draft("", *self._around(asked), context(n), first, answers[0])
        return _example(draft, answers, self, length, tokenizer)

    def _sentence(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.value, key=key, value=value)

    def _around(self, asked: Sequence[str]) -> tuple[str, str]:
        """The prompt before and after the context."""
        template, kind = QUESTION, self.value
        if self.queries * self.values == 1:
            kind = kind[:-1]
            for plural, singular in (("Some", "A"), ("are all", "is"), ("are", "is")):
                template = template.replace(plural, singular)
        query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
        before, after = template.split("{context}")
        return before.format(kind=kind), after.format(kind=kind, query=query)


def _draw_needles(rng: random.Random, task: Niah) -> dict[str, list[str]]:
    hidden: dict[str, list[str]] = {}
    while len(hidden) < max(task.keys, task.queries):
        hidden.setdefault(VALUES[task.key](rng), [VALUES[task.value](rng) for _ in range(task.values)])
    return hidden


def _noise(task: Niah, seed: int, needles: Sequence[str], length: int) -> Callable[[int], str]:
    return lambda n: "\n".join(_scatter([NOISE] * n, needles, random.Random(f"{seed}/{n}")))


def _distractors(task: Niah, seed: int, needles: Sequence[str], length: int) -> Callable[[int], str]:
    rng, lines = random.Random(seed), []
    taken = [needle.partition(" is: ")[0] for needle in needles]

    def haystack(n: int) -> str:
        while len(lines) < n:
            line = task._sentence(VALUES[task.key](rng), VALUES[task.value](rng))
            if line.partition(" is: ")[0] not in taken:
                lines.append(line)
        return "\n".join(_scatter(lines[:n], needles, random.Random(f"{seed}/{n}")))

    return haystack


def _essay(task: Niah, seed: int, needles: Sequence[str], length: int) -> Callable[[int], str]:
    rng = random.Random(seed)
    words, count = _words(Prose() if task.essay is None else task.essay, rng, length), len(needles)
    depths = sorted(rng.sample(DEPTHS, count) if count <= len(DEPTHS) else rng.choices(DEPTHS, k=count))

    def haystack(n: int) -> str:
        sentences = _sentences(words[:n])
        cuts = [int(len(sentences) * depth / 100) for depth in depths]
        parts, done = [], 0
        for cut, needle in zip(cuts, needles, strict=True):
            parts += (*sentences[done:cut], needle)
            done = cut
        return " ".join((*parts, *sentences[done:]))

    return haystack


HAYSTACKS: Mapping[str, Callable[[Niah, int, Sequence[str], int], Callable[[int], str]]] = {
    "noise": _noise,
    "essay": _essay,
    "needle": _distractors,
}
"""(task, seed, needles, most units) -> (units -> context). The context is a function of its size alone."""


def _scatter(lines: list[str], needles: Sequence[str], rng: random.Random) -> list[str]:
    for place, needle in zip(reversed(_places(len(lines), len(needles), rng)), needles, strict=True):
        lines.insert(place, needle)
    return lines


def _places(lines: int, count: int, rng: random.Random) -> list[int]:
    """Sorted indices of lines to stand before: different ones, as RULER's, wherever there are enough."""
    return sorted(rng.sample(range(lines), count) if count <= lines else rng.choices(range(lines), k=count))


def _words(documents: Documents, rng: random.Random, count: int) -> list[str]:
    """`count` consecutive words from a random place on, through the documents and round again."""
    start = rng.randrange(len(documents)) if len(documents) else 0
    text = documents[start].split() if len(documents) else []
    words = text[rng.randrange(len(text)) :] if text else []
    for step in itertools.count(1):
        if len(words) >= count:
            return words[:count]
        if step > len(documents) and not words:
            raise BadInput("essay", f"{len(documents)} documents", "holds no words", "text")
        words += documents[(start + step) % len(documents)].split()


def _sentences(words: Sequence[str]) -> list[str]:
    sentences, current = [], []
    for word in words:
        current.append(word)
        if re.search(r"[.!?][\"')\]]*$", word) or len(current) == LONGEST_SENTENCE:
            sentences.append(" ".join(current))
            current = []
    return [*sentences, " ".join(current)] if current else sentences


@dataclass(frozen=True)
class VariableTracking:
    """Follow a chain of assignments through noise: `VAR AAAAA = 12345`, `VAR BBBBB = VAR AAAAA`, ...

    Fields:
        chains: number of chains; the first one's value is asked for.    hops: copies in a chain.
        max_new: RULER's generation allowance, in tokens.
    """

    chains: int = 1
    hops: int = 4
    max_new: int = 30
    label: str = "vt"
    scoring: str = "all"

    def __post_init__(self):
        for name, most in (("chains", 100), ("hops", 100), ("max_new", None)):
            _check_positive(self.label, name, getattr(self, name), most)

    def __call__(self, rng: random.Random, length: int, tokenizer: Tokenizer) -> Example:
        """Draw an example. Raises BadInput if the prompt exceeds `length` with the smallest haystack."""
        shown = self._shown(rng, tokenizer) if length >= OFFICIAL else ""
        draft, names = self._draw(rng, shown, letters=5)
        return _example(draft, names, self, length, tokenizer)

    def _draw(self, rng: random.Random, shown: str, letters: int) -> tuple[Callable[[int], Draft], tuple[str, ...]]:
        """Lines of noise -> the question, and the names that answer it."""
        chains, seed = _draw_chains(rng, self.chains, self.hops, letters), rng.getrandbits(64)
        before, after = VARIABLES.split("{context}")
        after = after.format(query=chains[0].value, count=self.hops + 1)
        first, names = next(chains[0].statements()), tuple(chains[0].names)
        return lambda n: _draft(shown, before, after, self._context(chains, n, seed), first, names[0]), names

    def _context(self, chains: Sequence[_Chain], n: int, seed: int) -> str:
        rng, lines = random.Random(f"{seed}/{n}"), [NOISE] * n
        for chain in chains:
            places = _places(len(lines), self.hops + 1, rng)
            for shift, (place, statement) in enumerate(zip(places, chain.statements(), strict=True)):
                lines.insert(place + shift, statement)
        return "\n".join(lines)

    def _shown(self, rng: random.Random, tokenizer: Tokenizer) -> str:
        """A worked example with shorter names, of 500 tokens or as few more as it takes."""
        draft, names = self._draw(rng, "", letters=3)
        solved = lambda n: draft(n).prompt + " ".join(names) + "\n\n"
        count = lambda n: len(tokenizer.encode(solved(n)))
        return solved(fit(count, max(500, count(1)), low=1, guess=1))


class _Chain(NamedTuple):
    value: int
    names: list[str]

    def statements(self) -> Iterator[str]:
        yield f"VAR {self.names[0]} = {self.value}"
        for source, target in zip(self.names, self.names[1:], strict=False):
            yield f"VAR {target} = VAR {source} "


def _draw_chains(rng: random.Random, chains: int, hops: int, letters: int) -> list[_Chain]:
    names: dict[str, None] = {}
    while len(names) < chains * (hops + 1):
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    values = rng.sample(range(10_000, 99_999), chains)
    split = list(names)
    return [_Chain(value, split[i * (hops + 1) : (i + 1) * (hops + 1)]) for i, value in enumerate(values)]


def _allowance(answers: Sequence[str], official: int, length: int, tokenizer: Tokenizer) -> int:
    """Tokens that a model may generate."""
    if length >= OFFICIAL:
        return official
    return min(official, 2 * len(tokenizer.encode(" ".join(answers))))


def _draft(shown: str, before: str, after: str, context: str, needle: str, answer: str) -> Draft:
    at = context.index(needle)
    depth = at / max(1, len(context) - len(needle))
    return Draft(shown + before + context + after, answer, len(shown + before) + at, depth)


def _example(
    draft: Callable[[int], Draft], answers: tuple[str, ...], task: Any, length: int, tokenizer: Tokenizer
) -> Example:
    """The example with the most units of filler that leaves room to generate."""
    allowance = _allowance(answers, task.max_new, length, tokenizer)
    count = lambda n: len(tokenizer.encode(draft(n).prompt)) + allowance
    least = count(1)
    step = count(9) - least
    n = fit(count, length, low=1, guess=1 + 8 * max(0, length - least) // max(step, 1))
    if n is None:
        raise BadInput("length", length, f"too short for {task.label}", f"{least} tokens or more")
    chosen = draft(n)
    meta = {
        "length": count(n),
        "depth": chosen.depth,
        "distance": len(tokenizer.encode(chosen.prompt[chosen.value :])),
        "max_new": allowance,
        "spans": ((len(chosen.prompt), len(chosen.prompt) + len(chosen.answer)),),
    }
    return Example(chosen.prompt, answers, meta)


def _check_positive(label: str, name: str, value: int, most: int | None) -> None:
    if value < 1 or (most is not None and value > most):
        raise BadInput(f"{label}.{name}", value, "out of range", f"1 to {most}" if most else "1 or more")


RULER: Mapping[str, Niah | VariableTracking] = {
    "niah_single_1": Niah("noise", label="niah_single_1"),
    "niah_single_2": Niah("essay", label="niah_single_2"),
    "niah_single_3": Niah("essay", value="uuids", label="niah_single_3"),
    "niah_multikey_1": Niah("essay", keys=4, label="niah_multikey_1"),
    "niah_multikey_2": Niah("needle", label="niah_multikey_2"),
    "niah_multikey_3": Niah("needle", key="uuids", value="uuids", label="niah_multikey_3"),
    "niah_multivalue": Niah("essay", values=4, label="niah_multivalue"),
    "niah_multiquery": Niah("essay", queries=4, label="niah_multiquery"),
    "vt": VariableTracking(),
}
"""RULER's eight settings of needles in a haystack, and variable tracking."""


def with_essay(tasks: Mapping[str, Any], essay: Documents) -> dict[str, Any]:
    """The tasks with another text for their essay haystacks."""
    return {name: replace(task, essay=essay) if isinstance(task, Niah) else task for name, task in tasks.items()}


# Summaries ----------------------------------------------------------------------------------------------


class Averages(NamedTuple):
    """Means over lengths: plain, and with weights 1, 2, ... that grow or fall with the length (RULER, wAvg)."""

    plain: float
    increasing: float
    decreasing: float


def averages(scores: Mapping[int, float]) -> Averages:
    """Averages of scores by length. Raises BadInput for no scores."""
    if not scores:
        raise BadInput("scores", "{}", "nothing to average", "one length or more")
    ordered = [scores[length] for length in sorted(scores)]
    total = len(ordered) * (len(ordered) + 1) / 2
    rising = sum(weight * score for weight, score in enumerate(ordered, 1)) / total
    falling = sum(weight * score for weight, score in enumerate(reversed(ordered), 1)) / total
    return Averages(sum(ordered) / len(ordered), rising, falling)


def effective_length(scores: Mapping[int, float], threshold: float = 85.6) -> int:
    """The longest length up to which every score exceeds the threshold, or 0.

    Scores are percentages by length, each the mean over tasks. RULER's threshold 85.6 is Llama-2-7B-chat's
    score at 4K over all 13 tasks; with other tasks or lengths use one of your own, such as 0.85 of the
    model's score at short lengths (NoLiMa, arXiv 2502.05167), and call the result a relative effective length.
    """
    effective = 0
    for length in sorted(scores):
        if scores[length] <= threshold:
            break
        effective = length
    return effective

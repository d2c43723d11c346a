"""Retrieval tasks: a line hidden in real text, a pass key in noise, a value in a list of pairs.

Each makes exactly the wanted number of tokens with tokenizers whose tokens are bytes or characters, and
at most that number, close to it, with any other.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, NoReturn

from jaxlong.core.types import BadInput
from jaxlong.evals.base import Documents, Example, Tokenizer
from jaxlong.evals.sizing import Draft, exact_example
from jaxlong.evals.words import KEYS

NEAR = 200
"""Characters to look around for the start of a line; text without one there is cut where it stands."""


class Hidden(NamedTuple):
    """A line to hide, the offset of the value in it, and its depth."""

    line: str
    value: int
    depth: float


@dataclass(frozen=True)
class Needle:
    """Find the value of a key: lines such as `# key fox=482` stand in real text, and questions at its end.

    The needle that the last question asks for stands exactly at its depth, at a line break of the text
    wherever there is one; the others stand at the line breaks nearest to uniform depths. Earlier questions
    carry their answers, so that each is one more answer to learn from (`meta["spans"]`).

    Fields:
        haystack: the documents to hide in.
        needles, questions: smallest and largest number, drawn uniformly; questions ask for different needles.
        depth: of the needle asked for last, 0 first to 1 last; None draws it uniformly.
        split: "train" or "heldout", two disjoint sets of keys.
        digits: of the values, which differ within an example.
        line, question: the formats of a needle and of a question.
    """

    haystack: Documents
    needles: tuple[int, int] = (1, 1)
    questions: tuple[int, int] = (1, 1)
    depth: float | None = None
    split: str = "heldout"
    digits: int = 3
    line: str = "# key {key}={value}"
    question: str = "? key {key}="
    label: str = "needle"
    scoring: str = "exact"

    def __post_init__(self):
        if isinstance(self.haystack, str):
            raise BadInput(f"{self.label}.haystack", repr(self.haystack[:20]), "is one text", "a sequence of documents")
        _check_depth(self.label, self.depth)
        if self.split not in KEYS:
            raise BadInput(f"{self.label}.split", self.split, "no such set of keys", f"one of {', '.join(KEYS)}")
        if not 1 <= self.digits <= 18:
            raise BadInput(f"{self.label}.digits", self.digits, "is no number of digits", "1 to 18")
        most = min(len(KEYS[self.split]), 10**self.digits)
        for name, bound in (("needles", most), ("questions", self.needles[1])):
            low, high = getattr(self, name)
            if not 1 <= low <= high <= bound:
                why = "is no range of numbers" if high <= bound else f"there are at most {bound}"
                raise BadInput(
                    f"{self.label}.{name}", (low, high), why, f"(low, high) with 1 <= low <= high <= {bound}"
                )
        for name, parts in (("line", ("{key}", "{value}")), ("question", ("{key}",))):
            text = getattr(self, name)
            if any(text.count(part) != 1 for part in parts) or "\n" in text:
                raise BadInput(f"{self.label}.{name}", repr(text), "is no format of one line", f"{parts}, each once")

    def __call__(self, rng: random.Random, length: int, tokenizer: Tokenizer) -> Example:
        """Draw an example. Raises BadInput if the largest numbers of needles and questions exceed `length`."""
        self._check_length(length, tokenizer)
        count = rng.randint(*self.needles)
        asked = min(rng.randint(*self.questions), count)
        pairs = list(zip(rng.sample(KEYS[self.split], count), self._values(rng, count), strict=True))
        depths = [rng.random() for _ in range(count)]
        if self.depth is not None:
            depths[0] = self.depth
        hidden = [self._hidden(*pair, depth) for pair, depth in zip(pairs, depths, strict=True)]
        window = _Window(self.haystack, rng)
        questions, spans = self._questions([pairs[i] for i in (*rng.sample(range(1, count), asked - 1), 0)])
        answer = pairs[0][1]

        def make(n: int, pad: int) -> Draft:
            before = round(n * depths[0])
            context, value = _bury(window(before, n - before), before, hidden, pad)
            moved = tuple((len(context) + start, len(context) + end) for start, end in spans)
            return Draft(context + questions, answer, value, before / n if n else depths[0], moved)

        guess = length - len(questions) - len(answer) - sum(len(needle.line) for needle in hidden)
        example = exact_example(make, length, tokenizer, guess=guess, max_new=self.digits)
        return example or self._refuse(length, length + 1)

    def _values(self, rng: random.Random, count: int) -> list[str]:
        return [f"{value:0{self.digits}}" for value in rng.sample(range(10**self.digits), count)]

    def _hidden(self, key: str, value: str, depth: float) -> Hidden:
        before, after = self.line.replace("{key}", key).split("{value}")
        return Hidden(f"{before}{value}{after}\n", len(before), depth)

    def _questions(self, pairs: Sequence[tuple[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        """The questions, all but the last with its answer, and where those answers stand."""
        text, spans = "", []
        for key, value in pairs[:-1]:
            text += self.question.replace("{key}", key)
            spans.append((len(text), len(text) + len(value)))
            text += value + "\n"
        return text + self.question.replace("{key}", pairs[-1][0]), spans

    def _check_length(self, length: int, tokenizer: Tokenizer) -> None:
        """Refuse a length that the largest example without any text exceeds."""
        pair = (KEYS[self.split][0], "0" * self.digits)
        lines = self._hidden(*pair, 0.0).line * self.needles[1]
        smallest = lines + self._questions([pair] * self.questions[1])[0] + pair[1]
        if len(smallest) > length and (tokens := len(tokenizer.encode(smallest))) > length:
            self._refuse(length, tokens)

    def _refuse(self, length: int, least: int) -> NoReturn:
        why = f"too short for {self.needles[1]} needles and {self.questions[1]} questions of {self.label}"
        raise BadInput("length", length, why, f"{least} tokens or more")


def needle_grid(task: Any, depths: Sequence[float]) -> tuple[Any, ...]:
    """The task once for each depth, as variants of its label: the rows of a heat map."""
    return tuple(replace(task, depth=float(depth), label=f"{task.label}@{depth:.3g}") for depth in depths)


class _Window:
    """Text around a random line start: so many characters before it and after it.

    Where its document ends, the one before or after it goes on.
    """

    def __init__(self, documents: Documents, rng: random.Random):
        if not len(documents):
            raise BadInput("haystack", "()", "holds no documents", "one or more")
        self.documents, self.index = documents, rng.randrange(len(documents))
        text = documents[self.index]
        self.anchor = _line_start(text, int(rng.random() * len(text)))

    def __call__(self, before: int, after: int) -> str:
        text = self.documents[self.index]
        head, tail = text[max(0, self.anchor - before) : self.anchor], text[self.anchor : self.anchor + after]
        if len(head) == before and len(tail) == after:
            return head + tail
        return self._gather(head, before, -1) + self._gather(tail, after, 1)

    def _gather(self, piece: str, size: int, step: int) -> str:
        """`piece` continued to `size` characters with the documents before it (step -1) or after it (step 1)."""
        pieces, missing, index = [piece], size - len(piece), self.index
        if missing and piece and step == 1 and not piece.endswith("\n"):
            pieces, missing = [piece, "\n"], missing - 1
        while missing > 0:
            index = (index + step) % len(self.documents)
            text = self.documents[index]
            text = text if text.endswith("\n") else text + "\n"
            pieces.append(text[-missing:] if step == -1 else text[:missing])
            missing -= len(pieces[-1])
        return "".join(pieces if step == 1 else reversed(pieces))


def _line_start(text: str, near: int) -> int:
    """The start of a line nearest to an offset, or the offset itself if there is none within NEAR characters."""
    left = text.rfind("\n", max(0, near - NEAR), near) + 1
    right = text.find("\n", near, near + NEAR) + 1
    starts = [start for start in (left, right) if start]
    starts += [0] if near <= NEAR else []
    starts += [len(text)] if len(text) - near <= NEAR else []
    return min(starts, key=lambda start: abs(start - near), default=near)


def _bury(text: str, first: int, hidden: Sequence[Hidden], pad: int) -> tuple[str, int]:
    """Put the lines into the text, the first of them at offset `first`; returns the context and its value's offset.

    What stands before a line, and the whole, ends with a newline that takes the place of a character, so
    the context has as many characters as text and lines together.
    """
    places = [first] + [_line_start(text, round(needle.depth * len(text))) for needle in hidden[1:]]
    parts, done, total, value = [], 0, 0, 0
    for i in sorted(range(len(hidden)), key=places.__getitem__):
        piece = _ended(text[done : places[i]])
        done, total = places[i], total + len(piece)
        if i == 0:
            value = total + hidden[0].value
        total += len(hidden[i].line)
        parts += (piece, hidden[i].line)
    rest = _ended(text[done:])
    if pad:
        rest = rest[:-1] + " " * (pad if rest else pad - 1) + "\n"
    return "".join((*parts, rest)), value


def _ended(text: str) -> str:
    return text if not text or text[-1] == "\n" else text[:-1] + "\n"


@dataclass(frozen=True)
class Passkey:
    """Find a number in repeated noise (Mohtashami and Jaggi, arXiv 2305.16300; scored by the first integer).

    Fields:
        depth: of the pass key, 0 first to 1 last; None draws it uniformly.
        largest: the pass key is drawn from 1 to this.
        max_new: tokens that a model may generate.
    """

    depth: float | None = None
    largest: int = 50_000
    max_new: int = 10
    label: str = "passkey"
    scoring: str = "integer"

    TASK = (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
        "I will quiz you about the important information there.\n"
    )
    NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
    SENTENCE = "The pass key is {key}. Remember it. {key} is the pass key."
    QUESTION = "What is the pass key? The pass key is"

    def __post_init__(self):
        _check_depth(self.label, self.depth)
        for name in ("largest", "max_new"):
            if getattr(self, name) < 1:
                raise BadInput(f"{self.label}.{name}", getattr(self, name), "must be positive", "1 or more")

    def __call__(self, rng: random.Random, length: int, tokenizer: Tokenizer) -> Example:
        """Draw an example. Raises BadInput if the sentences alone exceed `length`."""
        key, depth = rng.randint(1, self.largest), rng.random()
        depth = depth if self.depth is None else self.depth
        _check_smallest(self.label, self._draft(self.largest, depth, 0, 0), length, tokenizer)
        guess = length - len(self._draft(key, depth, 0, 0).prompt) - len(f" {key}")
        make = lambda n, pad: self._draft(key, depth, n, pad)
        example = exact_example(make, length, tokenizer, guess=guess, max_new=self.max_new)
        return example or _refuse(self.label, length, length + 1)

    def _draft(self, key: int, depth: float, n: int, pad: int) -> Draft:
        before = round(n * depth)
        noise = self.NOISE * (n // len(self.NOISE) + 1)
        head = f"{self.TASK}{noise[:before]}\n"
        sentence = self.SENTENCE.format(key=key)
        prompt = f"{head}{sentence}\n{noise[before:n]}{' ' * pad}\n{self.QUESTION}"
        value = len(head) + self.SENTENCE.index("{")
        return Draft(prompt, f" {key}", value, before / n if n else depth)


@dataclass(frozen=True)
class KeyValue:
    """Find a key's value among as many random pairs as fit, printed as a JSON object (Liu et al., arXiv 2307.03172).

    `meta["position"]` is the number of the pair asked for. Where pairs do
    not fill the length, spaces before the closing brace do.

    Fields:
        depth: of the pair, 0 first to 1 last; None draws it uniformly.
        size: hexadecimal digits of keys and values; None is a UUID, as in the paper.
    """

    depth: float | None = None
    size: int | None = None
    label: str = "key_value"
    scoring: str = "part"

    TASK = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
    QUESTION = '\n\nKey: "{key}"\nCorresponding value:'

    def __post_init__(self):
        _check_depth(self.label, self.depth)
        if self.size is not None and not 3 <= self.size <= 32:
            raise BadInput(f"{self.label}.size", self.size, "is no number of hexadecimal digits", "3 to 32")

    def __call__(self, rng: random.Random, length: int, tokenizer: Tokenizer) -> Example:
        """Draw an example. Raises BadInput if one pair exceeds `length`, or keys run out of different digits."""
        depth = rng.random() if self.depth is None else self.depth
        pairs = _Pairs(random.Random(rng.getrandbits(64)), self.size)
        least = self._draft(pairs, depth, 0, 0)
        _check_smallest(self.label, least, length, tokenizer)
        guess = (length - len(least.prompt) - len(least.answer)) // (len(least.answer) * 2 + 6)
        make = lambda n, pad: self._draft(pairs, depth, n, pad)
        example = exact_example(make, length, tokenizer, guess=guess, max_new=len(least.answer) + 2)
        return example or _refuse(self.label, length, length + 1)

    def _draft(self, pairs: _Pairs, depth: float, n: int, pad: int) -> Draft:
        """n pairs around the one asked for, which is the first drawn."""
        gold = min(int(depth * (n + 1)), n)
        (key, value), *others = pairs.first(n + 1)
        lines = [f'"{k}": "{v}"' for k, v in (*others[:gold], (key, value), *others[gold:])]
        head = self.TASK + "{" + "".join(line + ",\n " for line in lines[:gold])
        text = head + ",\n ".join(lines[gold:]) + " " * pad + "}" + self.QUESTION.format(key=key)
        return Draft(text, f" {value}", len(head) + len(key) + 5, gold / n if n else depth, position=gold)


class _Pairs:
    """Random pairs with different keys, drawn when first asked for: pair i does not depend on how many are used."""

    def __init__(self, rng: random.Random, size: int | None):
        self.rng, self.size, self.pairs, self.keys = rng, size, [], set()

    def first(self, n: int) -> list[tuple[str, str]]:
        if self.size is not None and n > 16**self.size // 2:
            raise BadInput("key_value.size", self.size, f"has too few different keys for {n} pairs", "more digits")
        while len(self.pairs) < n:
            key, value = self._draw(), self._draw()
            if key not in self.keys:
                self.keys.add(key)
                self.pairs.append((key, value))
        return self.pairs[:n]

    def _draw(self) -> str:
        if self.size is None:
            return str(uuid.UUID(int=self.rng.getrandbits(128), version=4))
        return f"{self.rng.getrandbits(4 * self.size):0{self.size}x}"


def _check_depth(label: str, depth: float | None) -> None:
    if depth is not None and not 0 <= depth <= 1:
        raise BadInput(f"{label}.depth", depth, "outside the context", "0 (first) to 1 (last), or None")


def _check_smallest(label: str, smallest: Draft, length: int, tokenizer: Tokenizer) -> None:
    text = smallest.prompt + smallest.answer
    if len(text) > length and (tokens := len(tokenizer.encode(text))) > length:
        _refuse(label, length, tokens)


def _refuse(label: str, length: int, least: int) -> NoReturn:
    raise BadInput("length", length, f"too short for {label}", f"{least} tokens or more")

"""Endless plain prose without any asset: sentences from a small grammar, for haystacks of tasks that want essays."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import lru_cache

from jaxlong.evals.words import ADJECTIVES, NOUNS, VERBS

PATTERNS = (
    "The {a} {n} {v} the {b} {m}.",
    "Every {n} near the {m} {v} something {a}.",
    "In the {a} {n}, nobody {v} the {m}.",
    "Beside the {n}, a {b} {m} {v} the {a} evening.",
    "When the {a} {n} {v} the {m}, the {b} morning begins.",
    "Some say that the {n} {v} whatever is {a}, but the {m} stays {b}.",
    "It was {a} at the {n}, and {b} at the {m}.",
    "A {n} that {v} the {m} is seldom {a}.",
)


@dataclass(frozen=True)
class Prose:
    """A sequence of `documents` texts of `sentences` sentences each; text i depends on (seed, i) alone."""

    seed: int = 0
    documents: int = 64
    sentences: int = 400

    def __len__(self) -> int:
        return self.documents

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < self.documents:
            raise IndexError(index)
        return _document(self.seed, index, self.sentences)


@lru_cache(maxsize=256)
def _document(seed: int, index: int, sentences: int) -> str:
    rng = random.Random(f"prose/{seed}/{index}")
    return " ".join(_sentence(rng) for _ in range(sentences))


def _sentence(rng: random.Random) -> str:
    n, m = rng.sample(NOUNS, 2)
    a, b = rng.sample(ADJECTIVES, 2)
    text = rng.choice(PATTERNS).format(a=a, b=b, n=n, m=m, v=rng.choice(VERBS))
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)

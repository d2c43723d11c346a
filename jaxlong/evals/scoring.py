"""Scoring rules: what a prediction is worth, from 0 to 1, beside its references.

A task names its rule, so that a configuration stores it as data. References are compared without the
white space around them: tasks keep a leading space where the completion of a prompt begins with one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

CONTROL = re.compile(r"[\x00-\x1f]")


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the first line of the prediction is one of the references."""
    lines = prediction.strip().splitlines()
    return float(bool(lines) and lines[0].strip() in {reference.strip() for reference in references})


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """Share of the references that occur in the prediction, ignoring case (RULER: NIAH, variable tracking)."""
    text = clean(prediction).lower()
    return sum(reference.strip().lower() in text for reference in references) / len(references)


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """1 if any reference occurs in the prediction, ignoring case (RULER: question answering)."""
    text = clean(prediction).lower()
    return float(any(reference.strip().lower() in text for reference in references))


def first_integer(prediction: str, references: Sequence[str]) -> float:
    """1 if the first integer in the prediction equals a reference (passkey)."""
    found = re.search(r"[0-9]+", prediction)
    return float(found is not None and int(found.group()) in {int(reference) for reference in references})


def clean(prediction: str) -> str:
    """RULER's cleaning: strip, every control character becomes a newline, strip again."""
    return CONTROL.sub("\n", prediction.strip()).strip()


SCORING: Mapping[str, Callable[[str, Sequence[str]], float]] = {
    "exact": exact_match,
    "all": string_match_all,
    "part": string_match_part,
    "integer": first_integer,
}

"""Scoring rules on predictions made by hand."""

import pytest

from jaxlong.evals.scoring import SCORING, clean, exact_match, first_integer, string_match_all, string_match_part


@pytest.mark.parametrize(
    ("rule", "prediction", "references", "score"),
    [
        ("exact", "482", ["482"], 1),
        ("exact", " 482\n? key fox=1", ["482"], 1),
        ("exact", "4821", ["482"], 0),
        ("exact", "", ["482"], 0),
        ("exact", "\n", ["482"], 0),
        ("exact", "7", [" 482", " 7"], 1),
        ("all", "It is Alpha-One and BETA.", ["alpha-one", "beta"], 1),
        ("all", "It is alpha-one.", ["alpha-one", "beta", "gamma", "delta"], 0.25),
        ("all", "", ["alpha"], 0),
        ("all", " 1234567", [" 1234567"], 1),
        ("all", "12345678", ["1234567"], 1),  # as RULER: a longer number holds the shorter one
        ("part", "either Beta", ["alpha", "beta"], 1),
        ("part", "neither", ["alpha", "beta"], 0),
        ("integer", " 482. Remember", ["482"], 1),
        ("integer", "it is 0482", ["482"], 1),
        ("integer", "4 82", ["482"], 0),
        ("integer", "none", ["482"], 0),
    ],
)
def test_rule(rule, prediction, references, score):
    assert SCORING[rule](prediction, references) == score


def test_clean_turns_control_characters_into_newlines():
    assert clean("\x01 a\tb\x1fc \x00") == "a\nb\nc"
    assert string_match_all("one\ttwo", ["one\ntwo"]) == 1
    assert string_match_part("\x02", ["x"]) == 0


def test_rules_are_what_their_names_say():
    assert {
        "exact": exact_match,
        "all": string_match_all,
        "part": string_match_part,
        "integer": first_integer,
    } == SCORING

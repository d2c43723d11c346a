"""Retrieval tasks: exact sizes, answers that are there once, uniform depths, spans, disjoint keys."""

import dataclasses
import json
import random
import re

import numpy as np
import pytest
from eval_toys import HAYSTACK, Ascii, Bytes, Pieces, Texts, code

from jaxlong.core.types import BadInput
from jaxlong.evals import KeyValue, Needle, Passkey, needle_grid
from jaxlong.evals.scoring import SCORING
from jaxlong.evals.words import KEYS

MANY = Needle(HAYSTACK, needles=(1, 5), questions=(1, 4))
WIDE = Needle(Texts(("é\u2026\U0001f600 ab\n" * 300, "x" * 50)), needles=(1, 3))
TASKS = {
    "needle": (Needle(HAYSTACK), 64),
    "many": (MANY, 150),
    "prose": (Needle(Texts(("word and word " * 400, "no line ends here"))), 64),
    "short documents": (Needle(("ab\ncd", "", "e\n")), 64),
    "wide": (WIDE, 100),
    "passkey": (Passkey(), 256),
    "key_value": (KeyValue(), 300),
    "key_value small": (KeyValue(size=4), 160),
}
BYTES = Bytes()
draw = lambda task, i, length, tokenizer=BYTES: task(random.Random(f"test/{i}"), length, tokenizer)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("tokenizer", [Bytes(), Ascii()], ids=["bytes", "ascii"])
def test_size_is_exact(name, tokenizer):
    task, least = TASKS[name]
    for i in range(40):
        length = least + 7 * i
        example = draw(task, i, length, tokenizer)
        assert len(tokenizer.encode(example.prompt + example.answers[0])) == length == example.meta["length"]


@pytest.mark.parametrize("name", TASKS)
def test_size_is_close_with_tokens_of_several_characters(name):
    task, least = TASKS[name]
    for i in range(40):
        length = least + 11 * i
        example = draw(task, i, length, Pieces())
        tokens = len(Pieces().encode(example.prompt + example.answers[0]))
        waste = 3 if not name.startswith("key_value") else 60  # tokens of a pair
        assert length - waste <= tokens <= length and tokens == example.meta["length"]


@pytest.mark.parametrize("name", TASKS)
def test_example_is_a_function_of_its_stream(name):
    task, least = TASKS[name]
    first, again, other = (draw(task, i, least + 50) for i in (1, 1, 2))
    assert first == again and first != other


@pytest.mark.parametrize("name", TASKS)
def test_answer_scores_one_and_spans_cover_the_answers(name):
    task, least = TASKS[name]
    for i in range(30):
        prompt, answers, meta = draw(task, i, least + 100)
        assert SCORING[task.scoring](answers[0], answers) == 1
        assert 0 <= meta["depth"] <= 1
        start, end = meta["spans"][-1]
        assert (prompt + answers[0])[start:end] == answers[0]
        assert prompt[-meta["distance"] :].startswith(answers[0].strip()) or name == "wide"


@pytest.mark.parametrize("name", ["needle", "many", "prose", "wide"])
def test_needle_law(name):
    """Every needle is a line of its own, once; questions ask for different ones and are answered but for the last."""
    task, least = TASKS[name]
    for i in range(100):
        prompt, (answer,), meta = draw(task, i, least + 60)
        lines = prompt.split("\n")
        hidden = dict(re.findall(r"^# key (\w{3})=(\d{3})$", prompt, re.M))
        assert task.needles[0] <= len(hidden) <= task.needles[1]
        assert len(set(hidden.values())) == len(hidden) and set(hidden) <= set(KEYS["heldout"])
        assert all(lines.count(f"# key {k}={v}") == 1 for k, v in hidden.items())
        asked = re.findall(r"\? key (\w+)=(\d*)", prompt)
        assert task.questions[0] <= len(asked) <= min(len(hidden), task.questions[1])
        assert len({key for key, _ in asked}) == len(asked)
        assert asked[-1] == (asked[-1][0], "") and hidden[asked[-1][0]] == answer
        assert all(hidden[key] == value for key, value in asked[:-1])
        text = prompt + answer
        assert [text[a:b] for a, b in meta["spans"]] == [value for _, value in asked[:-1]] + [answer]
        assert meta["max_new"] == 3


def test_haystack_is_the_text_around_the_needles():
    document = code(7, 4000)
    task = Needle(Texts((document,)), needles=(1, 5))
    for i in range(30):
        prompt = draw(task, i, 600).prompt
        text = "".join(line for line in prompt.splitlines(True) if not line.startswith(("# key", "? key")))
        assert text[:-1] in document * 2  # its last character made way for a newline


def test_fixed_depth_is_exact():
    task = Needle(Texts((code(1, 4000),)))
    for depth in (0.0, 0.1, 0.35, 0.5, 0.9, 1.0):
        for i in range(20):
            prompt, _, meta = draw(dataclasses.replace(task, depth=depth), i, 500)
            context = prompt[: prompt.rindex("? key")]
            line = re.search(r"# key .*\n", context).group()
            free = len(context) - len(line)
            assert meta["depth"] == pytest.approx(depth, abs=1 / free)
            assert context.index(line) == pytest.approx(depth * free, abs=0.51)


@pytest.mark.parametrize("task", [Needle(HAYSTACK), Passkey(), KeyValue(size=4)], ids=lambda task: task.label)
def test_depths_are_uniform(task):
    depths = [draw(task, i, 1500).meta["depth"] for i in range(400)]
    counts = np.histogram(depths, bins=8, range=(0, 1))[0]
    assert ((counts - 50) ** 2 / 50).sum() < 24.3  # chi-square, 7 degrees of freedom, p = 0.001


def test_depths_of_further_needles_are_uniform():
    task, places = dataclasses.replace(MANY, needles=(3, 3), questions=(1, 1)), []
    for i in range(200):
        prompt, (answer,), _ = draw(task, i, 3000)
        context = prompt[: prompt.rindex("? key")]
        found = [m.start() for m in re.finditer(r"^# key \w+=(\d+)$", context, re.M) if m.group(1) != answer]
        places += [place / len(context) for place in found]
    counts = np.histogram(places, bins=8, range=(0, 1))[0]
    assert ((counts - 50) ** 2 / 50).sum() < 24.3  # 7 degrees of freedom, p = 0.001


def test_keys_of_training_and_evaluation_are_disjoint():
    assert not set(KEYS["train"]) & set(KEYS["heldout"])
    assert len(KEYS["train"]) > 200 and len(KEYS["heldout"]) > 50
    for split in ("train", "heldout"):
        task = dataclasses.replace(MANY, split=split)
        seen = {key for i in range(100) for key in re.findall(r"# key (\w+)=", draw(task, i, 300).prompt)}
        assert seen <= set(KEYS[split]) and len(seen) > 60


def test_value_is_not_in_the_rest_of_the_prompt():
    for i in range(100):
        prompt, answers, _ = draw(Needle(HAYSTACK, digits=6), i, 200)
        assert prompt.count(answers[0]) == 1


def test_formats_are_fields():
    task = Needle(HAYSTACK, line="{value} is what {key} holds", question="What does {key} hold? ", digits=5)
    prompt, (answer,), meta = draw(task, 0, 300)
    key = re.search(r"What does (\w+) hold\? $", prompt).group(1)
    assert f"\n{answer} is what {key} holds\n" in prompt and len(answer) == 5
    assert prompt[-meta["distance"] :].startswith(answer)


def test_passkey_words():
    prompt, (answer,), meta = draw(Passkey(depth=0.5), 0, 700)
    assert f"\nThe pass key is {answer.strip()}. Remember it. {answer.strip()} is the pass key.\n" in prompt
    assert prompt.endswith("\nWhat is the pass key? The pass key is") and answer.startswith(" ")
    assert prompt.count("The grass is green.") >= 2 and meta["max_new"] == 10
    assert {int(draw(Passkey(largest=2), i, 400).answers[0]) for i in range(20)} == {1, 2}


@pytest.mark.parametrize("size", [None, 6])
def test_key_value_is_json_with_the_gold_pair_at_its_place(size):
    for depth, i in [(0.0, 0), (0.5, 1), (1.0, 2), (None, 3)]:
        prompt, (answer,), meta = draw(KeyValue(depth=depth, size=size), i, 1500)
        pairs = json.loads(prompt[prompt.index("{") : prompt.index("}") + 1])
        key = re.search(r'Key: "(.*)"\nCorresponding value:$', prompt).group(1)
        assert pairs[key] == answer.strip() and prompt.count(answer.strip()) == 1
        assert list(pairs).index(key) == meta["position"]
        assert meta["depth"] == pytest.approx(meta["position"] / (len(pairs) - 1))
        if depth is not None:
            assert meta["depth"] == pytest.approx(depth, abs=1 / len(pairs))


def test_grid_makes_one_task_a_depth():
    grid = needle_grid(MANY, (0.0, 0.25, 1.0))
    assert [(task.label, task.depth) for task in grid] == [("needle@0", 0.0), ("needle@0.25", 0.25), ("needle@1", 1.0)]
    assert all(dataclasses.replace(task, depth=None, label="needle") == MANY for task in grid)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Needle(HAYSTACK, split="test"), "needle.split"),
        (lambda: Needle(HAYSTACK, digits=0), "needle.digits"),
        (lambda: Needle(HAYSTACK, digits=1, needles=(1, 11)), "needle.needles"),
        (lambda: Needle(HAYSTACK, needles=(0, 1)), "needle.needles"),
        (lambda: Needle(HAYSTACK, needles=(3, 2)), "needle.needles"),
        (lambda: Needle(HAYSTACK, needles=(2, 3), questions=(1, 4)), "needle.questions"),
        (lambda: Needle(HAYSTACK, depth=1.5), "needle.depth"),
        (lambda: Needle(HAYSTACK, line="no value {key}"), "needle.line"),
        (lambda: Needle(HAYSTACK, question="two\nlines {key}"), "needle.question"),
        (lambda: Needle("text"), "needle.haystack"),
        (lambda: draw(Needle(()), 0, 100), "haystack"),
        (lambda: draw(MANY, 0, 100), "length"),
        (lambda: draw(MANY, 0, 30, Pieces()), "length"),
        (lambda: Passkey(depth=-0.1), "passkey.depth"),
        (lambda: Passkey(largest=0), "passkey.largest"),
        (lambda: draw(Passkey(), 0, 100), "length"),
        (lambda: KeyValue(size=2), "key_value.size"),
        (lambda: draw(KeyValue(), 0, 100), "length"),
        (lambda: draw(KeyValue(size=3), 0, 100_000), "key_value.size"),
    ],
)
def test_bad_input(make, field):
    with pytest.raises(BadInput) as error:
        make()
    assert error.value.field == field and error.value.allowed


def test_length_that_is_refused_does_not_depend_on_the_draw():
    for i in range(50):
        with pytest.raises(BadInput):
            draw(MANY, i, 124)
        draw(MANY, i, 125)

"""RULER's tasks: its words, sizes with the allowance, chains that an independent parser resolves, its averages."""

import random
import re

import numpy as np
import pytest
from eval_toys import HAYSTACK, Bytes, Pieces

from jaxlong.core.types import BadInput
from jaxlong.evals.prose import Prose
from jaxlong.evals.ruler import (
    DEPTHS,
    NOISE,
    RULER,
    Averages,
    Niah,
    VariableTracking,
    averages,
    effective_length,
    with_essay,
)
from jaxlong.evals.scoring import SCORING
from jaxlong.evals.words import ADJECTIVES, KEYS, NOUNS

NIAH = [name for name in RULER if name != "vt"]
BYTES = Bytes()
draw = lambda task, i, length, tokenizer=BYTES: task(random.Random(f"test/{i}"), length, tokenizer)
SENTENCE = r"One of the special magic (\w+) for (\S+) is: (\S+)\."


def test_the_menu():
    assert list(RULER) == [
        "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
        "niah_multivalue", "niah_multiquery", "vt",
    ]  # fmt: skip
    assert all(task.label == name for name, task in RULER.items())
    row = lambda t: (t.haystack, t.key, t.value, max(t.keys, t.queries), t.values, t.queries)
    settings = {name: row(RULER[name]) for name in NIAH}
    assert settings == {
        "niah_single_1": ("noise", "words", "numbers", 1, 1, 1),
        "niah_single_2": ("essay", "words", "numbers", 1, 1, 1),
        "niah_single_3": ("essay", "words", "uuids", 1, 1, 1),
        "niah_multikey_1": ("essay", "words", "numbers", 4, 1, 1),
        "niah_multikey_2": ("needle", "words", "numbers", 1, 1, 1),
        "niah_multikey_3": ("needle", "uuids", "uuids", 1, 1, 1),
        "niah_multivalue": ("essay", "words", "numbers", 1, 4, 1),
        "niah_multiquery": ("essay", "words", "numbers", 4, 1, 4),
    }


def test_words_of_one_needle():
    prompt, (answer,), _ = draw(RULER["niah_single_1"], 0, 1000)
    ((kind, key, value),) = re.findall(SENTENCE, prompt)
    context = re.search(r"\n(.*)\nWhat", prompt, re.S).group(1)
    assert (kind, value) == ("numbers", answer.strip())
    assert prompt == (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        f"the number afterwards.\n{context}\nWhat is the special magic number for {key} mentioned in the provided text?"
        f" The special magic number for {key} mentioned in the provided text is"
    )
    assert set(context.split("\n")) == {NOISE, f"One of the special magic numbers for {key} is: {value}."}


def test_words_of_several_queries():
    prompt, answers, _ = draw(RULER["niah_multiquery"], 0, 1500)
    hidden = {key: value for _, key, value in re.findall(SENTENCE, prompt)}
    values = {value: key for key, value in hidden.items()}
    a, b, c, d = (values[answer.strip()] for answer in answers)
    assert prompt.startswith(
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the numbers afterwards.\n"
    )
    query = f"{a}, {b}, {c}, and {d}"
    assert prompt.endswith(
        f"\nWhat are all the special magic numbers for {query} mentioned in the provided text? The special magic "
        f"numbers for {query} mentioned in the provided text are"
    )


@pytest.mark.parametrize("name", NIAH)
def test_answers_are_hidden_once(name):
    task = RULER[name]
    for i in range(30):
        prompt, answers, meta = draw(task, i, 1200)
        found = [value for _, _, value in re.findall(SENTENCE, prompt)]
        assert len(answers) == task.values * task.queries
        assert all(found.count(a.strip()) == 1 == prompt.count(a.strip()) for a in answers)
        keys = [key for _, key, _ in re.findall(SENTENCE, prompt)]
        asked = {key for _, key, value in re.findall(SENTENCE, prompt) if f" {value}" in answers}
        assert all(keys.count(key) == task.values for key in asked)  # no distractor has the key asked for
        assert SCORING["all"](" and".join(answers), answers) == 1
        assert 0 <= meta["depth"] <= 1 and prompt[-meta["distance"] :].startswith("One of the special")


LARGEST_UNIT = {"noise": len(NOISE) + 1, "essay": 12, "needle": 130}


@pytest.mark.parametrize("name", RULER)
def test_size_holds_the_allowance_and_wastes_less_than_a_unit(name):
    task = RULER[name]
    for length in (1024, 2048, 4096, 8192):
        for i in range(5):
            example = draw(task, i, length)
            tokens = len(Bytes().encode(example.prompt)) + example.meta["max_new"]
            unit = LARGEST_UNIT[getattr(task, "haystack", "noise")]
            assert length - unit < tokens <= length and tokens == example.meta["length"]
            official = 30 if name == "vt" else 128
            twice = 2 * len(Bytes().encode(" ".join(example.answers)))
            assert example.meta["max_new"] == (official if length >= 4096 else min(official, twice))


def test_small_lengths_with_tokens_of_several_characters():
    """From 256 tokens on, except where uuids alone take more."""
    for name, task in RULER.items():
        least = 512 if name == "niah_multikey_3" else 256
        for i in range(5):
            meta = draw(task, i, least, Pieces()).meta
            assert least - 55 < meta["length"] <= least


@pytest.mark.parametrize("name", RULER)
def test_example_is_a_function_of_its_stream(name):
    first, again, other = (draw(RULER[name], i, 1500) for i in (1, 1, 2))
    assert first == again and first != other


def test_depths_in_noise_are_uniform():
    places = []
    for i in range(300):
        lines = draw(Niah("noise"), i, 2000).prompt.split("\n")[1:-1]
        places.append([line != NOISE for line in lines].index(True) / (len(lines) - 1))
    counts = np.histogram(places, bins=6, range=(0, 1))[0]
    assert ((counts - 50) ** 2 / 50).sum() < 20.6  # chi-square, 5 degrees of freedom, p = 0.001


def test_depths_in_essays_are_uniform():
    depths = [draw(Niah("essay"), i, 4000).meta["depth"] for i in range(200)]
    counts = np.histogram(depths, bins=5, range=(0, 1))[0]
    assert ((counts - 40) ** 2 / 40).sum() < 18.5  # 4 degrees of freedom, p = 0.001
    assert tuple(np.round(np.linspace(0, 100, 40)).astype(int)) == DEPTHS


def test_essay_is_the_text_given():
    tasks = with_essay(RULER, HAYSTACK)
    assert tasks["vt"] == RULER["vt"] and tasks["niah_single_2"].essay == HAYSTACK
    prompt = draw(tasks["niah_single_2"], 0, 1000).prompt
    words = re.sub(SENTENCE, "", re.search(r"\n(.*)\nWhat", prompt, re.S).group(1)).split()
    everything = " ".join(word for document in HAYSTACK.documents * 2 for word in document.split())
    assert " ".join(words) in everything
    # text without sentences is cut in pieces, so that depths differ
    assert len({round(draw(tasks["niah_single_2"], i, 3000).meta["depth"], 1) for i in range(60)}) > 8


def resolve(prompt):
    """The variables that hold the value asked for, by following assignments."""
    query = re.search(r"assigned the value (\d+) in the text above\. Answer", prompt).group(1)
    values = {}
    for target, source in re.findall(r"^VAR ([A-Z]+) = (?:VAR )?(\w+) ?$", prompt, re.M):
        assert target not in values
        values[target] = values.get(source, source)
    return [name for name, value in values.items() if value == query]


@pytest.mark.parametrize("task", [VariableTracking(), VariableTracking(chains=3, hops=2)], ids=["one", "three"])
def test_chain_resolves_to_the_answers(task):
    for i in range(40):
        prompt, answers, meta = draw(task, i, 1600)
        assert resolve(prompt) == list(answers) and len(answers) == task.hops + 1
        assert prompt.count("VAR ") == task.chains * (2 * task.hops + 1)
        assert re.search(rf"{task.hops + 1} variables are assigned the value \d+, they are: $", prompt)
        assert prompt[-meta["distance"] :].startswith(f"VAR {answers[0]} = ")


def test_long_chains_come_with_a_worked_example():
    for tokenizer in (Bytes(), Pieces()):
        prompt, answers, _ = draw(RULER["vt"], 0, 4096, tokenizer)
        shown, question = prompt.split("\n\nMemorize", 1)
        solved, _, names = shown.rpartition("they are: ")
        assert resolve("\n".join(line for line in solved.splitlines())) == names.split()
        assert all(len(name) == 3 for name in names.split())
        assert resolve("Memorize" + question) == list(answers)
    assert len(Pieces().encode(shown)) <= 500


def test_prose_is_a_sequence_of_sentences():
    prose = Prose(seed=1, documents=3, sentences=20)
    assert len(prose) == 3 and prose[0] == Prose(seed=1)[0][: len(prose[0])] and prose[0] != prose[1]
    assert len(list(prose)) == 3
    assert prose[2].count(".") == 20 and not re.search(r"\b[Aa] [aeiou]", prose[2])


def test_word_lists_have_no_word_twice():
    for words in (ADJECTIVES, NOUNS, KEYS["train"] + KEYS["heldout"]):
        assert len(set(words)) == len(words)
    assert not set(ADJECTIVES) & set(NOUNS)


LLAMA = dict(zip((4096, 8192, 16384, 32768, 65536, 131072), (95.5, 93.8, 91.6, 87.4, 84.7, 77.0), strict=True))
JAMBA = dict(zip(LLAMA, (96.7, 96.6, 96.4, 96.0, 95.4, 95.1), strict=True))
PROLONG = dict(zip(LLAMA, (94.5, 92.5, 92.3, 89.3, 83.2, 81.6), strict=True))


def test_published_averages():
    assert averages(LLAMA) == Averages(*(pytest.approx(x, abs=0.05) for x in (88.3, 85.4, 91.3)))
    assert averages(JAMBA) == Averages(*(pytest.approx(x, abs=0.05) for x in (96.0, 95.75, 96.3)))
    assert averages({128: 40.0}) == Averages(40.0, 40.0, 40.0)
    with pytest.raises(BadInput):
        averages({})


def test_effective_length():
    assert [effective_length(scores) for scores in (LLAMA, JAMBA, PROLONG)] == [32768, 131072, 32768]
    assert effective_length(LLAMA, threshold=99.0) == 0
    assert effective_length({256: 80.0, 512: 50.0, 1024: 90.0}, threshold=70.0) == 256  # a gap ends it


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Niah("hay"), "niah.haystack"),
        (lambda: Niah(key="names"), "niah.key"),
        (lambda: Niah(value="names", label="mine"), "mine.value"),
        (lambda: Niah(queries=0), "niah.queries"),
        (lambda: VariableTracking(hops=0), "vt.hops"),
        (lambda: draw(Niah("essay", essay=("", " ")), 0, 1000), "essay"),
        (lambda: draw(Niah("essay", essay=()), 0, 1000), "essay"),
        *((lambda task=task: draw(task, 0, 200), "length") for task in RULER.values()),
        *((lambda task=task: draw(task, 0, 0), "length") for task in RULER.values()),
    ],
)
def test_bad_input(make, field):
    with pytest.raises(BadInput) as error:
        make()
    assert error.value.field == field and error.value.allowed


def test_the_smallest_length_it_names_works():
    for task in RULER.values():
        with pytest.raises(BadInput) as error:
            draw(task, 0, 200)
        least = int(error.value.allowed.split()[0])
        assert draw(task, 0, least).meta["length"] == least

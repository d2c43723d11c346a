"""Tasks, language models, and the evaluation of one by the other.

A task makes an example of a wanted number of tokens from a random stream; a language model continues
prompts; `evaluate` brings them together and returns records. Evaluation draws from streams named
"eval/...", training from streams named "train/...": the two never share a sample.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from jaxlong.core.types import BadInput
from jaxlong.evals.records import Estimate, Record, Table
from jaxlong.evals.scoring import SCORING

__all__ = [
    "Documents",
    "Estimate",
    "Example",
    "LanguageModel",
    "Record",
    "Table",
    "Task",
    "Tokenizer",
    "evaluate",
    "stream",
]


class Example(NamedTuple):
    """A prompt and the answers that complete it.

    `meta` holds
        length: tokens of prompt and answer (RULER: of prompt and generation allowance).
        depth: of the needle in the context, in [0, 1].
        distance: tokens from the needle (its value, where the answer repeats one) to the end of the prompt.
        max_new: tokens that a model may generate.
        spans: ((start, end), ...) characters of prompt + answers[0] that are answers, for training on them.
        position: number of the item asked for, in tasks that list items.
    """

    prompt: str
    answers: tuple[str, ...]
    meta: Mapping[str, Any]


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back; `eos` separates documents."""

    vocab_size: int
    identity: str
    eos: int

    def encode(self, text: str) -> np.ndarray: ...

    def decode(self, ids: Any) -> str: ...


@runtime_checkable
class Documents(Protocol):
    """A sequence of texts."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> str: ...


@runtime_checkable
class Task(Protocol):
    """A frozen dataclass that makes examples; `label` names its records, `scoring` its rule in SCORING.

    Raises:
        BadInput: `length` cannot be made, whatever the random stream.
    """

    label: str
    scoring: str

    def __call__(self, rng: random.Random, length: int, tokenizer: Tokenizer) -> Example: ...


@runtime_checkable
class LanguageModel(Protocol):
    """Anything that continues prompts and scores tokens; retrieval methods wrap one in another."""

    tokenizer: Tokenizer

    def generate(self, prompts: Sequence[str], max_new: int) -> list[str]:
        """At most `max_new` tokens after each prompt, as text without the prompt."""
        ...

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        """log p(tokens[b, i + 1] | tokens[b, : i + 1]) in nats at [b, i]: [B, T] ids -> [B, T - 1] float32."""
        ...


def evaluate(
    lm: LanguageModel,
    tasks: Sequence[Task],
    lengths: Sequence[int],
    *,
    samples: int,
    seed: int,
    model: str = "",
    batch: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Table:
    """Score `samples` examples of every task at every length.

    Args:
        lm: the model; it is given up to `batch` prompts a call.
        tasks: their labels must differ.
        lengths: tokens of prompt and answer.
        samples, seed: sample i of a task is drawn from Random(f"eval/{seed}/{label}/{length}/{i}").
        model: name that the records carry.
        progress: called with (samples done, samples in all).

    Raises:
        BadInput: a task cannot make a length, or an argument is out of range; before the model runs.
    """
    _check(lm.tokenizer, tasks, lengths, samples, seed, batch)
    jobs = [(task, length, i) for length in lengths for task in tasks for i in range(samples)]
    records: list[Record] = []
    for start in range(0, len(jobs), batch):
        group = jobs[start : start + batch]
        examples = [task(stream(seed, task.label, n, i), n, lm.tokenizer) for task, n, i in group]
        for job, example, prediction in zip(group, examples, _predict(lm, examples), strict=True):
            records.append(_record(job, example, prediction, seed, model))
        if progress is not None:
            progress(len(records), len(jobs))
    return Table(tuple(records))


def stream(seed: int, label: str, length: int, index: int) -> random.Random:
    """The random stream of one evaluation sample."""
    return random.Random(f"eval/{seed}/{label}/{length}/{index}")


def _predict(lm: LanguageModel, examples: Sequence[Example]) -> Iterator[str]:
    """Predictions in order; prompts with the same allowance go to the model together, so none may exceed its own."""
    groups: dict[int, list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(example.meta["max_new"], []).append(i)
    predictions = {}
    for max_new, members in groups.items():
        texts = lm.generate([examples[i].prompt for i in members], max_new)
        predictions.update(zip(members, texts, strict=True))
    return (predictions[i] for i in range(len(examples)))


def _record(job: tuple[Task, int, int], example: Example, prediction: str, seed: int, model: str) -> Record:
    task, length, index = job
    meta = example.meta
    return Record(
        task=task.label,
        length=length,
        index=index,
        seed=seed,
        correct=SCORING[task.scoring](prediction, example.answers),
        prediction=prediction,
        references=tuple(answer.strip() for answer in example.answers),
        tokens=meta["length"],
        depth=meta["depth"],
        distance=meta.get("distance"),
        position=meta.get("position"),
        model=model,
    )


def _check(
    tokenizer: Tokenizer, tasks: Sequence[Task], lengths: Sequence[int], samples: int, seed: int, batch: int
) -> None:
    for name, value in (("samples", samples), ("batch", batch)):
        if value < 1:
            raise BadInput(name, value, "must be positive", "1 or more")
    for name, values in (("tasks", tasks), ("lengths", lengths)):
        if not values:
            raise BadInput(name, "()", "nothing to evaluate", "one or more")
    labels = [task.label for task in tasks]
    for label in labels:
        if labels.count(label) > 1:
            raise BadInput("tasks", label, "two tasks have this label", "a label of its own for each")
    for task in tasks:
        if task.scoring not in SCORING:
            raise BadInput(f"{task.label}.scoring", task.scoring, "no such rule", f"one of {', '.join(SCORING)}")
        for length in lengths:
            # Whether an example fits can depend on its draw, but only where the length is smallest.
            for i in range(samples if length == min(lengths) else 1):
                task(stream(seed, task.label, length, i), length, tokenizer)

"""Records of an evaluation, one JSON line each, and the tables that are views of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from jaxlong.core.types import BadInput

RESAMPLES = 1000


@dataclass(frozen=True)
class Record:
    """One sample of one task, and what a model made of it.

    Fields:
        task: label of the task; a part after "@" names a variant (a depth) of the same task.
        length: tokens asked for.    tokens: tokens made, of prompt and answer (RULER: and generation allowance).
        index, seed: with task and length, they decide the sample.
        correct: score in [0, 1].    prediction, references: what was compared.
        depth: of the needle in its context, 0 first to 1 last.
        distance: tokens from the needle to the place where it is asked for.
        position: number of the item asked for, in tasks that list items.
        model: name of what was evaluated, to hold several in one file.
    """

    kind: ClassVar[str] = "sample"

    task: str
    length: int
    index: int
    seed: int
    correct: float
    prediction: str
    references: tuple[str, ...]
    tokens: int
    depth: float | None = None
    distance: int | None = None
    position: int | None = None
    model: str = ""

    @property
    def family(self) -> str:
        """The task without its variant."""
        return self.task.partition("@")[0]


class Estimate(NamedTuple):
    """A mean in [0, 1] with its 95 % bootstrap interval, and the number of samples behind it."""

    mean: float
    low: float
    high: float
    samples: int


def bootstrap(scores: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Mean of the scores and the 2.5 % and 97.5 % quantiles of the means of resamples.

    Drawing with replacement is drawing counts of the distinct scores from a multinomial, so the cost
    does not grow with the samples where scores are 0 or 1. Where all scores are equal the interval is a point.

    Raises:
        BadInput: no scores.
    """
    if not len(scores):
        raise BadInput("scores", scores, "nothing to average", "one score or more")
    values, counts = np.unique(np.asarray(scores, np.float64), return_counts=True)
    n = int(counts.sum())
    draws = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples)
    low, high = np.quantile(draws @ values / n, (0.025, 0.975))
    return Estimate(float(np.mean(scores)), float(low), float(high), n)


@dataclass(frozen=True)
class Table:
    """Records and views of them."""

    records: tuple[Record, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    def __add__(self, other: Table) -> Table:
        return Table(self.records + other.records)

    def where(self, keep: Callable[[Record], bool]) -> Table:
        """The records that `keep` accepts: `table.where(lambda r: r.distance > 128)`."""
        return Table(tuple(filter(keep, self.records)))

    def group(self, key: Callable[[Record], Hashable]) -> dict[Any, Estimate]:
        """Accuracy of the records with equal keys, in the order of the keys."""
        groups: dict[Any, list[float]] = {}
        for record in self.records:
            groups.setdefault(key(record), []).append(record.correct)
        return {name: bootstrap(groups[name]) for name in sorted(groups)}

    def overall(self) -> Estimate:
        """Accuracy over all records."""
        return bootstrap([record.correct for record in self.records])

    def by_length(self) -> dict[int, Estimate]:
        """Accuracy by length, over all tasks."""
        return self.group(lambda r: r.length)

    def by_task_and_length(self) -> dict[tuple[str, int], Estimate]:
        """Accuracy by (task, length); the variants of a task together."""
        return self.group(lambda r: (r.family, r.length))

    def by_length_and_depth(self, depths: Sequence[float] | None = None) -> dict[tuple[int, float], Estimate]:
        """Accuracy by (length, depth), each record at the nearest of `depths` (default 0, 0.1, ..., 1).

        Records without a depth are left out.
        """
        grid = np.linspace(0, 1, 11) if depths is None else np.asarray(depths, np.float64)
        nearest = lambda depth: round(float(grid[np.argmin(np.abs(grid - depth))]), 6)
        placed = self.where(lambda r: r.depth is not None)
        return placed.group(lambda r: (r.length, nearest(r.depth)))

    def save(self, path: str | Path) -> None:
        """Add the records to the JSON lines at `path`, atomically: readers see the old file or the new one."""
        append_lines(path, ({"kind": Record.kind} | asdict(record) for record in self.records))

    @classmethod
    def load(cls, path: str | Path) -> Table:
        """Read the samples among the JSON lines at `path`.

        Raises:
            BadInput: no such file, or a line that is no record.
        """
        return cls(tuple(read_lines(path, Record)))


def append_lines(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the file's content and the new rows to a temporary file, then put it in the file's place."""
    path = Path(path)
    old = path.read_bytes() if path.exists() else b""
    if old and not old.endswith(b"\n"):
        old += b"\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(old)
        for row in rows:
            file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_lines(path: str | Path, cls: type) -> list[Any]:
    """The rows whose kind is `cls.kind`, as objects of that dataclass. Raises BadInput for anything but records."""
    try:
        lines = Path(path).read_bytes().decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "is no UTF-8 text"
        raise BadInput("results", path, str(why).lower(), "a file of JSON lines") from None
    rows = (_row(line, cls, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip())
    return [row for row in rows if row is not None]


def _row(line: str, cls: type, where: str) -> Any:
    try:
        data = json.loads(line)
    except json.JSONDecodeError:
        data = None
    if not isinstance(data, dict) or "kind" not in data:
        raise BadInput("results", where, "is no record", "a JSON object with a kind")
    if data.pop("kind") != cls.kind:
        return None
    names = {field.name for field in fields(cls)}
    if set(data) - names:
        raise BadInput("results", where, f"no such field: {sorted(set(data) - names)[0]}", ", ".join(sorted(names)))
    try:
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in data.items()})
    except TypeError as error:
        raise BadInput("results", where, str(error).split("__init__() ")[-1], "a whole record") from None

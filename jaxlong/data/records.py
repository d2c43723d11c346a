"""Files that hold many documents: JSON Lines, Parquet, ArrayRecord.

One pass when first used checks every document and hashes it; after that a document is found by its place.
`path` is a file or a pattern; the documents of several files follow one another in the order of the file names.
"""

from __future__ import annotations

import functools
import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import grain
import numpy as np

from jaxlong.core.types import BadInput
from jaxlong.data.sources import Scan, Source, check_split, decode_text, find_files, in_split, without_nul


class _LineIndex(NamedTuple):
    files: list[str]
    file: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    identity: str


@dataclass(frozen=True)
class Jsonl(Source):
    """JSON Lines: an object a line, its text under `field`; blank lines are passed over.

    One pass checks every line and keeps the byte offset of each; after that a document is one seek and one read, so a
    shuffle over a file of any size needs 20 bytes a document.

    Args:
        path: a file, or a pattern such as `shards/*.jsonl`.
        field: the key of the text.
        split: "train", "heldout" (about 8 % of the documents, by a hash of their text) or "all".
        longest_line: bytes that one line may have.

    Raises:
        BadInput: at first use; a line that cannot be used is named by file and line number.
    """

    path: str
    field: str = "text"
    split: str = "all"
    longest_line: int = 1 << 28

    def __post_init__(self) -> None:
        check_split(self)
        if self.longest_line < 1:
            raise BadInput("Jsonl.longest_line", self.longest_line, "below 1", "bytes of the longest line, at least 1")

    @property
    def identity(self) -> str:
        return self._index.identity

    @property
    def _count(self) -> int:
        return len(self._index.offset)

    def _read(self, i: int) -> str:
        index = self._index
        name = index.files[index.file[i]]
        with open(name, "rb") as file:
            file.seek(int(index.offset[i]))
            line = file.read(int(index.size[i]))
        try:
            return json.loads(line)[self.field]
        except (ValueError, KeyError, TypeError):
            raise BadInput("Jsonl.path", name, "changed since it was indexed", "a file that stays as it is") from None

    @functools.cached_property
    def _index(self) -> _LineIndex:
        files = find_files(self)
        scan, file, offset, size = Scan(), array("i"), array("q"), array("q")
        for number, name in enumerate(files):
            for start, line, place in self._lines(name):
                text = self._text(line, place)
                if in_split(text, self.split):
                    scan.add("", text.encode())
                    file.append(number)
                    offset.append(start)
                    size.append(len(line))
        why = f"no document in split {self.split}"
        identity = scan.finish("Jsonl.path", self.path, why, "at least one line with text")
        return _LineIndex(files, np.array(file), np.array(offset), np.array(size), identity)

    def _lines(self, name: str) -> Iterator[tuple[int, bytes, str]]:
        """(offset, line, its place in words) of each line that is not blank."""
        with open(name, "rb") as file:
            start = number = 0
            while line := file.readline(self.longest_line + 1):
                number += 1
                place = f"{name} line {number}"
                if len(line) > self.longest_line:
                    why = f"longer than {self.longest_line} bytes"
                    raise BadInput("Jsonl.path", place, why, "shorter lines, or a larger Jsonl.longest_line")
                if not line.isspace():
                    yield start, line, place
                start += len(line)

    def _text(self, line: bytes, place: str) -> str:
        decoded = decode_text(line, "Jsonl.path", place)
        try:
            record = json.loads(decoded)
        except (ValueError, RecursionError) as error:
            raise BadInput("Jsonl.path", place, f"not JSON ({error})", "one JSON object a line") from None
        if not isinstance(record, dict):
            raise BadInput("Jsonl.path", place, f"a JSON {type(record).__name__}", "one JSON object a line")
        if not isinstance(record.get(self.field), str):
            why = f"the object has no text under {self.field!r}"
            raise BadInput("Jsonl.field", place, why, f"it has {', '.join(map(repr, record)) or 'no field'}")
        text = without_nul(record[self.field], "Jsonl.path", place)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadInput("Jsonl.path", place, "half of a surrogate pair", "text that UTF-8 can hold") from None
        return text


class _Group(NamedTuple):
    """A row group: the unit in which a Parquet file is read."""

    file: str
    number: int


class _GroupIndex(NamedTuple):
    groups: list[_Group]
    ends: np.ndarray
    identity: str


_GROUPS_KEPT = 16
_TEXT_TYPES = ("string", "large_string", "string_view")


@dataclass(frozen=True)
class Parquet(Source):
    """A text column of Parquet files (extra `[parquet]`).

    A document is read with its row group and the last few groups are kept, so files written in groups of some megabytes
    shuffle well, and one group of gigabytes does not.

    Args:
        path: a file, or a pattern such as `shards/*.parquet`.
        column: the name of the column of text.

    Raises:
        BadInput: at first use; a value that cannot be used is named by file and row.
    """

    path: str
    column: str = "text"

    @property
    def identity(self) -> str:
        return self._index.identity

    @property
    def _count(self) -> int:
        return int(self._index.ends[-1])

    def _read(self, i: int) -> str:
        index = self._index
        group = int(np.searchsorted(index.ends, i, side="right"))
        start = int(index.ends[group - 1]) if group else 0
        return self._group(index.groups[group])[i - start].as_py()

    @functools.cached_property
    def _group(self) -> Callable[[_Group], Any]:
        return functools.lru_cache(maxsize=_GROUPS_KEPT)(self._load)

    def _load(self, group: _Group) -> Any:
        # A reader of its own for each call: a ParquetFile is not made for several threads.
        with _parquet().ParquetFile(group.file) as file:
            return file.read_row_group(group.number, columns=[self.column]).column(0)

    @functools.cached_property
    def _index(self) -> _GroupIndex:
        scan, groups, ends = Scan(), [], []
        for name in find_files(self):
            row = 0
            for number in range(self._row_groups(name)):
                group = _Group(name, number)
                for value in self._checked(group):
                    row += 1
                    scan.add("", self._text(value, f"{name} row {row}").encode())
                groups.append(group)
                ends.append(scan.count)
        identity = scan.finish("Parquet.path", self.path, "no rows", "at least one row with text")
        return _GroupIndex(groups, np.array(ends), identity)

    def _checked(self, group: _Group) -> Any:
        try:
            return self._load(group)
        except (ValueError, OSError) as error:
            place = f"{group.file} row group {group.number}"
            raise BadInput("Parquet.path", place, f"cannot be read ({error})", "an undamaged file") from None

    def _row_groups(self, name: str) -> int:
        try:
            file = _parquet().ParquetFile(name)
        except (ValueError, OSError) as error:
            raise BadInput("Parquet.path", name, f"not a Parquet file ({error})", "a Parquet file") from None
        with file:
            schema = file.schema_arrow
            if self.column not in schema.names:
                raise BadInput("Parquet.column", self.column, f"no such column in {name}", f"one of {schema.names}")
            kind = schema.field(self.column).type
            if str(kind) not in _TEXT_TYPES and not str(kind).startswith("dictionary<values=string"):
                raise BadInput("Parquet.column", self.column, f"holds {kind} in {name}", "a column of strings")
            return file.num_row_groups

    def _text(self, value: Any, place: str) -> str:
        try:
            text = value.as_py()
        except UnicodeDecodeError:
            raise BadInput("Parquet.column", place, "not UTF-8", "UTF-8 text") from None
        if text is None:
            raise BadInput("Parquet.column", place, "null", "text in each row")
        return without_nul(text, "Parquet.column", place)


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise BadInput(
            "Parquet", "pyarrow", "the package is not installed", 'python3 -m pip install "jaxlong[parquet]"'
        ) from None
    return pyarrow.parquet


@dataclass(frozen=True)
class ArrayRecord(Source):
    """ArrayRecord files whose records are UTF-8 text; write them with `group_size:1` for random access.

    Args:
        path: a file, or a pattern such as `shards/*.array_record`.

    Raises:
        BadInput: at first use; a record that cannot be used is named by its number, counted from 0 over all files.
    """

    path: str

    @property
    def identity(self) -> str:
        return self._index[1]

    @property
    def _count(self) -> int:
        return len(self._index[0])

    def _read(self, i: int) -> str:
        return self._index[0][i].decode("utf-8")

    @functools.cached_property
    def _index(self) -> tuple[Any, str]:
        files, scan = find_files(self), Scan()
        try:
            records = grain.sources.ArrayRecordDataSource(files)
            for i in range(len(records)):
                record = records[i]
                decode_text(record, "ArrayRecord.path", f"{self.path} record {i}")
                scan.add("", record)
        except (ValueError, RuntimeError, IndexError) as error:
            if isinstance(error, BadInput):
                raise
            raise BadInput("ArrayRecord.path", self.path, f"not ArrayRecord ({error})", "ArrayRecord files") from None
        return records, scan.finish("ArrayRecord.path", self.path, "no records", "at least one record of text")

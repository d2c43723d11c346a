"""Where documents come from: sequences of text with random access and an identity.

A source is a frozen dataclass of plain fields, so it is a value in a configuration: it compares and hashes by what was
asked for, and touches the disk when first used. `source[i]` is one document, `len(source)` their number and
`source.identity` the sha256 of their contents. What cannot be used ends in one line that names the file and the place.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import glob
import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxlong.core.types import BadInput

SPLITS = ("train", "heldout", "all")
HELD_OUT_PERCENT = 8


def in_split(name: str, split: str) -> bool:
    """Whether the document called `name` belongs to `split`: a hash of the name holds about 8 % out.

    The name decides alone, so a document stays on its side when others come and go.
    """
    if split == "all":
        return True
    draw = int.from_bytes(hashlib.sha256(f"heldout:{name}".encode()).digest()[:8], "big") % 100
    return (draw < HELD_OUT_PERCENT) == (split == "heldout")


class Source(Sequence, abc.ABC):
    """Documents with random access.

    A source of your own is a frozen dataclass that derives from this and defines `identity`, `_count` and `_read`.
    """

    @property
    @abc.abstractmethod
    def identity(self) -> str:
        """sha256 (hex) over the documents, in order."""

    @property
    @abc.abstractmethod
    def _count(self) -> int: ...

    @abc.abstractmethod
    def _read(self, i: int) -> str: ...

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: Any) -> Any:
        """Document `i`; a slice gives a list. Raises IndexError outside."""
        chosen = range(self._count)[i]
        return [self._read(j) for j in chosen] if isinstance(chosen, range) else self._read(chosen)

    def __getstate__(self) -> dict[str, Any]:
        # A copy carries the fields and finds its documents again: open readers and caches stay behind.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


class Scan:
    """One pass over the documents: how many there were, and their digest."""

    def __init__(self) -> None:
        self.count, self._digest = 0, hashlib.sha256()

    def add(self, name: str, text: bytes) -> None:
        self.count += 1
        self._digest.update(f"{name}\0{len(text)}\0".encode())
        self._digest.update(text)

    def finish(self, field: str, value: str, why: str, allowed: str) -> str:
        """The identity, or BadInput of these words where there was no document."""
        if not self.count:
            raise BadInput(field, value, why, allowed)
        return self._digest.hexdigest()


def decode_text(data: bytes, field: str, place: str) -> str:
    """Strict UTF-8 without NUL; BadInput names `place`."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        why = f"not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}"
        raise BadInput(field, place, why, "UTF-8 text") from None
    return without_nul(text, field, place)


def without_nul(text: str, field: str, place: str) -> str:
    if "\0" in text:
        why = f"NUL at character {text.index(chr(0))}"
        raise BadInput(field, place, why, "text without NUL, which marks the end of a document")
    return text


def _read_bytes(path: Path, field: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadInput(field, path, f"cannot be read ({error.strerror})") from None


def check_split(source: Any) -> None:
    if source.split not in SPLITS:
        raise BadInput(f"{type(source).__name__}.split", source.split, "unknown split", f"one of {', '.join(SPLITS)}")


def find_files(source: Any) -> list[str]:
    """The files that `source.path` names: one, or a pattern such as `part-*.jsonl`, in sorted order."""
    field, path = f"{type(source).__name__}.path", os.path.expanduser(source.path)
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        raise BadInput(field, source.path, "is a folder", f"a file, or a pattern such as {source.path.rstrip('/')}/*")
    found = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))
    if not found:
        raise BadInput(field, source.path, "no such file", "an existing file, or a pattern such as shards/*")
    return found


# -- the default corpus --------------------------------------------------------------------------------------------

# Tests, demonstrations and tables written by programs. Several are absent from slim installations, so none is used.
_NOT_PROSE = {"encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "turtledemo"}
_TEST_FOLDERS = {"test", "tests", "idle_test", "__pycache__", "site-packages"}
_LEAST_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class Stdlib(Source):
    """The source of the standard library of the interpreter that runs: a corpus that every user has.

    A top-level module is a document; so is a whole package, its modules one after the other by name (asyncio alone is
    half a million characters). The text varies with the version of Python: print the identity beside any result.

    Args:
        split: "train", "heldout" (about 8 % of the documents, by a hash of the name) or "all".
    """

    split: str = "train"

    def __post_init__(self) -> None:
        check_split(self)

    @property
    def identity(self) -> str:
        return self._documents[1]

    @property
    def _count(self) -> int:
        return len(self._documents[0])

    def _read(self, i: int) -> str:
        return self._documents[0][i]

    @functools.cached_property
    def _documents(self) -> tuple[tuple[str, ...], str]:
        scan, texts = Scan(), []
        for name, text in _stdlib(sysconfig.get_paths()["stdlib"]):
            if in_split(name, self.split):
                scan.add(name, text.encode())
                texts.append(text)
        return tuple(texts), scan.finish("Stdlib.split", self.split, "no documents", "another split")


@functools.lru_cache(maxsize=2)
def _stdlib(root: str) -> tuple[tuple[str, str], ...]:
    """(name, text) of each document under `root`, sorted by name."""
    documents = []
    for name in sorted(sys.stdlib_module_names - _NOT_PROSE):
        text = "".join(_module_texts(Path(root), name))
        if text:
            documents.append((name, text))
    size = sum(len(text) for _, text in documents)
    if size < _LEAST_CHARACTERS:
        why = f"this interpreter ships {size} characters of library source"
        raise BadInput("Stdlib", root, why, "a full Python installation, or your own text in a TextFolder")
    return tuple(documents)


def _module_texts(root: Path, name: str) -> Iterator[str]:
    paths = [root / f"{name}.py"]
    if (root / name).is_dir():
        found = ((path.relative_to(root).parts, path) for path in (root / name).rglob("*.py"))
        paths = [path for parts, path in sorted(found) if not _TEST_FOLDERS.intersection(parts)]
    for path in paths:
        try:
            text = path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if "\0" not in text:
            yield text if text.endswith("\n") or not text else text + "\n"


# -- files ---------------------------------------------------------------------------------------------------------


class _FolderIndex(NamedTuple):
    paths: list[Path]
    sizes: list[int]
    identity: str


@dataclass(frozen=True)
class TextFolder(Source):
    """Text files under a folder, one document a file, in the order of their names.

    Args:
        path: the folder.
        pattern: which files, as `pathlib.Path.glob` reads it; `**/` also looks into folders below.
        split: "train", "heldout" (about 8 % of the files, by a hash of the name relative to `path`) or "all".

    Raises:
        BadInput: at first use, for a missing folder, no file, a file that is not UTF-8 or holds NUL.
    """

    path: str
    pattern: str = "**/*.txt"
    split: str = "all"

    def __post_init__(self) -> None:
        check_split(self)

    @property
    def identity(self) -> str:
        return self._index.identity

    @property
    def _count(self) -> int:
        return len(self._index.paths)

    def _read(self, i: int) -> str:
        path = self._index.paths[i]
        data = _read_bytes(path, "TextFolder.path")
        if len(data) != self._index.sizes[i]:
            raise BadInput("TextFolder.path", path, "changed since it was indexed", "files that stay as they are")
        return data.decode("utf-8")

    @functools.cached_property
    def _index(self) -> _FolderIndex:
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise BadInput("TextFolder.path", self.path, "no such folder", "an existing folder of text files")
        try:
            files = {path.relative_to(root).as_posix(): path for path in root.glob(self.pattern) if path.is_file()}
        except (ValueError, NotImplementedError) as error:
            raise BadInput("TextFolder.pattern", self.pattern, f"not a pattern ({error})", "such as **/*.txt") from None
        scan, paths, sizes = Scan(), [], []
        for name, path in sorted(files.items()):
            if in_split(name, self.split):
                data = _read_bytes(path, "TextFolder.path")
                decode_text(data, "TextFolder.path", str(path))
                scan.add(name, data)
                paths.append(path)
                sizes.append(len(data))
        why = f"no file matches {self.pattern} in split {self.split}"
        return _FolderIndex(paths, sizes, scan.finish("TextFolder.path", self.path, why, "a folder with such files"))

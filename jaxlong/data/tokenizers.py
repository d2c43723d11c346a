"""Text to token ids and back.

Bytes and Ascii need nothing and train at once; HuggingFace reads any `tokenizer.json`. Each is a frozen dataclass, a
value in a configuration. NUL is refused in text, so byte 0 is free to mean "end of document" and to fill padding.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike

from jaxlong.core.types import BadInput


@runtime_checkable
class Tokenizer(Protocol):
    """What data, evaluation and inference ask of a tokenizer.

    Attributes:
        vocab_size: ids are `0 <= id < vocab_size`.
        eos: the id that ends a document (also fills padding).
        identity: a name that changes when the same text would become other ids.
    """

    vocab_size: int
    eos: int
    identity: str

    def encode(self, text: str) -> np.ndarray:
        """int32 ids `[n]` of `text`, without any special token."""

    def decode(self, ids: ArrayLike) -> str:
        """The text of `ids`; special tokens leave no text."""

    def offsets(self, text: str) -> np.ndarray:
        """`[n, 2]`: the characters `start <= c < end` that each token of `encode(text)` comes from."""


def check_ids(ids: ArrayLike, vocab_size: int, *, field: str = "ids") -> Int[np.ndarray, "..."]:
    """The ids as an integer array.

    An id outside the vocabulary would train silently: an embedding look-up clamps it or returns NaN.

    Raises:
        BadInput: an id that is not an integer in `0 <= id < vocab_size`.
    """
    array = np.asarray(ids)
    if array.size == 0:
        return array.astype(np.int32)
    allowed = f"integers from 0 to {vocab_size - 1}"
    if array.dtype.kind not in "iu":
        raise BadInput(field, array.dtype, "token ids are not integers", allowed)
    outside = array[(array < 0) | (array >= vocab_size)]
    if outside.size:
        raise BadInput(field, int(outside.flat[0]), "token id outside the vocabulary", allowed)
    return array


def _raw(text: str, encoding: str, errors: str) -> Int[np.ndarray, "n"]:
    if "\0" in text:
        raise BadInput(
            "text", _preview(text), f"NUL at character {text.index(chr(0))}", "text without NUL, the end mark"
        )
    try:
        return np.frombuffer(text.encode(encoding, errors), np.uint8).astype(np.int32)
    except UnicodeEncodeError as error:
        why = f"half of a surrogate pair at character {error.start}"
        raise BadInput("text", _preview(text), why, "text that UTF-8 can hold") from None


def _preview(text: str) -> str:
    return ascii(text if len(text) <= 24 else text[:24] + "...")


@dataclass(frozen=True)
class Bytes:
    """UTF-8 bytes: 256 ids, any language, nothing to train."""

    vocab_size: ClassVar[int] = 256
    eos: ClassVar[int] = 0
    identity: ClassVar[str] = "bytes"

    def encode(self, text: str) -> Int[np.ndarray, "n"]:
        return _raw(text, "utf-8", "strict")

    def decode(self, ids: ArrayLike) -> str:
        ids = check_ids(ids, self.vocab_size)
        return ids[ids != self.eos].astype(np.uint8).tobytes().decode("utf-8", "replace")

    def offsets(self, text: str) -> Int[np.ndarray, "n 2"]:
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        width = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
        start = np.repeat(np.arange(len(points)), width)
        return np.stack([start, start + 1], axis=1)


@dataclass(frozen=True)
class Ascii:
    """One id a character, 128 ids; any other character becomes "?". The smallest head for tiny models."""

    vocab_size: ClassVar[int] = 128
    eos: ClassVar[int] = 0
    identity: ClassVar[str] = "ascii"

    def encode(self, text: str) -> Int[np.ndarray, "n"]:
        return _raw(text, "ascii", "replace")

    def decode(self, ids: ArrayLike) -> str:
        ids = check_ids(ids, self.vocab_size)
        return ids[ids != self.eos].astype(np.uint8).tobytes().decode("ascii")

    def offsets(self, text: str) -> Int[np.ndarray, "n 2"]:
        start = np.arange(len(text))
        return np.stack([start, start + 1], axis=1)


# A tokenizer.json does not say which of its special tokens ends a document.
_COMMON_ENDS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>", "<|im_end|>", "[SEP]")


@dataclass(frozen=True)
class HuggingFace:
    """Any `tokenizer.json` of the `tokenizers` library (extra `[hf]`).

    Args:
        path: the file, or a folder that holds it.
        eos_token: the text of the token that ends a document. Empty: `eos_token` of the `tokenizer_config.json` beside
            the file, else the first of the usual names that the vocabulary has.

    Raises:
        BadInput: no such file; at first use, when the package or the end token is missing.
    """

    path: str
    eos_token: str = ""

    def __post_init__(self) -> None:
        if not self._file.is_file():
            raise BadInput(
                "HuggingFace.path", self.path, "no such file", "a tokenizer.json, or a folder that holds one"
            )

    def encode(self, text: str) -> Int[np.ndarray, "n"]:
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: ArrayLike) -> str:
        return self._tokenizer.decode(check_ids(ids, self.vocab_size).tolist(), skip_special_tokens=True)

    def offsets(self, text: str) -> Int[np.ndarray, "n 2"]:
        pairs = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return np.asarray(pairs, np.int64).reshape(-1, 2)

    @functools.cached_property
    def vocab_size(self) -> int:
        # Ids may have gaps, so this is not the number of entries.
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def eos(self) -> int:
        names = (self.eos_token,) if self.eos_token else (*self._configured_end(), *_COMMON_ENDS)
        for name in names:
            token = self._tokenizer.token_to_id(name)
            if token is not None:
                return token
        special = [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]
        raise BadInput(
            "HuggingFace.eos_token",
            repr(self.eos_token),
            f"no such token ends a document in {self._file}",
            f"one of {', '.join(special[:8])}" if special else "a token of the vocabulary",
        )

    @functools.cached_property
    def identity(self) -> str:
        return f"huggingface:{hashlib.sha256(self._file.read_bytes()).hexdigest()[:32]}:{self.eos}"

    @property
    def _file(self) -> Path:
        path = Path(self.path).expanduser()
        return path / "tokenizer.json" if path.is_dir() else path

    @functools.cached_property
    def _tokenizer(self) -> Any:
        try:
            import tokenizers
        except ImportError:
            raise BadInput(
                "HuggingFace", self.path, "needs the package tokenizers", 'python3 -m pip install "jaxlong[hf]"'
            ) from None
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(self._file))
        except Exception as error:  # the library raises bare Exception
            raise BadInput("HuggingFace.path", self.path, f"not a tokenizer.json ({error})") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def _configured_end(self) -> tuple[str, ...]:
        config = self._file.with_name("tokenizer_config.json")
        try:
            token = json.loads(config.read_text("utf-8")).get("eos_token")
        except (OSError, ValueError, AttributeError):
            return ()
        name = token.get("content") if isinstance(token, dict) else token
        return (name,) if isinstance(name, str) else ()

"""A source seen through a tokenizer: documents as token ids, with random access, and their lengths."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int

from jaxlong.data.sources import Source
from jaxlong.data.tokenizers import Tokenizer, check_ids

KEPT_TOKENS = 1 << 24
"""Tokens that stay in memory (64 MiB); the rows of an epoch are shuffled in windows of this size, see packing."""


class Documents:
    """`documents(i)` is document `i` as ids `[n]`, the last one eos; `lengths[i]` is its n.

    Making one tokenizes every document once.
    """

    def __init__(self, source: Source, tokenizer: Tokenizer):
        self.source, self.tokenizer = source, tokenizer
        self._kept = _Kept(self._encode, KEPT_TOKENS)
        self.lengths: np.ndarray = np.array([len(self(i)) for i in range(len(source))], np.int64)

    def __call__(self, i: int) -> Int[np.ndarray, "n"]:
        return self._kept(i)

    def _encode(self, i: int) -> np.ndarray:
        return with_end(self.tokenizer, self.source[i])


def with_end(tokenizer: Tokenizer, text: str) -> Int[np.ndarray, "n"]:
    """The ids of `text` and eos, int32. Raises BadInput where the tokenizer leaves its own vocabulary."""
    ids = check_ids(np.append(tokenizer.encode(text), tokenizer.eos), tokenizer.vocab_size, field="tokenizer.encode")
    return ids.astype(np.int32, copy=False)


class _Kept:
    """A function of an index whose last used arrays stay in memory, up to `budget` elements in all; for any threads."""

    def __init__(self, function: Callable[[int], np.ndarray], budget: int):
        self._function, self._budget = function, budget
        self._arrays: OrderedDict[int, np.ndarray] = OrderedDict()
        self._size, self._lock = 0, threading.Lock()

    def __call__(self, i: int) -> np.ndarray:
        with self._lock:
            if i in self._arrays:
                self._arrays.move_to_end(i)
                return self._arrays[i]
        made = self._function(i)  # outside the lock: at worst two threads make the same array
        with self._lock:
            if i not in self._arrays:
                self._arrays[i] = made
                self._size += len(made)
            while self._size > self._budget and len(self._arrays) > 1:
                self._size -= len(self._arrays.popitem(last=False)[1])
        return made


@dataclass(frozen=True)
class _Key:
    """Equal where the contents and the vocabulary are, wherever the files lie."""

    source: Source = field(compare=False)
    tokenizer: Tokenizer = field(compare=False)
    identity: tuple[str, str]


def documents(source: Source, tokenizer: Tokenizer) -> Documents:
    """The documents of `source` in ids of `tokenizer`; made once for the same contents and vocabulary."""
    return _documents(_Key(source, tokenizer, (source.identity, tokenizer.identity)))


@functools.lru_cache(maxsize=4)
def _documents(key: _Key) -> Documents:
    return Documents(key.source, key.tokenizer)

"""Small stand-ins: tokenizers, haystacks and language models that need no other part of the library."""

import random
import re
import zlib
from dataclasses import dataclass, field

import numpy as np


class Bytes:
    vocab_size, identity, eos = 256, "toy-bytes", 0

    def encode(self, text):
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids):
        return bytes(int(i) for i in ids).decode(errors="replace")


class Ascii:
    vocab_size, identity, eos = 128, "toy-ascii", 0

    def encode(self, text):
        return np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int32)

    def decode(self, ids):
        return bytes(int(i) for i in ids).decode("ascii")


class Pieces:
    """Tokens of several characters whose borders depend on what is around them, as byte-pair tokens do."""

    vocab_size, identity, eos = 5000, "toy-pieces", 0

    def encode(self, text):
        pieces = re.findall(r" ?[a-zA-Z]{1,5}|[0-9]{1,3}|\s+|[^\sa-zA-Z0-9]{1,3}", text)
        return np.array([1 + zlib.crc32(piece.encode()) % 4999 for piece in pieces], np.int32)

    def decode(self, ids):
        raise NotImplementedError


def code(seed, lines=400):
    """A document of short lines, without digits or signs that a needle has."""
    rng = random.Random(seed)
    word = lambda: "".join(rng.choices("abcdefghij", k=rng.randint(2, 9)))
    return "".join(
        " " * rng.choice((0, 4, 8)) + " ".join(word() for _ in range(rng.randint(1, 9))) + "\n" for _ in range(lines)
    )


@dataclass(frozen=True)
class Texts:
    """Documents that print short where a test fails."""

    documents: tuple = field(repr=False)

    def __len__(self):
        return len(self.documents)

    def __getitem__(self, index):
        return self.documents[index]


HAYSTACK = Texts(tuple(code(seed) for seed in range(5)))


class Reader:
    """Answers Needle's question by reading the prompt; keeps what it was asked."""

    def __init__(self, tokenizer=None):
        self.tokenizer, self.calls = tokenizer or Bytes(), []

    def generate(self, prompts, max_new):
        self.calls.append((list(prompts), max_new))
        return [self.read(prompt)[:max_new] for prompt in prompts]

    def read(self, prompt):
        values = dict(re.findall(r"^# key (\w+)=(\d+)$", prompt, re.M))
        return values[re.search(r"\? key (\w+)=$", prompt).group(1)] + "\n? key"

    def logprobs(self, tokens):
        raise NotImplementedError


class Silent(Reader):
    def read(self, prompt):
        return ""

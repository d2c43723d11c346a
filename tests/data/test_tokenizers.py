"""Tokenizers: round trips, the vocabulary as a border, where each token comes from."""

from __future__ import annotations

import json
import random
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlong.core.types import BadInput
from jaxlong.data import TOKENIZERS, Ascii, Bytes, HuggingFace, Tokenizer

WORDS = ("def", "return", "self", "import", "lambda", "yield", "naïve", "日本語", "😀", "x", "0", "1", "(", ")", ":")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> str:
    """A byte-level BPE of 400 ids, with special tokens at both ends of the vocabulary."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=200)) for _ in range(50)]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<stop>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=16)
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


@pytest.fixture(params=["bytes", "ascii", "huggingface"])
def tokenizer(request) -> Tokenizer:
    if request.param == "huggingface":
        return HuggingFace(request.getfixturevalue("trained"))
    return TOKENIZERS[request.param]()


TEXTS = ["", "x", "def f(x):\n    return x  # é\n", "日本語 😀 naïve", "a" * 1000, " leading and trailing "]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert not ids.size or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size)
    assert tokenizer.eos not in ids
    expected = "".join(c if c.isascii() else "?" for c in text) if isinstance(tokenizer, Ascii) else text
    assert tokenizer.decode(ids) == expected
    assert tokenizer.decode(ids.tolist()) == expected
    assert tokenizer.decode(jnp.asarray(ids)) == expected
    assert tokenizer.decode([*ids.tolist(), tokenizer.eos]) == expected, "the end mark leaves no text"


@pytest.mark.parametrize("text", TEXTS)
def test_offsets_name_the_characters_of_each_token(tokenizer, text):
    ids, offsets = tokenizer.encode(text), tokenizer.offsets(text)
    assert offsets.shape == (len(ids), 2)
    seen = np.zeros(len(text), int)
    for start, end in offsets:
        assert 0 <= start < end <= len(text)
        seen[start:end] += 1
    assert (seen > 0).all()
    if isinstance(tokenizer, Bytes):
        assert seen.tolist() == [len(c.encode()) for c in text]


def test_bytes_are_bytes():
    assert Bytes().encode("é\n").tolist() == [0xC3, 0xA9, 10]
    assert Ascii().encode("é\n").tolist() == [63, 10]
    assert Bytes().decode([0xC3, 97]) == "\ufffda", "what a model writes need not be UTF-8"
    assert (Bytes().vocab_size, Bytes().eos, Ascii().vocab_size, Ascii().eos) == (256, 0, 128, 0)


def test_values_and_identities(tokenizer, trained, tmp_path):
    assert isinstance(tokenizer, Tokenizer) and hash(tokenizer) == hash(type(tokenizer)(**vars_of(tokenizer)))
    identities = {Bytes().identity, Ascii().identity, HuggingFace(trained).identity}
    identities.add(HuggingFace(trained, eos_token="<stop>").identity)
    assert len(identities) == 4
    moved = tmp_path / "tokenizer.json"
    moved.write_bytes(open_bytes(trained))
    assert HuggingFace(str(tmp_path)).identity == HuggingFace(trained).identity, "by content; a folder will do"
    assert HuggingFace(str(tmp_path)).encode("def").tolist() == HuggingFace(trained).encode("def").tolist()


def vars_of(tokenizer) -> dict:
    return {"path": tokenizer.path} if isinstance(tokenizer, HuggingFace) else {}


def open_bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def test_huggingface_end_of_document(trained, tmp_path):
    tokens = json.loads(open_bytes(trained))["added_tokens"]
    ids = {token["content"]: token["id"] for token in tokens}
    assert HuggingFace(trained).eos == ids["</s>"], "a usual name"
    assert HuggingFace(trained, eos_token="<stop>").eos == ids["<stop>"]
    (tmp_path / "tokenizer.json").write_bytes(open_bytes(trained))
    for config in ({"eos_token": "<stop>"}, {"eos_token": {"content": "<stop>"}}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert HuggingFace(str(tmp_path)).eos == ids["<stop>"], "as configured"
    (tmp_path / "tokenizer_config.json").write_text("[]")
    assert HuggingFace(str(tmp_path)).eos == ids["</s>"]


def test_huggingface_ignores_stored_truncation_and_padding(trained):
    assert len(HuggingFace(trained).encode("x " * 500)) >= 500
    assert len(HuggingFace(trained).encode("x")) == 1


def test_huggingface_vocabulary_counts_added_tokens(trained):
    assert HuggingFace(trained).vocab_size == HuggingFace(trained).eos + 1, "the last token added"


def test_huggingface_vocabulary_with_gaps(tmp_path):
    import tokenizers

    words = tokenizers.models.WordLevel({"a": 0, "b": 7, "</s>": 9}, unk_token="a")
    tokenizers.Tokenizer(words).save(str(tmp_path / "tokenizer.json"))
    assert (HuggingFace(str(tmp_path)).vocab_size, HuggingFace(str(tmp_path)).eos) == (10, 9)


@pytest.mark.parametrize("ids", [[-1], [0, 10**6], np.array([[3, 10**6]]), np.array([2**40])])
def test_ids_outside_the_vocabulary(tokenizer, ids):
    with pytest.raises(BadInput, match=f"outside the vocabulary; integers from 0 to {tokenizer.vocab_size - 1}"):
        tokenizer.decode(ids)


def test_ids_must_be_integers(tokenizer):
    with pytest.raises(BadInput, match="not integers"):
        tokenizer.decode([1.5])


@pytest.mark.parametrize("raw", [Bytes(), Ascii()])
def test_nul_is_no_text(raw):
    with pytest.raises(BadInput, match="NUL at character 2"):
        raw.encode("ab\0")


def test_lone_surrogate_is_no_text():
    with pytest.raises(BadInput, match="surrogate pair at character 1") as caught:
        Bytes().encode("a\ud800")
    str(caught.value).encode()


def refused(path: str, eos_token: str = "") -> str:
    with pytest.raises(BadInput) as caught:
        HuggingFace(path, eos_token).eos  # noqa: B018
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_huggingface_bad_input(trained, tmp_path, monkeypatch):
    assert "no such file" in refused(str(tmp_path / "none"))
    assert "no such file" in refused(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    assert "not a tokenizer.json" in refused(str(tmp_path))
    assert "one of <pad>, <stop>, </s>" in refused(trained, eos_token="<nope>")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert 'pip install "jaxlong[hf]"' in refused(trained)

"""Sources: what the documents are, that they are found again, and what their identity depends on."""

from __future__ import annotations

import copy
import json
import pickle
import sys
import sysconfig
from pathlib import Path

import pytest

from jaxlong.core.types import BadInput
from jaxlong.data import SOURCES, ArrayRecord, Jsonl, Parquet, Stdlib, TextFolder
from jaxlong.data.sources import in_split

TEXTS = ["plain", "naïve café", "日本語のテキスト", "emoji 😀 and 𝔘nicode", "tabs\tand\nlines", 'quotes " \\ done']


def write_jsonl(path: Path, texts: list[str], *, ascii: bool) -> Path:
    lines = [json.dumps({"id": i, "text": text}, ensure_ascii=ascii) for i, text in enumerate(texts)]
    path.write_bytes("\n".join(lines).encode())
    return path


def write_parquet(path: Path, columns: dict, rows: int) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=rows)
    return path


def write_array_record(path: Path, records: list[bytes]) -> Path:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return path


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory) -> dict:
    """The same documents in every kind of file."""
    root = tmp_path_factory.mktemp("sources")
    (root / "folder" / "deep").mkdir(parents=True)
    for i, text in enumerate(TEXTS):
        (root / "folder" / ("deep" if i > 3 else "") / f"{i}.txt").write_bytes(text.encode())
    jsonl = write_jsonl(root / "a.jsonl", TEXTS, ascii=False)
    parquet = write_parquet(root / "a.parquet", {"text": TEXTS, "id": list(range(len(TEXTS)))}, rows=2)
    record = write_array_record(root / "a.array_record", [text.encode() for text in TEXTS])
    return {
        "text_folder": TextFolder(str(root / "folder")),
        "jsonl": Jsonl(str(jsonl)),
        "parquet": Parquet(str(parquet)),
        "array_record": ArrayRecord(str(record)),
    }


FILES = ("text_folder", "jsonl", "parquet", "array_record")


@pytest.mark.parametrize("kind", FILES)
def test_same_documents_from_every_kind_of_file(everywhere, kind):
    source = everywhere[kind]
    assert isinstance(source, SOURCES[kind])
    assert len(source) == len(TEXTS)
    for i in (3, 0, 5, 2, 1, 4, 3):
        assert source[i] == TEXTS[i]
    assert list(source) == TEXTS and source[-1] == TEXTS[-1] and source[1:3] == TEXTS[1:3]
    with pytest.raises(IndexError):
        source[len(TEXTS)]


@pytest.mark.parametrize("kind", FILES)
def test_a_source_is_a_value(everywhere, kind):
    source = everywhere[kind]
    fresh = type(source)(source.path)
    assert fresh == source and hash(fresh) == hash(source) and fresh.identity == source.identity
    for other in (copy.deepcopy(source), pickle.loads(pickle.dumps(source))):
        assert other == source and list(other) == TEXTS
    assert len(source.identity) == 64 and set(source.identity) <= set("0123456789abcdef")


def test_identity_follows_contents_not_place(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    write_jsonl(tmp_path / "a" / "x.jsonl", TEXTS, ascii=False)
    write_jsonl(tmp_path / "b" / "y.jsonl", TEXTS, ascii=True)
    write_jsonl(tmp_path / "c" / "x.jsonl", [*TEXTS[:-1], TEXTS[-1] + " "], ascii=False)
    same, escaped, other = (Jsonl(str(p)).identity for p in sorted(tmp_path.rglob("*.jsonl")))
    assert same == escaped != other
    parts = [
        Jsonl(str(write_jsonl(tmp_path / f"{i}.jsonl", texts, ascii=False)))
        for i, texts in enumerate((["ab", "c"], ["a", "bc"]))
    ]
    assert parts[0].identity != parts[1].identity


def test_folder_identity_knows_the_names(tmp_path):
    identities = []
    for name in ("one.txt", "two.txt"):
        folder = tmp_path / name[:3]
        folder.mkdir()
        (folder / name).write_text("the same text")
        identities.append(TextFolder(str(folder)).identity)
    assert identities[0] != identities[1]


@pytest.mark.parametrize("ascii", [False, True])
def test_jsonl_offsets_with_multibyte_text_blank_lines_and_windows_ends(tmp_path, ascii):
    lines = [json.dumps({"body": text}, ensure_ascii=ascii).encode() for text in TEXTS]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n" + b"\r\n".join(lines[:3]) + b"\n \n\n" + b"\n".join(lines[3:]) + b"\n\n")
    source = Jsonl(str(path), field="body")
    assert [source[i] for i in reversed(range(len(source)))] == TEXTS[::-1]


def test_jsonl_line_of_the_longest_length(tmp_path):
    path = tmp_path / "a.jsonl"
    line = json.dumps({"text": "x" * 100})
    path.write_text(line + "\n")
    assert Jsonl(str(path), longest_line=len(line) + 1)[0] == "x" * 100
    with pytest.raises(BadInput, match="line 1: longer than 50 bytes"):
        len(Jsonl(str(path), longest_line=50))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "array_record"])
def test_a_pattern_reads_files_in_order(tmp_path, kind):
    halves = TEXTS[:4], TEXTS[4:]
    for i, texts in enumerate(halves):
        path = tmp_path / f"part-{i}.{kind}"
        if kind == "jsonl":
            write_jsonl(path, texts, ascii=False)
        elif kind == "parquet":
            write_parquet(path, {"text": texts}, rows=3)
        else:
            write_array_record(path, [text.encode() for text in texts])
    assert list(SOURCES[kind](str(tmp_path / f"part-*.{kind}"))) == TEXTS


def test_parquet_other_string_types(tmp_path):
    import pyarrow

    kinds = {"large": pyarrow.large_string(), "coded": pyarrow.dictionary(pyarrow.int32(), pyarrow.string())}
    path = write_parquet(tmp_path / "a.parquet", {k: pyarrow.array(TEXTS).cast(v) for k, v in kinds.items()}, rows=4)
    for column in kinds:
        assert list(Parquet(str(path), column=column)) == TEXTS


def test_folder_pattern(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.py", "a.txt", "deep/c.py"):
        (tmp_path / name).write_text(name)
    assert list(TextFolder(str(tmp_path), pattern="*.py")) == ["b.py"]
    assert list(TextFolder(str(tmp_path), pattern="**/*.py")) == ["b.py", "deep/c.py"]


def test_splits_are_disjoint_and_complete(tmp_path):
    texts = [f"document {i}" for i in range(300)]
    path = str(write_jsonl(tmp_path / "a.jsonl", texts, ascii=False))
    train, held = (list(Jsonl(path, split=split)) for split in ("train", "heldout"))
    assert sorted(train + held) == sorted(texts) and not set(train) & set(held)
    assert 0.03 < len(held) / len(texts) < 0.14
    longer = str(write_jsonl(tmp_path / "b.jsonl", ["first", *texts], ascii=False))
    assert set(held) <= set(Jsonl(longer, split="heldout")), "a document stays on its side"
    for i, text in enumerate(texts[:60]):
        (tmp_path / f"{i}.txt").write_text(text)
    sides = [set(TextFolder(str(tmp_path), split=split)) for split in ("train", "heldout")]
    assert sides[0] | sides[1] == set(texts[:60]) and not sides[0] & sides[1] and all(sides)


def test_held_out_share_of_names():
    held = sum(in_split(f"name {i}", "heldout") for i in range(10_000))
    assert 700 < held < 900


# -- the standard library --------------------------------------------------------------------------------------------


def test_stdlib_is_the_running_interpreters_source():
    train, held, both = (Stdlib(split) for split in ("train", "heldout", "all"))
    assert set(train) | set(held) == set(both) and not set(train) & set(held)
    assert len(both) > 120 and sum(map(len, both)) > 5_000_000
    assert 0.04 < sum(map(len, held)) / sum(map(len, both)) < 0.11
    assert len({train.identity, held.identity, both.identity}) == 3
    assert Stdlib("train").identity == train.identity
    root = Path(sysconfig.get_paths()["stdlib"])
    assert (root / "textwrap.py").read_text("utf-8") in set(both)


def test_stdlib_package_is_one_document():
    root = Path(sysconfig.get_paths()["stdlib"])
    expected = "".join(path.read_text("utf-8") for path in sorted((root / "asyncio").glob("*.py")))
    assert expected in set(Stdlib("all"))
    assert len(expected) > 300_000


def test_stdlib_leaves_out_tests_and_third_party():
    text = "\n".join(Stdlib("all"))
    assert "class SpecialTokens" not in text  # no site-packages
    for name in ("idlelib", "pydoc_data"):
        root = Path(sysconfig.get_paths()["stdlib"]) / name
        for path in root.glob("[a-z]*.py"):
            assert len(path.read_text("utf-8")) < 500 or path.read_text("utf-8") not in text


def test_stdlib_skips_what_is_not_text(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    big = "x = 1\n" * 200_000
    (tmp_path / "ast.py").write_text(big)
    (tmp_path / "abc.py").write_bytes(b"caf\xe9 = 1\n")
    (tmp_path / "bdb.py").write_bytes(b"a\0b")
    (tmp_path / "mine.py").write_text("not of the standard library")
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "__init__.py").write_text("first")
    (tmp_path / "json" / "tests").mkdir()
    (tmp_path / "json" / "tests" / "a.py").write_text("a test")
    (tmp_path / "json" / "decoder.py").write_text("second\n")
    assert list(Stdlib("all")) == [big, "first\nsecond\n"]
    assert {"ast", "abc", "bdb", "json"} <= sys.stdlib_module_names


# -- what cannot be used ---------------------------------------------------------------------------------------------


def refused(source) -> str:
    with pytest.raises(BadInput) as caught:
        source().identity  # noqa: B018
    line = str(caught.value)
    assert "\n" not in line and line.count(": ") >= 2
    return line


def test_stdlib_without_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert "ships 0 characters" in refused(lambda: Stdlib())


@pytest.mark.parametrize("source", [Stdlib, lambda s: TextFolder("x", split=s), lambda s: Jsonl("x", split=s)])
def test_unknown_split(source):
    assert "one of train, heldout, all" in refused(lambda: source("tarin"))


@pytest.mark.parametrize("kind", FILES)
def test_missing_path(tmp_path, kind):
    assert "no such" in refused(lambda: SOURCES[kind](str(tmp_path / "none")))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "array_record"])
def test_folder_where_a_file_belongs(tmp_path, kind):
    assert "is a folder" in refused(lambda: SOURCES[kind](str(tmp_path)))


@pytest.mark.parametrize("kind", ["parquet", "array_record"])
@pytest.mark.parametrize("content", [b"", b"nothing of the kind" * 5000])
def test_another_kind_of_file(tmp_path, kind, content):
    path = tmp_path / "a"
    path.write_bytes(content)
    assert "not " in refused(lambda: SOURCES[kind](str(path)))


def test_folder_without_a_match(tmp_path):
    assert "no file matches *.txt" in refused(lambda: TextFolder(str(tmp_path), pattern="*.txt"))
    assert "not a pattern" in refused(lambda: TextFolder(str(tmp_path), pattern=""))
    assert "not a pattern" in refused(lambda: TextFolder(str(tmp_path), pattern="/etc/*"))


def test_empty_corpora(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n\n")
    assert "no document" in refused(lambda: Jsonl(str(tmp_path / "a.jsonl")))
    import pyarrow

    path = write_parquet(tmp_path / "a.parquet", {"text": pyarrow.array([], pyarrow.string())}, rows=1)
    assert "no rows" in refused(lambda: Parquet(str(path)))


@pytest.mark.parametrize("content, why", [(b"caf\xe9", "byte 0xe9 at offset 3"), (b"a\0b", "NUL at character 1")])
def test_text_that_is_none(tmp_path, content, why):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "zbad.txt").write_bytes(content)
    line = refused(lambda: TextFolder(str(tmp_path)))
    assert why in line and "zbad.txt" in line
    record = write_array_record(tmp_path / "a.array_record", [b"good", content])
    assert why in (line := refused(lambda: ArrayRecord(str(record)))) and "record 1" in line


@pytest.mark.parametrize(
    "bad, why",
    [
        (b'{"text": "caf\xe9"}', "not UTF-8"),
        (b'{"text": "a\\u0000b"}', "NUL at character 1"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": "open', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'["text"]', "a JSON list"),
        (b'{"body": "x", "id": 3}', "it has 'body', 'id'"),
        (b"{}", "it has no field"),
        (b'{"text": 3}', "no text under 'text'"),
        (b'{"text": null}', "no text under 'text'"),
    ],
)
def test_jsonl_line_that_is_none(tmp_path, bad, why):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + bad + b"\n")
    line = refused(lambda: Jsonl(str(path)))
    assert why in line and f"{path} line 3" in line


def test_jsonl_longest_line_must_be_positive(tmp_path):
    assert "below 1" in refused(lambda: Jsonl("a", longest_line=0))


def test_parquet_values_that_are_none(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"text": ["a", None], "n": [1, 2], "nul": ["a", "b\0"]}, rows=1)
    assert "row 2: null" in refused(lambda: Parquet(str(path)))
    assert "no such column" in refused(lambda: Parquet(str(path), column="body"))
    assert "holds int64" in refused(lambda: Parquet(str(path), column="n"))
    assert "row 2: NUL at character 1" in refused(lambda: Parquet(str(path), column="nul"))


def test_parquet_not_utf8_and_damaged(tmp_path):
    import pyarrow

    raw = pyarrow.array([b"good", b"caf\xe9"]).cast(pyarrow.large_binary())
    text = pyarrow.Array.from_buffers(pyarrow.large_string(), 2, raw.buffers())
    path = write_parquet(tmp_path / "a.parquet", {"text": text}, rows=2)
    assert "row 2: not UTF-8" in refused(lambda: Parquet(str(path)))
    good = write_parquet(tmp_path / "b.parquet", {"text": [f"{i:050d}" for i in range(1000)]}, rows=500)
    data = bytearray(good.read_bytes())
    data[10:400] = bytes(390)
    good.write_bytes(data)
    assert "row group 0: cannot be read" in refused(lambda: Parquet(str(good)))


def test_missing_packages_say_how_to_install(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", {"text": ["a"]}, rows=1)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert 'pip install "jaxlong[parquet]"' in refused(lambda: Parquet(str(path)))


def test_a_file_that_changes_is_noticed(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS, ascii=False)
    jsonl = Jsonl(str(path))
    (tmp_path / "a.txt").write_text("before")
    folder = TextFolder(str(tmp_path))
    assert jsonl[3] == TEXTS[3] and folder[0] == "before"
    path.write_bytes(path.read_bytes()[7:])
    (tmp_path / "a.txt").write_text("afterwards")
    for source, i in ((jsonl, 3), (folder, 0)):
        with pytest.raises(BadInput, match="changed since"):
            source[i]

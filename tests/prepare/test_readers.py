"""Inputs become documents in a fixed order, whatever the size of a unit of work."""

import gzip
import json
import logging
import random
import sys
from pathlib import Path

import pytest

from lclm.prepare.documents import read_unit
from lclm.prepare.readers import Problem, find_sources, iterate_units


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def documents(inputs, group_by=None, keys=("text",), block_bytes=1 << 20):
    found = []
    for unit in iterate_units(find_sources(inputs, group_by), block_bytes):
        found += [item for item in read_unit(unit, keys) if item is not None]
    return found


def json_lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.mark.parametrize("block_bytes", [1, 7, 64, 10_000])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a.jsonl.gz"])
def test_json_lines_are_cut_after_whole_lines(tmp_path, block_bytes, name):
    texts = [f"{number} gr\u00fc\u00df\n\n" * (number % 5) for number in range(40)]
    raw = json_lines(texts).encode()
    path = write(tmp_path / name, gzip.compress(raw) if name.endswith("gz") else raw)
    assert documents([path], block_bytes=block_bytes) == [(text,) for text in texts]
    units = list(iterate_units(find_sources([path]), block_bytes))
    assert sum(unit.num_bytes for unit in units) <= path.stat().st_size


def test_last_line_needs_no_newline_and_blank_lines_are_nothing(tmp_path):
    path = write(tmp_path / "a.jsonl", '\ufeff{"text": "a"}\r\n\n  \n{"text": "b"}')
    assert documents([path]) == [("a",), ("b",)]


def test_several_keys(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"q": "1", "n": 3, "a": "2"}\n')
    assert documents([path], keys=("a", "q")) == [("2", "1")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "is not JSON"),
        (b"nonsense", "is not JSON"),
        (b"[" * 200_000, "is not JSON"),
        (b'["text"]', "is a JSON list, not an object"),
        (b"{}", r"has no key 'text' \(its keys: none\)"),
        (b'{"body": "x"}', r"has no key 'text' \(its keys: body\)"),
        (b'{"text": 3}', "has int under key 'text', not a string"),
        (b'{"text": null}', "has NoneType under key 'text', not a string"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
        (b'{"text": "\xff"}', r"is not UTF-8 \(byte 10\)"),
    ],
)
def test_bad_lines(tmp_path, line, reason):
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    first, bad, last = documents([path])
    assert (first, last) == (("a",), ("b",))
    assert isinstance(bad, Problem) and bad.line == 2 and bad.path == path
    with pytest.raises(ValueError, match=reason):
        raise ValueError(bad.reason)


def test_text_files_and_order_of_inputs(tmp_path):
    b = write(tmp_path / "b.txt", "\ufeffsecond\r\nline")
    a = write(tmp_path / "a.md", "first")
    assert documents([b, a]) == [("second\r\nline",), ("first",)]


@pytest.fixture
def code(tmp_path):
    root = tmp_path / "code"
    write(root / "zoo" / "main.py", "print(1)")
    write(root / "zoo" / "lib" / "a.py", "import os\n")
    write(root / "ant" / "x.jsonl", '{"text": "line"}\n')
    write(root / "ant" / "b.c", "int b;\n")
    write(root / "ant" / "logo.png", b"\x89PNG\0\xff")
    write(root / "ant" / "zero.txt", b"a\0b")
    write(root / "ant" / ".git" / "HEAD", "ref")
    write(root / ".hidden", "no")
    write(root / "README", "read me\n")
    return root


def texts_of(items):
    return [item[0] for item in items if not isinstance(item, Problem)]


def test_repositories_are_joined_in_path_order(code):
    items = documents([code], "repo")
    assert texts_of(items) == [
        "read me\n",
        'int b;\n{"text": "line"}\n',
        "import os\nprint(1)",
    ]
    binary = [item for item in items if isinstance(item, Problem)]
    assert [item.path.name for item in binary] == ["logo.png", "zero.txt"]
    assert all(item.is_binary and item.line == 0 for item in binary)


def test_files_of_a_folder(code):
    by_file = ["read me\n", "int b;\n", '{"text": "line"}\n', "import os\n", "print(1)"]
    assert texts_of(documents([code], "file")) == by_file
    # without --group-by JSON lines are documents each, and come first
    assert texts_of(documents([code])) == ["line", *by_file[:2], *by_file[3:]]
    assert texts_of(documents([code], block_bytes=1)) == texts_of(documents([code]))


def test_a_file_that_is_ended_with_a_newline_before_the_next(tmp_path):
    for name, content in (("a", "one"), ("b", ""), ("c", "two\n"), ("d", "three")):
        write(tmp_path / "r" / "x" / name, content)
    assert documents([tmp_path / "r"], "repo") == [("one\ntwo\nthree",)]


@pytest.mark.parametrize("name", ["a.txt.zst", "a.txt.gz", "a.zip"])
def test_endings_that_are_not_read(tmp_path, name):
    with pytest.raises(ValueError, match="are not read"):
        find_sources([write(tmp_path / name, "x")])


def test_missing_and_empty_inputs(tmp_path):
    with pytest.raises(ValueError, match="none: no such file or folder"):
        find_sources([tmp_path / "none"])
    with pytest.raises(ValueError, match=r"a\.jsonl: is empty"):
        find_sources([write(tmp_path / "a.jsonl", "")])
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder: is empty or holds no file"):
        find_sources([tmp_path / "folder"])


def test_damaged_gzip(tmp_path):
    whole = gzip.compress(json_lines(["a" * 1000]).encode())
    for content in (b"no gzip", whole[:-6], whole[:20] + b"\0\0\0\0" + whole[24:]):
        path = write(tmp_path / "a.jsonl.gz", content)
        with pytest.raises(ValueError, match="cannot be decompressed"):
            documents([path])


def test_a_text_file_that_is_not_utf8(tmp_path):
    (problem,) = documents([write(tmp_path / "a.txt", b"\xff\xfe")])
    assert problem.reason == "is not UTF-8" and not problem.is_binary


def test_zstandard_files(tmp_path):
    """Several frames, as pzstd and `cat` make them; a frame cut short is damage, not the end."""
    import zstandard

    texts = [f"text {number} " * 40 for number in range(300)]
    lines = json_lines(texts).encode()
    compress = zstandard.ZstdCompressor().compress
    whole = compress(lines[:5000]) + compress(lines[5000:5000]) + compress(lines[5000:])
    path = write(tmp_path / "a.jsonl.zst", whole)
    for block_bytes in (1, 700, 1 << 20):
        assert documents([path], block_bytes=block_bytes) == [(text,) for text in texts]
    for content in (whole[:-5], compress(lines)[:-9], b"no zstandard", whole + b"rubbish"):
        with pytest.raises(ValueError, match=r"a\.jsonl\.zst: cannot be decompressed"):
            documents([write(tmp_path / "a.jsonl.zst", content)])


def test_parquet_files(tmp_path):
    import pyarrow as arrow
    import pyarrow.parquet

    texts = [f"text {number}" for number in range(100)]
    table = arrow.table({"text": [*texts[:50], None, *texts[50:]], "n": range(101)})
    path = tmp_path / "folder" / "a.parquet"
    path.parent.mkdir()
    pyarrow.parquet.write_table(table, path, row_group_size=30)
    sources = find_sources([path.parent])
    for block_bytes in (1, 900, 1 << 20):
        units = list(iterate_units(sources, block_bytes))
        assert sum(unit.num_bytes for unit in units) == path.stat().st_size
        items = documents([path], block_bytes=block_bytes)
        bad = [item for item in items if isinstance(item, Problem)]
        assert [item[0] for item in items if not isinstance(item, Problem)] == texts
        assert [item.reason for item in bad] == ["has NoneType in column 'text', not a string"]
    (missing,) = documents([path], keys=("body",))
    assert "has no column 'body' (its columns: text, n)" in missing.reason
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        documents([path])
    middle = len(whole) // 8
    path.write_bytes(whole[:4] + b"\xff" * middle + whole[4 + middle :])
    with pytest.raises(ValueError, match="row group 0: cannot be read"):
        documents([path])


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.parquet"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, name):
    for module in ("zstandard", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r"needs the package (zstandard|pyarrow).*pip install"):
        documents([write(tmp_path / name, "x")])


@pytest.mark.parametrize("parser", ["orjson", "json"])
def test_lines_that_a_fast_parser_must_not_decide(tmp_path, monkeypatch, parser):
    if parser == "json":
        monkeypatch.setattr("lclm.prepare.documents.orjson", None)
    cases = {
        '{"text": "a", "text": "b"}': "has the key 'text' twice",
        '{"text": "a", "m": {"text": "b"}}': ("a",),
        '{"text": "say \\"text\\" twice \\"text\\""}': ('say "text" twice "text"',),
        '{"te\\u0078t": "a"}': ("a",),
        '{"text": "a", "te\\u0078t": "b"}': "has the key 'text' twice",
        '{"text": "a", "n": NaN}': ("a",),
        '{"text": "a\\u0000b"}': ("a\0b",),
        '{"text": "a\0b"}': "is not JSON",
        '{"text": {"text": 1}}': "has dict under key 'text', not a string",
        '{"text": ""}': ("",),
        '[{"text": "a"},': "a file of one JSON array must become one object per line",
    }
    path = write(tmp_path / "a.jsonl", "\n".join(cases))
    for item, expected in zip(documents([path]), cases.values()):
        if isinstance(expected, str):
            assert isinstance(item, Problem) and expected in item.reason
        else:
            assert item == expected


PLAIN_TEXTS = [
    "",
    "plain words " * 20,
    'quote " backslash \\ slash / \b\f\n\r\t end',
    "\\" * 131 + '"' * 67 + "\\n",
    "\u00e9\u4e2d\U0001f600" * 40 + "\n" * 70,
    "\x00\x1f\x7f\u0080\u2028\ufeff\uffff\U0010ffff",
    "nrtbf/u\\u0041 " * 9,
]
ODD_LINES = [
    b"",
    b" \t\r\x0b\x0c",
    b'  {\t"text"  : "spaces"\r } \r',
    b'{"te\\nxt": "c", "text": "d", "text ": "e"}',
    b'{"meta": [[[[]]], {"a": {"b": ["text"]}}], "text": ""}',
    b"{}",
    b"[]",
    b'"text"',
    b'{"text": 1}',
    b'{"text": null}',
    b'{"body": "x"}',
    b'{"text": "a"',
    b'{"text": "a"}}',
    b'{"text": "a"} {"text": "b"}',
    b'{"text": "a",}',
    b'{,"text": "a"}',
    b"{'text': 'a'}",
    b'{"text": "\xff"}',
    b'{"text": "\xc0\x80"}',
    b'{"text": "\xed\xa0\x80"}',
    b'{"text": "\xf4\x90\x80\x80"}',
    b'{"text": "\xe4\xb8"}',
    b'{"text": "\\ud83d"}',
    b'{"text": "\\ude00\\ud83d"}',
    b'{"text": "\\x41"}',
    b'{"text": "\\u00g1"}',
    b'{"text": "tab\there"}',
    b'{"text": "a", "n": 01}',
    b'{"text": "a", "n": 1.}',
    b'{"text": "a", "n": +1}',
    b'{"text": "a", "n": tru}',
    b'{"text": "a", "n": [1, 2}',
    b'\xef\xbb\xbf{"text": "a"}',
    b'{"text": "a", "n": ' + b"[" * 100 + b"]" * 100 + b"}",
    b'{"text": "' + b"a" * 200 + b"\\",
]


def damaged_lines():
    """Lines of JSON with a few bytes removed and added."""
    rng = random.Random(0)
    sane = [json.dumps({"n": [1, {"k": -0.5e7}], "text": t, "z": ""}) for t in PLAIN_TEXTS]
    sane += [line.encode().decode("unicode_escape") for line in sane[:3]]
    signs = b'"\\{}[],:0-e.utn \x00\x80\xed\xf0'
    for _ in range(4000):
        raw = bytearray(rng.choice(sane).encode().replace(b"\n", b" "))
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(raw) + 1)
            raw[at : at + rng.randint(0, 2)] = bytes(rng.choices(signs, k=rng.randint(0, 2)))
        yield bytes(raw)


def test_orjson_and_json_give_the_same_documents(tmp_path, monkeypatch):
    pytest.importorskip("orjson")
    records = [{"n": 1, "text": text, "m": text + "x"} for text in PLAIN_TEXTS]
    lines = [json.dumps(r, ensure_ascii=a).encode() for r in records for a in (True, False)]
    path = write(tmp_path / "a.jsonl", b"\n".join([*lines, *ODD_LINES, *damaged_lines()]))
    fast = documents([path])
    monkeypatch.setattr("lclm.prepare.documents.orjson", None)
    assert documents([path]) == fast
    assert fast[: len(lines)] == [(r["text"],) for r in records for _ in "ab"]
    assert 1000 < sum(isinstance(item, Problem) for item in fast) < 4000


def test_keys_that_are_no_plain_words(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({"q": "1", "\u00fc\n": "2", "": "3"}))
    assert documents([path], keys=("q", "\u00fc\n", "")) == [("1", "2", "3")]


@pytest.fixture
def log(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("lclm"), "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


def test_links_to_folders_are_followed(tmp_path, log):
    root = tmp_path / "repos"
    for name in ("r0/a.py", "r0/deep/b.py"):
        write(root / name, f"# {name}\n")
    for name in ("x1/c.py", "x2/d.py"):
        write(tmp_path / "elsewhere" / name, f"# {name}\n")
    (root / "r1").symlink_to(tmp_path / "elsewhere" / "x1")
    (root / "r2").symlink_to("../elsewhere/x2")
    (root / "r2" / "back").symlink_to(root)
    (root / "r0" / "deep" / "loop").symlink_to("..")
    (root / "r0" / "gone").symlink_to(tmp_path / "nowhere")
    assert texts_of(documents([root], "repo")) == [
        "# r0/a.py\n# r0/deep/b.py\n", "# x1/c.py\n", "# x2/d.py\n"
    ]  # fmt: skip
    assert "read are 4 as 3 documents of text" in log.text
    assert "left out are 3: r0/deep/loop (a link to a folder that it lies in)" in log.text
    assert "r0/gone (a link that leads nowhere" in log.text and "r2/back (a link to" in log.text


@pytest.mark.parametrize("name", ["part-00.json", "part-00.json.gz", "p.jsonl", "p.NDJSON"])
def test_a_file_is_read_alike_by_name_and_in_its_folder(tmp_path, name):
    raw = json_lines(["a", "b\n", "c"]).encode()
    path = write(tmp_path / "d" / name, gzip.compress(raw) if name.endswith("gz") else raw)
    assert documents([path.parent]) == documents([path]) == [("a",), ("b\n",), ("c",)]
    texts = texts_of(documents([path.parent], "file"))
    assert texts == ([] if name.endswith("gz") else [raw.decode()])


def test_what_a_folder_is_read_as_is_said(tmp_path, log):
    for name in ("a.jsonl", "deep/b.json"):
        write(tmp_path / "d" / name, json_lines(["x"]))
    for name in ("README.md", "deep/LICENSE", ".gitattributes", ".git/HEAD"):
        write(tmp_path / "d" / name, "text")
    assert len(documents([tmp_path / "d"])) == 4
    assert (
        "read are 2 files as JSON lines, 2 as 2 documents of text (README.md, deep/LICENSE); left "
        "out are 2: .git (starts with a dot), .gitattributes (starts with a dot)"
    ) in log.text


def test_a_file_that_comes_twice_is_said(tmp_path, log):
    path = write(tmp_path / "d" / "a.jsonl", json_lines(["x"]))
    (tmp_path / "link.jsonl").symlink_to(path)
    find_sources([path])
    assert "more than once" not in log.text
    inputs = [path, path.parent, tmp_path / "link.jsonl"]
    assert documents(inputs) == [("x",)] * 3, "as asked for"
    assert "2 files are given more than once, and their documents come as often" in log.text
    assert f"{tmp_path / 'link.jsonl'} is {path}" in log.text

"""Strings out of JSON lines by native code: what json gives; lines that are not right are left."""

import json
import random

import pytest

from lclm.prepare.documents import _texts_slowly
from lclm_kernels.native import json_texts, load_native

PLAIN = [
    "",
    "x",
    "plain words " * 20,
    'quote " backslash \\ slash / \b\f\n\r\t end',
    "\\" * 131 + '"' * 67 + "\\n",
    "\u00e9\u4e2d\U0001f600" * 40 + "\n" * 70,
    "\x00\x1f\x7f\u0080\u2028\ufeff\uffff\U0010ffff",
    "nrtbf/u\\u0041 " * 9,
]
RECORDS = [
    {"text": "a"},
    {"id": 7, "text": "b", "meta": {"text": "other", "list": [1, -2.5e3, True, None, {}, []]}},
    {"te\nxt": "c", "text": "d", "text ": "e"},
    {"meta": [[[[]]], {"a": {"b": ["text"]}}], "text": ""},
]
LEFT = [
    b"{}",
    b"[]",
    b'"text"',
    b'{"text": 1}',
    b'{"text": null}',
    b'{"body": "x"}',
    b'{"text": "a", "text": "b"}',
    b'{"text": "a", "te\\u0078t": "b"}',
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


def check(data, key="text"):
    """Every line's item against json's; the number of lines left."""
    lines = data.removesuffix(b"\n").split(b"\n")
    items = list(json_texts(data, key))
    assert len(items) == len(lines)
    left = 0
    for line, item in zip(lines, items):
        if item is None:
            assert not line.strip()
        elif isinstance(item, slice):
            assert data[item] == line
            left += 1
        else:
            assert (item,) == _texts_slowly(line, (key,))
    as_bytes = [item.encode() if isinstance(item, str) else item for item in items]
    assert list(json_texts(data, key, as_utf8=True)) == as_bytes
    return left


@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_texts_are_those_of_json(ensure_ascii):
    assert load_native() is not None, "this test is about the native library"
    records = RECORDS + [{"n": 1, "text": text, "m": text + "x"} for text in PLAIN]
    lines = [json.dumps(record, ensure_ascii=ensure_ascii) for record in records]
    lines += ["", " \t\r\x0b\x0c", '  {\t"text"  : "spaces"\r } \r']
    data = "\n".join(lines).encode()
    assert check(data) == 0 and check(data + b"\n") == 0
    # every place a string may have relative to blocks of 64 bytes
    shifted = "\n".join(" " * shift + line for shift in range(70) for line in lines)
    assert check(shifted.encode()) == 0


def test_what_is_not_plainly_right_is_left():
    data = b"\n".join(LEFT)
    assert check(data) == len(LEFT)
    assert check(b'{"text": "a"}\n' + data + b'\n{"text": "b"}') == len(LEFT)


def test_other_keys():
    line = json.dumps({"q": "1", "\u00fc\n": "2", "": "3"}).encode()
    assert [next(json_texts(line, key)) for key in ("q", "\u00fc\n", "")] == ["1", "2", "3"]
    assert next(json_texts(line, "none")) == slice(0, len(line))


def test_damaged_lines_give_what_json_gives_or_are_left():
    rng = random.Random(0)
    sane = [json.dumps({"n": [1, {"k": -0.5e7}], "text": text, "z": ""}) for text in PLAIN]
    sane += [line.encode().decode("unicode_escape") for line in sane[:3]]
    signs = b'"\\{}[],:\n0-e.utn \x00\x80\xed\xf0'
    num_left = 0
    for _ in range(4000):
        raw = bytearray(rng.choice(sane).encode())
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(raw) + 1)
            raw[at : at + rng.randint(0, 2)] = bytes(rng.choices(signs, k=rng.randint(0, 2)))
        num_left += check(bytes(raw)) if raw else 0
    assert 1000 < num_left < 6000


def test_without_the_library_every_line_is_left(monkeypatch):
    monkeypatch.setattr("lclm_kernels.native.json_lines.load_native", lambda: None)
    data = b'{"text": "a"}\n \n\n{"text": "b"}'
    assert list(json_texts(data, "text")) == [slice(0, 13), None, None, slice(17, 30)]

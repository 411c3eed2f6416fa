"""Work that was broken off goes on only where every byte of it would be made again."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import pytest

from lclm.data.tokenizer import load_tokenizer
from lclm.prepare import encoder
from lclm.prepare.encoder import encode_sources
from lclm.prepare.readers import find_sources
from lclm.prepare.worker import EncodeOptions, WorkerState, what_decides

BASE = {"json_keys": ("text",), "append_eod": True, "on_error": "skip", "num_workers": 1}


@pytest.fixture
def corpus(tmp_path, tokenizer_files, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("lclm"), "propagate", True)
    caplog.set_level(logging.INFO)
    (tmp_path / "tokenizer").mkdir()
    shutil.copy(tokenizer_files["hf"], tmp_path / "tokenizer")
    rows = [{"text": f"hello world {n}\n" * (n % 9), "body": f"the cat {n}"} for n in range(99)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def encode(corpus, name, block_bytes=500, **options):
    """The files of a run, by their name."""
    prefix = corpus.parent / name / "x"
    encode_sources(
        find_sources([corpus]),
        load_tokenizer(corpus.parent / "tokenizer"),
        str(prefix),
        EncodeOptions(**BASE | options),
        block_bytes=block_bytes,
    )
    return {path.name: path.read_bytes() for path in prefix.parent.iterdir()}


def break_off(corpus, name, **options):
    """A run that dies when every unit is done and none of the files has its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "_check_result", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            encode(corpus, name, **options)
    assert (corpus.parent / name / "x.unfinished" / "state.json").is_file()


OTHER = {
    "key": {"json_keys": ("body",)},
    "more keys": {"json_keys": ("text", "body")},
    "no eod": {"append_eod": False},
    "bos": {"prepend_bos": True},
    "on error": {"on_error": "stop"},
    "short": {"min_tokens": 12},
    "long": {"max_tokens": 40},
    "shard": {"shard": (0, 2)},
    "units": {"block_bytes": 700},
}


@pytest.mark.parametrize("options", OTHER.values(), ids=list(OTHER))
def test_other_options_start_anew(corpus, caplog, options):
    break_off(corpus, "x")
    found = encode(corpus, "x", **options)
    assert "held work on other inputs or options; started anew" in caplog.text
    assert found == encode(corpus, "fresh", **options)


def test_the_order_of_keys_counts(corpus, caplog):
    break_off(corpus, "x", json_keys=("text", "body"))
    found = encode(corpus, "x", json_keys=("body", "text"))
    assert "started anew" in caplog.text
    assert found == encode(corpus, "fresh", json_keys=("body", "text"))


@pytest.mark.parametrize("token", ["he", {"content": "he"}])
def test_an_eos_token_of_a_file_beside_the_tokenizer_counts(corpus, caplog, token):
    break_off(corpus, "x")
    (corpus.parent / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": token})
    )
    found = encode(corpus, "x")
    assert "started anew" in caplog.text and found == encode(corpus, "fresh")


def test_how_the_work_is_done_does_not_count(corpus, caplog):
    break_off(corpus, "x")
    found = encode(corpus, "x", num_workers=2, library="standard")
    assert "going on after" in caplog.text and found == encode(corpus, "fresh")


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"units": 3, "of": "another version"}'])
def test_a_state_that_cannot_be_read_starts_anew(corpus, caplog, content):
    """As after a power cut."""
    break_off(corpus, "x")
    state = corpus.parent / "x" / "x.unfinished" / "state.json"
    state.write_text(content)
    found = encode(corpus, "x")
    assert "state.json: cannot be read" in caplog.text and found == encode(corpus, "fresh")


def test_no_field_can_be_forgotten():
    """Whatever a worker is given is hashed, unless its field says that it changes no output."""
    options = EncodeOptions()
    state = WorkerState("path", (("name", "hash"),), 9, (1,), (2,), options)

    def decides(value, name):
        changed = dataclasses.replace(value, **{name: object()})
        return what_decides(changed) != what_decides(value)

    how = {item.name for item in dataclasses.fields(options) if not decides(options, item.name)}
    assert how == {"num_workers", "library", "engine"}
    how = {item.name for item in dataclasses.fields(state) if not decides(state, item.name)}
    assert how == {"tokenizer_path", "plain_json_file"}
    other = dataclasses.replace(state, options=dataclasses.replace(options, min_tokens=1))
    assert json.dumps(what_decides(other)) != json.dumps(what_decides(state))


def test_work_that_moved_is_named_by_its_new_place(corpus):
    break_off(corpus, "x")
    Path(corpus.parent / "x").rename(corpus.parent / "y")
    prefix = str(corpus.parent / "y" / "x")
    summary = encode_sources(
        find_sources([corpus]), load_tokenizer(corpus.parent / "tokenizer"), prefix,
        EncodeOptions(**BASE), block_bytes=500,
    )  # fmt: skip
    assert summary.prefixes == [prefix]

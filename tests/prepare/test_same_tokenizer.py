"""Prefixes that meet are told by vocabulary and end token, not by the hash of one file."""

import json
import logging
import shutil

import pytest
import tokenizers

from lclm.data.indexed import IndexedReader
from lclm.data.stage_rows import StageRows
from lclm.data.tokenizer import load_tokenizer
from lclm.prepare.gigatoken import make_plain_json
from lclm.prepare.merge import merge_prefixes
from lclm.prepare.retokenize import retokenize
from tests.data_fixtures import mixture_entry
from tests.prepare.test_preprocess_damage import load_tool


@pytest.fixture
def encode(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "hello world the cat"}\n' * 9)

    def run(name, tokenizer, *extra, status=0):
        prefix = str(tmp_path / name)
        arguments = ["--input", str(tmp_path / "a.jsonl"), "--output-prefix", prefix,
                     "--tokenizer", str(tokenizer), "--workers", "1", *extra]  # fmt: skip
        assert load_tool("preprocess_data").main(arguments) == status
        return prefix

    return run


def mix(*prefixes):
    entries = [mixture_entry(prefix, "concat", 0, 1 / len(prefixes)) for prefix in prefixes]
    return StageRows(entries, 8, 2, 1, max_epochs=9)


@pytest.fixture
def spellings(tmp_path, tokenizer_files):
    """The same tokenizers in two files each, by kind."""
    again = tmp_path / "again"
    again.mkdir()
    tree = json.loads(tokenizer_files["hf"].read_text())
    (again / "tokenizer.json").write_text(json.dumps(tree))
    model = load_tokenizer(tokenizer_files["tiktoken"])
    folder = tokenizers.Tokenizer.from_str(make_plain_json(model))
    folder.add_special_tokens(sorted(model.special_names, key=model.special_names.get))
    (tmp_path / "llama").mkdir()
    folder.save(str(tmp_path / "llama" / "tokenizer.json"))
    return {
        "re-serialized": (tokenizer_files["hf"], again),
        "model and folder": (tokenizer_files["tiktoken"], tmp_path / "llama"),
    }


@pytest.mark.parametrize("kind", ["re-serialized", "model and folder"])
def test_one_tokenizer_in_two_spellings_goes_together(tmp_path, encode, spellings, kind):
    first, second = spellings[kind]
    prefixes = [encode("x", first, "--append-eod"), encode("y", second, "--append-eod")]
    digests = [IndexedReader(prefix).metadata["tokenizer"]["sha256"] for prefix in prefixes]
    assert digests[0] != digests[1]
    assert (
        merge_prefixes(prefixes, str(tmp_path / "m")) == 2 * IndexedReader(prefixes[0]).num_tokens
    )
    mix(*prefixes)
    retokenize(prefixes[0], str(tmp_path / "r"), load_tokenizer(second))


def test_two_end_tokens_do_not_go_together(tmp_path, encode, tokenizer_files):
    folder = tmp_path / "t"
    folder.mkdir()
    shutil.copy(tokenizer_files["hf"], folder)
    first = encode("x", folder, "--append-eod")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|begin_of_text|>"}')
    second, third = encode("y", folder, "--append-eod"), encode("z", folder)
    for join in (lambda: merge_prefixes([first, second], str(tmp_path / "m")),
                 lambda: mix(first, second)):  # fmt: skip
        with pytest.raises(ValueError, match=r"x end in token 1, those of .*y in 0; .*--eod-token"):
            join()
    mix(first, third)  # no document of the third was ended


def test_prefixes_of_older_versions_are_told_by_the_file(tmp_path, encode, spellings):
    first, second = (encode(name, file)
                     for name, file in zip("xy", spellings["re-serialized"]))  # fmt: skip
    path = tmp_path / "x.json"
    metadata = json.loads(path.read_text())
    del metadata["tokenizer"]["vocabulary"]
    path.write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match=r"different tokenizers \(300 tokens, sha256"):
        mix(first, second)
    merge_prefixes([first], str(tmp_path / "m"))
    del metadata["tokenizer"]
    path.write_text(json.dumps(metadata))
    mix(first, second)
    with pytest.raises(ValueError, match="names no tokenizer"):
        merge_prefixes([first, second], str(tmp_path / "n"))


def test_the_end_token_is_said_and_can_be_chosen(encode, tokenizer_files, caplog, monkeypatch):
    monkeypatch.setattr("lclm.command_line.setup_logging", lambda: None)
    monkeypatch.setattr(logging.getLogger("lclm"), "propagate", True)
    caplog.set_level(logging.INFO)
    tokenizer = load_tokenizer(tokenizer_files["tiktoken"])
    for extra, name in (((), "<|end_of_text|>"), (("--eod-token", "<|eot_id|>"), "<|eot_id|>")):
        caplog.clear()
        prefix = encode("x", tokenizer_files["tiktoken"], "--append-eod", *extra)
        assert f"documents end in {name} (token {tokenizer.special_id(name)}" in caplog.text
        assert IndexedReader(prefix).read(0)[-1] == tokenizer.special_id(name)
        metadata = IndexedReader(prefix).metadata
        assert metadata["tokenizer"]["eod_id"] == tokenizer.special_id(name)
    encode("y", tokenizer_files["tiktoken"], "--append-eod", "--eod-token", "<no>", status=2)
    encode("y", tokenizer_files["tiktoken"], "--eod-token", "<|eot_id|>", status=2)

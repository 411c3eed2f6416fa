"""No tool writes over what it reads: refused with exit status 2 before any work."""

import json

import numpy as np
import pytest
import tokenizers

from lclm.data.indexed import IndexedWriter
from lclm.data.tokenizer import load_tokenizer
from tests.prepare.test_preprocess_damage import load_tool

TALK = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def everything_below(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(name, folder, capsys, *arguments):
    """Run a tool that must end with 2 and change nothing; what it said."""
    before = everything_below(folder)
    status = load_tool(name).main([*map(str, arguments)])
    said = capsys.readouterr().err
    assert status == 2 and "error:" in said, said
    assert everything_below(folder) == before and not list(folder.rglob("*.unfinished"))
    return said


@pytest.fixture
def room(tmp_path, tokenizer_files):
    """A folder with a corpus under names that outputs would take, and a tokenizer."""
    folder = tmp_path / "d"
    folder.mkdir()
    for name in ("a.json", "a.bin", "a_text.json"):
        (folder / name).write_text('{"text": "hello world", "other": "x"}\n')
    (folder / "sft.json").write_text(json.dumps(TALK) + "\n")
    (folder / "repo").mkdir()
    (folder / "repo" / "b.txt").write_text("hello world")
    (tmp_path / "link").symlink_to(folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_files["hf"]))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    ("source", "prefix", "extra"),
    [
        ("a.json", "a", ()),
        ("a.json", "../link/a", ()),
        ("../link/a.json", "repo/../a", ()),
        ("a.bin", "a", ()),
        ("a_text.json", "a", ("--json-keys", "text", "other")),
        ("sft.json", "sft", ("--chat", "--chat-template", "chatml")),
        ("repo", "repo/x", ()),
        ("repo", "../link/repo/deep/x", ("--group-by", "repo")),
        ("a.json", "tokenizer", ()),
    ],
)
def test_preprocess_keeps_its_input(room, capsys, source, prefix, extra):
    said = refused(
        "preprocess_data", room, capsys, "--input", room / source, "--output-prefix",
        room / prefix, "--tokenizer", room / "tokenizer.json", *extra,
    )  # fmt: skip
    assert ": is the input" in said or ": lies in the input" in said


def test_a_prefix_beside_a_folder_of_its_name(room):
    """As `--input books/ --output-prefix books`, which takes nothing away."""
    status = load_tool("preprocess_data").main([
        "--input", str(room / "repo"), "--output-prefix", str(room / "repo"),
        "--tokenizer", str(room / "tokenizer.json"), "--workers", "1",
    ])  # fmt: skip
    assert status == 0 and (room / "repo" / "b.txt").read_text() == "hello world"


def test_retokenize_and_merge_keep_their_input(room, capsys):
    tokenizer = load_tokenizer(room / "tokenizer.json")
    with IndexedWriter(room / "x", tokenizer.vocab_size) as writer:
        writer.metadata["tokenizer"] = tokenizer.describe()
        writer.add_document(np.array([5, 6]))
    common = ("--tokenizer", room / "tokenizer.json", "--output-prefix")
    for prefix in ("x", "../link/x", "tokenizer"):
        said = refused("retokenize", room, capsys, "--input", room / "x", *common, room / prefix)
        assert "is the input" in said
    for prefix in ("x", "../link/x"):
        said = refused(
            "merge_data", room, capsys, "--input", room / "x", "--output-prefix", room / prefix
        )
        assert "is the input" in said
    picture = ("--histogram", room / "x.bin")
    assert "is the input" in refused("inspect_data", room, capsys, room / "x", *picture)


def test_train_tokenizer_keeps_its_input(room, capsys):
    common = ("--vocab-size", 300, "--output", room)
    for source in (room / "tokenizer.json", room):
        said = refused("train_tokenizer", room, capsys, "--input", source, *common)
        assert "is the input" in said or "lies in the input" in said

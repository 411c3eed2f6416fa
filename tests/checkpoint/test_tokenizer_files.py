"""Which files are the tokenizer's, and the ids that they tell in their several spellings."""

import json

import pytest

from lclm.checkpoint.tokenizer_files import (
    TokenIds,
    copy_tokenizer,
    has_tokenizer,
    read_token_ids,
)

WORDS = {"model": {"vocab": {"<s>": 4, "</s>": 5}}}
PIECES = {"model": {"vocab": [["<unk>", 0.0], ["<s>", 0.0], ["</s>", -1.5]]}}
ADDED = {"model": {"vocab": {}}, "added_tokens": [{"id": 8, "content": "</s>"}]}
TEXTS = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}


def write(folder, **files):
    for name, tree in files.items():
        (folder / f"{name}.json").write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, TokenIds()),
        ({"tokenizer": WORDS}, TokenIds()),  # which of the words frame a text is not said
        ({"tokenizer": WORDS, "tokenizer_config": TEXTS}, TokenIds(4, 5)),
        ({"tokenizer": WORDS, "special_tokens_map": TEXTS}, TokenIds(4, 5)),
        ({"tokenizer": PIECES, "tokenizer_config": TEXTS}, TokenIds(1, 2)),
        ({"tokenizer": ADDED, "tokenizer_config": TEXTS}, TokenIds(None, 8)),
        (
            {"tokenizer_config": {**TEXTS, "added_tokens_decoder": {"7": {"content": "<s>"}}}},
            TokenIds(7, None),
        ),
        (
            {
                "tokenizer": WORDS,
                "tokenizer_config": TEXTS,
                "generation_config": {"eos_token_id": [5, 9]},
            },
            TokenIds(4, [5, 9]),
        ),
        ({"tokenizer_config": {"bos_token": None}}, TokenIds()),
    ],
)
def test_ids(tmp_path, files, expected):
    write(tmp_path, **files)
    assert read_token_ids(tmp_path) == expected


def test_only_the_tokenizer_is_taken_from_a_model_folder(tmp_path):
    source, target = tmp_path / "model", tmp_path / "out"
    source.mkdir()
    write(source, config={}, tokenizer=WORDS, tokenizer_config=TEXTS, other={})
    (source / "model.safetensors").write_text("x")
    assert copy_tokenizer(source, target) == ["tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in target.iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_files_of_any_name_are_taken_from_a_tokenizer_folder(tmp_path):
    source, target = tmp_path / "tokenizer", tmp_path / "out"
    source.mkdir()
    write(source, config={}, tokenizer=WORDS, other={})
    for name in ("words.bpe", "model.safetensors", "model.safetensors.index.json"):
        (source / name).write_text("x")
    assert copy_tokenizer(source, target, is_tokenizer_folder=True) == [
        "other.json",
        "tokenizer.json",
        "words.bpe",
    ]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.json"])
def test_a_vocabulary_makes_a_tokenizer(tmp_path, name):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert not has_tokenizer(tmp_path)
    (tmp_path / name).write_text("{}")
    assert has_tokenizer(tmp_path)

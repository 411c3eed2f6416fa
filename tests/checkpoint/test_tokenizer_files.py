"""Which files are the tokenizer's, and the ids that they tell in their several spellings."""

import json

import pytest

from lclm.checkpoint.tokenizer_files import (
    TokenIds,
    find_tokenizer,
    has_tokenizer,
    read_token_ids,
    read_travelling,
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
    write(tmp_path, config={}, tokenizer=WORDS, tokenizer_config=TEXTS, other={})
    (tmp_path / "model.safetensors").write_text("x")
    names = ["tokenizer.json", "tokenizer_config.json"]
    assert find_tokenizer(tmp_path) == {name: tmp_path / name for name in names}
    assert list(find_tokenizer(tmp_path / "tokenizer.json")) == names


def test_files_of_any_name_are_taken_from_a_tokenizer_folder(tmp_path):
    write(tmp_path, config={}, tokenizer=WORDS, other={})
    for name in ("words.bpe", "model.safetensors", "model.safetensors.index.json"):
        (tmp_path / name).write_text("x")
    names = ["other.json", "tokenizer.json", "words.bpe"]
    assert list(find_tokenizer(tmp_path, is_tokenizer_folder=True)) == names


def test_more_chat_templates_travel(tmp_path):
    write(tmp_path, tokenizer=WORDS)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ x }}")
    files = read_travelling(tmp_path, None)
    assert files["tokenizer/additional_chat_templates/tool_use.jinja"] == b"{{ x }}"


@pytest.mark.parametrize(
    ("content", "name"),
    [(b' {"model": {}}', "tokenizer.json"), (b"IQ== 0\n", "tokenizer.model")],
)
def test_a_file_of_another_name_gets_the_usual_one(tmp_path, content, name):
    file = tmp_path / "my_tok.json"
    file.write_bytes(content)
    write(tmp_path, tokenizer_config=TEXTS)
    assert find_tokenizer(file) == {
        name: file,
        "tokenizer_config.json": tmp_path / "tokenizer_config.json",
    }
    (tmp_path / "tokenizer.json").write_text("{}")  # what else is there belongs to this one
    assert find_tokenizer(file) == {name: file}


def test_what_travels_is_kept_though_its_source_goes(tmp_path):
    write_folder = tmp_path / "words"
    write_folder.mkdir()
    write(write_folder, tokenizer=WORDS)
    files = read_travelling(write_folder, None)
    (write_folder / "tokenizer.json").unlink()
    assert json.loads(files["tokenizer/tokenizer.json"]) == WORDS


def test_what_a_start_carries_on(tmp_path):
    origin, other = tmp_path / "step_00000000", tmp_path / "other"
    (origin / "tokenizer").mkdir(parents=True)
    write(origin / "tokenizer", tokenizer=WORDS, odd={}, generation_config={"eos_token_id": [5, 9]})
    (origin / "hf_source.json").write_text("{}")
    other.mkdir()
    write(other, tokenizer=PIECES)
    generation = "tokenizer/generation_config.json"
    kept = read_travelling(None, origin)
    assert kept.keys() == {
        "hf_source.json",
        "tokenizer/tokenizer.json",
        "tokenizer/odd.json",
        generation,
    }
    changed = read_travelling(other, origin)
    assert changed.keys() == {"hf_source.json", "tokenizer/tokenizer.json", generation}
    assert json.loads(changed["tokenizer/tokenizer.json"]) == PIECES
    assert changed[generation] == kept[generation]
    write(other, generation_config={"temperature": 0.5})
    assert json.loads(read_travelling(other, origin)[generation]) == {"temperature": 0.5}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.json"])
def test_a_vocabulary_makes_a_tokenizer(tmp_path, name):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert not has_tokenizer(tmp_path)
    (tmp_path / name).write_text("{}")
    assert has_tokenizer(tmp_path)

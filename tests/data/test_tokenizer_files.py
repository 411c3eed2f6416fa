"""Files beside a tokenizer count as they do for transformers, or are refused."""

import io
import json
import shutil

import pytest
import sentencepiece
import tokenizers
from transformers import AutoTokenizer

from lclm.data.tokenizer import load_tokenizer
from lclm.prepare.gigatoken import make_plain_json
from tests.data_fixtures import SENTENCES

TEXT = "hello <think> world"


def added(content, special=False):
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return flags | {"content": content, "special": special}


def write_folder(folder, main, files):
    folder.mkdir()
    shutil.copy(main, folder)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast"}
BESIDE = {
    "decoder": {"tokenizer_config.json": CONFIG | {
        "eos_token": "<|im_end|>",
        "added_tokens_decoder": {"301": added("<|im_end|>", True), "300": added("<think>")}}},
    "flags": {"tokenizer_config.json": CONFIG | {
        "added_tokens_decoder": {"1": added("<|end_of_text|>", True) | {"normalized": True},
                                 "300": added("<think>") | {"lstrip": True}}}},
    "added_tokens.json": {"tokenizer_config.json": CONFIG | {"eos_token": "<|im_end|>"},
                          "added_tokens.json": {"<think>": 300, "<|im_end|>": 301}},
    "map": {"tokenizer_config.json": CONFIG | {"eos_token": "<|begin_of_text|>"},
            "special_tokens_map.json": {"eos_token": {"content": "<|end_of_text|>"}}},
    "map behind decoder": {
        "tokenizer_config.json": CONFIG | {"eos_token": "<|begin_of_text|>",
                                           "added_tokens_decoder": {"300": added("<think>")}},
        "special_tokens_map.json": {"eos_token": "<|end_of_text|>"}},
}  # fmt: skip


@pytest.fixture
def hf_300(tokenizer_files):
    return tokenizer_files["hf"]  # ids 0 .. 299


@pytest.mark.parametrize("files", BESIDE.values(), ids=list(BESIDE))
def test_as_transformers_does(tmp_path, hf_300, files):
    folder = write_folder(tmp_path / "t", hf_300, files)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.encode(TEXT) == theirs.encode(TEXT, add_special_tokens=False)
    assert ours.vocab_size == len(theirs)
    assert theirs.eos_token_id in (None, ours.eod_id)
    name = next((name for name in ("<|im_end|>", "<|end_of_text|>") if name in ours.ids), "")
    assert ours.ids[name] not in ours.encode(f"a {name} b"), "special tokens are not made from text"
    assert ours.decode(ours.encode(TEXT)) == theirs.decode(ours.encode(TEXT))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config.json": {"added_tokens_decoder": {"305": added("<think>")}}},
         "'<think>' is 305 in .* gives it 300"),
        ({"added_tokens.json": {"hello": 300}}, "'hello' is 300 in"),
        ({"tokenizer_config.json": {"eos_token": "<eos>"}}, "eos_token is '<eos>'"),
        ({"special_tokens_map.json": {"bos_token": "<bos>"}}, "bos_token is '<bos>'"),
        ({"tokenizer_config.json": {"add_prefix_space": True}}, "add_prefix_space is True"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"x": {}}}}, "added tokens cannot be"),
        ({"added_tokens.json": ["<think>"]}, r"added_tokens\.json: holds no JSON object"),
    ],
)  # fmt: skip
def test_what_cannot_be_applied_is_refused(tmp_path, hf_300, files, message):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(write_folder(tmp_path / "t", hf_300, files))


def test_add_prefix_space_that_agrees(tmp_path, hf_300):
    files = {"tokenizer_config.json": {"add_prefix_space": False}}
    folder = write_folder(tmp_path / "t", hf_300, files)
    assert load_tokenizer(folder).encode(TEXT) == load_tokenizer(hf_300).encode(TEXT)


def test_a_sentencepiece_folder_with_added_tokens(tmp_path, tokenizer_files):
    plain = load_tokenizer(tokenizer_files["sentencepiece"])
    size = plain.vocab_size
    files = {
        "added_tokens.json": {"<|im_end|>": size + 1, "<|im_start|>": size},
        "special_tokens_map.json": {"additional_special_tokens": ["<|im_start|>"]},
        "tokenizer_config.json": {"eos_token": "<|im_end|>"},
    }
    folder = write_folder(tmp_path / "t", tokenizer_files["sentencepiece"], files)
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eod_id, tokenizer.bos_id) == (size + 1, 1)
    assert tokenizer.vocab_size == size + 2 and tokenizer.special_id("<|im_start|>") == size
    text = "hello <|im_end|> world"
    assert tokenizer.encode(text) == plain.encode(text)
    ids = [size, *plain.encode("hello"), size + 1, size + 1, *plain.encode("world")]
    assert tokenizer.decode(ids) == "<|im_start|>hello<|im_end|><|im_end|>world"
    assert tokenizer.vocabulary != plain.vocabulary
    for files, message in (
        ({"added_tokens.json": {"<think>": size}}, "'<think>', which is no special token"),
        ({"added_tokens.json": {"<think>": size + 3}}, f"the id {size + 3}, it would be {size}"),
        ({"tokenizer_config.json": {"eos_token": "<eos>"}}, "eos_token is '<eos>'"),
    ):
        bad = write_folder(
            tmp_path / message[:9].strip("'"), tokenizer_files["sentencepiece"], files
        )
        with pytest.raises(ValueError, match=message):
            load_tokenizer(bad)


def test_a_vocabulary_is_the_same_in_every_spelling(tmp_path, tokenizer_files):
    hf = load_tokenizer(tokenizer_files["hf"])
    (tmp_path / "again").mkdir()
    tree = json.loads(tokenizer_files["hf"].read_text())
    (tmp_path / "again" / "tokenizer.json").write_text(json.dumps(tree, indent=3))
    again = load_tokenizer(tmp_path / "again")
    assert again.sha256 != hf.sha256 and again.vocabulary == hf.vocabulary
    model = load_tokenizer(tokenizer_files["tiktoken"])
    spelled = tokenizers.Tokenizer.from_str(make_plain_json(model))
    names = sorted(model.special_names, key=model.special_names.get)
    spelled.add_special_tokens(names)
    (tmp_path / "llama").mkdir()
    spelled.save(str(tmp_path / "llama" / "tokenizer.json"))
    assert load_tokenizer(tmp_path / "llama").vocabulary == model.vocabulary
    kinds = ("hf", "tiktoken", "sentencepiece")
    assert len({load_tokenizer(tokenizer_files[kind]).vocabulary for kind in kinds}) == 3


def test_a_sentencepiece_model_and_its_tokenizer_json_have_one_vocabulary(tmp_path):
    convert = pytest.importorskip("gigatoken._load.sentencepiece").sentencepiece_to_tokenizer_json
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, vocab_size=320, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    text = convert(model.getvalue())
    (tmp_path / "tokenizer.json").write_text(text if isinstance(text, str) else text.decode())
    pieces, folder = load_tokenizer(tmp_path / "tokenizer.model"), load_tokenizer(tmp_path)
    assert (pieces.kind, folder.kind) == ("sentencepiece", "hf")
    assert pieces.vocabulary == folder.vocabulary


def test_another_token_may_end_documents(tokenizer_files):
    tokenizer = load_tokenizer(tokenizer_files["tiktoken"])
    tokenizer.choose_eod("<|eot_id|>")
    assert tokenizer.eod_id == tokenizer.special_id("<|eot_id|>") == tokenizer.describe()["eod_id"]
    with pytest.raises(ValueError, match=r"--eod-token <\|im_end\|>: .* has no such token"):
        tokenizer.choose_eod("<|im_end|>")

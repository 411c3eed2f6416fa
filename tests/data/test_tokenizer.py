"""Tokenizers of three kinds: told by content, special tokens never made from text."""

import hashlib
import json
import shutil

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from lclm.data.tokenizer import load_tokenizer

KINDS = ("hf", "tiktoken", "sentencepiece")
SPECIAL_TEXT = "a <|end_of_text|> b</s><s><|begin_of_text|><unk><|eot_id|> c"


@pytest.mark.parametrize("kind", KINDS)
def test_kind_is_told_by_content(tokenizer_files, tmp_path, kind):
    renamed = tmp_path / "whatever.bin"
    shutil.copy(tokenizer_files[kind], renamed)
    for path in (tokenizer_files[kind], tokenizer_files[kind].parent, renamed):
        tokenizer = load_tokenizer(path)
        assert tokenizer.kind == kind
        assert tokenizer.sha256 == hashlib.sha256(renamed.read_bytes()).hexdigest()
    assert load_tokenizer(renamed).files == [renamed]


@pytest.mark.parametrize("kind", KINDS)
def test_text_comes_back(tokenizer_files, kind):
    tokenizer = load_tokenizer(tokenizer_files[kind])
    texts = ["hello world", "x =  1\n\ty", "gr\u00fc\u00df \u65e5\u672c \U0001f600", SPECIAL_TEXT]
    ids = tokenizer.encode_batch(texts)
    assert ids == [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(item) for item in ids] == texts
    assert all(0 <= n < tokenizer.vocab_size for item in ids for n in item)
    assert tokenizer.encode("") == []


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_spells_a_special_token_stays_text(tokenizer_files, kind):
    tokenizer = load_tokenizer(tokenizer_files[kind])
    assert not {tokenizer.eod_id, tokenizer.bos_id} & set(tokenizer.encode(SPECIAL_TEXT))


def test_special_ids(tokenizer_files):
    ids = {kind: load_tokenizer(tokenizer_files[kind]) for kind in KINDS}
    assert (ids["hf"].bos_id, ids["hf"].eod_id, ids["hf"].vocab_size) == (0, 1, 300)
    # as in Llama 3: 128000 ranks, then 128000 is the first special token and 128001 the second
    tiktoken = ids["tiktoken"]
    assert (tiktoken.bos_id, tiktoken.eod_id, tiktoken.vocab_size) == (264, 265, 264 + 256)
    assert tiktoken.decode([265, 264 + 9]) == "<|end_of_text|><|eot_id|>"
    assert (ids["sentencepiece"].bos_id, ids["sentencepiece"].eod_id) == (1, 2)


def test_tiktoken_merges_by_rank(tokenizer_files):
    tokenizer = load_tokenizer(tokenizer_files["tiktoken"])
    assert tokenizer.encode("hello world") == [259, 263]
    assert tokenizer.encode("hell") == [258]


def test_tiktoken_survives_long_white_space(tokenizer_files):
    tokenizer = load_tokenizer(tokenizer_files["tiktoken"])
    text = "x" + " " * 1_500_000 + "y"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def save_with_special(folder, model, trainer, splitter):
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = splitter
    tokenizer.train_from_iterator(["up down left", "up down"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain.encode_special_tokens = True
    return plain


@pytest.mark.parametrize(
    ("model", "trainer"),
    [
        (models.Unigram(), trainers.UnigramTrainer(unk_token="<unk>", vocab_size=40)),
        (models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer()),
    ],
)
def test_special_tokens_inside_the_models_vocabulary(tmp_path, model, trainer):
    """Models that reach a special token without looking it up by name."""
    trainer.special_tokens = ["<unk>", "</s>"]
    trainer.show_progress = False
    plain = save_with_special(tmp_path, model, trainer, pre_tokenizers.WhitespaceSplit())
    eod = plain.token_to_id("</s>")
    assert eod in plain.encode("up </s> down").ids, "the trap this test is about"
    tokenizer = load_tokenizer(tmp_path)
    assert eod not in tokenizer.encode("up </s> down")
    assert tokenizer.eod_id == eod
    assert tokenizer.encode("up down") == plain.encode("up down").ids
    assert tokenizer.vocab_size == plain.get_vocab_size()


def test_special_tokens_beside_the_models_vocabulary(tokenizer_files, tmp_path):
    """As in Llama 3's tokenizer.json: special tokens that only a look-up by name can give."""
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_files["hf"]))
    tokenizer.add_special_tokens(["<|eot_id|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    eot = tokenizer.token_to_id("<|eot_id|>")
    assert eot == 300 and eot in tokenizer.encode(SPECIAL_TEXT).ids
    ours = load_tokenizer(tmp_path)
    assert eot not in ours.encode(SPECIAL_TEXT) and ours.vocab_size == 301
    assert ours.decode(ours.encode(SPECIAL_TEXT)) == SPECIAL_TEXT


def test_special_token_that_merges_can_build(tmp_path):
    tree = json.loads(tokenizers.Tokenizer(models.BPE()).to_str())
    names = ["<", "/", "s", ">", "</", "s>", "</s>"]
    tree["model"]["vocab"] = {name: number for number, name in enumerate(names)}
    tree["model"]["merges"] = [["<", "/"], ["s", ">"], ["</", "s>"]]
    tree["added_tokens"] = [
        {
            "id": 6, "content": "</s>", "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True,
        }
    ]  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("</s>") == [4, 5]
    assert tokenizer.decode([6]) == "</s>" and tokenizer.eod_id == 6


def test_truncation_and_padding_of_the_file_are_off(tokenizer_files, tmp_path):
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_files["hf"]))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    plain = load_tokenizer(tokenizer_files["hf"])
    text = "the cat sat on the mat and the cat sat"
    assert load_tokenizer(tmp_path).encode(text) == plain.encode(text)


@pytest.mark.parametrize("value", ["he", {"content": "he", "special": True}])
def test_eod_is_the_configured_one(tokenizer_files, tmp_path, value):
    shutil.copy(tokenizer_files["hf"], tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": value}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode([tokenizer.eod_id]) == "he"
    assert tokenizer.bos_id == 0
    assert [file.name for file in tokenizer.files] == ["tokenizer.json", "tokenizer_config.json"]


def test_configured_token_that_does_not_exist(tokenizer_files, tmp_path):
    shutil.copy(tokenizer_files["hf"], tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    with pytest.raises(ValueError, match=r"eos_token is '<eos>', which tokenizer\.json does not"):
        load_tokenizer(tmp_path)


def test_missing_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(ValueError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{ not json", "starts like JSON but is not a Hugging Face tokenizer.json"),
        ('{"config": {}, "vocab": []}', "it has no 'model'"),
        ("plain text\n", "neither a Hugging Face .* nor a SentencePiece model"),
        ("", "nor a SentencePiece model"),
        ("IQ== 0\nIg== x\n", "line 2: .* is not a base64 token and a rank"),
        ("IQ== 0\nIg== 2\n", "must have the ranks 0 to 1"),
        ("IQ== 0\nIg== 1\n", "include all 256 bytes"),
    ],
)
def test_files_that_are_no_tokenizer(tmp_path, content, message):
    path = tmp_path / "tokenizer.model"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(path)


def test_tiktoken_files_of_other_models_are_refused(tokenizer_files, tmp_path, monkeypatch):
    monkeypatch.setattr("lclm.data.tokenizer.OTHER_TIKTOKEN", {264: "Other"})
    with pytest.raises(ValueError, match="264 ranks are those of Other"):
        load_tokenizer(tokenizer_files["tiktoken"])

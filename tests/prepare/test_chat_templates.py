"""Chat templates of released models: ids equal transformers', and where assistants speak."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from lclm.data.tokenizer import load_tokenizer
from lclm.prepare.chat import ChatOptions, ChatTemplate, check_conversation

SPEC = importlib.util.find_spec("trl")
assert SPEC is not None and SPEC.submodule_search_locations
FOLDER = Path(SPEC.submodule_search_locations[0]) / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja") if not path.stem.endswith("_training"))
PARTS_ONLY = ("idefics3", "llava_next", "smolvlm")  # a content that is one text they do not show
BY_NEXT_ROLE = {"glm4moe": "<|user|>"}  # what ends an assistant's turn there
NO_SYSTEM = ("gemma",)
SPECIAL = re.compile(
    r"<[|\uff5c/]?[A-Za-z_][\w\u2581.|\uff5c-]*>|<\uff5c[^\uff5c>]+\uff5c>|\[/?[A-Z_]{3,}\]"
)
TEXT = Path(json.__file__).read_text(encoding="utf-8")

QUESTION = {"role": "user", "content": "hello world, the cat?"}
ANSWER = {"role": "assistant", "content": "a long road\n\ngoes over"}
TALKS = {
    "one turn": [QUESTION, ANSWER],
    "system": [{"role": "system", "content": "be kind"}, QUESTION, ANSWER],
    "two turns": [QUESTION, ANSWER, {"role": "user", "content": "x"}, ANSWER | {"content": "y 1"}],
}


def train(kind: str) -> tokenizers.Tokenizer:
    """Byte-level like Llama 3 and Qwen; or SentencePiece-like, with a space before the text."""
    if kind == "byte-level":
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=500, initial_alphabet=letters, show_progress=False
        )
    else:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<u>"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=kind)
        tokenizer.decoder = tokenizers.decoders.Metaspace()
        byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=700, special_tokens=["<u>", *byte_tokens], show_progress=False
        )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


@pytest.fixture(scope="module")
def trained():
    return {kind: train(kind).to_str() for kind in ("byte-level", "first", "always")}


def write_folder(root: Path, trained: str, template: str) -> PreTrainedTokenizerFast:
    """A tokenizer with the template's special tokens; its thoughts' marks are ordinary ones."""
    tokenizer = tokenizers.Tokenizer.from_str(trained)
    names = sorted({"<s>", "</s>", *SPECIAL.findall(template)})
    tokenizer.add_tokens([name for name in names if "think" in name])
    tokenizer.add_special_tokens(
        [
            tokenizers.AddedToken(name, normalized=False, rstrip=name == "<|user|>")
            for name in names
            if "think" not in name
        ]
    )
    root.mkdir()
    tokenizer.save(str(root / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    (root / "tokenizer_config.json").write_text(json.dumps(named))
    (root / "chat_template.jinja").write_text(template)
    return PreTrainedTokenizerFast(tokenizer_file=str(root / "tokenizer.json"), **named)


def in_parts(messages):
    return [
        message | {"content": [{"type": "text", "text": message["content"]}]}
        for message in messages
    ]


KINDS = [
    pytest.param(name, kind, marks=[pytest.mark.long] if is_long else [])
    for name in NAMES
    for kind in ("byte-level", "first", "always")
    for is_long in [kind != "byte-level" and name not in ("cohere", "llama3", "phi3", "qwen3")]
]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_ids_equal_transformers(trained, tmp_path, name, kind):
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    theirs = write_folder(tmp_path / "t", trained[kind], source)
    ours = load_tokenizer(tmp_path / "t")
    chat = ChatTemplate(ChatOptions("tokenizer", end_token=BY_NEXT_ROLE.get(name, "")), ours)
    for which, messages in TALKS.items():
        if which == "system" and name in NO_SYSTEM:
            with pytest.raises(ValueError, match="System role not supported"):
                chat.encode(check_conversation({"messages": messages}))
            continue
        ids, targets = chat.encode(check_conversation({"messages": messages}))
        given = in_parts(messages) if name in PARTS_ONLY else messages
        expected = theirs.apply_chat_template(
            given, chat_template=source, tokenize=True, return_dict=False
        )
        end = [ours.special_id(BY_NEXT_ROLE[name])] if name in BY_NEXT_ROLE else []
        assert ids == [*expected, *end]
        check_turns(theirs, messages, ids, targets)


def check_turns(theirs, messages, ids, targets):
    """The words of every assistant and one special token at their end, and no other's words."""
    runs, run = [], []
    for token, target in [*zip(ids, targets), (None, 0)]:
        if target:
            run.append(token)
        elif run:
            runs.append(run)
            run = []
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert len(runs) == len(answers)
    for run, answer in zip(runs, answers):
        said = theirs.decode(run).replace("\u2581", " ")
        assert re.sub(r"\s", "", answer) in re.sub(r"\s", "", said)
        assert "hello" not in said and "be kind" not in said and "user\n" not in said
        assert theirs.convert_ids_to_tokens(run[-1]) in theirs.get_added_vocab()


@pytest.mark.parametrize("name", ["llama3", "cohere", "cohere2", "phi3", "lfm2", "qwen2_5_vl"])
def test_turns_are_those_the_training_template_marks(trained, tmp_path, name):
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    marked = (FOLDER / f"{name}_training.jinja").read_text(encoding="utf-8")
    write_folder(tmp_path / "plain", trained["byte-level"], source)
    theirs = write_folder(tmp_path / "marked", trained["byte-level"], marked)
    talk = check_conversation({"messages": TALKS["one turn"]})
    plain, by_marks = (
        ChatTemplate(ChatOptions("tokenizer"), load_tokenizer(tmp_path / which)).encode(talk)
        for which in ("plain", "marked")
    )
    assert plain == by_marks
    masked = theirs.apply_chat_template(
        TALKS["one turn"], chat_template=marked, tokenize=True, return_dict=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    # theirs may hold the newline behind the end of a turn, which no model has to say
    difference = [t for t, a, b in zip(plain[0], masked["assistant_masks"], plain[1]) if a != b]
    assert theirs.decode(difference).strip() == ""


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": "<|im_end|>", "b": 2}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {
    "type": "object", "properties": {"a": {"type": "string", "description": "one"}}}}}  # fmt: skip


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_instruct_2507"])
def test_calls_of_tools_and_thoughts_are_targets(trained, tmp_path, name):
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    theirs = write_folder(tmp_path / "t", trained["byte-level"], source)
    messages = [
        QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "it is 3"},
    ]
    if name == "qwen3":
        messages[1]["reasoning_content"] = "hm"
    talk = check_conversation({"messages": messages, "tools": [TOOL], "url": "not of the talk"})
    ids, targets = ChatTemplate(ChatOptions("tokenizer"), load_tokenizer(tmp_path / "t")).encode(
        talk
    )
    text = theirs.apply_chat_template(messages, tools=[TOOL], chat_template=source, tokenize=False)
    assert theirs.decode(ids) == text
    said = theirs.decode([token for token, target in zip(ids, targets) if target])
    call = '<tool_call>\n{"name": "add", "arguments": {"a": "<|im_end|>", "b": 2}}\n</tool_call>'
    thought = "<think>\nhm\n</think>\n\n" if name == "qwen3" else ""
    assert said.startswith(f"{thought}{call}<|im_end|>") and said.endswith("it is 3<|im_end|>")
    num_ends = ids.count(theirs.convert_tokens_to_ids("<|im_end|>"))
    assert num_ends == text.count("<|im_end|>") - 1, "the one in the call is text"


def test_an_assistant_who_speaks_first_says_its_words_alone(trained, tmp_path):
    source = (FOLDER / "qwen2_5.jinja").read_text(encoding="utf-8")
    theirs = write_folder(tmp_path / "t", trained["byte-level"], source)
    talk = check_conversation({"messages": [ANSWER]})
    ids, targets = ChatTemplate(ChatOptions("tokenizer"), load_tokenizer(tmp_path / "t")).encode(
        talk
    )
    said = theirs.decode([token for token, target in zip(ids, targets) if target])
    assert said == ANSWER["content"] + "<|im_end|>"

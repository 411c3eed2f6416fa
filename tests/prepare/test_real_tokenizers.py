"""Tokenizers that people have: Llama 3's file, and the SentencePiece models of Mistral."""

import importlib.util
import json
from pathlib import Path

import pytest

from lclm.data.indexed import IndexedReader
from lclm.data.tokenizer import load_tokenizer
from lclm.prepare import gigatoken
from lclm.prepare.chat import ChatOptions, ChatTemplate, check_conversation
from lclm.prepare.encoder import encode_sources
from lclm.prepare.readers import find_sources
from lclm.prepare.worker import EncodeOptions

TALK = [  # no space at the ends of a turn: Hugging Face's template strips it, Meta's code does not
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "what is  7 x 6?"},
    {"role": "assistant", "content": "42, \u56db\u5341\u4e8c\n\n\tof course"},
    {"role": "user", "content": "<|eot_id|> and then?"},
    {"role": "assistant", "content": "nothing"},
]


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


LLAMA3 = package_folder("llama_models") / "llama3" / "tokenizer.model"
MISTRAL = sorted((package_folder("mistral_common") / "data").glob("*.model.v*"))


def real_texts() -> list[str]:
    """Source code and its documentation strings, and texts made to be difficult."""
    files = sorted(Path(json.__file__).parent.glob("*.py"))
    files += sorted(package_folder("email").glob("*.py"))
    special = "<|begin_of_text|>a<|eot_id|> <|end_of_text|><s>b</s> [INST] c [/INST]"
    return [file.read_text(encoding="utf-8") for file in files] + [special, *gigatoken.PROBES]


def test_llama_3_gives_the_ids_of_its_own_library() -> None:
    from llama_models.llama3.tokenizer import Tokenizer as Theirs

    ours, theirs = load_tokenizer(LLAMA3), Theirs(LLAMA3)
    assert ours.kind == "tiktoken"
    assert (ours.vocab_size, ours.bos_id, ours.eod_id) == (128256, 128000, 128001)
    for text in real_texts():
        ids = theirs.encode(
            text, bos=False, eos=False, allowed_special=set(), disallowed_special=()
        )
        assert ours.encode(text) == ids
        assert ours.decode(ids) == text


def test_llama_3_conversations_are_those_of_its_own_library() -> None:
    from llama_models.datatypes import RawMessage
    from llama_models.llama3.chat_format import ChatFormat
    from llama_models.llama3.tokenizer import Tokenizer as Theirs

    tokens, targets = ChatTemplate(ChatOptions("llama3"), load_tokenizer(LLAMA3)).encode(
        check_conversation({"messages": TALK})
    )
    theirs = ChatFormat(Theirs(LLAMA3)).encode_dialog_prompt([RawMessage(**turn) for turn in TALK])
    header = ChatFormat(Theirs(LLAMA3))._encode_header("assistant")
    assert theirs.tokens[-len(header) :] == header  # of the answer to come
    assert tokens == theirs.tokens[: -len(header)]
    assert tokens[-1] == load_tokenizer(LLAMA3).special_id("<|eot_id|>") and targets[-1]


@pytest.mark.parametrize("path", [LLAMA3, *MISTRAL], ids=lambda path: path.name)
def test_gigatoken_writes_what_the_ordinary_library_writes(path: Path, tmp_path: Path) -> None:
    texts = real_texts()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "texts.jsonl").write_text(lines, encoding="utf-8")
    tokenizer = load_tokenizer(path)
    sources = find_sources([tmp_path / "texts.jsonl"])
    written = []
    for library in ("gigatoken", "standard"):
        prefix = str(tmp_path / library)
        encode_sources(sources, tokenizer, prefix, EncodeOptions(library=library))
        written.append([Path(f"{prefix}.{kind}").read_bytes() for kind in ("bin", "idx")])
        reader = IndexedReader(prefix)
        for number in range(3):
            assert tokenizer.decode(reader.read(number).tolist()) == texts[number]
    assert written[0] == written[1]


MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
    "{{ '[INST] ' + message.content + '[/INST]' }}"
    "{% else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"
)


def test_mistral_conversations_are_those_of_its_own_library(tmp_path: Path) -> None:
    from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    (model,) = [path for path in MISTRAL if path.name.endswith(".v3")]
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    names = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": MISTRAL_TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    contents = ["Hello", "what is  7 x 6?", "42, \u56db\u5341\u4e8c\n\n\tof course", "\u00e9 then?"]
    request = ChatCompletionRequest(
        messages=[
            UserMessage(content=contents[0]),
            AssistantMessage(content=contents[1]),
            UserMessage(content=contents[2]),
        ]
    )
    theirs = MistralTokenizer.from_file(str(model)).encode_chat_completion(request)
    messages = [
        {"role": "user" if number % 2 == 0 else "assistant", "content": content}
        for number, content in enumerate(contents)
    ]
    tokenizer = load_tokenizer(tmp_path)
    chat = ChatTemplate(ChatOptions("tokenizer"), tokenizer)
    ids, targets = chat.encode(check_conversation({"messages": messages}))
    assert ids[: len(theirs.tokens)] == theirs.tokens, "up to the second answer"
    assert ids[-1] == tokenizer.special_id("</s>") and targets[-1] == 1
    said = tokenizer.decode([token for token, target in zip(ids, targets) if target])
    assert said.split() == " ".join(contents[1::2]).split()


def test_llama_3_template_gives_the_ids_of_its_own_library(tmp_path: Path) -> None:
    from llama_models.datatypes import RawMessage
    from llama_models.llama3.chat_format import ChatFormat
    from llama_models.llama3.tokenizer import Tokenizer as Theirs

    (tmp_path / "tokenizer.model").write_bytes(LLAMA3.read_bytes())
    template = package_folder("trl") / "chat_templates" / "llama3.jinja"
    (tmp_path / "chat_template.jinja").write_text(template.read_text(encoding="utf-8"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<|begin_of_text|>"}')
    chat = ChatTemplate(ChatOptions("tokenizer"), load_tokenizer(tmp_path))
    tokens, targets = chat.encode(check_conversation({"messages": TALK}))
    theirs = ChatFormat(Theirs(LLAMA3)).encode_dialog_prompt([RawMessage(**turn) for turn in TALK])
    assert tokens == theirs.tokens[: len(tokens)]
    named = ChatTemplate(ChatOptions("llama3"), load_tokenizer(LLAMA3))
    assert (tokens, targets) == named.encode(check_conversation({"messages": TALK}))

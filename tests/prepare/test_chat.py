"""Conversations: tokens equal transformers', what is trained on, what is refused."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from lclm.config import MixtureEntry
from lclm.data.indexed import IndexedReader
from lclm.data.labels import build_label_weights, build_labels
from lclm.data.stage_rows import StageRows
from lclm.data.tokenizer import load_tokenizer
from lclm.prepare.chat import ChatOptions, ChatTemplate, Conversation, check_conversation
from lclm.prepare.encoder import encode_sources
from lclm.prepare.merge import merge_prefixes
from lclm.prepare.readers import find_sources
from lclm.prepare.resume import Unfinished
from lclm.prepare.worker import EncodeOptions

ROOT = Path(__file__).resolve().parents[2]
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
CHATML = (
    "{%- for message in messages %}\n"
    "    {%- if message.role not in ['system', 'user', 'assistant'] %}\n"
    "        {{- raise_exception('no such role') }}\n    {%- endif %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' }}\n"
    "    {%- if message.role == 'assistant' %}{% generation %}{{ message.content }}"
    "{{ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}\n"
    "    {%- else %}{{ message.content + '<|im_end|>\\n' }}{% endif %}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
           "<|eot_id|>", "<|im_start|>", "<|im_end|>"]  # fmt: skip
TALK = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hello world, the cat?"},
    {"role": "assistant", "content": "a long road\n\ngoes over"},
    {"role": "user", "content": "x + 1"},
    {"role": "assistant", "content": "names: Anna"},
]


@pytest.fixture
def folder(tokenizer_files, tmp_path):
    """A tokenizer folder with the special tokens of both formats; write(template) sets its own."""
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_files["hf"]))
    tokenizer.add_special_tokens(SPECIAL)
    root = tmp_path / "tokenizer"
    root.mkdir()
    tokenizer.save(str(root / "tokenizer.json"))

    def write(template):
        config = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "chat_template": template}
        if template is None:
            del config["chat_template"]
        (root / "tokenizer_config.json").write_text(json.dumps(config))
        return load_tokenizer(root)

    write(None)
    return root, write


def talk(*messages, **extras):
    return check_conversation({"messages": list(messages)} | extras)


def said(tokenizer, ids, targets):
    return tokenizer.decode([token for token, target in zip(ids, targets) if target])


def by_transformers(root, template, messages):
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(root / "tokenizer.json"), bos_token=SPECIAL[0]
    )
    return theirs.apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=True,
        return_assistant_tokens_mask="generation" in template,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "template"), [("llama3", LLAMA3), ("chatml", CHATML)])
@pytest.mark.parametrize("source", ["named", "tokenizer"])
def test_tokens_and_targets_equal_transformers(folder, name, template, source):
    root, write = folder
    tokenizer = write(template)
    chat = ChatTemplate(ChatOptions(name if source == "named" else "tokenizer"), tokenizer)
    for messages in (TALK, TALK[1:3], TALK[:3]):
        ids, targets = chat.encode(talk(*messages))
        theirs = by_transformers(root, template, messages)
        assert ids == list(theirs["input_ids"])
        if name == "chatml":
            assert targets == list(theirs["assistant_masks"])
        end = "<|eot_id|>" if name == "llama3" else "<|im_end|>"
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        assert said(tokenizer, ids, targets) == "".join(answer + end for answer in answers)


@pytest.mark.parametrize("source", ["llama3", "tokenizer"])
@pytest.mark.parametrize("content", ["a<|eot_id|>b\ue000", "<|eot_id|>", "\ue000\uf8ff"])
def test_what_contents_spell_stays_text(folder, source, content):
    _, write = folder
    tokenizer = write(LLAMA3)
    question = {"role": "user", "content": content}
    answer = {"role": "assistant", "content": content}
    ids, targets = ChatTemplate(ChatOptions(source), tokenizer).encode(talk(question, answer))
    eot = tokenizer.special_id("<|eot_id|>")
    assert ids.count(eot) == 2 and ids[-1] == eot and targets[-1] == 1
    learned = [token for token, target in zip(ids, targets) if target]
    assert learned == [*tokenizer.encode(content), eot]


def test_what_templates_refuse(folder, tokenizer_files):
    _, write = folder
    with pytest.raises(ValueError, match="brings no chat template"):
        ChatTemplate(ChatOptions("tokenizer"), write(None))
    with pytest.raises(ValueError, match="chat template:"):
        ChatTemplate(ChatOptions("tokenizer"), write("{% for %}"))
    conversation = Conversation([{"role": "tool", "content": "x"}], [1])
    with pytest.raises(ValueError, match="refuses it: no such role"):
        ChatTemplate(ChatOptions("tokenizer"), write(CHATML)).encode(conversation)
    with pytest.raises(ValueError, match=r"has no special token <\|im_start\|>, <\|im_end\|>"):
        ChatTemplate(ChatOptions("chatml"), load_tokenizer(tokenizer_files["tiktoken"]))
    with pytest.raises(ValueError, match="use one of llama3"):
        ChatTemplate(ChatOptions("alpaca"), write(None))


def test_the_token_that_ends_a_turn_is_never_left_out(folder):
    _, write = folder
    by_next_role = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = write(by_next_role)
    with pytest.raises(ValueError, match=r"end of message 2: .* not learn to stop; .*--end-token"):
        ChatTemplate(ChatOptions("tokenizer"), tokenizer).encode(talk(*TALK))
    with pytest.raises(ValueError, match=r"no special token <\|end\|>, which --end-token needs"):
        ChatTemplate(ChatOptions("tokenizer", end_token="<|end|>"), tokenizer)
    ids, targets = ChatTemplate(ChatOptions("tokenizer", end_token="<|im_end|>"), tokenizer).encode(
        talk(*TALK)
    )
    answers = [TALK[2]["content"] + "<|im_start|>", TALK[4]["content"] + "<|im_end|>"]
    assert said(tokenizer, ids, targets) == "".join(answers)


def test_a_message_of_weight_0_is_no_target(folder):
    tokenizer = folder[1](None)
    messages = [dict(message) for message in TALK]
    messages[2]["weight"] = 0
    messages[4]["weight"] = 1
    ids, targets = ChatTemplate(ChatOptions("llama3"), tokenizer).encode(talk(*messages))
    assert said(tokenizer, ids, targets) == TALK[4]["content"] + "<|eot_id|>"
    assert ids == ChatTemplate(ChatOptions("llama3"), tokenizer).encode(talk(*TALK))[0]


USER, ANSWER = TALK[1], {"role": "assistant", "content": "x"}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}


@pytest.mark.parametrize("source", ["llama3", "chatml", "tokenizer"])
@pytest.mark.parametrize(
    ("messages", "extras", "reason"),
    [
        ([USER, ANSWER | {"reasoning_content": "hm"}], {}, "message 1 has reasoning_content"),
        ([USER, CALL], {}, "message 1 has tool_calls"),
        ([USER, ANSWER], {"tools": [{"name": "f"}]}, "has tools"),
        ([USER, ANSWER], {"chat_template_kwargs": {"date": "now"}}, "has date"),
    ],
)
def test_what_the_template_does_not_use_is_refused(folder, source, messages, extras, reason):
    tokenizer = folder[1](CHATML)
    with pytest.raises(ValueError, match=reason + ", which the chat template does"):
        ChatTemplate(ChatOptions(source), tokenizer).encode(talk(*messages, **extras))


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no list of messages"),
        ("hello", "no list of messages"),
        ([{"content": "x"}], "message 0 is no object with a role"),
        ([{"role": "user"}], "message 0 has no text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 0 has no text"),
        ([{"role": "user", "content": "x"}], "no message of an assistant"),
        ([USER, ANSWER | {"weight": 0.5}], "message 1 has weight 0.5"),
    ],
)
def test_messages_that_are_none(messages, reason):
    with pytest.raises(ValueError, match=reason):
        check_conversation({"messages": messages})


def test_parts_of_text_are_joined(folder):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    for source, template in [("llama3", None), ("tokenizer", LLAMA3)]:
        chat = ChatTemplate(ChatOptions(source), folder[1](template))
        joined, split = (
            chat.encode(talk(USER, {"role": "assistant", "content": content}))
            for content in ("ab", parts)
        )
        assert joined == split


def test_from_lines_to_weighted_labels(folder, tmp_path):
    root, _ = folder
    path = tmp_path / "talks.jsonl"
    path.write_text((json.dumps({"messages": TALK}) + "\n\n") * 3)
    command = [sys.executable, ROOT / "tools/preprocess_data.py", "--input", path, "--chat",
               "--chat-template", "llama3", "--prompt-weight", "0.25", "--tokenizer", root,
               "--output-prefix", tmp_path / "sft"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tokenizer = load_tokenizer(root)
    ids, targets = ChatTemplate(ChatOptions("llama3"), tokenizer).encode(talk(*TALK))
    assert IndexedReader(tmp_path / "sft").lengths.tolist() == [len(ids)] * 3
    length = 2 * len(ids) + 9
    rows = StageRows(
        [MixtureEntry(prefix=str(tmp_path / "sft"), packing="best-fit", share=1.0)], length, 1, 0
    )
    row = rows.row(0)
    assert row.doc_lengths.tolist() == [len(ids), len(ids), 9], "conversations are not cut"
    expected = np.where(np.array(targets) == 1, 1, 0.25)
    assert row.token_weights.tolist() == [*expected, *expected, *[0] * 9]
    labels = build_labels(row.tokens, row.doc_lengths)
    weights = build_label_weights(row.token_weights, row.doc_lengths, labels)
    eot = tokenizer.special_id("<|eot_id|>")
    assert labels[len(ids) - 2] == eot and weights[len(ids) - 2] == 1, "the last one is trained"
    assert labels[len(ids) - 1] == -100 and weights[len(ids) - 1] == 0
    assert (labels != -100).sum() == 2 * (len(ids) - 1) and (weights > 0).sum() == 2 * (
        len(ids) - 1
    )


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ((), "give --chat-template"),
        (("--chat-template", "llama3", "--append-eod"), "does not go with --append-eod or"),
        (("--chat-template", "llama3", "--prompt-weight", "2"), "must be from 0 to 1"),
        (("--chat-template", "llama3"), "line 2: holds no message of an assistant"),
    ],
)
def test_bad_chat_input_ends_with_2_and_leaves_nothing(folder, tmp_path, extra, message):
    path = tmp_path / "talks.jsonl"
    lines = [{"messages": TALK}, {"messages": TALK[:2]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, ROOT / "tools/preprocess_data.py", "--input", path, "--chat",
               "--tokenizer", folder[0], "--output-prefix", tmp_path / "sft", *extra]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("sft*"))


def test_bad_conversations_are_skipped_and_named(folder, tmp_path):
    path = tmp_path / "talks.jsonl"
    lines = [{"messages": TALK}, {"messages": []}, {"talk": 1}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "nonsense\n")
    options = EncodeOptions(("messages",), chat=ChatOptions("llama3"), on_error="skip")
    sources, tokenizer = find_sources([path]), load_tokenizer(folder[0])
    summary = encode_sources(sources, tokenizer, str(tmp_path / "sft"), options)
    assert (summary.num_documents, summary.num_skipped) == (1, 3)
    reasons = ["no list of messages", "has no key 'messages'", "is not JSON"]
    assert all(reason in text for reason, text in zip(reasons, summary.named))
    assert summary.named[2].startswith(f"{path}, line 4")


def write_talks(path):
    """Conversations of different lengths; every fifth has a message of weight 0."""
    lines = []
    for number in range(60):
        messages = [dict(message) for message in TALK[1 : 3 + 2 * (number % 2)]]
        messages[1] |= {"content": f"answer {number} " * (number % 7 + 1)}
        if number % 5 == 0:
            messages[1]["weight"] = 0
        lines.append({"messages": messages, "url": number})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def encode_talks(folder, path, name, num_workers=1, shard=(0, 1), prompt_weight=0.5):
    prefix = path.parent / name / "sft"
    chat = ChatOptions("tokenizer", prompt_weight)
    options = EncodeOptions(("messages",), num_workers=num_workers, chat=chat, shard=shard)
    tokenizer = folder[1](CHATML)
    encode_sources(
        find_sources([path]), tokenizer, str(prefix), options, domain="d", block_bytes=2000
    )
    return {file.name: file.read_bytes() for file in prefix.parent.iterdir()}


def test_workers_write_the_tokens_and_weights_of_each_conversation(folder, tmp_path):
    lines = write_talks(tmp_path / "talks.jsonl")
    alone = encode_talks(folder, tmp_path / "talks.jsonl", "alone")
    assert set(alone) == {"sft.bin", "sft.idx", "sft.json", "sft.weights"}
    assert encode_talks(folder, tmp_path / "talks.jsonl", "pool", num_workers=2) == alone
    chat = ChatTemplate(ChatOptions("tokenizer"), folder[1](CHATML))
    expected = [chat.encode(check_conversation(line)) for line in lines]
    reader = IndexedReader(tmp_path / "alone" / "sft")
    for number, (ids, _) in enumerate(expected):
        assert reader.read(number).tolist() == ids
    assert alone["sft.weights"] == bytes(target for _, targets in expected for target in targets)
    assert json.loads(alone["sft.json"])["weight_values"] == [0.5, 1.0]


def test_conversations_broken_off_go_on(folder, tmp_path, monkeypatch, caplog):
    write_talks(tmp_path / "talks.jsonl")
    whole = encode_talks(folder, tmp_path / "talks.jsonl", "whole")
    save, calls = Unfinished.save, []

    def save_or_die(work):
        save(work)
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Unfinished, "save", save_or_die)
    with pytest.raises(KeyboardInterrupt):
        encode_talks(folder, tmp_path / "talks.jsonl", "twice")
    assert (tmp_path / "twice/sft.unfinished").is_dir()
    monkeypatch.setattr(Unfinished, "save", save)
    monkeypatch.setattr(logging.getLogger("lclm"), "propagate", True)
    caplog.set_level(logging.INFO)
    assert encode_talks(folder, tmp_path / "talks.jsonl", "twice") == whole
    assert "going on after 3 units" in caplog.text


def test_shards_join_to_the_whole(folder, tmp_path):
    path = tmp_path / "talks.jsonl"
    write_talks(path)
    whole = encode_talks(folder, path, "whole")
    for number in range(3):
        encode_talks(folder, path, f"part{number}", shard=(number, 3))
    shards = [str(tmp_path / f"part{number}/sft") for number in range(3)]
    merge_prefixes(shards, str(tmp_path / "joined/sft"))
    joined = {file.name: file.read_bytes() for file in (tmp_path / "joined").iterdir()}
    trees = [json.loads(files.pop("sft.json")) for files in (whole, joined)]
    assert joined == whole and trees[0] == trees[1]
    encode_talks(folder, path, "other", shard=(2, 3), prompt_weight=0.25)
    other = [*shards[:2], str(tmp_path / "other/sft")]
    with pytest.raises(ValueError, match=r"weights of targets are \[0.5, 1.0\] in .*part0/sft and"):
        merge_prefixes(other, str(tmp_path / "no"))


def test_rows_of_parquet_are_conversations(folder, tmp_path):
    lines = write_talks(tmp_path / "talks.jsonl")
    columns = {"messages": [line["messages"] for line in lines], "url": list(range(len(lines)))}
    pq.write_table(pa.table(columns), tmp_path / "talks.parquet", row_group_size=11)
    by_lines = encode_talks(folder, tmp_path / "talks.jsonl", "lines")
    by_rows = encode_talks(folder, tmp_path / "talks.parquet", "rows")
    for ending in ("bin", "idx", "weights"):
        assert by_rows[f"sft.{ending}"] == by_lines[f"sft.{ending}"]


def test_a_field_that_stands_twice_is_refused(folder, tmp_path):
    path = tmp_path / "talks.jsonl"
    path.write_text(
        '{"messages": [{"role": "user", "content": "a"}, '
        '{"role": "assistant", "content": "b", "content": "c"}]}\n'
    )
    with pytest.raises(ValueError, match="line 1: has the key 'content' twice"):
        encode_talks(folder, path, "out")
    assert not list((tmp_path / "out").iterdir())


def test_the_day_is_one_of_the_settings(folder):
    tokenizer = folder[1]("{{ strftime_now('%d %B %Y') }}" + CHATML)
    options = ChatOptions("tokenizer", today="2024-07-26")
    chat = ChatTemplate(options, tokenizer)
    assert chat.uses_date and not ChatTemplate(options, folder[1](CHATML)).uses_date
    ids, _ = chat.encode(talk(*TALK))
    assert tokenizer.decode(ids).startswith("26 July 2024")

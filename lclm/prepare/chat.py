"""Conversations to tokens and weights of targets.

A template turns messages into segments: special tokens by their id, text by the tokenizer, so text
that spells a special token stays text. Targets are what an assistant says and the token that ends
its turn (ProLong, arXiv 2410.02660; `<|eot_id|>` of Llama 3); the rest has the prompt weight.
"""

import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lclm.data.tokenizer import Tokenizer

TEMPLATES = ("llama3", "chatml", "tokenizer")
ESCAPE = "\ue000"  # private use: put into contents that spell special tokens while Jinja runs
Message = Mapping[str, str]


@dataclass(frozen=True)
class Segment:
    """A part of a conversation: text, or a special token by its name."""

    text: str
    is_special: bool
    is_target: bool


def check_messages(messages: object) -> list[dict[str, str]]:
    """Messages of one conversation as role and content.

    Raises:
        ValueError: says what is wrong, for the line it stands in.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("holds no list of messages")
    checked = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {number} is no object with a role")
        content = message.get("content")
        if isinstance(content, list) and all(
            isinstance(part, dict) and part.get("type") == "text" for part in content
        ):
            content = "".join(str(part.get("text", "")) for part in content)
        if not isinstance(content, str):
            raise ValueError(f"message {number} has no text as content")
        checked.append({"role": message["role"], "content": content})
    if not any(message["role"] == "assistant" for message in checked):
        raise ValueError("holds no message of an assistant: there is nothing to train on")
    return checked


class ChatTemplate:
    """One template with one tokenizer."""

    def __init__(self, name: str, tokenizer: Tokenizer) -> None:
        """Prepare it.

        Args:
            name: llama3, chatml, or tokenizer: the Jinja template that comes with the tokenizer.
            tokenizer: encodes text and knows the special tokens.

        Raises:
            ValueError: there is no such template, the tokenizer lacks one of its special tokens or
                brings no template, or jinja2 is not installed.
        """
        self._tokenizer = tokenizer
        self._name = name
        needed: tuple[str, ...] = ()
        if name == "llama3":
            self._segments: Callable[[Sequence[Message]], list[Segment]] = _llama3
            needed = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
        elif name == "chatml":
            self._segments = _chatml
            needed = ("<|im_start|>", "<|im_end|>")
        elif name == "tokenizer":
            self._segments = _JinjaTemplate(tokenizer)
        else:
            raise ValueError(f"--chat-template {name}: use one of {', '.join(TEMPLATES)}")
        missing = [token for token in needed if tokenizer.special_id(token) is None]
        if missing:
            raise ValueError(
                f"tokenizer {tokenizer.path}: has no special token {', '.join(missing)}, which the "
                f"template {name} needs; use another --chat-template or tokenizer"
            )

    def encode(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Token ids and, for each, 1 for a target and 0 for the prompt.

        Raises:
            ValueError: the template refuses the messages.
        """
        segments = [segment for segment in self._segments(messages) if segment.text]
        texts = [segment.text for segment in segments if not segment.is_special]
        encoded = iter(self._tokenizer.encode_batch(texts))
        ids: list[int] = []
        targets: list[int] = []
        for segment in segments:
            if segment.is_special:
                token = self._tokenizer.special_id(segment.text)
                assert token is not None, "templates use special tokens that are there"
                here = [token]
            else:
                here = next(encoded)
            ids += here
            targets += [int(segment.is_target)] * len(here)
        return ids, targets


def _llama3(messages: Sequence[Message]) -> list[Segment]:
    """Llama 3's format (ChatFormat of github.com/meta-llama/llama-models)."""
    segments = [Segment("<|begin_of_text|>", True, False)]
    for message in messages:
        is_target = message["role"] == "assistant"
        segments += [
            Segment("<|start_header_id|>", True, False),
            Segment(message["role"], False, False),
            Segment("<|end_header_id|>", True, False),
            Segment("\n\n", False, False),
            Segment(message["content"].strip(), False, is_target),
            Segment("<|eot_id|>", True, is_target),
        ]
    return segments


def _chatml(messages: Sequence[Message]) -> list[Segment]:
    segments = []
    for message in messages:
        is_target = message["role"] == "assistant"
        segments += [
            Segment("<|im_start|>", True, False),
            Segment(f"{message['role']}\n", False, False),
            Segment(message["content"], False, is_target),
            Segment("<|im_end|>", True, is_target),
            Segment("\n", False, False),
        ]
    return segments


class _JinjaTemplate:
    """The tokenizer's own template, rendered as transformers does.

    What an assistant says is what its message adds behind the generation prompt. A text is cut
    where that begins and ends; nearly all templates have a special token or a newline there.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        source, tokens = _find_template(tokenizer)
        try:
            sandbox = importlib.import_module("jinja2.sandbox")
            loops = importlib.import_module("jinja2.ext").loopcontrols
            errors = importlib.import_module("jinja2").TemplateError
        except ImportError as error:
            raise ValueError(
                "--chat-template tokenizer: needs the package jinja2, which is not installed; run: "
                "pip install jinja2"
            ) from error
        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loops]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        self._error = errors
        # a tag of transformers that marks the assistant's words; where they are is found otherwise
        plain = re.sub(r"\{%(-?)\s*(end)?generation\s*(-?)%\}", r"{#\1 generation \3#}", source)
        try:
            self._template = environment.from_string(plain)
        except errors as error:
            raise ValueError(f"tokenizer {tokenizer.path}: chat template: {error}") from error
        self._tokens = tokens
        names = sorted(tokenizer.special_names, key=len, reverse=True)
        self._specials = re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def _render(self, messages: Sequence[Message], has_prompt: bool) -> str:
        try:
            return str(
                self._template.render(
                    messages=messages, add_generation_prompt=has_prompt, **self._tokens
                )
            )
        except (self._error, TypeError, ValueError) as error:
            raise ValueError(f"the chat template refuses it: {error}") from error

    def __call__(self, messages: Sequence[Message]) -> list[Segment]:
        escaped = [
            {
                name: self._specials.sub(lambda found: found[0][0] + ESCAPE + found[0][1:], text)
                for name, text in message.items()
            }
            for message in messages
        ]
        whole = self._render(escaped, False)
        borders = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(escaped[:number], True) if number else ""
            after = self._render(escaped[: number + 1], False)
            if not (whole.startswith(after) and after.startswith(before)):
                raise ValueError(
                    f"the chat template does not append message {number}: what the assistant says "
                    "cannot be told apart; use a named --chat-template"
                )
            borders.append((len(before), self._end_of_turn(whole, len(before), len(after))))
        segments = []
        at = 0
        for start, end in [*borders, (len(whole), len(whole))]:
            segments += self._cut(whole[at:start], False) + self._cut(whole[start:end], True)
            at = end
        return segments

    def _end_of_turn(self, whole: str, start: int, end: int) -> int:
        """Behind the last special token, where only white space follows it."""
        last = None
        for found in self._specials.finditer(whole, start, end):
            last = found
        return last.end() if last and not whole[last.end() : end].strip() else end

    def _cut(self, text: str, is_target: bool) -> list[Segment]:
        segments = []
        at = 0
        for found in self._specials.finditer(text):
            plain = text[at : found.start()].replace(ESCAPE, "")
            segments += [Segment(plain, False, is_target), Segment(found[0], True, is_target)]
            at = found.end()
        return [*segments, Segment(text[at:].replace(ESCAPE, ""), False, is_target)]


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise ValueError(message)


def _find_template(tokenizer: Tokenizer) -> tuple[str, dict[str, str]]:
    """The template's source, and bos_token and eos_token by name."""
    folder = Path(tokenizer.files[0]).parent
    config: dict[str, Any] = {}
    if (folder / "tokenizer_config.json").is_file():
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    source = config.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = next((one["template"] for one in source if one["name"] == "default"), None)
    if (folder / "chat_template.jinja").is_file():
        source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if not isinstance(source, str):
        raise ValueError(
            f"tokenizer {tokenizer.path}: brings no chat template (chat_template.jinja, or "
            "chat_template in tokenizer_config.json); use --chat-template llama3 or chatml"
        )
    tokens = {}
    for name in ("bos_token", "eos_token"):
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        tokens[name] = value or ""
    return source, tokens

"""The Jinja template that comes with a tokenizer, rendered as transformers does.

Which characters are special tokens, and where an assistant speaks, is found in the rendered text:

- Only special tokens that the template writes are tokens. Those that a content spells are kept
  apart while Jinja runs by a character that the conversation does not hold.
- A turn is what `{% generation %}` marks, where the template has such marks. Elsewhere it is what
  the message adds behind the generation prompt; where a template writes earlier turns another way
  than the last one (Qwen3 and DeepSeek-R1 drop the thoughts), it is found around the content.
"""

import bisect
import datetime
import functools
import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lclm.data.tokenizer import Tokenizer
from lclm.data.tokenizer_files import read_companions
from lclm.prepare.special_tokens import Span

Message = dict[str, Any]
# transformers gives these to a template, whether it uses them or not
NO_EXTRAS: Mapping[str, Any] = {"tools": None, "documents": None}
PRIVATE_USE = range(0xE000, 0xF900)  # characters of Unicode that no text needs
GENERATION = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")
PROBES = [chr(place) for place in range(0xF8F0, 0xF8F4)]  # contents that no template writes
TURN_BEGIN, TURN_END = "\ufdd0", "\ufdd1"  # noncharacters: not in a text that is to be exchanged


class JinjaTemplate:
    """The chat template of a tokenizer's folder.

    Attributes:
        names: all that the template mentions: of variables, attributes, keys and texts.
    """

    def __init__(self, tokenizer: Tokenizer, today: str) -> None:
        """Compile it; `today` is an ISO date, or empty.

        Raises:
            ValueError: the tokenizer brings no template or a wrong one, or jinja2 is not installed.
        """
        source, self._tokens = _find_template(tokenizer)
        try:
            jinja2 = importlib.import_module("jinja2")
            environment = _make_environment(today)
        except ImportError as error:
            raise ValueError(
                "--chat-template tokenizer: needs the package jinja2, which is not installed; run: "
                "pip install jinja2"
            ) from error
        self._error = jinja2.TemplateError
        self._has_marks = GENERATION.search(source) is not None
        plain = GENERATION.sub(_mark_generation, source)
        try:
            self._template = environment.from_string(plain)
            self.names = _find_names(environment.parse(plain))
        except jinja2.TemplateError as error:
            raise ValueError(f"tokenizer {tokenizer.path}: chat template: {error}") from error
        self._source_characters = set(source)
        names = sorted(tokenizer.special_names, key=len, reverse=True)
        self._specials = re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def render(
        self, messages: Sequence[Message], extras: Mapping[str, Any]
    ) -> tuple[str, list[Span], dict[int, Span]]:
        """Text, spans of special tokens, and the span of each assistant's turn by message number.

        Args:
            messages: with role and content.
            extras: further variables of the template, such as tools.

        Raises:
            ValueError: the template refuses the conversation, or a turn cannot be found.
        """
        messages = [self.with_content(message, message["content"]) for message in messages]
        one = _Conversation(self, messages, extras)
        turns = one.find_marked() if self._has_marks else one.find_turns()
        return one.without_escapes(turns)

    def run(self, messages: Sequence[Message], extras: Mapping[str, Any], has_prompt: bool) -> str:
        """The text of the messages, with the generation prompt behind it if asked for."""
        try:
            return str(
                self._template.render(
                    {**NO_EXTRAS, **self._tokens, **extras},
                    messages=messages,
                    add_generation_prompt=has_prompt,
                )
            )
        except (self._error, TypeError, ValueError) as error:
            raise ValueError(f"the chat template refuses it: {error}") from error

    def find_specials(self, text: str, start: int = 0) -> Iterator[Span]:
        """Where special tokens are spelled."""
        return (found.span() for found in self._specials.finditer(text, start))

    @functools.cached_property
    def generation_prompt(self) -> str:
        """What the template writes where an assistant is to speak; empty where that is unclear."""
        question = [self.with_content({"role": "user"}, PROBES[0])]
        before, prompted = (self.run(question, {}, has_prompt) for has_prompt in (False, True))
        return prompted.removeprefix(before) if prompted.startswith(before) else ""

    @functools.cached_property
    def end_token(self) -> str:
        """The special token that ends a turn another follows; empty where none ends a turn."""
        roles = ("user", "assistant", "user", "assistant")
        talk = [self.with_content({"role": r}, p) for r, p in zip(roles, PROBES)]
        last = self.run(talk[:2], {}, False)
        if next(self.find_specials(last, last.rindex(PROBES[1])), None) is None:
            return ""
        text = self.run(talk, {}, False)
        return text[slice(*next(self.find_specials(text, text.rindex(PROBES[1]))))]

    @functools.cached_property
    def _wants_parts(self) -> bool:
        """Whether a content is shown only as a list of parts."""
        question: Message = {"role": "user", "content": PROBES[0]}
        try:
            return PROBES[0] not in self.run([question], {}, True)
        except ValueError:
            return True

    def with_content(self, message: Message, content: str | list[dict[str, str]]) -> Message:
        """A message with a content in the form that the template shows."""
        if self._wants_parts and isinstance(content, str):
            content = [{"type": "text", "text": content}]
        elif isinstance(content, list) and "text" not in self.names:
            content = "".join(part["text"] for part in content)
        return message | {"content": content}

    def escape(self, value: Any, mark: str) -> Any:
        """A value of JSON in which every spelled special token is broken by a mark."""
        if isinstance(value, str):
            return self._specials.sub(lambda found: found[0][0] + mark + found[0][1:], value)
        if isinstance(value, list):
            return [self.escape(item, mark) for item in value]
        if isinstance(value, dict):
            return {self.escape(key, mark): self.escape(item, mark) for key, item in value.items()}
        return value

    def choose_mark(self, text: str) -> str:
        """A character that neither this text nor the template holds."""
        used = self._source_characters | set(text)
        return next(mark for mark in map(chr, PRIVATE_USE) if mark not in used)

    def spells_special(self, text: str) -> bool:
        return self._specials.search(text) is not None


class _Conversation:
    """One conversation while it is rendered, its contents escaped."""

    def __init__(
        self, template: JinjaTemplate, messages: list[Message], extras: Mapping[str, Any]
    ) -> None:
        self._template = template
        spelled = json.dumps([messages, dict(extras)], ensure_ascii=False)
        self._probe = template.choose_mark(spelled)
        self._mark = ""
        self._messages = messages
        self._extras = extras
        # the spelling is looked for in JSON, where a quote is written another way: no token has one
        if template.spells_special(spelled):
            self._mark = template.choose_mark(spelled + self._probe)
            self._messages = template.escape(messages, self._mark)
            self._extras = template.escape(dict(extras), self._mark)
        self._text = template.run(self._messages, self._extras, False)

    def find_marked(self) -> dict[int, Span]:
        """The turns as the template marks them, up to the token that ends each."""
        pieces = re.split(f"([{TURN_BEGIN}{TURN_END}])", self._text)
        self._text = "".join(pieces[::2])
        spans: list[Span] = []
        at = 0
        for before, mark in zip(pieces[::2], [*pieces[1::2], ""]):
            at += len(before)
            if mark == TURN_BEGIN and (not spans or self._text[spans[-1][1] : at].strip()):
                spans.append((at, at))  # otherwise it goes on: its end token is marked apart
            elif mark == TURN_END:
                spans[-1] = (spans[-1][0], at)
        numbers = [n for n, message in enumerate(self._messages) if message["role"] == "assistant"]
        if len(spans) != len(numbers):
            raise ValueError(
                f"the chat template marks {len(spans)} turns by generation, and assistants speak "
                f"{len(numbers)} times; use a template that marks each turn, or none"
            )
        trimmed = [(start, self._without_white_space(start, end)) for start, end in spans]
        return dict(zip(numbers, trimmed))

    def find_turns(self) -> dict[int, Span]:
        """The turn of every assistant's message."""
        return {
            number: self._find_turn(number)
            for number, message in enumerate(self._messages)
            if message["role"] == "assistant"
        }

    def _find_turn(self, number: int) -> Span:
        start = self._behind_prompt(number)
        end = self._behind_message(number)
        content = None
        if start is None or end is None:
            content = self._find_content(number)
        if start is None:
            assert content is not None
            start = self._behind_header(content[0])
        if end is None:
            assert content is not None
            end = self._behind_end_token(content[1])
        return start, self._without_white_space(start, end)

    def _behind_prompt(self, number: int) -> int | None:
        """Length of the text that a model is given to write this message; None: it is another."""
        if number == 0:  # many templates refuse to render no message, or write a system's then
            return None
        before = self._template.run(self._messages[:number], self._extras, True)
        return len(before) if self._text.startswith(before) else None

    def _behind_message(self, number: int) -> int | None:
        """Length of the text up to this message; None: it is another text."""
        after = self._template.run(self._messages[: number + 1], self._extras, False)
        return len(after) if self._text.startswith(after) else None

    def _find_content(self, number: int) -> Span:
        """Where the text changes when the content of a message does."""
        messages = list(self._messages)
        messages[number] = self._template.with_content(messages[number], self._probe)
        other = self._template.run(messages, self._extras, False)
        if self._probe not in other:
            raise ValueError(
                f"the chat template does not show the content of message {number}: what the "
                "assistant says cannot be told apart; use a named --chat-template"
            )
        start = _count_equal(self._text, other)
        end = _count_equal(self._text[::-1], other[::-1])
        return start, max(start, len(self._text) - end)

    def _behind_header(self, content: int) -> int:
        """Behind the last generation prompt before a place, or as much of it as stands there."""
        prompt = self._template.generation_prompt.lstrip()
        first = next(self._template.find_specials(prompt), None)
        before = [span for span in self._template.find_specials(self._text) if span[1] <= content]
        if first is not None:
            token = prompt[slice(*first)]
            for start, end in reversed(before):
                if self._text[start:end] == token:
                    return start + _count_equal(self._text[start:], prompt[first[0] :])
        return before[-1][1] if before else content

    def _behind_end_token(self, content: int) -> int:
        """Behind the token that ends the turn of which the content ends at a place."""
        token = self._template.end_token
        for start, end in self._template.find_specials(self._text, content):
            if not token:
                return start
            if self._text[start:end] == token:
                return end
        return len(self._text)

    def _without_white_space(self, start: int, end: int) -> int:
        """The end of a turn, without what follows its last special token if that is white space."""
        last = None
        for span in self._template.find_specials(self._text[:end], start):
            last = span[1]
        return last if last is not None and not self._text[last:end].strip() else end

    def without_escapes(self, turns: dict[int, Span]) -> tuple[str, list[Span], dict[int, Span]]:
        """Text, specials and turns with the marks in spelled special tokens taken out."""
        specials = list(self._template.find_specials(self._text))
        if not self._mark:
            return self._text, specials, turns
        marks = [found.start() for found in re.finditer(self._mark, self._text)]

        def shift(span: Span) -> Span:
            start, end = (at - bisect.bisect_left(marks, at) for at in span)
            return start, end

        return (
            self._text.replace(self._mark, ""),
            list(map(shift, specials)),
            {number: shift(span) for number, span in turns.items()},
        )


def _count_equal(first: str, second: str) -> int:
    """Characters that two texts begin with alike."""
    pairs = enumerate(zip(first, second))
    return next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))


def _make_environment(today: str) -> Any:
    """Jinja with what transformers gives to chat templates."""
    now = datetime.datetime.fromisoformat(today) if today else datetime.datetime.now()
    sandbox = importlib.import_module("jinja2.sandbox")
    loops = importlib.import_module("jinja2.ext").loopcontrols
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loops]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = now.strftime
    return environment


def _mark_generation(found: re.Match[str]) -> str:
    """A tag of transformers around what an assistant says, as one that writes a mark."""
    left, is_end, right = found.groups()
    mark = TURN_END if is_end else TURN_BEGIN
    return f"{{%{left} if true %}}{mark}{{% endif {right}%}}"


def _find_names(tree: Any) -> set[str]:
    """Every name that a template mentions: of variables, attributes, keys and texts."""
    nodes = importlib.import_module("jinja2.nodes")
    names = {node.name for node in tree.find_all(nodes.Name)}
    names |= {node.attr for node in tree.find_all(nodes.Getattr)}
    return names | {str(node.value) for node in tree.find_all(nodes.Const)}


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> None:
    raise ValueError(message)


def _find_template(tokenizer: Tokenizer) -> tuple[str, dict[str, str]]:
    """The template's source, and the special tokens that it may use by name."""
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
    return source, read_companions(folder).names

"""Conversations to tokens and weights of targets.

A template turns a conversation into one text, in which it says where special tokens stand and what
an assistant says. The text is encoded once, as transformers' `apply_chat_template` does, so the ids
are equal; what a content spells stays text, also where it spells a special token. Targets are what
an assistant says and the token that ends its turn (ProLong, arXiv 2410.02660; `<|eot_id|>` of
Llama 3); the rest has the prompt weight.
"""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lclm.data.tokenizer import Tokenizer
from lclm.prepare.chat_template import JinjaTemplate
from lclm.prepare.special_tokens import Span, make_encoder

TEMPLATES = ("llama3", "chatml", "tokenizer")
MESSAGE = ("role", "content")  # fields of a message that every template uses
# What a record may hold beside its messages that belongs to the conversation; transformers' names.
EXTRAS = ("tools", "documents", "chat_template_kwargs")
Message = Mapping[str, Any]


@dataclass(frozen=True)
class ChatOptions:
    """How conversations become tokens.

    Attributes:
        template: llama3, chatml, or tokenizer: the Jinja template that comes with the tokenizer.
        prompt_weight: weight of everything that no assistant says; 0: not trained on.
        end_token: special token that ends an assistant's turn where the template writes none, but
            goes on with the next role; empty: such a conversation is refused.
        today: ISO date that a template which asks for the day gets; empty: today.
    """

    template: str
    prompt_weight: float = 0.0
    end_token: str = ""
    today: str = ""


@dataclass(frozen=True)
class Conversation:
    """What a template renders.

    Attributes:
        messages: role and content, and further fields that the template must know.
        weights: of each message, 1 (a target where an assistant speaks) or 0.
        extras: tools, documents and further variables of the template.
    """

    messages: list[dict[str, Any]]
    weights: list[int]
    extras: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: all of it.
        specials: spans that are special tokens, in order.
        turns: by the number of an assistant's message, the span of what it says, its end included.
    """

    text: str
    specials: list[Span]
    turns: dict[int, Span]


def check_conversation(record: Mapping[str, Any], key: str = "messages") -> Conversation:
    """The conversation of one record.

    Raises:
        ValueError: says what is wrong, for the line it stands in.
    """
    if key not in record:
        raise ValueError(f"has no key {key!r} (its keys: {', '.join(record)})")
    messages = record[key]
    if not isinstance(messages, list) or not messages:
        raise ValueError("holds no list of messages")
    checked, weights = [], []
    for number, message in enumerate(messages):
        fields, weight = _check_message(number, message)
        checked.append(fields)
        weights.append(weight)
    if not any(message["role"] == "assistant" for message in checked):
        raise ValueError("holds no message of an assistant: there is nothing to train on")
    return Conversation(checked, weights, _check_extras(record))


def _check_message(number: int, message: Any) -> tuple[dict[str, Any], int]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"message {number} is no object with a role")
    fields = {name: value for name, value in message.items() if value is not None}
    content = (
        fields.setdefault("content", "") if fields.get("tool_calls") else fields.get("content")
    )
    is_parts = isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    )
    if not isinstance(content, str) and not is_parts:
        raise ValueError(f"message {number} has no text as content")
    weight = fields.pop("weight", 1)
    if weight not in (0, 1):
        raise ValueError(f"message {number} has weight {weight!r}; only 0 and 1 are known")
    return fields, int(weight)


def _check_extras(record: Mapping[str, Any]) -> dict[str, Any]:
    extras = {name: record[name] for name in EXTRAS if record.get(name)}
    variables = extras.pop("chat_template_kwargs", {})
    if not isinstance(variables, dict):
        raise ValueError("chat_template_kwargs is no object")
    return extras | variables


class ChatTemplate:
    """One template with one tokenizer.

    Attributes:
        uses_date: whether the template writes the day on which it is rendered.
    """

    def __init__(self, options: ChatOptions, tokenizer: Tokenizer) -> None:
        """Prepare it.

        Args:
            options: which template, and how.
            tokenizer: encodes text and knows the special tokens.

        Raises:
            ValueError: an option is wrong, the tokenizer lacks one of the template's special tokens
                or brings no template, or jinja2 is not installed.
        """
        if not 0 <= options.prompt_weight <= 1:
            raise ValueError(f"--prompt-weight {options.prompt_weight}: must be from 0 to 1")
        self._tokenizer = tokenizer
        self._end_token = end_token = options.end_token
        name = options.template
        self._known: Collection[str] = ()  # names of what it uses beside role and content
        self.uses_date = False
        needed: tuple[str, ...] = (end_token,) if end_token else ()
        if name == "llama3":
            self._render: Callable[[Conversation], Rendered] = _llama3
            needed += LLAMA3_TOKENS
        elif name == "chatml":
            self._render = _chatml
            needed += ("<|im_start|>", "<|im_end|>")
        elif name == "tokenizer":
            template = JinjaTemplate(tokenizer, options.today)
            self._known = template.names
            self.uses_date = "strftime_now" in template.names
            self._render = lambda talk: Rendered(*template.render(talk.messages, talk.extras))
        else:
            raise ValueError(f"--chat-template {name}: use one of {', '.join(TEMPLATES)}")
        missing = [token for token in needed if tokenizer.special_id(token) is None]
        if missing:
            what = f"the template {name}" if name in TEMPLATES[:2] else "--end-token"
            raise ValueError(
                f"tokenizer {tokenizer.path}: has no special token {', '.join(missing)}, which "
                f"{what} needs; use another --chat-template or tokenizer"
            )

    @functools.cached_property
    def _encode(self) -> Callable[[str, Sequence[Span]], tuple[list[int], list[Span]]]:
        return make_encoder(self._tokenizer)  # loads files: not where options are only checked

    def encode(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        """Token ids and, for each, 1 for a target and 0 for the prompt.

        Raises:
            ValueError: the template refuses the conversation or does not use a part of it.
        """
        _refuse_unused(conversation, self._known)
        rendered = self._render(conversation)
        turns = [
            self._with_end(rendered, number, span)
            for number, span in sorted(rendered.turns.items())
            if conversation.weights[number]
        ]
        text, specials = rendered.text, rendered.specials
        if turns and turns[-1][1] > len(text):  # the template ends without the end token
            specials = [*specials, (len(text), len(text) + len(self._end_token))]
            text += self._end_token
        ids, spans = self._encode(text, specials)
        is_special = {start for start, _ in specials}
        targets = [0] * len(ids)
        turn = 0
        for place, (start, end) in enumerate(spans):
            while turn < len(turns) and start >= turns[turn][1]:
                turn += 1
            if turn == len(turns):
                break
            # a token that holds the border belongs to the turn, a special token where it begins
            last = start if start in is_special else max(start, end - 1)
            targets[place] = int(last >= turns[turn][0])
        return ids, targets

    def _with_end(self, rendered: Rendered, number: int, turn: Span) -> Span:
        """The turn with the special token that ends it."""
        if any(span[1] == turn[1] for span in rendered.specials):
            return turn
        following = next((span for span in rendered.specials if span[0] == turn[1]), None)
        if not self._end_token:
            raise ValueError(
                f"the chat template writes no special token at the end of message {number}: the "
                "model would not learn to stop; name the token that ends a turn with --end-token"
            )
        if following is not None:
            return turn[0], following[1]
        if turn[1] == len(rendered.text):
            return turn[0], turn[1] + len(self._end_token)
        raise ValueError(
            f"the chat template goes on behind message {number} without a special token"
        )


LLAMA3_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


class _Builder:
    """Puts a text together and notes its special tokens and turns."""

    def __init__(self) -> None:
        self.text = ""
        self.specials: list[Span] = []
        self.turns: dict[int, Span] = {}

    def special(self, name: str) -> None:
        self.specials.append((len(self.text), len(self.text) + len(name)))
        self.text += name

    def turn(self, number: int, message: Message, content: str, end: str) -> None:
        """Content and the special token behind it."""
        start = len(self.text)
        self.text += content
        self.special(end)
        if message["role"] == "assistant":
            self.turns[number] = (start, len(self.text))

    def done(self) -> Rendered:
        return Rendered(self.text, self.specials, self.turns)


def _refuse_unused(conversation: Conversation, known: Collection[str]) -> None:
    """Raise for a part of the conversation that no template would show."""
    for where, names in [
        ("the conversation", set(conversation.extras)),
        *((f"message {number}", set(one)) for number, one in enumerate(conversation.messages)),
    ]:
        unused = sorted(names.difference(known, MESSAGE))
        if unused:
            raise ValueError(
                f"{where} has {', '.join(unused)}, which the chat template does not use; take it "
                "out, or use --chat-template tokenizer with a template that knows it"
            )


def _content(message: Message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _llama3(conversation: Conversation) -> Rendered:
    """Llama 3's format (ChatFormat of github.com/meta-llama/llama-models)."""
    begin, start, end, stop = LLAMA3_TOKENS
    text = _Builder()
    text.special(begin)
    for number, message in enumerate(conversation.messages):
        content = _content(message).strip()
        text.special(start)
        text.text += "ipython" if message["role"] == "tool" else message["role"]
        text.special(end)
        text.text += "\n\n"
        text.turn(number, message, content, stop)
    return text.done()


def _chatml(conversation: Conversation) -> Rendered:
    text = _Builder()
    for number, message in enumerate(conversation.messages):
        content = _content(message)
        text.special("<|im_start|>")
        text.text += f"{message['role']}\n"
        text.turn(number, message, content, "<|im_end|>")
        text.text += "\n"
    return text.done()

"""What the files beside a tokenizer add to it, read by the rules of transformers.

`tokenizer_config.json` names special tokens and, in `added_tokens_decoder`, tokens that the main
file may lack. Only without that field do the older `special_tokens_map.json` and
`added_tokens.json` count; the first then goes before the names in `tokenizer_config.json`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What a folder may hold beside the main file that belongs to the tokenizer.
COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class AddedToken:
    """A token that is looked up by name before a text is cut."""

    id: int
    name: str
    flags: dict[str, bool]  # as in a tokenizer.json

    @property
    def is_special(self) -> bool:
        return self.flags["special"]


@dataclass(frozen=True)
class Companions:
    """What they say."""

    folder: Path
    names: dict[str, str]  # of special tokens by field, such as eos_token
    added: list[AddedToken]  # in the order of their ids
    is_old: bool  # from added_tokens.json, to which tokenizer.json is preferred
    add_prefix_space: bool | None


def read_companions(folder: Path) -> Companions:
    """Read them.

    Raises:
        ValueError: a file is not JSON or not of its form.
    """
    config = _read(folder / "tokenizer_config.json")
    names = dict(config)
    if "added_tokens_decoder" not in config:
        names |= _read(folder / "special_tokens_map.json")
    special = {_name(value) for field, value in names.items() if field.endswith("_token")}
    for field in ("additional_special_tokens", "extra_special_tokens"):
        special |= set(map(_name, names.get(field) or ()))
    try:
        if "added_tokens_decoder" in config:
            added = [
                AddedToken(int(token), str(entry["content"]), _flags(entry))
                for token, entry in config["added_tokens_decoder"].items()
            ]
        else:
            added = [
                AddedToken(int(token), name, _flags({"special": name in special}))
                for name, token in _read(folder / "added_tokens.json").items()
            ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"tokenizer {folder}: its added tokens cannot be read ({error}); tokenizer_config.json "
            "or added_tokens.json is damaged: fetch it again"
        ) from error
    added.sort(key=lambda token: token.id)
    every = {field: _name(value) for field, value in names.items() if field.endswith("_token")}
    named = {field: name for field, name in every.items() if name is not None}
    is_old = "added_tokens_decoder" not in config
    return Companions(folder, named, added, is_old, config.get("add_prefix_space"))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"tokenizer {path}: is not JSON ({error}); fetch it again") from error
    if not isinstance(tree, dict):
        raise ValueError(f"tokenizer {path}: holds no JSON object; fetch it again")
    return tree


def _name(value: Any) -> str | None:
    """A special token is named as text, or as an object with its content."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _flags(entry: dict[str, Any]) -> dict[str, bool]:
    """The flags, with transformers' defaults: a token that is not special is normalized."""
    defaults = {"normalized": not entry.get("special", False)}
    return {flag: bool(entry.get(flag, defaults.get(flag, False))) for flag in _FLAGS}

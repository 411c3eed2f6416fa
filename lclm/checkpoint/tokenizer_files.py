"""The tokenizer's files travel with a checkpoint; here is which they are and what ids they tell."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lclm.checkpoint.folder import read_json

GENERATION_CONFIG_NAME = "generation_config.json"

# Any one of these makes a folder one with a tokenizer.
VOCABULARY_NAMES = ("tokenizer.json", "tokenizer.model", "vocab.json")
COMPANION_NAMES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION_CONFIG_NAME,  # no tokenizer file, but it holds ids: several ends of text, say
)
# Never taken from a tokenizer folder: they would be mistaken for the model.
MODEL_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".index.json")
MODEL_NAMES = ("config.json",)


@dataclass(frozen=True)
class TokenIds:
    """Ids that frame a text; None where the files do not tell."""

    bos: int | None = None
    eos: int | list[int] | None = None


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a vocabulary."""
    return any((folder / name).is_file() for name in VOCABULARY_NAMES)


def copy_tokenizer(source: Path, target: Path, is_tokenizer_folder: bool = False) -> list[str]:
    """Copy the tokenizer's files to `target` (made if needed) and return their names, sorted.

    `is_tokenizer_folder`: everything in `source` belongs to the tokenizer, so files of any name
    are taken, except those that belong to a model.
    """
    if is_tokenizer_folder:
        names = [path.name for path in source.iterdir() if path.is_file()]
        names = [n for n in names if not n.endswith(MODEL_SUFFIXES) and n not in MODEL_NAMES]
    else:
        names = [n for n in VOCABULARY_NAMES + COMPANION_NAMES if (source / n).is_file()]
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, target / name)
    return sorted(names)


def read_token_ids(folder: Path) -> TokenIds:
    """Ids of the begin- and end-of-text tokens that the files of a folder tell.

    `generation_config.json` comes first, since only it can name several ends; then the texts in
    `tokenizer_config.json` or `special_tokens_map.json`, looked up in the vocabulary.
    """
    found = [_read_optional(folder / GENERATION_CONFIG_NAME)]
    bos, eos = found[0].get("bos_token_id"), found[0].get("eos_token_id")
    config = _read_optional(folder / "tokenizer_config.json")
    special = _read_optional(folder / "special_tokens_map.json")
    ids = _ids_by_text(config, _read_optional(folder / "tokenizer.json"))
    texts = {name: _text(config.get(name) or special.get(name)) for name in _TOKENS}
    return TokenIds(
        bos=ids.get(texts["bos_token"]) if bos is None else bos,
        eos=ids.get(texts["eos_token"]) if eos is None else eos,
    )


_TOKENS = ("bos_token", "eos_token")


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _text(token: Any) -> str | None:
    """A special token is written as text or as an object with its text in `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _ids_by_text(config: dict[str, Any], tokenizer: dict[str, Any]) -> dict[str | None, int]:
    """Ids of all tokens by text, from the vocabulary and the tokens added to it."""
    vocab = tokenizer.get("model", {}).get("vocab", {})
    if isinstance(vocab, list):  # unigram: [text, score] in order of id
        vocab = {entry[0]: number for number, entry in enumerate(vocab)}
    ids: dict[str | None, int] = dict(vocab)
    ids.update({entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens", [])})
    for number, entry in config.get("added_tokens_decoder", {}).items():
        ids[_text(entry)] = int(number)
    return ids

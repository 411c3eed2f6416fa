"""What travels beside the weights, from step folder to step folder, until it is exported.

The tokenizer's files, the generation config, and what the Hugging Face folder that a model came
from says beyond our own fields. Here is which files they are and what ids they tell.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lclm.checkpoint.folder import TOKENIZER_FOLDER, read_json

HF_SOURCE_NAME = "hf_source.json"  # in a step folder; written and read by lclm.hf
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
TOKEN_NAMES = ("bos", "eos", "pad")
CHAT_TEMPLATES = "additional_chat_templates"  # a folder of templates, beside chat_template.jinja


@dataclass(frozen=True)
class TokenIds:
    """Ids that frame and fill a text; None where the files do not tell."""

    bos: int | None = None
    eos: int | list[int] | None = None
    pad: int | None = None


def has_tokenizer(source: Path) -> bool:
    """Whether a folder holds a vocabulary, or is itself such a file."""
    return source.is_file() or any((source / name).is_file() for name in VOCABULARY_NAMES)


def find_tokenizer(source: Path, is_tokenizer_folder: bool = False) -> dict[str, Path]:
    """The files of a tokenizer by the name that they travel under, which is relative.

    Args:
        source: a folder, or a vocabulary file. A file of a name that no library looks for gets the
            name that its content has elsewhere; the files beside it are its own unless there is
            another vocabulary.
        is_tokenizer_folder: everything in `source` belongs to the tokenizer, so files of any name
            are taken, except those that belong to a model.
    """
    folder = source if source.is_dir() else source.parent
    if is_tokenizer_folder:
        names = [path.name for path in folder.iterdir() if path.is_file()]
        names = [n for n in names if not n.endswith(MODEL_SUFFIXES) and n not in MODEL_NAMES]
    else:
        names = [n for n in VOCABULARY_NAMES + COMPANION_NAMES if (folder / n).is_file()]
    names += [f"{CHAT_TEMPLATES}/{p.name}" for p in (folder / CHAT_TEMPLATES).glob("*.jinja")]
    found = {name: folder / name for name in sorted(names)}
    if source.is_dir() or source.name in VOCABULARY_NAMES:
        return found
    return ({} if has_tokenizer(folder) else found) | {_usual_name(source): source}


def _usual_name(vocabulary: Path) -> str:
    with vocabulary.open("rb") as file:
        is_json = file.read(4096).lstrip().startswith(b"{")
    return "tokenizer.json" if is_json else "tokenizer.model"


def read_travelling(tokenizer: Path | None, origin: Path | None) -> dict[str, bytes]:
    """What is to lie in every step folder of a run, by path in it: read once, when it starts.

    Nothing that happens to the sources afterwards matters, not even that the run deletes the step
    folder it resumed from.

    Args:
        tokenizer: file or folder that the configuration names; None: the one of `origin` goes on.
        origin: step folder whose weights the run starts from, if any. Its generation config goes on
            unless the tokenizer's folder has one.
    """
    found: dict[str, Path] = {}
    if origin is not None:
        if (origin / TOKENIZER_FOLDER).is_dir():
            found = find_tokenizer(origin / TOKENIZER_FOLDER, is_tokenizer_folder=True)
        if tokenizer is not None:
            found = {n: path for n, path in found.items() if n == GENERATION_CONFIG_NAME}
    if tokenizer is not None:
        found |= find_tokenizer(tokenizer)
    files = {f"{TOKENIZER_FOLDER}/{name}": path.read_bytes() for name, path in found.items()}
    if origin is not None and (origin / HF_SOURCE_NAME).is_file():
        files[HF_SOURCE_NAME] = (origin / HF_SOURCE_NAME).read_bytes()
    return files


def write_travelling(step_folder: Path, files: dict[str, bytes]) -> None:
    """Write what `read_travelling` gave into a step folder."""
    for name, content in files.items():
        path = step_folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def read_token_ids(folder: Path) -> TokenIds:
    """Ids of special tokens that the files of a folder tell.

    `generation_config.json` comes first, since only it can name several ends; then what
    `read_vocabulary_ids` finds.
    """
    generation = _read_optional(folder / GENERATION_CONFIG_NAME)
    told = {name: generation.get(f"{name}_token_id") for name in TOKEN_NAMES}
    vocabulary = read_vocabulary_ids(folder)
    ids = {n: getattr(vocabulary, n) if value is None else value for n, value in told.items()}
    return TokenIds(**ids)


def read_vocabulary_ids(folder: Path) -> TokenIds:
    """Ids of the texts that `tokenizer_config.json` or `special_tokens_map.json` names."""
    config = _read_optional(folder / "tokenizer_config.json")
    special = _read_optional(folder / "special_tokens_map.json")
    ids = ids_by_text(config, _read_optional(folder / "tokenizer.json"))
    texts = {n: config.get(f"{n}_token") or special.get(f"{n}_token") for n in TOKEN_NAMES}
    return TokenIds(**{name: ids.get(_text(text)) for name, text in texts.items()})


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _text(token: Any) -> str | None:
    """A special token is written as text or as an object with its text in `content`."""
    return token.get("content") if isinstance(token, dict) else token


def ids_by_text(config: dict[str, Any], tokenizer: dict[str, Any]) -> dict[str | None, int]:
    """Ids of all tokens by text, from the vocabulary and the tokens added to it."""
    vocab = tokenizer.get("model", {}).get("vocab", {})
    if isinstance(vocab, list):  # unigram: [text, score] in order of id
        vocab = {entry[0]: number for number, entry in enumerate(vocab)}
    ids: dict[str | None, int] = dict(vocab)
    ids.update({entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens", [])})
    for number, entry in config.get("added_tokens_decoder", {}).items():
        ids[_text(entry)] = int(number)
    return ids

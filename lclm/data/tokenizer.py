"""Text to token ids, for three kinds of tokenizer file told apart by content.

- `hf`: a Hugging Face `tokenizer.json`, or a folder that holds one.
- `tiktoken`: lines of base64 and rank. Rank files do not say how text is split or which special
  tokens follow; those of Llama 3 are used (models/llama3/tokenizer.py in
  https://github.com/meta-llama/llama-models), and files known to be of other models refused.
- `sentencepiece`: a serialized model.

Tokens that the files beside them add or name are taken over as transformers does, or refused.
No beginning-of-text token is added. Text that spells a special token stays text.
"""

import base64
import functools
import hashlib
import itertools
import json
import logging
import os
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

import sentencepiece
import tiktoken
import tokenizers

from lclm.data.tokenizer_files import COMPANIONS, Companions, read_companions

Kind = Literal["hf", "tiktoken", "sentencepiece"]

# End-of-document tokens of common models, for a tokenizer.json that comes alone.
COMMON_EOD = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "<|eos|>")
COMMON_BOS = ("<|begin_of_text|>", "<s>", "<bos>", "<|bos|>")

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
LLAMA3_NUM_SPECIAL = 256
# Ranks of files whose split pattern or special tokens are not Llama 3's.
OTHER_TIKTOKEN = {
    50256: "GPT-2 (r50k)",
    50280: "Codex (p50k)",
    100256: "GPT-4 (cl100k)",
    151643: "Qwen",
    199998: "GPT-4o (o200k)",
    200000: "Llama 4",
}
# tiktoken's regex engine gives up on runs of white space of some 10^6 characters
MAX_WHITE_SPACE = 100_000


def llama3_splitter() -> tokenizers.pre_tokenizers.PreTokenizer:
    """Llama 3's cutting of text into pieces of bytes, for tokenizers of Hugging Face's library."""
    parts = tokenizers.pre_tokenizers
    split = parts.Split(tokenizers.Regex(LLAMA3_PATTERN), behavior="isolated")
    return parts.Sequence([split, parts.ByteLevel(add_prefix_space=False, use_regex=False)])


def hash_file(path: Path) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


logger = logging.getLogger(__name__)


class Tokenizer(ABC):
    """One tokenizer file, ready to encode.

    Attributes:
        path: as given to `load_tokenizer`.
        kind: hf, tiktoken or sentencepiece.
        files: what to copy so that the tokenizer can be loaded again; files[0] is the main one.
        sha256: hex digest of files[0].
        vocab_size: ids are 0 .. vocab_size - 1, special tokens included.
        eod_id, bos_id: end of document and beginning of text; None where the file names none.
        special_names: special tokens by their names.
        ids: tokens by their names, for those that have one.
    """

    kind: Kind
    vocab_size: int
    eod_id: int | None
    bos_id: int | None
    special_names: dict[str, int]
    ids: dict[str, int]

    def __init__(self, path: Path, main: Path) -> None:
        self.path = path
        companions = (main.parent / name for name in COMPANIONS)
        self.files = [main, *(file for file in companions if file.is_file())]
        self.sha256 = hash_file(main)
        self._companions = read_companions(main.parent)

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without any token that is not in the text."""

    @abstractmethod
    def spellings(self) -> dict[int, bytes]:
        """What each id stands for, the same in every kind of file that holds the tokenizer."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens written out where the library can."""

    @functools.cached_property
    def vocabulary(self) -> str:
        """SHA-256 of all tokens, the same for every file that holds this tokenizer."""
        digest = hashlib.sha256()
        for token, spelled in sorted(self.spellings().items()):
            digest.update(b"%d %d " % (token, len(spelled)) + spelled)
        return digest.hexdigest()

    def name_ends(self, eod: int | None, bos: int | None) -> None:
        """Set eod_id and bos_id as the files beside the tokenizer name them, else as given.

        Raises:
            ValueError: they name a token that is not there.
        """
        self.eod_id, self.bos_id = eod, bos
        names, folder = self._companions.names, self._companions.folder
        for field, name in names.items():
            if name not in self.ids:
                raise ValueError(
                    f"tokenizer {folder}: {field} is {name!r}, which {self.files[0].name} does "
                    "not have; correct one of the two files"
                )
        if "eos_token" in names:
            self.eod_id = self.ids[names["eos_token"]]
        if "bos_token" in names:
            self.bos_id = self.ids[names["bos_token"]]

    def choose_eod(self, name: str | None) -> None:
        """End documents with the token of this name, if any, and say in the log which one it is.

        Raises:
            ValueError: there is no such token.
        """
        if name is not None and name not in self.ids:
            raise ValueError(
                f"--eod-token {name}: tokenizer {self.path} has no such token; its special tokens "
                f"are {', '.join(list(self.special_names)[:20]) or 'none'}"
            )
        if name is not None:
            self.eod_id = self.ids[name]
        found = next((name for name, token in self.ids.items() if token == self.eod_id), None)
        if found is not None:
            logger.info("documents end in %s (token %d of %s)", found, self.eod_id, self.path)

    def end_tokens(self, prepend_bos: bool, append_eod: bool) -> list[tuple[int, ...]]:
        """Ids put before and behind every document; ValueError where one asked for has no name."""
        ends: list[tuple[int, ...]] = []
        for is_wanted, token, name in (
            (prepend_bos, self.bos_id, "beginning-of-text token (bos_token)"),
            (append_eod, self.eod_id, "end-of-document token (eos_token)"),
        ):
            if is_wanted and token is None:
                raise ValueError(
                    f"tokenizer {self.path}: names no {name}; name it in tokenizer_config.json "
                    "beside the tokenizer, or leave the option out"
                )
            ends.append((token,) if is_wanted and token is not None else ())
        return ends

    def special_id(self, name: str) -> int | None:
        """Id of a special token; None where there is none of this name."""
        return self.special_names.get(name)

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without any token that is not in the text."""
        return self.encode_batch([text])[0]

    def describe(self) -> dict[str, Any]:
        """What `<prefix>.json` says about the tokenizer."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "sha256": self.sha256,
            "vocabulary": self.vocabulary,
            "vocab_size": self.vocab_size,
            "eod_id": self.eod_id,
            "bos_id": self.bos_id,
        }


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Load a tokenizer file, or the one of a folder.

    In a folder `tokenizer.json` comes first, then `tokenizer.model`.

    Raises:
        ValueError: there is no such file, or it is none of the three kinds.
    """
    given = Path(path)
    main = _main_file(given)
    with open(main, "rb") as file:
        head = file.read(4096)
    if head.lstrip().startswith(b"{"):
        return HuggingFaceTokenizer(given, main)
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", head):
        return _Tiktoken(given, main)
    return _SentencePiece(given, main)


def _main_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(
            f"tokenizer {path}: no such file or folder; give a tokenizer.json, a tokenizer.model "
            "or the folder that holds it"
        )
    for name in ("tokenizer.json", "tokenizer.model"):
        if (path / name).is_file():
            return path / name
    raise ValueError(
        f"tokenizer {path}: the folder holds neither tokenizer.json nor tokenizer.model; give the "
        "file itself if it has another name"
    )


class HuggingFaceTokenizer(Tokenizer):
    kind: Kind = "hf"

    def __init__(self, path: Path, main: Path) -> None:
        super().__init__(path, main)
        text = main.read_text(encoding="utf-8")
        try:
            tree = json.loads(text)
            if "model" not in tree:
                raise ValueError("it has no 'model'")
            self._tokenizer = open_hf(text)
            if _add_tokens(self._tokenizer, self._companions):
                tree = json.loads(self._tokenizer.to_str())
            plain = without_spellable_specials(tree)
            self._encoder = self._tokenizer if plain is tree else open_hf(json.dumps(plain))
        except Exception as error:  # the library raises bare Exception for a bad file
            raise ValueError(
                f"tokenizer {main}: starts like JSON but is not a Hugging Face tokenizer.json: "
                f"{error}"
            ) from error
        # special tokens are looked up by name only: in a text they are ordinary characters
        self._encoder.encode_special_tokens = True
        self.ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self.ids.values(), default=-1) + 1
        _check_agreement(tree, self.ids, self._companions)
        parts = [tree.get("pre_tokenizer"), tree.get("decoder")]
        self._is_byte_level = '"ByteLevel"' in json.dumps(parts)
        self.special_names = {
            str(token["content"]): int(token["id"])
            for token in tree.get("added_tokens") or []
            if token["special"]
        }
        eod, bos = (
            next((self.ids[name] for name in common if name in self.ids), None)
            for common in (COMMON_EOD, COMMON_BOS)
        )
        self.name_ends(eod, bos)

    def to_json(self) -> str:
        """The tokenizer.json of what encodes, with the tokens of the files beside it."""
        return str(self._tokenizer.to_str())

    def spellings(self) -> dict[int, bytes]:
        added = self._tokenizer.get_added_tokens_decoder()
        spelled = {token: name.encode() for name, token in self.ids.items()}
        if self._is_byte_level:
            values = {name: value for value, name in byte_names().items()}
            for name, token in self.ids.items():
                if token not in added and all(letter in values for letter in name):
                    spelled[token] = bytes(values[letter] for letter in name)
        return spelled

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        encodings = self._encoder.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def open_hf(text: str) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _add_tokens(tokenizer: tokenizers.Tokenizer, companions: Companions) -> bool:
    """Add the tokens of the files beside it that it lacks, or has otherwise; whether there were."""
    added = tokenizer.get_added_tokens_decoder().values()
    there = {token.content if companions.is_old else repr(token) for token in added}
    tokens = [tokenizers.AddedToken(token.name, **token.flags) for token in companions.added]
    new = [token for token in tokens if not {token.content, repr(token)} & there]
    tokenizer.add_tokens(new)
    return bool(new)


def _check_agreement(tree: dict[str, Any], ids: dict[str, int], companions: Companions) -> None:
    """Refuse a tokenizer.json that the files beside it contradict."""
    for token in companions.added:
        if ids.get(token.name) != token.id:
            raise ValueError(
                f"tokenizer {companions.folder}: the token {token.name!r} is {token.id} in "
                "tokenizer_config.json or added_tokens.json, the tokenizer itself gives it "
                f"{ids.get(token.name)}; correct one of them"
            )
    in_file = (tree.get("pre_tokenizer") or {}).get("add_prefix_space")
    asked = companions.add_prefix_space
    if None not in (in_file, asked) and in_file != asked:
        raise ValueError(
            f"tokenizer {companions.folder}: add_prefix_space is {asked} in tokenizer_config.json "
            f"and {in_file} in tokenizer.json, and which one counts depends on the version of "
            "transformers; make them equal"
        )


def byte_names() -> dict[int, str]:
    """GPT-2's name of each byte: printable ones stand for themselves, others follow from 256 on."""
    printable = (*range(33, 127), *range(161, 173), *range(174, 256))
    others = (value for value in range(256) if value not in printable)
    names = {value: chr(value) for value in printable}
    return names | {value: chr(256 + place) for place, value in enumerate(others)}


def without_spellable_specials(tree: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer with special tokens renamed where its model could produce them from text.

    Tokens looked up by name can be switched off, but a special token may also stand in the model's
    own vocabulary, where merges, or a whole word, or a Unigram path can reach it. There it gets a
    name that no text spells, under the same id.
    """
    model = tree["model"]
    special = {token["content"] for token in tree.get("added_tokens") or [] if token["special"]}
    vocab = model.get("vocab", {})
    pieces = set(vocab if isinstance(vocab, dict) else (piece for piece, _ in vocab))
    names = {name: f"\x00{hashlib.sha256(name.encode()).hexdigest()}" for name in special & pieces}
    if not names:
        return tree
    if isinstance(vocab, dict):
        new_vocab: Any = {names.get(piece, piece): number for piece, number in vocab.items()}
    else:
        new_vocab = [[names.get(piece, piece), score] for piece, score in vocab]
    new_model = model | {"vocab": new_vocab}
    if isinstance(model.get("unk_token"), str):
        new_model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        # "a b" in older files, ["a", "b"] in newer ones
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        new_model["merges"] = [pair for pair in pairs if not names.keys() & {*pair, "".join(pair)}]
    added = [
        token | {"content": names.get(token["content"], token["content"])}
        for token in tree["added_tokens"]
    ]
    return tree | {"model": new_model, "added_tokens": added, "post_processor": None}


class _Tiktoken(Tokenizer):
    kind: Kind = "tiktoken"

    def __init__(self, path: Path, main: Path) -> None:
        super().__init__(path, main)
        self._ranks = ranks = read_ranks(main)
        if len(ranks) in OTHER_TIKTOKEN:
            raise ValueError(
                f"tokenizer {main}: {len(ranks)} ranks are those of {OTHER_TIKTOKEN[len(ranks)]}; "
                "only Llama 3's split pattern is known for tiktoken files: use that model's "
                "tokenizer.json"
            )
        reserved = (n for n in range(LLAMA3_NUM_SPECIAL) if n not in LLAMA3_NAMED)
        names = LLAMA3_NAMED | {
            place: f"<|reserved_special_token_{n}|>" for n, place in enumerate(reserved)
        }
        special = {names[place]: len(ranks) + place for place in range(LLAMA3_NUM_SPECIAL)}
        self._encoding = tiktoken.Encoding(
            main.name, pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )
        self._white_space = re.compile(rf"\s{{{MAX_WHITE_SPACE}}}")
        self.vocab_size = len(ranks) + LLAMA3_NUM_SPECIAL
        self.special_names = self.ids = special
        _check_agreement({}, special, self._companions)
        self.name_ends(special["<|end_of_text|>"], special["<|begin_of_text|>"])

    def spellings(self) -> dict[int, bytes]:
        special = {token: name.encode() for name, token in self.special_names.items()}
        return {rank: token for token, rank in self._ranks.items()} | special

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self._encode_one(text) for text in texts]

    def _encode_one(self, text: str) -> list[int]:
        """Ids of a text, cut after every MAX_WHITE_SPACE characters of one run of white space."""
        if len(text) <= MAX_WHITE_SPACE:
            return self._encoding.encode_ordinary(text)
        cuts = [0, *(match.end() for match in self._white_space.finditer(text)), len(text)]
        ids: list[int] = []
        for first, last in itertools.pairwise(cuts):
            ids += self._encoding.encode_ordinary(text[first:last])
        return ids

    def decode(self, ids: list[int]) -> str:
        return self._encoding.decode(ids)


def read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise ValueError(
                f"tokenizer {path}, line {number}: {line[:40]!r} is not a base64 token and a rank; "
                "the file is damaged: fetch it again"
            ) from error
    has_bytes = all(bytes([value]) in ranks for value in range(256))
    if sorted(ranks.values()) != list(range(len(ranks))) or not has_bytes:
        raise ValueError(
            f"tokenizer {path}: its {len(ranks)} tokens must have the ranks 0 to {len(ranks) - 1}, "
            "each once, and include all 256 bytes; the file is damaged: fetch it again"
        )
    return ranks


class _SentencePiece(Tokenizer):
    kind: Kind = "sentencepiece"

    def __init__(self, path: Path, main: Path) -> None:
        super().__init__(path, main)
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(main.read_bytes())
        except RuntimeError as error:
            raise ValueError(
                f"tokenizer {main}: is neither a Hugging Face tokenizer.json, nor tiktoken lines "
                "of base64 and rank, nor a SentencePiece model; give one of these"
            ) from error
        num_pieces = self._processor.get_piece_size()
        control = filter(self._processor.is_control, range(num_pieces))
        self.special_names = {self._processor.id_to_piece(token): token for token in control}
        self.ids = {self._processor.id_to_piece(token): token for token in range(num_pieces)}
        self._added = self._add_tokens(num_pieces)
        self.vocab_size = num_pieces + len(self._added)
        eos, bos = self._processor.eos_id(), self._processor.bos_id()
        self.name_ends(eos if eos >= 0 else None, bos if bos >= 0 else None)

    def _add_tokens(self, num_pieces: int) -> dict[int, str]:
        """Names of the tokens that the files beside the model add behind its pieces."""
        added: dict[int, str] = {}
        for token in self._companions.added:
            there = self.ids.setdefault(token.name, num_pieces + len(added))
            if there != token.id:
                raise ValueError(
                    f"tokenizer {self.path}: the files beside {self.files[0].name} give "
                    f"{token.name!r} the id {token.id}, it would be {there}; correct them"
                )
            is_piece = there < num_pieces
            if token.is_special:
                self.special_names[token.name] = there
            elif not (is_piece and self._processor.is_user_defined(there)):
                raise ValueError(
                    f"tokenizer {self.path}: the files beside {self.files[0].name} add "
                    f"{token.name!r}, which is no special token: a SentencePiece model alone does "
                    "not find it in a text; save the folder by transformers, as a tokenizer.json"
                )
            if not is_piece:
                added[there] = token.name
        return added

    def spellings(self) -> dict[int, bytes]:
        return {token: name.encode() for name, token in self.ids.items()}

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._processor.encode(texts)

    def decode(self, ids: list[int]) -> str:
        if not self._added:
            return str(self._processor.decode(ids))
        parts = itertools.groupby(ids, lambda token: self._added.get(token))
        return "".join(
            str(self._processor.decode(list(run))) if name is None else name * len(list(run))
            for name, run in parts
        )

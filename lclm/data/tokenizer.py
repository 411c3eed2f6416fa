"""Text to token ids, for three kinds of tokenizer file told apart by content.

- `hf`: a Hugging Face `tokenizer.json`, or a folder that holds one.
- `tiktoken`: lines of base64 and rank. Rank files do not say how text is split or which special
  tokens follow; those of Llama 3 are used (models/llama3/tokenizer.py in
  https://github.com/meta-llama/llama-models), and files known to be of other models refused.
- `sentencepiece`: a serialized model.

No beginning-of-text token is added. Text that spells a special token stays text.
"""

import base64
import bisect
import functools
import hashlib
import itertools
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece
import tiktoken
import tokenizers

Kind = Literal["hf", "tiktoken", "sentencepiece"]
Span = tuple[int, int]  # of the characters of a text: begin and end

# What a Hugging Face folder may hold beside tokenizer.json that belongs to the tokenizer.
HF_COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
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
# begins the names of special tokens that a text means, where it spells others: noncharacters
TWIN = "\ufdd2\ufdd3\ufdd2\ufdd3"
# add_dummy_prefix = false in the normalizer_spec of a ModelProto: what follows a serialized message
# is merged into it
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
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
    """

    kind: Kind
    vocab_size: int
    eod_id: int | None
    bos_id: int | None
    special_names: dict[str, int]

    def __init__(self, path: Path, files: list[Path]) -> None:
        self.path = path
        self.files = files
        self.sha256 = hash_file(files[0])

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without any token that is not in the text."""

    @abstractmethod
    def encode_with_specials(
        self, text: str, specials: Sequence[Span]
    ) -> tuple[list[int], list[Span]]:
        """Ids of a text in which some spans are special tokens, and the characters of each id.

        Args:
            text: all of it, the special tokens spelled out.
            specials: spans that each spell a special token, in order; other text that spells one
                stays text.

        Returns:
            ids: as the model's own library gives them.
            spans: of each id; ids of the bytes of one character share it.
        """

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens written out where the library can."""

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
        return _HuggingFace(given, main)
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


class _HuggingFace(Tokenizer):
    kind: Kind = "hf"

    def __init__(self, path: Path, main: Path) -> None:
        companions = [main.parent / name for name in HF_COMPANIONS]
        super().__init__(path, [main, *(file for file in companions if file.is_file())])
        self._text = main.read_text(encoding="utf-8")
        try:
            tree = json.loads(self._text)
            if "model" not in tree:
                raise ValueError("it has no 'model'")
            self._tokenizer = _open_hf(self._text)
            plain = without_spellable_specials(tree)
            self._encoder = self._tokenizer if plain is tree else _open_hf(json.dumps(plain))
        except Exception as error:  # the library raises bare Exception for a bad file
            raise ValueError(
                f"tokenizer {main}: starts like JSON but is not a Hugging Face tokenizer.json: "
                f"{error}"
            ) from error
        # special tokens are looked up by name only: in a text they are ordinary characters
        self._encoder.encode_special_tokens = True
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1
        self.special_names = {
            str(token["content"]): int(token["id"])
            for token in tree.get("added_tokens") or []
            if token["special"]
        }
        self.eod_id = _named_id(main.parent, "eos_token", COMMON_EOD, ids)
        self.bos_id = _named_id(main.parent, "bos_token", COMMON_BOS, ids)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        encodings = self._encoder.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_with_specials(
        self, text: str, specials: Sequence[Span]
    ) -> tuple[list[int], list[Span]]:
        if len(specials) == sum(1 for _ in self._spelled.finditer(text)):
            encoding = self._with_specials.encode(text, add_special_tokens=False)
            return encoding.ids, encoding.offsets
        # some are only spelled: those that are meant go by names that no text has
        if TWIN in text:
            raise ValueError("holds the noncharacters U+FDD2 U+FDD3 twice: no text does")
        tokenizer, ids = self._with_twins
        pieces: list[str] = []
        places: list[int] = []  # of the twins' first characters
        at = 0
        for start, end in specials:
            pieces += [text[at:start], TWIN, text[start:end]]
            places.append(start + len(TWIN) * len(places))
            at = end
        encoding = tokenizer.encode("".join([*pieces, text[at:]]), add_special_tokens=False)

        def shift(place: int) -> int:
            num_before = bisect.bisect_left(places, place)
            return max(
                place - len(TWIN) * num_before, specials[num_before - 1][0] if num_before else 0
            )

        spans = [(shift(start), shift(end)) for start, end in encoding.offsets]
        return [ids.get(token, token) for token in encoding.ids], spans

    @functools.cached_property
    def _spelled(self) -> re.Pattern[str]:
        names = sorted(self.special_names, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    @functools.cached_property
    def _with_specials(self) -> tokenizers.Tokenizer:
        """Looks up special tokens in a text, as transformers does."""
        return _open_hf(self._text)

    @functools.cached_property
    def _with_twins(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """Looks up a twin of every special token instead, and the special token of each twin."""
        tree = json.loads(self._text)
        tokenizer = _open_hf(json.dumps(without_spellable_specials(tree)))
        tokenizer.encode_special_tokens = True
        ids = {}
        for token in tree.get("added_tokens") or []:
            if token["special"]:
                rules = {name: token[name] for name in ("lstrip", "rstrip", "single_word")}
                twin = tokenizers.AddedToken(
                    TWIN + token["content"], special=False, normalized=False, **rules
                )
                tokenizer.add_tokens([twin])
                ids[tokenizer.token_to_id(twin.content)] = int(token["id"])
        return tokenizer, ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def _open_hf(text: str) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


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


def _named_id(folder: Path, field: str, common: tuple[str, ...], ids: dict[str, int]) -> int | None:
    """Id of a special token: as the files beside tokenizer.json name it, else of a common name."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if not (folder / name).is_file():
            continue
        value = json.loads((folder / name).read_text(encoding="utf-8")).get(field)
        content = value.get("content") if isinstance(value, dict) else value
        if content is not None:
            if content not in ids:
                raise ValueError(
                    f"tokenizer {folder / name}: {field} is {content!r}, which tokenizer.json does "
                    "not have; correct one of the two files"
                )
            return ids[content]
    return next((ids[name] for name in common if name in ids), None)


class _Tiktoken(Tokenizer):
    kind: Kind = "tiktoken"

    def __init__(self, path: Path, main: Path) -> None:
        super().__init__(path, [main])
        ranks = read_ranks(main)
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
        self.special_names = special
        self.eod_id = special["<|end_of_text|>"]
        self.bos_id = special["<|begin_of_text|>"]

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

    def encode_with_specials(
        self, text: str, specials: Sequence[Span]
    ) -> tuple[list[int], list[Span]]:
        def encode_between(start: int, end: int) -> tuple[list[int], list[Span]]:
            ids = self._encode_one(text[start:end])
            # bytes of a character before its last one stand at its beginning
            ends = np.cumsum(
                [len(self._encoding.decode_single_token_bytes(token)) for token in ids]
            )
            places = _character_of_byte(text[start:end]) + start
            return ids, [
                (int(places[first]), int(places[last]))
                for first, last in itertools.pairwise([0, *ends])
            ]

        return _encode_pieces(text, specials, self.special_names, encode_between)

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
        super().__init__(path, [main])
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(main.read_bytes())
        except RuntimeError as error:
            raise ValueError(
                f"tokenizer {main}: is neither a Hugging Face tokenizer.json, nor tiktoken lines "
                "of base64 and rank, nor a SentencePiece model; give one of these"
            ) from error
        self.vocab_size = self._processor.get_piece_size()
        control = filter(self._processor.is_control, range(self.vocab_size))
        self.special_names = {self._processor.id_to_piece(token): token for token in control}
        eos, bos = self._processor.eos_id(), self._processor.bos_id()
        self.eod_id = eos if eos >= 0 else None
        self.bos_id = bos if bos >= 0 else None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._processor.encode(texts)

    def encode_with_specials(
        self, text: str, specials: Sequence[Span]
    ) -> tuple[list[int], list[Span]]:
        def encode_between(start: int, end: int) -> tuple[list[int], list[Span]]:
            # a space is put before the beginning of a text, not behind a special token
            processor = self._processor if start == 0 else self._without_prefix
            found = processor.encode(text[start:end], return_type="offset_mapping")
            spans = [(start + first, start + last) for first, last in found["offsets"]]
            return found["ids"], spans

        return _encode_pieces(text, specials, self.special_names, encode_between)

    @functools.cached_property
    def _without_prefix(self) -> sentencepiece.SentencePieceProcessor:
        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(self.files[0].read_bytes() + NO_DUMMY_PREFIX)
        return processor

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)


def _encode_pieces(
    text: str,
    specials: Sequence[Span],
    names: Mapping[str, int],
    encode_between: Callable[[int, int], tuple[list[int], list[Span]]],
) -> tuple[list[int], list[Span]]:
    """Ids and spans of special tokens and of the text between them."""
    ids: list[int] = []
    spans: list[Span] = []
    at = 0
    for start, end in [*specials, (len(text), len(text))]:
        if start > at:
            more_ids, more_spans = encode_between(at, start)
            ids += more_ids
            spans += more_spans
        if end > start:
            ids.append(names[text[start:end]])
            spans.append((start, end))
        at = end
    return ids, spans


def _character_of_byte(text: str) -> np.ndarray:
    """int64 [bytes + 1], the character each byte of the UTF-8 belongs to; last, their number."""
    data = np.frombuffer(text.encode(), np.uint8)
    begins = (data & 0xC0) != 0x80
    return np.append(np.cumsum(begins) - 1, len(text))

"""Ids of a text in which some places are special tokens, and the characters that each id is of.

The ids are those that transformers gives for the text where nothing else in it spells a special
token. What does stays text here.
"""

import bisect
import functools
import itertools
import json
import re
from collections.abc import Callable, Sequence

import numpy as np
import sentencepiece
import tokenizers

from lclm.data.tokenizer import (
    HuggingFaceTokenizer,
    Tokenizer,
    open_hf,
    without_spellable_specials,
)

Span = tuple[int, int]  # of the characters of a text: begin and end
Encoded = tuple[list[int], list[Span]]
# begins the names of special tokens that a text means, where it spells others: noncharacters
TWIN = "\ufdd2\ufdd3\ufdd2\ufdd3"
# add_dummy_prefix = false in the normalizer_spec of a ModelProto: what follows a serialized message
# is merged into it
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


def make_encoder(tokenizer: Tokenizer) -> Callable[[str, Sequence[Span]], Encoded]:
    """A function of a text and the spans in it that are special tokens, in order.

    It returns the ids and the span of each; ids of the bytes of one character share its span.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return _HuggingFaceEncoder(tokenizer).encode
    between = _ModelEncoder if tokenizer.kind == "sentencepiece" else _ByteEncoder
    return functools.partial(_encode_pieces, tokenizer.special_names, between(tokenizer))


class _HuggingFaceEncoder:
    def __init__(self, tokenizer: HuggingFaceTokenizer) -> None:
        self._json = tokenizer.to_json()
        self._tokenizer = open_hf(self._json)
        names = sorted(tokenizer.special_names, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def encode(self, text: str, specials: Sequence[Span]) -> Encoded:
        if len(specials) == sum(1 for _ in self._spelled.finditer(text)):
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            return encoding.ids, encoding.offsets
        return self._encode_with_twins(text, specials)

    def _encode_with_twins(self, text: str, specials: Sequence[Span]) -> Encoded:
        """Some special tokens are only spelled: those that are meant get names no text has."""
        if TWIN in text:
            raise ValueError("holds the noncharacters U+FDD2 U+FDD3 twice: no text does")
        tokenizer, ids = self._twins
        pieces: list[str] = []
        places: list[int] = []  # of the twins' first characters
        at = 0
        for start, end in specials:
            pieces += [text[at:start], TWIN, text[start:end]]
            places.append(start + len(TWIN) * len(places))
            at = end
        encoding = tokenizer.encode("".join([*pieces, text[at:]]), add_special_tokens=False)

        def shift(place: int) -> int:
            number = bisect.bisect_left(places, place)
            return max(place - number * len(TWIN), specials[number - 1][0]) if number else place

        spans = [(shift(start), shift(end)) for start, end in encoding.offsets]
        return [ids.get(token, token) for token in encoding.ids], spans

    @functools.cached_property
    def _twins(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """A tokenizer that looks up a twin of every special token instead, and what twins are."""
        tree = json.loads(self._json)
        tokenizer = open_hf(json.dumps(without_spellable_specials(tree)))
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


class _ByteEncoder:
    """Text between special tokens, by a tokenizer whose tokens are bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._sizes = {token: len(spelled) for token, spelled in tokenizer.spellings().items()}

    def __call__(self, text: str, start: int, end: int) -> Encoded:
        ids = self._tokenizer.encode(text[start:end])
        places = _character_of_byte(text[start:end]) + start
        ends = itertools.accumulate((self._sizes[token] for token in ids), initial=0)
        return ids, [(int(places[a]), int(places[b])) for a, b in itertools.pairwise(ends)]


class _ModelEncoder:
    """Text between special tokens, by a SentencePiece model."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        model = tokenizer.files[0].read_bytes()
        self._first, self._later = (sentencepiece.SentencePieceProcessor() for _ in range(2))
        self._first.LoadFromSerializedProto(model)
        # a space is put before the beginning of a text, not behind a special token
        self._later.LoadFromSerializedProto(model + NO_DUMMY_PREFIX)

    def __call__(self, text: str, start: int, end: int) -> Encoded:
        processor = self._later if start else self._first
        found = processor.encode(text[start:end], return_type="offset_mapping")
        return found["ids"], [(start + a, start + b) for a, b in found["offsets"]]


def _encode_pieces(
    names: dict[str, int],
    between: Callable[[str, int, int], Encoded],
    text: str,
    specials: Sequence[Span],
) -> Encoded:
    """Ids and spans of special tokens and of the text between them."""
    ids: list[int] = []
    spans: list[Span] = []
    at = 0
    for start, end in [*specials, (len(text), len(text))]:
        if start > at:
            more_ids, more_spans = between(text, at, start)
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

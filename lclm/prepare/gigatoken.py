"""Encoding text by gigatoken where its ids are proven equal to the ordinary library's.

gigatoken (an optional package) always recognises special tokens inside text, so it is built from a
tokenizer.json without any. Before the work starts its ids are compared on texts made to differ and
on texts of the input itself; where they differ, or it cannot load the tokenizer, the ordinary
library encodes and the log says why.
"""

import importlib
import json
import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import tokenizers

from lclm.data.tokenizer import (
    LLAMA3_NAMED,
    MAX_WHITE_SPACE,
    HuggingFaceTokenizer,
    Tokenizer,
    byte_names,
    llama3_splitter,
    load_tokenizer,
    read_ranks,
    without_spellable_specials,
)

Library = Literal["auto", "gigatoken", "standard"]

SAMPLE_CHARS = 1 << 16  # of one text of the input; the ordinary libraries do some MB a second
PROBES = (
    "",
    " ",
    "   leading and trailing   ",
    "a\n\n\n  \n\tb\r\n\r\nc \n",
    "don't DON'T we'LL I'Ve it's y'all'd",
    "1 12 123 1234 12345678 3.14159 1,000,000 \u0661\u0662\u0663\u0664",
    "if (x!=0){return a->b[i++];} // ***!!!???\n",
    "na\u00efve caf\u00e9 e\u0301 \u0130stanbul \u017ft K's \ufb01ne \u1e9e",
    "\u4e2d\u6587\u5b57\u7b26\u3002\u65e5\u672c\u8a9e\u306e\u6587 \ud55c\uad6d\uc5b4",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea \u0939\u093f",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7 \ufe0f\u20e3",
    "\x00\x01\x7f\u0085\u00a0\u2003\u2028\u3000\ufeff\uffff zero\x00byte",
    "a" * 3000 + " " * 3000 + "\n" * 300 + "=" * 3000,
    "<s></s><unk><pad>[CLS][SEP][PAD]<|endoftext|><|im_start|>user<|im_end|>",
)
logger = logging.getLogger(__name__)


def make_plain_json(tokenizer: Tokenizer) -> str:
    """A tokenizer.json that gives the ids of `tokenizer` and knows no special token.

    Raises:
        ValueError: gigatoken does not read this kind of file.
    """
    main = tokenizer.files[0]
    if tokenizer.kind == "tiktoken":
        return _from_ranks(read_ranks(main))
    if isinstance(tokenizer, HuggingFaceTokenizer):
        text = tokenizer.to_json()
    else:
        module = importlib.import_module("gigatoken._load.sentencepiece")
        text = module.sentencepiece_to_tokenizer_json(main.read_bytes())
        text = text if isinstance(text, str) else text.decode("utf-8")
    tree = without_spellable_specials(json.loads(text))
    added = [token for token in tree.get("added_tokens") or [] if not token["special"]]
    return json.dumps(tree | {"added_tokens": added, "post_processor": None})


def _from_ranks(ranks: dict[bytes, int]) -> str:
    """Llama 3's rank file as byte-level BPE.

    tiktoken joins whichever neighbours make the token of the lowest rank, so every way to cut a
    token in two is a merge, in the order of the token's rank; a piece that is a token needs none.
    """
    table = str.maketrans({chr(value): name for value, name in byte_names().items()})
    spelled = {token: token.decode("latin-1").translate(table) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
        pairs = [(left, right) for left, right in cuts if left in ranks and right in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(spelled[left], spelled[right]) for left, right in pairs]
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    tree = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, ignore_merges=True))
    tree.pre_tokenizer = llama3_splitter()
    return tree.to_str()


class Encoder:
    """Texts to arrays of ids, by gigatoken or by the ordinary library."""

    def __init__(self, tokenizer: Tokenizer | str, plain_json: str | None) -> None:
        """Load what is needed.

        Args:
            tokenizer: or its path; the ordinary library is then loaded when first needed.
            plain_json: from `make_plain_json`; None: the ordinary library encodes.
        """
        self._tokenizer = tokenizer
        self._fast = None if plain_json is None else load_gigatoken(plain_json)

    def _standard(self) -> Tokenizer:
        if isinstance(self._tokenizer, str):
            self._tokenizer = load_tokenizer(self._tokenizer)
        return self._tokenizer

    def encode(self, texts: Sequence[str]) -> Iterable[np.ndarray]:
        """Ids of each text, uint32."""
        if self._fast is None:
            for ids in self._standard().encode_batch(list(texts)):
                yield np.array(ids, np.uint32)
            return
        for text in texts:
            if _has_long_white_space(text):  # cut there by the ordinary library only
                yield np.array(self._standard().encode(text), np.uint32)
            else:
                yield self._fast.encode(text)


def _has_long_white_space(text: str) -> bool:
    """Whether MAX_WHITE_SPACE characters in a row are white space.

    Such a run covers a whole block of half its length, so most texts cost a look at the start of
    each block.
    """
    block = MAX_WHITE_SPACE // 2
    starts = range(0, len(text) - block + 1, block)
    if not any(text[at : at + 8].isspace() and text[at : at + block].isspace() for at in starts):
        return False
    return re.search(rf"\s{{{MAX_WHITE_SPACE}}}", text) is not None


def load_gigatoken(plain_json: str) -> Any:
    """gigatoken's tokenizer; any failure, a Rust panic too, is a ValueError."""
    try:
        module = importlib.import_module("gigatoken.gigatoken_rs")
        return module.load_hf_json(plain_json)
    except (ImportError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic is no Exception
        raise ValueError(f"gigatoken cannot load it: {error}") from error


def choose_library(tokenizer: Tokenizer, wish: Library, samples: Sequence[str]) -> str | None:
    """The `plain_json` for `Encoder`: gigatoken's where it is proven equal, else None.

    Args:
        tokenizer: the ordinary library.
        wish: auto falls back and says why; gigatoken never does; standard does not try.
        samples: texts of the input, of which SAMPLE_CHARS each are compared.

    Raises:
        ValueError: gigatoken was asked for by name and cannot be used.
    """
    if wish == "standard":
        logger.info("tokenizer: the standard library (%s) encodes, as asked", tokenizer.kind)
        return None
    try:
        plain_json = make_plain_json(tokenizer)
        reason = _first_difference(tokenizer, plain_json, samples)
    except ImportError:
        reason = "gigatoken is not installed (pip install gigatoken)"
    except (KeyError, TypeError, ValueError) as error:
        reason = str(error)
    if not reason:
        logger.info(
            "tokenizer: gigatoken encodes; its ids equal %s's on %d texts",
            tokenizer.kind,
            len(PROBES) + len(samples),
        )
        return plain_json
    if wish == "gigatoken":
        raise ValueError(f"--tokenizer-library gigatoken, tokenizer {tokenizer.path}: {reason}")
    logger.warning(
        "tokenizer: the standard library (%s) encodes, many times slower: %s",
        tokenizer.kind,
        reason,
    )
    return None


def _first_difference(tokenizer: Tokenizer, plain_json: str, samples: Sequence[str]) -> str:
    """Where gigatoken's ids differ, in words; empty when they are equal everywhere."""
    ends = {tokenizer.eod_id, tokenizer.bos_id}
    special = sorted(tokenizer.decode([token]) for token in ends if token is not None)
    spelled = [f"a {name}b{name} c" for name in (*LLAMA3_NAMED.values(), *special)]
    texts = [*PROBES, *spelled, *(sample[:SAMPLE_CHARS] for sample in samples)]
    found = Encoder(tokenizer, plain_json).encode(texts)
    for text, ids, expected in zip(texts, found, tokenizer.encode_batch(texts)):
        if ids.tolist() != expected:
            at = next(
                (n for n, (a, b) in enumerate(zip(ids.tolist(), expected)) if a != b),
                min(len(ids), len(expected)),
            )
            return (
                f"gigatoken gives other ids for {text[:40]!r}: from token {at} on "
                f"{ids[at : at + 4].tolist()} instead of {expected[at : at + 4]}"
            )
    return ""

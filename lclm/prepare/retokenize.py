"""MDS folders and indexed prefixes to indexed prefixes, of the same tokenizer or another."""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from lclm.data.indexed import (
    Document,
    IndexedReader,
    IndexedWriter,
    prefix_files,
    tokenizer_difference,
)
from lclm.data.mds import MdsReader
from lclm.data.tokenizer import Tokenizer
from lclm.files import refuse_overwriting
from lclm.prepare.gigatoken import Encoder, choose_library

logger = logging.getLogger(__name__)
BATCH_DOCS = 256
SAMPLE_DOCS = 16


def retokenize(
    source: str,
    output_prefix: str,
    old: Tokenizer,
    new: Tokenizer | None = None,
    append_eod: bool = False,
    prepend_bos: bool = False,
    domain: str = "",
) -> tuple[int, int]:
    """Write the documents of `source` as `<output_prefix>.bin/.idx/.json`.

    Args:
        source: a folder with MDS shards, or an indexed prefix.
        output_prefix: of the new files.
        old: the tokenizer that wrote source.
        new: None: tokens, spans and masks stay as they are. Else documents are decoded and encoded
            anew, a begin token at their start and an end token at their end left out. Those inside
            a document become the new tokenizer's, the text on both sides being encoded by itself; a
            document cut inside a character keeps a replacement character there.
        append_eod, prepend_bos: end or start every document with the special token of `new`.
        domain: name for the `.json`; empty: the last part of the prefix.

    Returns:
        Documents and tokens written.

    Raises:
        ValueError: source cannot be read, ids lie beyond the old vocabulary, masks would have to go
            from one tokenizer to another, a special token does not exist, or a document holds one
            that the new tokenizer has no counterpart for.
    """
    reader = _open(source, old)
    read = Path(source).iterdir() if isinstance(reader, MdsReader) else prefix_files(source)
    tokenizers = [*old.files, *(new.files if new else [])]
    refuse_overwriting(prefix_files(output_prefix), [*read, *tokenizers])
    if new is not None and reader.has_weights:
        raise ValueError(
            f"{source}: has masks of tokens, which cannot follow to another tokenizer; write the "
            "conversations anew with tools/preprocess_data.py --chat"
        )
    target = new or old
    if new is None and (append_eod or prepend_bos):
        raise ValueError("--append-eod and --prepend-bos: apply with --to-tokenizer only")
    num_documents = num_tokens = 0
    with IndexedWriter(output_prefix, target.vocab_size, reader.weight_values) as writer:
        documents = reader.documents()
        if new is not None:
            ends = new.end_tokens(prepend_bos, append_eod)
            documents = _encode(documents, old, new, ends)
        for tokens, weights in documents:
            writer.add_document(tokens, weights)
            num_documents += 1
            num_tokens += len(tokens)
        writer.metadata = {
            "format": 1,
            "domain": domain or Path(output_prefix).name,
            "tokenizer": target.describe(),
            "sources": [{"path": source, "documents": num_documents}],
            "options": {"append_eod": append_eod, "prepend_bos": prepend_bos},
        }
        if reader.is_chat:
            writer.metadata["is_chat"] = True
        if isinstance(reader, MdsReader) and reader.num_outside:
            writer.metadata["tokens_outside_spans"] = reader.num_outside
            logger.warning(
                "%s: %d tokens lie outside every span of `indices` and are left out",
                source,
                reader.num_outside,
            )
    return num_documents, num_tokens


def _open(source: str, old: Tokenizer) -> MdsReader | IndexedReader:
    if (Path(source) / "index.json").is_file() or Path(source).is_dir():
        return MdsReader(Path(source))
    reader = IndexedReader(source)
    difference = tokenizer_difference(reader.metadata.get("tokenizer", {}), old.describe())
    if difference:
        raise ValueError(
            f"{source}: was written with another tokenizer than {old.path} ({difference}); give "
            "the one that wrote it"
        )
    return reader


def _encode(
    documents: Iterator[Document],
    old: Tokenizer,
    new: Tokenizer,
    ends: list[tuple[int, ...]],
) -> Iterator[Document]:
    before, after = (np.array(end, np.uint32) for end in ends)
    counterparts = {old.bos_id: new.bos_id, old.eod_id: new.eod_id}
    special = {token: counterparts.get(token) for token in old.special_names.values()}
    special |= {token: other for token, other in counterparts.items() if token is not None}
    documents_cut = (_cut(tokens, old, special) for tokens, _ in documents)
    sample = list(itertools.islice(documents_cut, SAMPLE_DOCS))
    encoder = Encoder(new, choose_library(new, "auto", list(_texts(sample))))
    every = itertools.chain(sample, documents_cut)
    while batch := list(itertools.islice(every, BATCH_DOCS)):
        encoded = iter(encoder.encode(list(_texts(batch))))
        for parts in batch:
            pieces = [next(encoded) if isinstance(part, str) else np.array([part], np.uint32)
                      for part in parts]  # fmt: skip
            if any(map(len, pieces)):
                pieces = [before, *pieces, after]
            yield np.concatenate(pieces), None


def _texts(documents: Sequence[Sequence[str | int]]) -> Iterator[str]:
    return (part for parts in documents for part in parts if isinstance(part, str))


def _cut(tokens: np.ndarray, old: Tokenizer, special: Mapping[int, int | None]) -> list[str | int]:
    """Texts of a document, and ids of the new tokenizer for the special tokens between them.

    Args:
        tokens: integers [n].
        old: the tokenizer of tokens.
        special: its special tokens; None: there is no counterpart.
    """
    if len(tokens) and int(tokens.max()) >= old.vocab_size:
        raise ValueError(
            f"tokenizer {old.path}: has {old.vocab_size} tokens, the data holds {tokens.max()}; "
            "give the tokenizer that wrote the data"
        )
    ids = tokens.tolist()
    at = 1 if ids and ids[0] == old.bos_id else 0
    end = len(ids) - 1 if len(ids) > at and ids[-1] == old.eod_id else len(ids)
    parts: list[str | int] = []
    for place in np.flatnonzero(np.isin(tokens[:end], list(special))).tolist():
        if place < at:
            continue
        other = special[ids[place]]
        if other is None:
            name = next((n for n, t in old.special_names.items() if t == ids[place]), ids[place])
            raise ValueError(
                f"tokenizer {old.path}: a document holds its special token {name} ({ids[place]}), "
                "which the new tokenizer has no counterpart for; only begin and end of text go "
                "from one to another: write the text anew with tools/preprocess_data.py"
            )
        parts += [old.decode(ids[at:place]), other]
        at = place + 1
    return [*parts, old.decode(ids[at:end])]

"""MDS folders and indexed prefixes to indexed prefixes, of the same tokenizer or another."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lclm.data.indexed import Document, IndexedReader, IndexedWriter, prefix_files
from lclm.data.mds import MdsReader
from lclm.data.tokenizer import Tokenizer
from lclm.files import refuse_overwriting
from lclm.prepare.gigatoken import Encoder, choose_library

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
        new: None: tokens, spans and masks stay as they are. Else documents are decoded, special
            tokens at both ends left out, and encoded anew; a document cut inside a character keeps
            a replacement character there.
        append_eod, prepend_bos: end or start every document with the special token of `new`.
        domain: name for the `.json`; empty: the last part of the prefix.

    Returns:
        Documents and tokens written.

    Raises:
        ValueError: source cannot be read, ids lie beyond the old vocabulary, masks would have to go
            from one tokenizer to another, or a special token does not exist.
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
    return num_documents, num_tokens


def _open(source: str, old: Tokenizer) -> MdsReader | IndexedReader:
    if (Path(source) / "index.json").is_file() or Path(source).is_dir():
        return MdsReader(Path(source))
    reader = IndexedReader(source)
    digest = reader.metadata.get("tokenizer", {}).get("sha256", old.sha256)
    if digest != old.sha256:
        raise ValueError(
            f"{source}: was written with another tokenizer than {old.path} (sha256 {digest[:12]} "
            f"and {old.sha256[:12]}); give the one that wrote it"
        )
    return reader


def _encode(
    documents: Iterator[Document],
    old: Tokenizer,
    new: Tokenizer,
    ends: list[tuple[int, ...]],
) -> Iterator[Document]:
    before, after = (np.array(end, np.uint32) for end in ends)
    texts = (_decode(tokens, old) for tokens, _ in documents)
    sample = list(itertools.islice(texts, SAMPLE_DOCS))
    encoder = Encoder(new, choose_library(new, "auto", sample))
    every = itertools.chain(sample, texts)
    while batch := list(itertools.islice(every, BATCH_DOCS)):
        for ids in encoder.encode(batch):
            yield (np.concatenate([before, ids, after]) if len(ids) else ids), None


def _decode(tokens: np.ndarray, old: Tokenizer) -> str:
    if len(tokens) and int(tokens.max()) >= old.vocab_size:
        raise ValueError(
            f"tokenizer {old.path}: has {old.vocab_size} tokens, the data holds {tokens.max()}; "
            "give the tokenizer that wrote the data"
        )
    ids = tokens.tolist()
    start = 1 if ids and ids[0] == old.bos_id else 0
    end = len(ids) - 1 if len(ids) > start and ids[-1] == old.eod_id else len(ids)
    return old.decode(ids[start:end])

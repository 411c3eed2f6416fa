"""Token files in Megatron's indexed format: `<prefix>.bin`, `<prefix>.idx` and our `<prefix>.json`.

`.bin` holds the tokens of all documents back to back; `.idx` is described in index_file.py. We
write one sequence per document. A document without tokens has no sequence, only a border, as in
Megatron-LM's own tool; readers here do not number such documents.
`.json` says where the tokens come from (tokenizer, sources, options) and what they look like.
`.weights`, where `.json` has weight_values: one byte per token, the number of its weight there.
"""

import json
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lclm.data.index_file import (
    MAX_DOCUMENT,
    are_starts,
    documents_of,
    read_index,
    write_index,
)
from lclm.data.retry import RetryingFile
from lclm.files import replace_files

_ENDINGS = (".bin", ".weights", ".json", ".idx")  # .idx is renamed last: it makes them complete
COPY_BYTES = 1 << 24

Document = tuple[np.ndarray, np.ndarray | None]  # tokens, numbers of their weights as targets


def check_new_prefix(prefix: str) -> None:
    """Raise ValueError where a prefix to be written names a folder, its files would be hidden."""
    if os.path.basename(prefix) in ("", ".", ".."):
        raise ValueError(
            f"--output-prefix {prefix}: ends in no name; give the start of the files' names, for "
            f"example {os.path.join(prefix, 'books')}"
        )


def prefix_files(prefix: str | os.PathLike[str]) -> list[Path]:
    """The files that a prefix may have, there or not."""
    return [Path(os.fspath(prefix) + ending) for ending in _ENDINGS]


def dtype_for_vocab(vocab_size: int) -> np.dtype:
    """Megatron's rule: uint16 when vocab_size < 65500, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def length_histogram(lengths: np.ndarray) -> dict[str, int]:
    """Documents per power of two: key 2^k counts lengths in [2^k, 2^(k+1)); empty bins left out."""
    # frexp gives length = mantissa * 2^exponent with mantissa in [0.5, 1): exact for int32
    exponents = np.frexp(lengths[lengths > 0].astype(np.float64))[1] - 1
    bins, counts = np.unique(exponents, return_counts=True)
    return {str(1 << int(k)): int(count) for k, count in zip(bins, counts)}


class IndexedReader:
    """The documents of one prefix; the index is memory-mapped.

    Attributes:
        lengths: int32 [num_docs], tokens of each document that has any.
        num_tokens: their sum.
        dtype: of the stored tokens.
        metadata: contents of `<prefix>.json`; empty when there is none (files of another tool).
        is_chat: documents are conversations, which best-fit never cuts.
        weight_values: weights that tokens may have as targets; empty: all weigh 1.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        """Open `<prefix>.bin` and `<prefix>.idx`.

        Raises:
            ValueError: a file is missing, is not of this format, or the two do not match.
        """
        self.prefix = os.fspath(prefix)
        bin_path, idx_path = Path(self.prefix + ".bin"), Path(self.prefix + ".idx")
        for path in (bin_path, idx_path):
            if not path.is_file():
                raise ValueError(
                    f"{path}: no such file; a prefix names <prefix>.bin and <prefix>.idx, which "
                    "tools/preprocess_data.py writes"
                )
        self.dtype, lengths, pointers, borders = read_index(idx_path)
        self.num_tokens = int(lengths.sum(dtype=np.int64))
        num_bytes = self.num_tokens * self.dtype.itemsize
        if bin_path.stat().st_size != num_bytes:
            raise ValueError(
                f"{bin_path}: has {bin_path.stat().st_size} bytes, but {idx_path.name} describes "
                f"{num_bytes} ({self.num_tokens} tokens of {self.dtype.itemsize} bytes); the file "
                "is cut short or belongs to another index: copy or write both again"
            )
        if not are_starts(pointers, lengths, self.dtype.itemsize):
            raise ValueError(
                f"{idx_path}: its byte offsets do not follow from its lengths; the file is damaged:"
                " write it again"
            )
        if len(borders) == len(lengths) + 1 and lengths.all():
            # a sequence per document: nothing to work out, the file itself serves
            self.lengths, self._starts, self._start_unit = lengths, pointers, self.dtype.itemsize
        else:
            self.lengths, self._starts = documents_of(idx_path, lengths, borders)
            self._start_unit = 1
        self._tokens = RetryingFile(bin_path)
        self.metadata = read_metadata(Path(self.prefix + ".json"))
        _check_metadata(self.metadata, Path(self.prefix + ".json"), self.num_tokens)
        self.is_chat = bool(self.metadata.get("is_chat"))
        self.weight_values: list[float] = self.metadata.get("weight_values", [])
        self._weight_table = np.array(self.weight_values, np.float32)
        self._weights = _open_weights(self.prefix, self.num_tokens) if self.has_weights else None

    @property
    def has_weights(self) -> bool:
        """Whether tokens count as targets by weights of their own (`read_weights`)."""
        return bool(self.weight_values)

    @property
    def weight_numbers(self) -> np.ndarray | None:
        """uint8 [num_tokens], number of each token's weight in `weight_values`, if there are any.

        As the file has them: in the order of its documents only where those follow one another.
        """
        return self._weights

    def check_dtype(self) -> None:
        """Raise ValueError unless the tokens are stored as metadata["vocab_size"] asks."""
        vocab_size = self.metadata["vocab_size"]
        if dtype_for_vocab(int(vocab_size)) != self.dtype:
            raise ValueError(
                f"{self.prefix}: holds {self.dtype}, a vocabulary of {vocab_size} asks for "
                f"{dtype_for_vocab(int(vocab_size))}; write it again"
            )

    def read_weight_numbers(self, doc: int, offset: int, length: int) -> np.ndarray:
        """uint8 [length], number of each token's weight in `weight_values`; see `read`."""
        assert self._weights is not None, "has_weights says whether there are any"
        start = int(self._starts[doc]) // self._start_unit + offset
        return self._weights[start : start + length]

    def read_weights(self, doc: int, offset: int, length: int) -> np.ndarray:
        """float32 [length]: weight of each of these tokens as a target; see `read`."""
        return self._weight_table[self.read_weight_numbers(doc, offset, length)]

    def documents(self) -> Iterator[Document]:
        """Tokens of every document, and the numbers of their weights where there are any."""
        for number, length in enumerate(self.lengths.tolist()):
            weights = self.read_weight_numbers(number, 0, length) if self.has_weights else None
            yield self.read(number), weights

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, doc: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens [offset, offset + length) of document doc; length None: up to its end.

        Returns a read-only array of dtype `self.dtype`.

        Raises:
            ValueError: the range does not lie in the document.
            OSError: the file cannot be read, even after retries.
        """
        if not 0 <= doc < len(self.lengths):
            raise ValueError(f"{self.prefix}: document {doc} of {len(self.lengths)} does not exist")
        end = int(self.lengths[doc]) if length is None else offset + length
        if not 0 <= offset <= end <= self.lengths[doc]:
            raise ValueError(
                f"{self.prefix}: tokens [{offset}, {end}) are not inside document {doc} of "
                f"{self.lengths[doc]} tokens"
            )
        first = int(self._starts[doc]) // self._start_unit + offset
        raw = self._tokens.read(first * self.dtype.itemsize, (end - offset) * self.dtype.itemsize)
        return np.frombuffer(raw, self.dtype)


def _open_weights(prefix: str, num_tokens: int) -> np.ndarray:
    """uint8 [num_tokens] of `<prefix>.weights`: number of each token's weight_values in .json."""
    path = Path(prefix + ".weights")
    size = path.stat().st_size if path.is_file() else -1
    if size != num_tokens:
        raise ValueError(
            f"{path}: {'is missing' if size < 0 else f'has {size} bytes'}, the prefix has "
            f"{num_tokens} tokens and its .json says that each has a weight; write it again"
        )
    return np.memmap(path, np.uint8, "r") if num_tokens else np.empty(0, np.uint8)


def read_metadata(path: Path) -> dict[str, Any]:
    """The `.json` of a prefix, empty where there is none; ValueError for one that is no object."""
    if not path.is_file():
        return {}
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error}); write the prefix again") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"{path}: holds no JSON object; write the prefix again")
    return metadata


def _check_metadata(metadata: dict[str, Any], path: Path, num_tokens: int) -> None:
    if path.is_file() and metadata.get("tokens") != num_tokens:
        raise ValueError(
            f"{path}: does not describe the {num_tokens} tokens of the files beside it; it belongs "
            "to another version of them: write the prefix again, or delete the .json"
        )


class IndexedWriter:
    """Writes one prefix. Use as a context manager: files appear under their names only on success.

    Attributes:
        metadata: put into `<prefix>.json`, where tokens, documents, empty_documents, vocab_size,
            dtype and length_histogram are added.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        vocab_size: int,
        weight_values: Sequence[float] = (),
    ) -> None:
        """Prepare `<prefix>.bin`, `.idx` and `.json`; folders on the way are created.

        Args:
            prefix: of the files.
            vocab_size: decides the dtype, as `dtype_for_vocab` says.
            weight_values: at most 256 weights that targets may have; with any, `.weights` is
                written and every document brings the number of each token's weight.
        """
        self.prefix = os.fspath(prefix)
        check_new_prefix(self.prefix)
        self.vocab_size = vocab_size
        self.dtype = dtype_for_vocab(vocab_size)
        self.metadata: dict[str, Any] = {}
        self._lengths = array("i")  # of every document, 0 for one without tokens
        self._weight_values = list(weight_values)
        self._endings = [e for e in _ENDINGS if weight_values or e != ".weights"]
        self._weights: BinaryIO | None = None

    def __enter__(self) -> "IndexedWriter":
        Path(self.prefix).absolute().parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            files = replace_files(*(Path(self.prefix + ending) for ending in self._endings))
            self._temporary = dict(zip(self._endings, stack.enter_context(files)))
            self._bin: BinaryIO = stack.enter_context(self._temporary[".bin"].open("wb"))
            if self._weight_values:
                self._weights = stack.enter_context(self._temporary[".weights"].open("wb"))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *raised: Any) -> None:
        if raised[0] is None:
            if self._weight_values:
                self.metadata["weight_values"] = self._weight_values
            files = (self._temporary[".idx"], self._temporary[".json"])
            lengths = np.asarray(self._lengths, np.int32)
            self._open.callback(_describe, *files, lengths, self.vocab_size, self.metadata)
        self._open.__exit__(*raised)

    def add_document(self, ids: np.ndarray | list[int], weights: np.ndarray | None = None) -> None:
        """Append one document; one without tokens is counted and gets a border only.

        Args:
            ids: its tokens.
            weights: integers, number of each token's weight in weight_values; given if and only if
                there are any.

        Raises:
            ValueError: an id lies outside the vocabulary, the document is too long, or weights do
                not fit.
        """
        tokens = np.asarray(ids, dtype=np.int64)
        if len(tokens) > MAX_DOCUMENT:
            raise ValueError(
                f"{self.prefix}: document {len(self._lengths)} has {len(tokens)} tokens, the "
                f"format holds at most {MAX_DOCUMENT}; split it"
            )
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise ValueError(
                f"{self.prefix}: document {len(self._lengths)} holds ids from {tokens.min()} to"
                f" {tokens.max()}, the vocabulary has {self.vocab_size}; use the tokenizer's "
                "vocabulary size"
            )
        if self._weights is not None:
            self._weights.write(self._checked_weights(weights, len(tokens)))
        self._bin.write(tokens.astype(self.dtype).tobytes())
        self._lengths.append(len(tokens))

    def _checked_weights(self, weights: np.ndarray | None, num_tokens: int) -> bytes:
        if weights is None or len(weights) != num_tokens:
            raise ValueError(
                f"{self.prefix}: document {len(self._lengths)} of {num_tokens} tokens has "
                f"{None if weights is None else len(weights)} weights; give one for each"
            )
        if num_tokens and not 0 <= weights.min() <= weights.max() < len(self._weight_values):
            raise ValueError(
                f"{self.prefix}: document {len(self._lengths)} has weight numbers up to "
                f"{weights.max()}, there are {len(self._weight_values)}"
            )
        return weights.astype(np.uint8).tobytes()

    def add_tokens(
        self,
        source: BinaryIO,
        num_bytes: int,
        lengths: np.ndarray,
        weights: np.ndarray | None = None,
    ) -> None:
        """Append documents whose tokens are the next num_bytes of source, already in `self.dtype`.

        Args:
            source: where it is to be read from.
            num_bytes: of all tokens.
            lengths: tokens of every document, 0 for one without.
            weights: as of `add_document`, of all tokens.

        Raises:
            ValueError: num_bytes are not the sum of lengths, source ends too early, or weights do
                not fit.
        """
        if int(lengths.sum(dtype=np.int64)) * self.dtype.itemsize != num_bytes:
            raise ValueError(
                f"{self.prefix}: {num_bytes} bytes do not hold {lengths.sum()} tokens of "
                f"{self.dtype}"
            )
        if self._weights is not None:
            num_tokens = num_bytes // self.dtype.itemsize
            self._weights.write(self._checked_weights(weights, num_tokens))
        while num_bytes:
            block = source.read(min(num_bytes, COPY_BYTES))
            if not block:
                raise ValueError(f"{self.prefix}: a shard ended {num_bytes} bytes too early")
            self._bin.write(block)
            num_bytes -= len(block)
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())


def adopt_tokens(
    prefix: str,
    tokens: Path,
    lengths: np.ndarray,
    vocab_size: int,
    metadata: dict[str, Any],
    weights: Path | None = None,
) -> None:
    """Make a file of tokens the `.bin` of a prefix and write `.idx` and `.json` beside it.

    Args:
        prefix: of the new files; older ones are replaced, the index last.
        tokens: file on the same file system; it is renamed. Where it is gone, an earlier call that
            was killed has renamed it already.
        lengths: int32, tokens of every document, 0 for one without tokens.
        vocab_size: decides the dtype, as `dtype_for_vocab` says.
        metadata: as `IndexedWriter.metadata`; with weights, weight_values are among it.
        weights: the same for the `.weights`.
    """
    with replace_files(Path(prefix + ".json"), Path(prefix + ".idx")) as (description, index):
        _describe(index, description, lengths, vocab_size, metadata)
        if weights is not None and weights.exists():
            os.replace(weights, prefix + ".weights")
        if tokens.exists():
            os.replace(tokens, prefix + ".bin")


def tokenizer_difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """What tells two descriptions of tokenizers apart, in words; empty: nothing that is known.

    Tokenizers are told by their vocabulary, added tokens included, so that one in two kinds of file
    is the same; prefixes of older versions name the hash of one file alone.
    """
    for field in ("vocabulary", "sha256"):
        if field in first and field in second:
            shown = [
                f"{item.get('vocab_size')} tokens, {field} {item[field][:12]}"
                for item in (first, second)
            ]
            return "" if first[field] == second[field] else " and ".join(shown)
    return ""


def check_same_tokenizer(readers: Sequence[IndexedReader], where: str) -> None:
    """Refuse prefixes that do not belong together; files without a `.json` are not checked.

    Raises:
        ValueError: two were written with different tokenizers, or end documents differently.
    """
    known = [item for item in readers if item.metadata.get("tokenizer")]
    for second in known[1:]:
        difference = tokenizer_difference(*(r.metadata["tokenizer"] for r in (known[0], second)))
        if difference:
            raise ValueError(
                f"{where}: {known[0].prefix} and {second.prefix} were written with different "
                f"tokenizers ({difference}); write both with the same one"
            )
    ended = [item for item in known if item.metadata.get("options", {}).get("append_eod")]
    for second in ended[1:]:
        ends = [item.metadata["tokenizer"].get("eod_id") for item in (ended[0], second)]
        if ends[0] != ends[1]:
            raise ValueError(
                f"{where}: documents of {ended[0].prefix} end in token {ends[0]}, those of "
                f"{second.prefix} in {ends[1]}; write both with the same eos_token or --eod-token"
            )


def read_all_lengths(prefix: str) -> np.ndarray:
    """int32, tokens of every document of a prefix, 0 for those without tokens.

    Raises:
        ValueError: as `IndexedReader`, or a document has several sequences.
    """
    path = Path(prefix + ".idx")
    _, lengths, _, borders = read_index(path)
    counts = np.diff(borders)
    if len(counts) and counts.max() > 1:
        raise ValueError(
            f"{path}: a document has {counts.max()} sequences; only files with one sequence per "
            "document, as tools/preprocess_data.py writes them, can be used here"
        )
    every = np.zeros(len(counts), np.int32)
    every[counts == 1] = lengths
    return every


def _describe(
    index: Path, description: Path, lengths: np.ndarray, vocab_size: int, metadata: dict[str, Any]
) -> None:
    """Write the `.idx` and the `.json` of documents of these lengths."""
    dtype = dtype_for_vocab(vocab_size)
    write_index(index, lengths, dtype)
    num_documents = int(np.count_nonzero(lengths))
    counts = {
        "vocab_size": vocab_size,
        "dtype": dtype.name,
        "tokens": int(lengths.sum(dtype=np.int64)),
        "documents": num_documents,
        "empty_documents": len(lengths) - num_documents,
        "length_histogram": length_histogram(lengths),
    }
    text = json.dumps(metadata | counts, indent=2, ensure_ascii=True)
    description.write_text(text + "\n", encoding="utf-8")

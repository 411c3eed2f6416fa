"""The rows of a stage: row n is a pure function of (files, seed, stages before, n).

There is no iterator state: any rank of any layout asks for the rows it needs, and a resumed run
asks for the next one. Positions and row order are worked out once, when a stage is built, and cost
tens of bytes per row; tokens stay on disk until a row is read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lclm.config import MixtureEntry, check_mixture
from lclm.data.domain import Cursor, Domain, distinct_names, prefix_key, seeded_order
from lclm.data.indexed import check_same_tokenizer
from lclm.data.mixture import assign_rows
from lclm.data.packing import (
    DomainRows,
    PackedRows,
    build_best_fit_rows,
    build_concat_rows,
    build_exact_rows,
)
from lclm.data.packing_cache import Packing, hash_packing, load_or_make
from lclm_kernels.native import pack_concat


@dataclass(frozen=True)
class Row:
    """One packed sequence."""

    tokens: np.ndarray  # int64 [T]
    doc_lengths: np.ndarray  # int64, tokens of each piece, adding up to T; padding is the last one
    domain: str
    token_weights: np.ndarray | None = None  # float32 [T], of each token as a target; None: all 1
    document_mask: bool = True  # of the stage

    def __post_init__(self) -> None:
        """Raise ValueError unless doc_lengths cut the row into pieces; nothing later checks it."""
        lengths = self.doc_lengths
        if len(lengths) == 0 or lengths.sum() != len(self.tokens) or lengths.min() < 1:
            raise ValueError(
                f"row: pieces of {lengths.tolist()[:8]} tokens must be positive and add up to the "
                f"row's {len(self.tokens)}; delete the run folder's plans to pack again"
            )

    @property
    def attention_lengths(self) -> np.ndarray:
        """int64, tokens of each document as attention and positions see the row."""
        return _attention_lengths(self.doc_lengths, self.document_mask)


PACKING_VERSION = 2  # raised when the same inputs give other rows
PACKED_FIELDS = ("row_start", "doc", "offset", "length")  # of PackedRows
LOST = ("tail_tokens", "unused_tokens", "padding_tokens", "dropped_docs")  # of DomainRows
PADDING_TOKEN = 0  # never a target, never seen from another piece


def _attention_lengths(doc_lengths: np.ndarray, document_mask: bool) -> np.ndarray:
    """The documents that attention stays within: the whole row is one without the mask."""
    return doc_lengths if document_mask else doc_lengths.sum(keepdims=True)


def _padded_lengths(lengths: np.ndarray, seq_length: int) -> np.ndarray:
    """int64: the pieces' lengths, and that of the padding where there is any."""
    room = seq_length - int(lengths.sum(dtype=np.int64))
    return np.append(lengths, room).astype(np.int64) if room else lengths.astype(np.int64)


class _Rows:
    """What the rows of a stage and those of its validation share."""

    num_rows: int

    def __init__(self, seq_length: int, vocab_size: int | None, document_mask: bool) -> None:
        self.seq_length = seq_length
        self._vocab_size, self._document_mask = vocab_size, document_mask

    def __len__(self) -> int:
        return self.num_rows

    def _check(self, number: int) -> None:
        if not 0 <= number < self.num_rows:
            raise IndexError(f"row {number} of {self.num_rows} rows")

    def _read(self, domain: Domain, rows: PackedRows, number: int) -> Row:
        first, last = rows.row_start[number : number + 2].tolist()
        doc_lengths = rows.length[first:last].astype(np.int64)
        docs, offsets = rows.doc[first:last].tolist(), rows.offset[first:last].tolist()
        tokens = np.full(self.seq_length, PADDING_TOKEN, np.int64)
        num_tokens = int(doc_lengths.sum())
        weights: np.ndarray | None = None
        if domain.reader.has_weights or num_tokens < self.seq_length:
            weights = np.ones(self.seq_length, np.float32)
            weights[num_tokens:] = 0
        vocab_size, at = self._vocab_size, 0
        for doc, offset, length in zip(docs, offsets, doc_lengths.tolist()):
            piece = domain.reader.read(doc, offset, length)
            if vocab_size is not None and not 0 <= piece.min() <= piece.max() < vocab_size:
                raise ValueError(
                    f"{domain.reader.prefix}.bin: tokens [{offset}, {offset + length}) of document "
                    f"{doc} hold ids from {piece.min()} to {piece.max()}, the model's vocabulary "
                    f"has {vocab_size}; the file is damaged or of another tokenizer: check it with "
                    "tools/inspect_data.py --verify"
                )
            tokens[at : at + length] = piece
            if weights is not None and domain.reader.has_weights:
                weights[at : at + length] = domain.reader.read_weights(doc, offset, length)
            at += length
        lengths = _padded_lengths(doc_lengths, self.seq_length)
        return Row(tokens, lengths, domain.name, weights, self._document_mask)


class StageRows(_Rows):
    """All rows of one stage.

    Attributes:
        num_rows, seq_length: as given.
        next_cursors: `prefix_key` -> Cursor where the next stage starts; prefixes that this stage
            does not use keep theirs.
    """

    def __init__(
        self,
        entries: Sequence[MixtureEntry],
        seq_length: int,
        num_rows: int,
        seed: int,
        stage_index: int = 0,
        cursors: Mapping[str, Cursor] | None = None,
        held_out_fraction: float = 0.0,
        max_epochs: int = 1,
        cache_dir: Path | None = None,
        vocab_size: int | None = None,
        document_mask: bool = True,
        names: Mapping[str, str] | None = None,
    ) -> None:
        """Pack the stage.

        Args:
            entries: the mixture; shares of tokens, at the start and at the end, add up to 1.
            seq_length: tokens of a row.
            num_rows: rows of the whole stage.
            seed: of the run.
            stage_index: number of the stage in the run.
            cursors: `next_cursors` of the stage before; None for the first.
            held_out_fraction: of each domain's documents, never trained on.
            max_epochs: passes over one domain allowed, all stages together.
            cache_dir: folder where packings are kept (see `packing_cache`); None: none are.
            vocab_size: of the model; reading a row with other ids is a ValueError. None: no limit.
            document_mask: whether attention and positions stay within a document; labels always do.
            names: of the domains in metrics, by prefix; None: `distinct_names` of the mixture.

        Raises:
            ValueError: a rule of the mixture is broken, files cannot be read or come from different
                tokenizers, or a domain does not have enough tokens.
        """
        where = f"stage.{stage_index}"
        if num_rows < 1 or seq_length < 1:
            raise ValueError(
                f"{where}: {num_rows} rows of {seq_length} tokens; both must be at least 1"
            )
        super().__init__(seq_length, vocab_size, document_mask)
        self.num_rows = num_rows
        first: dict[str, str] = {}  # spelling of each prefix: two of one file are one domain
        spelled = [first.setdefault(prefix_key(e.prefix), e.prefix) for e in entries]
        self._entries = [e.model_copy(update={"prefix": p}) for e, p in zip(entries, spelled)]
        self._piece_lengths = check_mixture(where, self._entries, seq_length)
        self._domains = {
            prefix: Domain(prefix, seed, held_out_fraction)
            for prefix in dict.fromkeys(entry.prefix for entry in self._entries)
        }
        names = names or distinct_names(self._domains)
        for prefix, domain in self._domains.items():
            domain.name = names[prefix]
        check_same_tokenizer([domain.reader for domain in self._domains.values()], "mixture")
        self.next_cursors = dict(cursors or {})
        self._first_cursors = {
            prefix: self.next_cursors.get(prefix_key(prefix), Cursor()) for prefix in self._domains
        }
        inputs: list[object] = [PACKING_VERSION, seq_length, num_rows]
        inputs += [seed, stage_index, max_epochs]
        inputs += [
            [self._domains[e.prefix].key, self._domains[e.prefix].num_held_out,
             self._domains[e.prefix].reader.is_chat, e.packing, length, e.share,
             self._first_cursors[e.prefix]]
            for e, length in zip(self._entries, self._piece_lengths)
        ]  # fmt: skip
        arrays, facts = load_or_make(
            cache_dir, hash_packing(inputs), lambda: self._pack_stage(seed, stage_index, max_epochs)
        )
        self._entry_of_row = arrays["entry_of_row"]
        self._row_in_entry = arrays["row_in_entry"]
        self._rows = [
            PackedRows(*(arrays[f"{name}_{number}"] for name in PACKED_FIELDS))
            for number in range(len(self._entries))
        ]
        self._rows_per_entry = np.bincount(self._entry_of_row, minlength=len(self._entries))
        self._facts = dict(zip(self._domains, facts["domains"]))
        for prefix, fact in self._facts.items():
            self.next_cursors[prefix_key(prefix)] = Cursor(*fact["next_cursor"])

    def _pack_stage(self, seed: int, stage_index: int, max_epochs: int) -> Packing:
        """Pack every domain and shuffle the rows of every entry."""
        entry_of_row = assign_rows([entry.share_ends for entry in self._entries], self.num_rows)
        counts = np.bincount(entry_of_row, minlength=len(self._entries)).tolist()
        row_in_entry = np.empty(self.num_rows, np.int64)
        arrays = {"entry_of_row": entry_of_row, "row_in_entry": row_in_entry}
        facts = []
        for prefix, domain in self._domains.items():
            mine = [n for n, entry in enumerate(self._entries) if entry.prefix == prefix]
            part = self._pack(domain, mine, counts, max_epochs, f"stage.{stage_index}")
            for number, rows, epoch in zip(mine, part.rows, part.epochs):
                for name in PACKED_FIELDS:
                    arrays[f"{name}_{number}"] = getattr(rows, name)
                # which row of its entry each row of the stage is: epoch by epoch, shuffled within
                shuffled = seeded_order(len(rows), "rows", seed, stage_index, number)
                row_in_entry[entry_of_row == number] = np.lexsort((shuffled, epoch))
            lost = {name: getattr(part, name) for name in LOST}
            facts.append({"next_cursor": list(part.next_cursor), **lost})
        return arrays, {"domains": facts}

    def _pack(
        self, domain: Domain, mine: list[int], counts: list[int], max_epochs: int, where: str
    ) -> DomainRows:
        needs = [counts[n] for n in mine]
        request = (domain, self._first_cursors[domain.prefix], self.seq_length)
        packing = self._entries[mine[0]].packing
        if packing == "concat":
            return build_concat_rows(*request, needs[0], max_epochs, where)
        if packing == "best-fit":
            return build_best_fit_rows(*request, needs[0], max_epochs, where)
        lengths = [self._piece_lengths[n] for n in mine]
        return build_exact_rows(*request, lengths, needs, max_epochs, where)

    @property
    def domain_names(self) -> dict[str, str]:
        """Prefix -> the name that this domain's rows carry."""
        return {prefix: domain.name for prefix, domain in self._domains.items()}

    def row(self, number: int) -> Row:
        """Row `number` of the stage, 0 <= number < num_rows.

        Raises:
            IndexError: there is no such row.
            ValueError: it holds ids outside the vocabulary.
            OSError: it cannot be read, even after retries.
        """
        self._check(number)
        entry = int(self._entry_of_row[number])
        domain = self._domains[self._entries[entry].prefix]
        return self._read(domain, self._rows[entry], int(self._row_in_entry[number]))

    def attention_lengths(self, number: int) -> np.ndarray:
        """int64, `attention_lengths` of row `number` without reading its tokens."""
        entry = int(self._entry_of_row[number])
        rows, at = self._rows[entry], int(self._row_in_entry[number])
        first, last = rows.row_start[at : at + 2].tolist()
        lengths = _padded_lengths(rows.length[first:last], self.seq_length)
        return _attention_lengths(lengths, self._document_mask)

    def ledger(self, num_rows: int) -> dict[str, int]:
        """Tokens of each prefix in the first num_rows rows of the stage."""
        counts = np.bincount(self._entry_of_row[:num_rows], minlength=len(self._entries))
        tokens = dict.fromkeys(self._domains, 0)
        for entry, count in zip(self._entries, counts.tolist()):
            tokens[entry.prefix] += count * self.seq_length
        return tokens

    def summary(self) -> str:
        """A line per entry and per domain, for the log."""
        lines = []
        for number, entry in enumerate(self._entries):
            pieces = f" of {self._piece_lengths[number]}" if entry.packing == "exact" else ""
            count = int(self._rows_per_entry[number])
            ends = dict.fromkeys(entry.share_ends)
            lines.append(
                f"{entry.prefix}: share {' to '.join(f'{share:g}' for share in ends)}, "
                f"{entry.packing}{pieces}, {count} rows, "
                f"{count * self.seq_length} tokens"
            )
        for prefix, domain in self._domains.items():
            fact, is_chat = self._facts[prefix], domain.reader.is_chat
            first = self._first_cursors[prefix].ordinal / domain.num_docs
            last = self.next_cursors[prefix_key(prefix)].ordinal / domain.num_docs
            dropped = {
                f"{fact['tail_tokens']} tokens of tails dropped": True,
                f"{fact['unused_tokens']} in pieces not needed": True,
                f"{fact['padding_tokens']} of padding": fact["padding_tokens"],
                f"{fact['dropped_docs']} conversations longer than a row left out": is_chat,
            }
            lines.append(
                f"{prefix}: epochs {first:.3f} to {last:.3f} of {domain.num_docs} documents "
                f"({domain.num_held_out} more held out), "
                + ", ".join(text for text, is_said in dropped.items() if is_said)
            )
        return "\n".join(lines)


class HeldOutRows(_Rows):
    """Validation rows of one domain: its held-out documents one after another, cut at row ends.

    Attributes:
        num_rows: as asked for, or fewer: as many as the documents fill, at least 1. A single row
            repeats documents until it is full.
    """

    def __init__(
        self,
        prefix: str,
        seq_length: int,
        num_rows: int,
        seed: int,
        held_out_fraction: float,
        vocab_size: int | None = None,
        document_mask: bool = True,
        name: str = "",
    ) -> None:
        """Pack the rows; vocab_size and document_mask as for `StageRows`, name for metrics.

        Raises:
            ValueError: no documents are held out, or num_rows is less than 1.
        """
        self._domain = Domain(prefix, seed, held_out_fraction)
        super().__init__(seq_length, vocab_size, document_mask)
        self._domain.name = name or self._domain.name
        docs = self._domain.held_out_docs
        if len(docs) == 0 or num_rows < 1:
            raise ValueError(
                f"{prefix}: {num_rows} validation rows asked for and {len(docs)} documents are "
                "held out; both must be at least 1: set data.held_out_fraction above 0 and give "
                "the domain at least 2 documents"
            )
        lengths = self._domain.reader.lengths[docs]
        num_tokens = int(lengths.sum(dtype=np.int64))
        self.num_rows = min(num_rows, max(1, num_tokens // seq_length))
        repeats = -(-self.num_rows * seq_length // num_tokens)
        packed = pack_concat(np.tile(lengths, repeats), 0, seq_length, self.num_rows)
        assert packed is not None, "documents are repeated until they fill the rows"
        doc = np.tile(docs, repeats)[packed.place]
        self._rows = PackedRows(packed.row_start, doc, packed.offset, packed.length)

    def row(self, number: int) -> Row:
        """Row `number`, 0 <= number < num_rows; raises as `StageRows.row`."""
        self._check(number)
        return self._read(self._domain, self._rows, number)

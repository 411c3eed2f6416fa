"""The rows of a stage: row n is a pure function of (files, seed, stages before, n).

There is no iterator state: any rank of any layout asks for the rows it needs, and a resumed run
asks for the next one. Positions and row order are worked out once, when a stage is built, and cost
tens of bytes per row; tokens stay on disk until a row is read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lclm.data.domain import Cursor, Domain, seeded_order
from lclm.data.indexed import IndexedReader
from lclm.data.mixture import Entry, assign_rows, check_entries
from lclm.data.rows import DomainRows, PackedRows, build_concat_rows, build_exact_rows
from lclm_kernels.native import pack_concat

__all__ = ["Cursor", "HeldOutRows", "Row", "StageRows"]


@dataclass(frozen=True)
class Row:
    """One packed sequence."""

    tokens: np.ndarray  # int64 [T]
    doc_lengths: np.ndarray  # int64, tokens of each piece, adding up to T
    domain: str


def _read_row(domain: Domain, rows: PackedRows, number: int, seq_length: int) -> Row:
    first, last = rows.row_start[number : number + 2].tolist()
    doc_lengths = rows.length[first:last]
    docs, offsets = rows.doc[first:last].tolist(), rows.offset[first:last].tolist()
    tokens = np.empty(seq_length, np.int64)
    at = 0
    for doc, offset, length in zip(docs, offsets, doc_lengths.tolist()):
        tokens[at : at + length] = domain.reader.read(doc, offset, length)
        at += length
    return Row(tokens, doc_lengths, domain.name)


class StageRows:
    """All rows of one stage.

    Attributes:
        num_rows, seq_length: as given.
        next_cursors: prefix -> Cursor where the next stage starts; prefixes that this stage does
            not use keep theirs.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        seq_length: int,
        num_rows: int,
        seed: int,
        stage_index: int = 0,
        cursors: Mapping[str, Cursor | Sequence[int]] | None = None,
        held_out_fraction: float = 0.0,
        max_epochs: int = 1,
    ) -> None:
        """Plan the stage.

        Args:
            entries: the mixture; shares of tokens add up to 1.
            seq_length: tokens of a row.
            num_rows: rows of the whole stage.
            seed: of the run.
            stage_index: number of the stage in the run.
            cursors: `next_cursors` of the stage before, {} for the first; pairs (ordinal, offset)
                as they come from JSON will do.
            held_out_fraction: of each domain's documents, never trained on.
            max_epochs: passes over one domain allowed, all stages together.

        Raises:
            ValueError: a rule of the mixture is broken, files cannot be read or come from different
                tokenizers, or a domain does not have enough tokens.
        """
        where = f"stage.{stage_index}"
        if num_rows < 1 or seq_length < 1:
            raise ValueError(
                f"{where}: {num_rows} rows of {seq_length} tokens; both must be at least 1"
            )
        self.seq_length = seq_length
        self.num_rows = num_rows
        self._entries = list(entries)
        self._piece_lengths = check_entries(self._entries, seq_length)
        self._entry_of_row = assign_rows([entry.share for entry in self._entries], num_rows)
        self._rows_per_entry = np.bincount(self._entry_of_row, minlength=len(self._entries))
        self._domains = {
            prefix: Domain(prefix, seed, held_out_fraction)
            for prefix in dict.fromkeys(entry.prefix for entry in self._entries)
        }
        check_same_tokenizer([domain.reader for domain in self._domains.values()])
        self.next_cursors = {key: Cursor(*at) for key, at in (cursors or {}).items()}
        self._parts: dict[str, DomainRows] = {}
        self._rows: dict[int, PackedRows] = {}  # of each entry
        self._first_cursors: dict[str, Cursor] = {}
        for prefix, domain in self._domains.items():
            self._pack(domain, self.next_cursors.get(prefix, Cursor()), max_epochs, where)
        # which row of its entry each row of the stage is: epoch by epoch, shuffled within one
        self._row_in_entry = np.empty(num_rows, np.int64)
        for number, rows in self._rows.items():
            shuffled = seeded_order(len(rows), "rows", seed, stage_index, number)
            in_order = np.lexsort((shuffled, rows.epoch))
            self._row_in_entry[self._entry_of_row == number] = in_order

    def _pack(self, domain: Domain, cursor: Cursor, max_epochs: int, where: str) -> None:
        mine = [n for n, entry in enumerate(self._entries) if entry.prefix == domain.prefix]
        counts = [int(self._rows_per_entry[n]) for n in mine]
        lengths = [self._piece_lengths[n] for n in mine]
        request = (domain, cursor, self.seq_length)
        if self._entries[mine[0]].packing == "concat":
            part = build_concat_rows(*request, counts[0], max_epochs, where)
        else:
            part = build_exact_rows(*request, lengths, counts, max_epochs, where)
        self._parts[domain.prefix] = part
        for number, rows in zip(mine, part.rows):
            self._rows[number] = rows
        self._first_cursors[domain.prefix] = cursor
        self.next_cursors[domain.prefix] = part.next_cursor

    def __len__(self) -> int:
        return self.num_rows

    @property
    def domain_names(self) -> dict[str, str]:
        """Prefix -> the name that this domain's rows carry."""
        return {prefix: domain.name for prefix, domain in self._domains.items()}

    @property
    def vocab_sizes(self) -> dict[str, int]:
        """Prefix -> tokens of the vocabulary it was written with, where its `.json` says."""
        known = {p: domain.reader.metadata.get("vocab_size") for p, domain in self._domains.items()}
        return {prefix: int(size) for prefix, size in known.items() if size is not None}

    def row(self, number: int) -> Row:
        """Row `number` of the stage, 0 <= number < num_rows.

        Raises:
            IndexError: there is no such row.
        """
        if not 0 <= number < self.num_rows:
            raise IndexError(f"row {number} of a stage of {self.num_rows} rows")
        entry = int(self._entry_of_row[number])
        domain = self._domains[self._entries[entry].prefix]
        row_in_entry = int(self._row_in_entry[number])
        return _read_row(domain, self._rows[entry], row_in_entry, self.seq_length)

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
            lines.append(
                f"{entry.prefix}: share {entry.share:g}, {entry.packing}{pieces}, {count} rows, "
                f"{count * self.seq_length} tokens"
            )
        for prefix, domain in self._domains.items():
            part = self._parts[prefix]
            first = self._first_cursors[prefix].ordinal / domain.num_docs
            last = self.next_cursors[prefix].ordinal / domain.num_docs
            lines.append(
                f"{prefix}: epochs {first:.3f} to {last:.3f} of {domain.num_docs} documents "
                f"({len(domain.held_out_docs)} more held out), {part.num_tail_tokens} tokens of "
                f"tails dropped, {part.num_unused_tokens} in pieces not needed"
            )
        return "\n".join(lines)


class HeldOutRows:
    """Validation rows of one domain: its held-out documents one after another, cut at row ends.

    Attributes:
        num_rows: as asked for, or fewer: as many as the documents fill, at least 1. A single row
            repeats documents until it is full.
    """

    def __init__(
        self, prefix: str, seq_length: int, num_rows: int, seed: int, held_out_fraction: float
    ) -> None:
        """Plan the rows.

        Raises:
            ValueError: no documents are held out, or num_rows is less than 1.
        """
        self._domain = Domain(prefix, seed, held_out_fraction)
        docs = self._domain.held_out_docs
        if len(docs) == 0 or num_rows < 1:
            raise ValueError(
                f"{prefix}: {num_rows} validation rows asked for and {len(docs)} documents are "
                "held out; both must be at least 1: set data.held_out_fraction above 0 and give "
                "the domain at least 2 documents"
            )
        lengths = self._domain.reader.lengths[docs]
        num_tokens = int(lengths.sum(dtype=np.int64))
        self.seq_length = seq_length
        self.num_rows = min(num_rows, max(1, num_tokens // seq_length))
        repeats = -(-self.num_rows * seq_length // num_tokens)
        packed = pack_concat(np.tile(lengths, repeats), 0, seq_length, self.num_rows)
        assert packed is not None, "documents are repeated until they fill the rows"
        doc = np.tile(docs, repeats)[packed.place]
        epoch = np.zeros(self.num_rows, np.int64)
        self._rows = PackedRows(packed.row_start, doc, packed.offset, packed.length, epoch)

    def __len__(self) -> int:
        return self.num_rows

    def row(self, number: int) -> Row:
        """Row `number`, 0 <= number < num_rows; IndexError when there is no such row."""
        if not 0 <= number < self.num_rows:
            raise IndexError(f"row {number} of {self.num_rows} validation rows")
        return _read_row(self._domain, self._rows, number, self.seq_length)


def check_same_tokenizer(readers: Sequence[IndexedReader]) -> None:
    """Refuse prefixes whose `.json` name different tokenizers; files without one are not checked.

    Raises:
        ValueError: two prefixes were written with different tokenizers.
    """
    first: tuple[str, str] | None = None
    for reader in readers:
        digest = reader.metadata.get("tokenizer", {}).get("sha256")
        if digest is None:
            continue
        if first is not None and digest != first[1]:
            raise ValueError(
                f"mixture: {first[0]} and {reader.prefix} were written with different tokenizers "
                f"(sha256 {first[1][:12]} and {digest[:12]}); write both with the same one"
            )
        first = first or (reader.prefix, digest)

"""A row plan: who holds which tokens of a packed row, who sees them, what must travel.

A row is `row_length` tokens made of documents laid end to end; a token may see its own document up
to and including itself. A plan deals the row out to `cp_size` ranks: each rank gets the same number
of tokens, as sorted spans of global positions. Because a rank keeps its tokens sorted, the keys a
query may see are one interval `[lo, hi)` of any rank's keys. Nothing here knows a process group.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

Span = tuple[int, int]  # (start, end) in global token positions, end not included
DocLengths = Sequence[int] | np.ndarray

_MAX_ROW_LENGTH = 2**31 - 1  # intervals are int32


def check_doc_lengths(doc_lengths: DocLengths) -> np.ndarray:
    """Return the lengths as a new int64 array [documents].

    Raises:
        ValueError: empty, not one-dimensional, not integers, a document of no tokens, or a row
            of 2**31 tokens or more.
    """
    lengths = np.asarray(doc_lengths)
    if lengths.ndim != 1 or lengths.size == 0:
        raise ValueError(
            f"doc_lengths has shape {lengths.shape}; it must be a list of at least one document "
            "length (without document masks: one document as long as the row)"
        )
    if lengths.dtype.kind not in "iu":
        raise ValueError(f"doc_lengths holds {lengths.dtype}; lengths are whole tokens (integers)")
    lengths = lengths.astype(np.int64)
    if (lengths <= 0).any():
        bad = int(np.argmax(lengths <= 0))
        raise ValueError(
            f"doc_lengths[{bad}] is {lengths[bad]}; every document of a row has at least one "
            "token, leave empty documents out"
        )
    row_length = int(lengths.sum())
    if row_length > _MAX_ROW_LENGTH:
        raise ValueError(f"row of {row_length} tokens; a row has at most {_MAX_ROW_LENGTH} tokens")
    return lengths


def check_cp_size(cp_size: int) -> None:
    """Raise ValueError unless `cp_size` is a positive number of ranks."""
    if cp_size < 1:
        raise ValueError(f"cp_size is {cp_size}; context parallelism needs at least 1 rank")


class _Pieces(NamedTuple):
    """The row cut at document starts and at span ends; all int64 [pieces], in global order."""

    starts: np.ndarray
    lengths: np.ndarray
    owners: np.ndarray
    docs: np.ndarray


@dataclass(frozen=True, eq=False)
class RowPlan:
    """One row dealt out to the ranks of a context-parallel group.

    Attributes:
        doc_lengths: int64 [documents], tokens; sums to the row length.
        cp_size: number of ranks R.
        chunks: `chunks[rank]` is that rank's sorted, disjoint global spans (start, end). Every
            token of the row is on exactly one rank; every rank has row_length / R tokens.

    Raises:
        ValueError: when the documents do not sum to what the chunks hold, or the chunks are not
            sorted, overlap, leave tokens out or differ in tokens per rank.
    """

    doc_lengths: np.ndarray
    cp_size: int
    chunks: tuple[tuple[Span, ...], ...]

    def __post_init__(self) -> None:
        check_cp_size(self.cp_size)
        lengths = check_doc_lengths(self.doc_lengths)
        lengths.setflags(write=False)
        object.__setattr__(self, "doc_lengths", lengths)
        chunks = tuple(tuple((int(a), int(b)) for a, b in spans) for spans in self.chunks)
        object.__setattr__(self, "chunks", chunks)
        if len(chunks) != self.cp_size:
            raise ValueError(f"chunks has {len(chunks)} ranks, cp_size is {self.cp_size}")
        self._check_spans()

    @classmethod
    def of_checked(
        cls, doc_lengths: np.ndarray, cp_size: int, chunks: tuple[tuple[Span, ...], ...]
    ) -> "RowPlan":
        """A plan of lengths from `check_doc_lengths` and a partition known to be good, unchecked.

        Args:
            doc_lengths: int64 [documents]; becomes read-only.
            cp_size, chunks: as in the attributes, chunks of Python integers.
        """
        plan = object.__new__(cls)
        doc_lengths.setflags(write=False)
        plan.__dict__.update(doc_lengths=doc_lengths, cp_size=cp_size, chunks=chunks)
        return plan

    def _check_spans(self) -> None:
        """Raise ValueError unless the spans are a partition of the row with equal shares."""
        end_before = 0
        for start, end in sorted(span for spans in self.chunks for span in spans):
            if start != end_before or end <= start:
                raise ValueError(
                    f"span ({start}, {end}) follows position {end_before}; the spans of all ranks "
                    "must cover the row once, without gaps, overlaps or empty spans"
                )
            end_before = end
        if end_before != self.row_length:
            raise ValueError(
                f"documents sum to {self.row_length} tokens but the ranks hold {end_before}; "
                "doc_lengths must sum to the row length"
            )
        for rank, spans in enumerate(self.chunks):
            tokens = sum(end - start for start, end in spans)
            if tokens * self.cp_size != self.row_length:
                raise ValueError(
                    f"rank {rank} holds {tokens} tokens; each of {self.cp_size} ranks must hold "
                    f"{self.row_length}/{self.cp_size}"
                )
            if spans != tuple(sorted(spans)):
                raise ValueError(f"spans of rank {rank} are not sorted: {spans}")

    @cached_property
    def row_length(self) -> int:
        """Tokens of the whole row, T."""
        return int(self.doc_lengths.sum())

    @cached_property
    def doc_starts(self) -> np.ndarray:
        """First global position of each document, int64 [documents]."""
        return np.cumsum(self.doc_lengths) - self.doc_lengths

    def positions(self, rank: int) -> np.ndarray:
        """Global positions of a rank's tokens, sorted, int64 [T/R]."""
        return np.concatenate([np.arange(start, end) for start, end in self._spans(rank)])

    def first_visible(self, positions: np.ndarray) -> np.ndarray:
        """First position each token may see, the start of its document; int64, same shape."""
        doc = np.searchsorted(self.doc_starts, positions, side="right") - 1
        return self.doc_starts[doc]

    def intervals(
        self, query_rank: int, key_rank: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Visible keys of each token of `query_rank`.

        Args:
            query_rank: whose tokens ask, in sorted order.
            key_rank: whose keys (sorted) they look at; None: the keys of the whole row in global
                order.

        Returns:
            lo, hi: int32 [T/R]; query i sees keys [lo[i], hi[i]). A query sees nothing iff
            lo == hi. Neither ever decreases.
        """
        queries = self.positions(query_rank)
        lo, hi = self.first_visible(queries), queries + 1
        if key_rank is not None:
            spans = self._spans(key_rank)
            lo, hi = _held_below(spans, lo), _held_below(spans, hi)
        return lo.astype(np.int32), hi.astype(np.int32)

    def gather_order(self) -> np.ndarray:
        """Index into keys concatenated in rank order that gives global order, int64 [T].

        `concatenated[plan.gather_order()]` is the row; needed after an all-gather, whose result
        comes in rank order, because kernels want keys in global order.
        """
        order = np.empty(self.row_length, dtype=np.int64)
        in_rank_order = np.concatenate([self.positions(rank) for rank in range(self.cp_size)])
        order[in_rank_order] = np.arange(self.row_length)
        return order

    @cached_property
    def areas(self) -> np.ndarray:
        """Visible pairs of each query rank with each key rank: int64 [R, R], [query, key]."""
        pieces, areas = self._pieces, np.zeros((self.cp_size, self.cp_size), dtype=np.int64)
        inside = pieces.lengths * (pieces.lengths + 1) // 2
        np.add.at(areas, (pieces.owners, pieces.owners), inside)
        split, _, before = self._split_pieces
        np.add.at(areas, pieces.owners[split], before * pieces.lengths[split, None])
        return areas

    @cached_property
    def received(self) -> np.ndarray:
        """Tokens whose keys travel from key rank to query rank: int64 [R, R], [query, key]."""
        split, needed, _ = self._split_pieces
        received = np.zeros((self.cp_size, self.cp_size), dtype=np.int64)
        weights = needed * self._pieces.lengths[split, None]
        np.add.at(received.T, self._pieces.owners[split], weights)
        return received

    def travels(self, query_rank: int, key_rank: int) -> tuple[Span, ...]:
        """Global spans of `key_rank`'s tokens that `query_rank` sees, sorted.

        Exactly the keys some query of `query_rank` sees; none when the ranks are the same.
        """
        self._spans(query_rank), self._spans(key_rank)
        split, needed, _ = self._split_pieces
        pieces = split[needed[:, query_rank] & (self._pieces.owners[split] == key_rank)]
        starts = self._pieces.starts[pieces]
        return _joined(starts, starts + self._pieces.lengths[pieces])

    def travel_intervals(self, query_rank: int, key_rank: int) -> tuple[np.ndarray, np.ndarray]:
        """As `intervals`, but into only those keys of `key_rank` that travel, in global order."""
        queries, spans = self.positions(query_rank), self.travels(query_rank, key_rank)
        lo = _held_below(spans, self.first_visible(queries))
        hi = _held_below(spans, queries + 1)
        return lo.astype(np.int32), hi.astype(np.int32)

    def merged(self, size: int) -> "RowPlan":
        """The plan in which each `size` ranks that follow one another are one rank.

        Raises:
            ValueError: `size` does not divide the ranks.
        """
        if size < 1 or self.cp_size % size:
            raise ValueError(f"{self.cp_size} context ranks do not divide into groups of {size}")
        groups = (self.chunks[first : first + size] for first in range(0, self.cp_size, size))
        merged = tuple(_joined(*np.concatenate(group).T) for group in groups)
        return RowPlan.of_checked(self.doc_lengths, self.cp_size // size, merged)

    def split(self, size: int) -> "RowPlan":
        """The plan in which each rank's tokens go in order to `size` ranks, the dual of `merged`.

        Raises:
            ValueError: a rank's tokens do not divide by `size`.
        """
        if self.row_length % (self.cp_size * size):
            raise ValueError(
                f"{self.row_length} tokens of {self.cp_size} ranks do not divide into {size} parts "
                "of each"
            )
        held = self.row_length // (self.cp_size * size)
        parts: list[list[Span]] = []
        for spans in self.chunks:
            room = 0
            for start, end in spans:
                while start < end:
                    if room == 0:
                        parts.append([])
                        room = held
                    stop = min(end, start + room)
                    parts[-1].append((start, stop))
                    room -= stop - start
                    start = stop
        return RowPlan.of_checked(self.doc_lengths, self.cp_size * size, tuple(map(tuple, parts)))

    @cached_property
    def _pieces(self) -> _Pieces:
        spans = np.array(
            [(*span, rank) for rank, spans in enumerate(self.chunks) for span in spans]
        )
        spans = spans[np.argsort(spans[:, 0])]
        starts = np.union1d(spans[:, 0], self.doc_starts)
        owners = spans[np.searchsorted(spans[:, 0], starts, side="right") - 1, 2]
        docs = np.searchsorted(self.doc_starts, starts, side="right") - 1
        return _Pieces(starts, np.diff(np.append(starts, self.row_length)), owners, docs)

    @cached_property
    def _split_pieces(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pieces of documents that have several.

        Returns:
            split: their numbers, int64 [P]; needed: bool [P, R], whether the piece travels to the
            rank; before: int64 [P, R], tokens of its document the rank holds before it.
        """
        docs = self._pieces.docs
        split = np.flatnonzero(np.bincount(docs)[docs] > 1)
        docs, owners = docs[split], self._pieces.owners[split]
        held = np.zeros((len(split) + 1, self.cp_size), dtype=np.int64)
        held[np.arange(1, len(split) + 1), owners] = self._pieces.lengths[split]
        held = np.cumsum(held, axis=0)
        first, end = np.searchsorted(docs, docs), np.searchsorted(docs, docs, side="right")
        needed = held[end] > held[1:]  # the rank holds a later piece of the document
        needed[np.arange(len(split)), owners] = False
        return split, needed, held[:-1] - held[first]

    def digest(self) -> str:
        """SHA-256 (hex) of documents and chunks; equal on all ranks iff they hold one plan."""
        spans = [(rank, *span) for rank in range(self.cp_size) for span in self.chunks[rank]]
        content = hashlib.sha256(f"{self.cp_size} {len(self.doc_lengths)} ".encode())
        content.update(self.doc_lengths.tobytes())
        content.update(np.asarray(spans, dtype=np.int64).tobytes())
        return content.hexdigest()

    def _spans(self, rank: int) -> tuple[Span, ...]:
        if not 0 <= rank < self.cp_size:
            raise ValueError(f"rank {rank} is not one of the plan's {self.cp_size} ranks")
        return self.chunks[rank]


def _joined(starts: np.ndarray, ends: np.ndarray) -> tuple[Span, ...]:
    """Sorted spans of disjoint pieces; pieces that touch make one span."""
    borders = np.setxor1d(starts, ends).reshape(-1, 2)  # where two touch, one ends, one starts
    return tuple((start, end) for start, end in borders.tolist())


def _held_below(spans: Sequence[Span], positions: np.ndarray) -> np.ndarray:
    """How many tokens of sorted spans lie before each global position; int64, same shape."""
    if not spans:
        return np.zeros_like(positions)
    starts, ends = np.array(spans, dtype=np.int64).T
    before = np.cumsum(ends - starts) - (ends - starts)
    span = np.searchsorted(starts, positions, side="right") - 1
    inside = np.minimum(positions, ends[span]) - starts[span]
    return np.where(span < 0, 0, before[span] + inside)

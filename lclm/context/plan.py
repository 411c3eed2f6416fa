"""Who holds which tokens of a packed row: the row plan.

A row is `row_length` tokens made of documents laid end to end; a token may see its own document up
to and including itself. A plan deals the row out to `cp_size` ranks: each rank gets the same number
of tokens, as sorted spans of global positions. Because a rank keeps its tokens sorted, the keys a
query may see are one interval `[lo, hi)` of any rank's keys. Nothing here knows a process group.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

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

    def _check_spans(self) -> None:
        """Raise ValueError unless the spans are a partition of the row with equal shares."""
        held = sum(end - start for spans in self.chunks for start, end in spans)
        if held != self.row_length:
            raise ValueError(
                f"documents sum to {self.row_length} tokens but the ranks hold {held}; "
                "doc_lengths must sum to the row length"
            )
        for rank, spans in enumerate(self.chunks):
            tokens = sum(end - start for start, end in spans)
            if tokens * self.cp_size != self.row_length:
                raise ValueError(
                    f"rank {rank} holds {tokens} tokens; each of {self.cp_size} ranks must hold "
                    f"{self.row_length}/{self.cp_size}"
                )
            if any(a[1] > b[0] for a, b in pairwise(spans)):
                raise ValueError(f"spans of rank {rank} are not sorted: {spans}")
        end_before = 0
        for start, end in sorted(span for spans in self.chunks for span in spans):
            if start != end_before or end <= start:
                raise ValueError(
                    f"span ({start}, {end}) follows position {end_before}; the spans of all ranks "
                    "must cover the row once, without gaps, overlaps or empty spans"
                )
            end_before = end

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
            lo, hi = self._held_below(key_rank, lo), self._held_below(key_rank, hi)
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

    def area(self, rank: int) -> int:
        """Visible (query, key) pairs of a rank's queries: its share of attention work."""
        queries = self.positions(rank)
        return int((queries + 1 - self.first_visible(queries)).sum())

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

    def _held_below(self, rank: int, positions: np.ndarray) -> np.ndarray:
        """How many tokens of `rank` lie before each global position; int64, same shape."""
        spans = np.asarray(self._spans(rank), dtype=np.int64)
        starts, lengths = spans[:, 0], spans[:, 1] - spans[:, 0]
        before = np.cumsum(lengths) - lengths
        span = np.searchsorted(starts, positions, side="right") - 1
        inside = np.clip(positions - starts[span], 0, lengths[span])
        return np.where(span < 0, 0, before[span] + inside)


def contiguous_plan(doc_lengths: DocLengths, cp_size: int) -> RowPlan:
    """Rank r holds the r-th of `cp_size` equal stretches of the row.

    Raises:
        ValueError: bad lengths, cp_size < 1, or a row length that cp_size does not divide.
    """
    lengths = check_doc_lengths(doc_lengths)
    step = _equal_parts(int(lengths.sum()), cp_size, parts=cp_size, layout="contiguous")
    chunks = tuple(((rank * step, (rank + 1) * step),) for rank in range(cp_size))
    return RowPlan(lengths, cp_size, chunks)


def zigzag_plan(doc_lengths: DocLengths, cp_size: int) -> RowPlan:
    """Rank r holds stretches r and 2*cp_size - 1 - r of 2*cp_size equal ones.

    Balances a causal row of one document exactly; on ragged documents it does not (the solver of
    `plan_row` does).

    Raises:
        ValueError: bad lengths, cp_size < 1, or a row length that 2 * cp_size does not divide.
    """
    lengths = check_doc_lengths(doc_lengths)
    step = _equal_parts(int(lengths.sum()), cp_size, parts=2 * cp_size, layout="zigzag")
    chunks = []
    for rank in range(cp_size):
        early, late = rank * step, (2 * cp_size - 1 - rank) * step
        touching = early + step == late
        pair = ((early, late + step),) if touching else ((early, early + step), (late, late + step))
        chunks.append(pair)
    return RowPlan(lengths, cp_size, tuple(chunks))


_LAYOUTS = {"contiguous": contiguous_plan, "zigzag": zigzag_plan}


def build_row_plan(layout: str, doc_lengths: DocLengths, cp_size: int) -> RowPlan:
    """Build the plan of the named layout ("contiguous" or "zigzag").

    Raises:
        ValueError: an unknown layout, or what the layout's own function refuses.
    """
    if layout not in _LAYOUTS:
        raise ValueError(f"cp_layout is {layout!r}; it must be one of {', '.join(_LAYOUTS)}")
    return _LAYOUTS[layout](doc_lengths, cp_size)


def _equal_parts(row_length: int, cp_size: int, parts: int, layout: str) -> int:
    """Tokens of each part when a row is cut into `parts`; ValueError when it cannot be."""
    check_cp_size(cp_size)
    if row_length % parts:
        rule = "cp_size" if parts == cp_size else f"{parts // cp_size} * cp_size"
        raise ValueError(
            f"row of {row_length} tokens does not divide into {parts} equal parts; the {layout} "
            f"layout needs a row length that is a multiple of {rule} = {parts}"
        )
    return row_length // parts

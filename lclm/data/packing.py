"""Documents of one domain packed into rows.

`exact` (ProLong, arXiv 2410.02660 A.2): each document is cut from the front into the longest piece
length it still fills; the tail below the smallest is dropped and counted; a row is
seq_length / piece_length pieces of one length. `concat`: documents one after another, cut at the
end of each row, the remainder opening the next row. `best-fit`: whole documents, each in the row
with the least room that holds it (online best fit: D. S. Johnson, Fast algorithms for bin packing,
JCSS 8, 1974); what no document fills is padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lclm.data.domain import Cursor, Domain
from lclm_kernels.native import pack_best_fit, pack_concat, pack_exact

REMEDY = "lower its share or the stage's tokens, raise data.max_epochs, or add data"


@dataclass(frozen=True)
class PackedRows:
    """Rows as pieces of documents: row r is the pieces row_start[r] .. row_start[r + 1]."""

    row_start: np.ndarray  # int64 [R + 1]
    doc: np.ndarray  # int32 [P], document number of the reader
    offset: np.ndarray  # int32 [P], first token of the piece in its document
    length: np.ndarray  # int32 [P], tokens

    def __len__(self) -> int:
        return len(self.row_start) - 1


@dataclass(frozen=True)
class DomainRows:
    """What one domain gives to one stage."""

    rows: list[PackedRows]  # in the order of the piece lengths asked for
    epochs: list[np.ndarray]  # of each of rows: int64 [R], epoch of the row's first piece
    next_cursor: Cursor
    tail_tokens: int = 0  # dropped: shorter than the smallest piece
    unused_tokens: int = 0  # cut to a piece length that had enough pieces already
    padding_tokens: int = 0  # best-fit: room that no document fills
    dropped_docs: int = 0  # conversations longer than a row


def _append_epochs(domain: Domain, docs: np.ndarray, first: int, last: int) -> np.ndarray:
    """docs and behind them the documents of the epochs [first, last)."""
    if first == last:
        return docs
    more = domain.stream(first * domain.num_docs, last * domain.num_docs)
    return np.concatenate([docs, more])


def build_concat_rows(
    domain: Domain, cursor: Cursor, row_length: int, num_rows: int, max_epochs: int, where: str
) -> DomainRows:
    """The next num_rows rows of the stream of documents, starting at cursor.

    Raises:
        ValueError: more than max_epochs passes over the domain are needed.
    """
    lengths = domain.train_lengths
    epoch_tokens = int(lengths.sum(dtype=np.int64))
    epoch = cursor.ordinal // domain.num_docs
    docs = domain.stream(cursor.ordinal, (epoch + 1) * domain.num_docs)
    first_tokens = int(domain.reader.lengths[docs].sum(dtype=np.int64)) - cursor.offset
    needed = num_rows * row_length
    more_epochs = max(0, -(-(needed - first_tokens) // epoch_tokens))
    if needed and epoch + 1 + more_epochs > max_epochs:
        rest = first_tokens + (max_epochs - epoch - 1) * epoch_tokens
        there = rest if epoch < max_epochs else 0
        raise ValueError(
            f"{where}: {domain.prefix} needs {needed} tokens, {there} are left of {max_epochs} "
            f"epochs of {epoch_tokens} tokens; {REMEDY}"
        )
    docs = _append_epochs(domain, docs, epoch + 1, epoch + 1 + more_epochs)
    packed = pack_concat(domain.reader.lengths[docs], cursor.offset, row_length, num_rows)
    assert packed is not None, "the token count above promised enough documents"
    first_place = packed.place[packed.row_start[:-1]].astype(np.int64)
    rows = PackedRows(packed.row_start, docs[packed.place], packed.offset, packed.length)
    epochs = (cursor.ordinal + first_place) // domain.num_docs
    next_cursor = Cursor(cursor.ordinal + packed.next_place, packed.next_offset)
    return DomainRows([rows], [epochs], next_cursor)


def build_exact_rows(
    domain: Domain,
    cursor: Cursor,
    row_length: int,
    piece_lengths: Sequence[int],
    num_rows: Sequence[int],
    max_epochs: int,
    where: str,
) -> DomainRows:
    """The next num_rows[i] rows of pieces of piece_lengths[i] tokens, starting at cursor.

    A document that an earlier stage used in part is left out.

    Raises:
        ValueError: no document is long enough, or more than max_epochs passes are needed.
    """
    first_ordinal = cursor.ordinal + (1 if cursor.offset else 0)
    falling = sorted(range(len(piece_lengths)), key=lambda i: -piece_lengths[i])
    targets = np.array([piece_lengths[i] for i in falling], np.int64)
    needs = np.array([num_rows[i] * (row_length // piece_lengths[i]) for i in falling], np.int64)
    epoch = first_ordinal // domain.num_docs
    docs = domain.stream(first_ordinal, (epoch + 1) * domain.num_docs)
    more_epochs = _exact_epochs(domain, docs, targets, needs, epoch, max_epochs, where)
    docs = _append_epochs(domain, docs, epoch + 1, epoch + 1 + more_epochs)
    packed = pack_exact(domain.reader.lengths[docs], targets, needs)
    assert packed is not None, "the piece counts above promised enough documents"
    rows: dict[int, PackedRows] = {}
    epochs: dict[int, np.ndarray] = {}
    for i, (place, offset) in zip(falling, packed.pieces):
        row_start = np.arange(num_rows[i] + 1, dtype=np.int64) * (row_length // piece_lengths[i])
        length = np.full(len(place), piece_lengths[i], np.int32)
        first_piece = first_ordinal + place[row_start[:-1]].astype(np.int64)
        rows[i] = PackedRows(row_start, docs[place], offset, length)
        epochs[i] = first_piece // domain.num_docs
    return DomainRows(
        [rows[i] for i in range(len(falling))],
        [epochs[i] for i in range(len(falling))],
        Cursor(first_ordinal + packed.num_documents),
        packed.num_tail_tokens,
        packed.num_unused_tokens,
    )


def _exact_epochs(
    domain: Domain,
    first_docs: np.ndarray,
    targets: np.ndarray,
    needs: np.ndarray,
    epoch: int,
    max_epochs: int,
    where: str,
) -> int:
    """Epochs needed after the one the stage starts in; refuses what max_epochs does not allow."""
    in_epoch = _count_pieces(domain.train_lengths, targets)
    in_first = _count_pieces(domain.reader.lengths[first_docs], targets)
    more_epochs = 0
    for target, need, per_epoch, first in zip(targets.tolist(), needs.tolist(), in_epoch, in_first):
        if per_epoch == 0:
            longer = [other for other in targets.tolist() if other > target]
            also = f" after pieces of {longer} tokens are cut off" if longer else ""
            raise ValueError(
                f"{where}: {domain.prefix} has no document that fills a piece of {target} tokens"
                f"{also}; its longest document has {domain.train_lengths.max()}: use a smaller "
                "piece_length, packing concat, or longer documents"
            )
        missing_epochs = max(0, -(-(need - first) // per_epoch))
        if need and epoch + 1 + missing_epochs > max_epochs:
            there = first + (max_epochs - epoch - 1) * per_epoch if epoch < max_epochs else 0
            raise ValueError(
                f"{where}: {domain.prefix} needs {need * target} tokens in {need} pieces of "
                f"{target}, {there * target} in {there} pieces are left of {max_epochs} epochs of "
                f"{per_epoch * target} tokens; {REMEDY}"
            )
        more_epochs = max(more_epochs, missing_epochs)
    return more_epochs


def _count_pieces(lengths: np.ndarray, targets: np.ndarray) -> list[int]:
    """Pieces of each target (falling) that documents of these lengths give."""
    rest = lengths.astype(np.int64)
    counts = []
    for target in targets.tolist():
        pieces, rest = np.divmod(rest, target)
        counts.append(int(pieces.sum()))
    return counts


def build_best_fit_rows(
    domain: Domain, cursor: Cursor, row_length: int, num_rows: int, max_epochs: int, where: str
) -> DomainRows:
    """The next num_rows rows of whole documents, starting at cursor.

    A document longer than a row is cut from the front into rows, what is left of it being packed
    like a document; a conversation longer than a row is left out. A document that an earlier stage
    used in part is left out.

    Raises:
        ValueError: more than max_epochs passes over the domain are needed.
    """
    first = cursor.ordinal + (1 if cursor.offset else 0)
    epoch = first // domain.num_docs
    docs = domain.stream(first, (epoch + 1) * domain.num_docs)
    while True:
        lengths = domain.reader.lengths[docs]
        packed = None
        if epoch < max_epochs:
            packed = pack_best_fit(lengths, row_length, num_rows, domain.reader.is_chat)
        if packed is not None:
            break
        epoch += 1
        if epoch >= max_epochs:
            shortest = domain.train_lengths.min()
            if domain.reader.is_chat and shortest > row_length:
                raise ValueError(
                    f"{where}: all {domain.num_docs} conversations of {domain.prefix} are longer "
                    f"than a row of {row_length} tokens (the shortest has {shortest}) and would be "
                    "left out; give a longer seq_length or shorter conversations"
                )
            num_tokens = int(lengths.sum(dtype=np.int64)) if epoch == max_epochs else 0
            raise ValueError(
                f"{where}: {domain.prefix} needs {num_rows} rows of {row_length} tokens, its "
                f"{num_tokens} tokens left of {max_epochs} epochs of {domain.num_docs} documents "
                f"fill fewer; {REMEDY}"
            )
        docs = _append_epochs(domain, docs, epoch, epoch + 1)
    first_place = packed.place[packed.row_start[:-1]].astype(np.int64)
    rows = PackedRows(packed.row_start, docs[packed.place], packed.offset, packed.length)
    num_tokens = int(packed.length.sum(dtype=np.int64))
    return DomainRows(
        [rows],
        [(first + first_place) // domain.num_docs],
        Cursor(first + packed.num_documents),
        unused_tokens=packed.num_unused_tokens,
        padding_tokens=num_rows * row_length - num_tokens,
        dropped_docs=packed.num_dropped,
    )

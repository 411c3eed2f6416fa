"""Plans of rows: the layouts, and the planner that picks the fastest one for a row's documents.

`build_row_plan`, `plan_row` and `candidate_plans` check a row's lengths; the functions of single
layouts take what `check_doc_lengths` gives, int64 [documents].
"""

from collections.abc import Sequence

import numpy as np

from lclm.context.plan.cost import RING, Comm, CostModel, candidate_comms, predict_seconds
from lclm.context.plan.rates import LINKS
from lclm.context.plan.row_plan import (
    DocLengths,
    RowPlan,
    Span,
    check_cp_size,
    check_doc_lengths,
)
from lclm_kernels.native.context_plan import assign_chunks

_EVEN_AREA = 1.05  # largest over mean area of the ranks; less is not felt beside other noise


def contiguous_plan(lengths: np.ndarray, cp_size: int) -> RowPlan:
    """Rank r holds the r-th of `cp_size` equal stretches of the row.

    Raises:
        ValueError: cp_size < 1, or a row length that cp_size does not divide.
    """
    step = _equal_parts(int(lengths.sum()), cp_size, parts=cp_size, layout="contiguous")
    chunks = tuple(((rank * step, (rank + 1) * step),) for rank in range(cp_size))
    return RowPlan.of_checked(lengths, cp_size, chunks)


def zigzag_plan(lengths: np.ndarray, cp_size: int) -> RowPlan:
    """Rank r holds stretches r and 2*cp_size - 1 - r of 2*cp_size equal ones.

    Balances a causal row of one document exactly; on ragged documents it does not (the solver of
    `plan_row` does).

    Raises:
        ValueError: cp_size < 1, or a row length that 2 * cp_size does not divide.
    """
    step = _equal_parts(int(lengths.sum()), cp_size, parts=2 * cp_size, layout="zigzag")
    return _dealt(lengths, cp_size, step, _there_and_back(cp_size))


def balanced_plan(
    lengths: np.ndarray, cp_size: int, chunk: int, implementation: str = "auto"
) -> RowPlan:
    """Spread area evenly over the ranks and let little travel; span ends are multiples of `chunk`.

    Long documents are split over as few ranks as fit, short ones stay whole where the grid of
    chunks allows (`lclm_kernels.native.context_plan`).

    Args:
        lengths: tokens of each document.
        cp_size: number of ranks R.
        chunk: granularity in tokens; R * chunk must divide the row length, see `candidate_plans`.
        implementation: "auto", "native" (C++) or "reference" (NumPy); they give the same plan.
    """
    return _dealt(lengths, cp_size, chunk, assign_chunks(lengths, cp_size, chunk, implementation))


def mixed_plan(lengths: np.ndarray, cp_size: int, chunk: int) -> RowPlan:
    """Zigzag within each document that no rank can hold whole; what is left is balanced.

    Long documents are then even to the pair, at the price of all ranks seeing each other's keys.
    Where no document is long enough for 2 * cp_size chunks this is `balanced_plan`.

    Args: lengths, cp_size and chunk as in `balanced_plan`.
    """
    ends = np.cumsum(lengths)
    row_length = int(ends[-1])
    owner = np.full(row_length // chunk, -1)
    left = lengths.copy()
    for document in np.flatnonzero(lengths > row_length // cp_size).tolist():
        end = int(ends[document]) // chunk
        start = -(-int(ends[document] - lengths[document]) // chunk)
        each = (end - start) // (2 * cp_size)
        if each > 0:
            owner[end - 2 * cp_size * each : end] = np.repeat(_there_and_back(cp_size), each)
            left[document] -= 2 * cp_size * each * chunk
    if left.any():
        owner[owner < 0] = assign_chunks(left[left > 0], cp_size, chunk)
    return _dealt(lengths, cp_size, chunk, owner)


def candidate_plans(
    doc_lengths: DocLengths, cp_size: int, chunk: int | None, ulysses_size: int = 1
) -> dict[str, RowPlan]:
    """Every layout that can be had on the grid of chunks, by name, the preferred one first.

    Args:
        doc_lengths: tokens of each document.
        cp_size: number of ranks R.
        chunk: granularity in tokens: span ends are multiples of it; R * chunk must divide the row
            length. Attention kernels work on tiles of 128; longer rows plan faster with more.
            None: `default_chunk`.
        ulysses_size: neighbours that share heads. They get a rank's part of a plan for so many
            fewer ranks.

    Raises:
        ValueError: bad lengths, cp_size < 1 or not a multiple of ulysses_size, or a row length
            that cp_size * chunk does not divide.
    """
    lengths = check_doc_lengths(doc_lengths)
    row_length = int(lengths.sum())
    if chunk is None:
        chunk = default_chunk(row_length, cp_size)
    _check_grid(row_length, cp_size, chunk)
    ranks, rest = divmod(cp_size, ulysses_size)
    if rest:
        raise ValueError(f"{cp_size} context ranks do not divide into groups of {ulysses_size}")
    plans = {"balanced": balanced_plan(lengths, ranks, chunk)}
    if lengths.max() > row_length // ranks:
        plans["mixed"] = mixed_plan(lengths, ranks, chunk)
    plans["contiguous"] = contiguous_plan(lengths, ranks)
    if row_length % (2 * ranks * chunk) == 0:
        plans["zigzag"] = zigzag_plan(lengths, ranks)
    if ulysses_size > 1:
        plans = {name: plan.split(ulysses_size) for name, plan in plans.items()}
    return plans


def default_chunk(row_length: int, cp_size: int) -> int:
    """A granularity for a row: about 1/1024 of it, at least 128 where that divides a rank's share.

    128 is a tile of the attention kernels; 1024 chunks are planned in a few milliseconds. A power
    of two; ValueError when cp_size does not divide the row.
    """
    share = _equal_parts(row_length, cp_size, parts=cp_size, layout="balanced")
    chunk = 1 << (max(128, row_length // 1024).bit_length() - 1)
    while share % chunk:
        chunk //= 2
    return chunk


def plan_row(
    doc_lengths: DocLengths,
    cp_size: int,
    chunk: int | None = None,
    cost: CostModel | None = None,
    comm: Comm = RING,
) -> RowPlan:
    """The candidate whose attention is predicted to take least time.

    Args:
        doc_lengths, cp_size, chunk: see `candidate_plans`.
        cost: rates of the machine and the model's attention shape. With it time alone decides, so
            that a slow link may be worth an uneven layout. Without it only layouts with even area
            are looked at, and a slow link is assumed, which asks for little traffic.
        comm: how queries will meet keys.

    Returns:
        A pure function of the arguments, equal on every rank.

    Raises:
        ValueError: as `candidate_plans`.
    """
    plans = candidate_plans(doc_lengths, cp_size, chunk, comm.ulysses_size)
    if cost is None:
        cost = CostModel(LINKS["infiniband"])
        # neighbours that share heads have their sum, evenly
        shape = (cp_size // comm.ulysses_size, -1)
        areas = {name: plan.areas.reshape(shape).sum(axis=1) for name, plan in plans.items()}
        uneven = {name: float(area.max() / area.mean()) for name, area in areas.items()}
        limit = max(_EVEN_AREA, uneven["balanced"])
        plans = {name: plan for name, plan in plans.items() if uneven[name] <= limit}
    return min(plans.values(), key=lambda plan: predict_seconds(plan, cost, comm))


_LAYOUTS = {"contiguous": contiguous_plan, "zigzag": zigzag_plan}


def build_row_plan(
    layout: str,
    doc_lengths: DocLengths,
    cp_size: int,
    chunk: int | None = None,
    cost: CostModel | None = None,
    comm: Comm = RING,
) -> RowPlan:
    """Build the plan of a layout by name.

    Args:
        layout: "contiguous", "zigzag", or "auto": `plan_row`'s choice.
        doc_lengths: tokens of each document.
        cp_size: number of ranks.
        chunk, cost, comm: of "auto", see `plan_row`.

    Raises:
        ValueError: an unknown layout, or what the layout itself refuses.
    """
    if layout == "auto":
        return plan_row(doc_lengths, cp_size, chunk, cost, comm)
    if layout not in _LAYOUTS:
        names = ", ".join([*_LAYOUTS, "auto"])
        raise ValueError(f"cp_layout is {layout!r}; it must be one of {names}")
    return _LAYOUTS[layout](check_doc_lengths(doc_lengths), cp_size)


def compare_comms(
    layout: str, rows: Sequence[np.ndarray], cp_size: int, cost: CostModel
) -> dict[Comm, float]:
    """Predicted seconds of a layer's attention, forward and backward, mean of the rows, by mode.

    Args:
        layout: as in `build_row_plan`; rows of "auto" are dealt out for each mode.
        rows: document lengths of rows of one length, at least one row.
        cp_size: ranks that share a row, at least 2.
        cost: the machine and the attention of one rank.

    Returns:
        A pure function of the arguments, the preferred mode first; modes that rows of that length
        cannot use are left out.
    """
    comms = candidate_comms(int(rows[0].sum()), cp_size, cost)
    found = dict.fromkeys(comms, 0.0)
    for lengths in rows:
        for comm in comms:
            plan = build_row_plan(layout, lengths, cp_size, None, cost, comm)
            found[comm] += predict_seconds(plan, cost, comm) / len(rows)
    return found


def _there_and_back(cp_size: int) -> np.ndarray:
    """Owners of 2 * cp_size stretches that give each rank an early and a late one."""
    return np.concatenate([np.arange(cp_size), np.arange(cp_size)[::-1]])


def _dealt(lengths: np.ndarray, cp_size: int, chunk: int, owner: np.ndarray) -> RowPlan:
    """The plan in which `owner`, [row length / chunk], says who holds each chunk."""
    starts = np.concatenate([[0], np.flatnonzero(np.diff(owner)) + 1])
    ends = np.append(starts[1:], len(owner))
    spans: list[list[Span]] = [[] for _ in range(cp_size)]
    borders = zip((starts * chunk).tolist(), (ends * chunk).tolist(), strict=True)
    for rank, span in zip(owner[starts].tolist(), borders, strict=True):
        spans[rank].append(span)
    return RowPlan.of_checked(lengths, cp_size, tuple(tuple(mine) for mine in spans))


def _check_grid(row_length: int, cp_size: int, chunk: int) -> None:
    """Raise ValueError unless every rank can get the same number of whole chunks."""
    check_cp_size(cp_size)
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; the granularity is at least 1 token")
    if row_length % (cp_size * chunk):
        raise ValueError(
            f"row of {row_length} tokens is not a multiple of cp_size * chunk = {cp_size} * "
            f"{chunk} = {cp_size * chunk}; choose a chunk that divides {row_length} / {cp_size}"
        )


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

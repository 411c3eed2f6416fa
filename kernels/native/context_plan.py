"""Deal the chunks of a row of documents out to context-parallel ranks: C++ or NumPy, same plan.

The NumPy twin takes the decisions of context_plan.cpp in the same order, on integers. See the top
of context_plan.cpp for the idea; names are the same there. Change both or neither; the numbers
stand here alone. "Units" of area are visible query-key pairs divided by a power of the row's size.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lclm_kernels.native.ops import choose_library


class Numbers(NamedTuple):
    """What shapes a plan, for both implementations; context_row.h has the fields in this order."""

    share: int = 4096  # area and traffic are weighed in 1/4096 of a fair share
    free_share: int = 4096 // 8  # of a ring: traffic that hides under the work anyway
    fraction_bits: int = 32  # of the multipliers that replace divisions
    area_bits: int = 20  # a rank's fair share of area is at least 2^20 units
    fill_parts: int = 16  # filler shares are in sixteenths of the row
    partners: int = 8  # a round looks at exchanges with the best-off ranks
    candidates: int = 16  # and at this many chunks of each rank
    pair_budget: int = 1 << 19  # exchanges looked at in all rounds, about
    min_rounds: int = 16
    max_rounds: int = 128


NUMBERS = Numbers()
# filler share and overfill shift of each deal: a rank may take 1/8 or 1/16 above its target
DEALS = [(share, shift) for shift in (3, 4) for share in (1, 2, 3, 4, 6, 8, 12)]


@dataclass(frozen=True)
class Row:
    """The row cut into chunks; see context_row.h for chains, heads and groups.

    Behind the chains stands one that nobody holds, so that chain -1 can be looked up like others.
    """

    ranks: int
    chunk: int  # tokens
    quota: int  # chunks per rank
    area: np.ndarray  # int64 [chunks], units
    chain: np.ndarray  # int64 [chunks], -1: the first token starts a document
    next_chain: np.ndarray  # int64 [chunks], the chain this chunk is the head of, or -1
    head: np.ndarray  # int64 [chains + 1]
    head_tokens: np.ndarray  # int64 [chains + 1]
    low: np.ndarray  # int64 [chains + 1], first chunk of the chain
    high: np.ndarray  # int64 [chains + 1], last chunk of the chain
    group_start: list[int]
    fair_area: int
    area_factor: int
    traffic_factor: int
    free_traffic: int


def make_row(lengths: np.ndarray, ranks: int, chunk: int) -> Row:
    """Cut a row of documents (int64 [documents]) into chunks of `chunk` tokens."""
    ends = np.cumsum(lengths)
    starts = ends - lengths
    length = int(ends[-1])
    num_chunks = length // chunk
    # pairs of all tokens before each chunk border
    borders = np.arange(num_chunks + 1) * chunk
    doc = np.searchsorted(starts, borders[:-1], side="right") - 1
    whole = lengths * (lengths + 1) // 2
    inside = borders[:-1] - starts[doc]
    before = (np.cumsum(whole) - whole)[doc] + inside * (inside + 1) // 2
    area = np.diff(np.append(before, whole.sum()))
    area //= max(1, (int(whole.sum()) // ranks) >> NUMBERS.area_bits)

    first, last = starts // chunk, (ends - 1) // chunk
    crosses = last > first
    chain_of_doc = np.cumsum(crosses) - 1
    head = np.append(first[crosses], 0)
    chain = np.where(inside > 0, chain_of_doc[doc], -1)
    next_chain = np.full(num_chunks, -1)
    next_chain[first[crosses]] = chain_of_doc[crosses]
    joins = (chain[1:] >= 0) & ((chain[:-1] < 0) | (chain[:-1] == chain[1:]))
    group_start = [0, *(np.flatnonzero(~joins) + 1).tolist(), num_chunks]

    fair_area = max(1, int(area.sum()) // ranks)
    ring = max(1, (ranks - 1) * (length // ranks))
    traffic_factor = (NUMBERS.share << NUMBERS.fraction_bits) // ring
    least = max(0, int(lengths.max()) - length // ranks)
    return Row(
        ranks=ranks,
        chunk=chunk,
        quota=num_chunks // ranks,
        area=area,
        chain=chain,
        next_chain=next_chain,
        head=head,
        head_tokens=np.append((first[crosses] + 1) * chunk - starts[crosses], 0),
        low=head + 1,
        high=np.append(last[crosses], 0),
        group_start=group_start,
        fair_area=fair_area,
        area_factor=(NUMBERS.share << NUMBERS.fraction_bits) // fair_area,
        traffic_factor=traffic_factor,
        free_traffic=max(NUMBERS.free_share, (least * traffic_factor) >> NUMBERS.fraction_bits),
    )


def rank_cost(row: Row, area: np.ndarray, traffic: np.ndarray) -> np.ndarray:
    """What ranks with this area (units) and traffic (tokens) cost the row; int64."""
    x = ((area * row.area_factor) >> NUMBERS.fraction_bits) - NUMBERS.share
    x = np.where(x < 0, x >> 1, x)
    y = (traffic * row.traffic_factor) >> NUMBERS.fraction_bits
    over = np.maximum(0, y - row.free_traffic)
    return x * x + over * over + ((y * y) >> 12)


class Deal:
    """One deal of the groups; `owner` is the rank of each chunk."""

    def __init__(self, row: Row, fill_share: int, overfill_shift: int) -> None:
        self.row = row
        starts = row.group_start
        self.area = row.area.tolist()
        self.group_size = np.diff(starts).tolist()
        self.group_area = np.add.reduceat(row.area, starts[:-1]).tolist()
        order = sorted(
            range(len(self.group_size)), key=lambda g: (-self.group_size[g], -self.group_area[g])
        )
        wanted = len(self.area) * fill_share // NUMBERS.fill_parts
        first_filler, tokens, area = len(order), 0, 0
        while first_filler > 0 and tokens + self.group_size[order[first_filler - 1]] <= wanted:
            first_filler -= 1
            tokens += self.group_size[order[first_filler]]
            area += self.group_area[order[first_filler]]
        self.filler = area // tokens if tokens else 0
        target = row.fair_area - row.quota * self.filler
        self.overfill = max(0, target) >> overfill_shift
        self.owner = [-1] * len(self.area)
        self.room = [row.quota] * row.ranks  # chunks a rank still takes
        self.need = [target] * row.ranks  # area above filler it still wants
        for group in order[:first_filler]:
            self._place(group)
        self._fill(order[first_filler:])

    def _excess(self, group: int) -> int:
        return self.group_area[group] - self.filler * self.group_size[group]

    def _chunks(self, group: int) -> range:
        return range(self.row.group_start[group], self.row.group_start[group + 1])

    def _put(self, chunks: Iterable[int], rank: int) -> None:
        for chunk in chunks:
            self.owner[chunk] = rank
            self.room[rank] -= 1
            self.need[rank] -= self.area[chunk] - self.filler

    def _neediest(self, chunks: int, sign: int) -> int:
        """The rank that wants most (sign -1: least) among those with room; -1 if none."""
        ranks = (rank for rank in range(self.row.ranks) if self.room[rank] >= chunks)
        return max(ranks, key=lambda rank: sign * self.need[rank], default=-1)

    def _place(self, group: int) -> None:
        rank = self._neediest(self.group_size[group], 1)
        if rank >= 0 and self.need[rank] + self.overfill >= self._excess(group):
            self._put(self._chunks(group), rank)
        else:
            self._split(group)

    def _takers(self, group: int) -> list[int]:
        """The fewest ranks, neediest first, that can take the group together."""
        takers: list[int] = []
        wants = room = 0
        for rank in sorted(range(self.row.ranks), key=lambda rank: -self.need[rank]):
            enough = wants + len(takers) * self.overfill >= self._excess(group)
            if takers and enough and room >= self.group_size[group]:
                break
            if self.room[rank]:
                takers.append(rank)
                wants += self.need[rank]
                room += self.room[rank]
        return takers

    def _split(self, group: int) -> None:
        """Each taker gets a stretch from the end of the group and one from its start."""
        first, size = self.row.group_start[group], self.group_size[group]
        takers = self._takers(group)
        room = sum(self.room[rank] for rank in takers)
        weight = sum(max(1, self.need[rank]) for rank in takers)
        excess = self.row.area[first : first + size] - self.filler
        before = np.concatenate([[0], np.cumsum(excess)])
        bottom, top, left = 0, size, int(before[size])
        for place, rank in enumerate(takers):
            others, chunks = len(takers) - place - 1, top - bottom
            own_weight = max(1, self.need[rank])
            room -= self.room[rank]
            take, target = chunks, left
            if others:
                take = min(max(chunks // (others + 1), chunks - room), self.room[rank])
                target = left * own_weight // weight
            late = np.arange(take + 1)
            area = before[top] - before[top - late] + before[bottom + take - late] - before[bottom]
            nearest = int(np.argmin(np.abs(area - target)))
            top -= nearest
            self._put(range(first + top, first + top + nearest), rank)
            self._put(range(first + bottom, first + bottom + take - nearest), rank)
            bottom += take - nearest
            left -= int(area[nearest])
            weight -= own_weight

    def _fill(self, fillers: list[int]) -> None:
        """Fillers that matter most for area first, each whole where one rank has room."""
        loose: list[int] = []
        for group in sorted(fillers, key=lambda group: -abs(self._excess(group))):
            sign = 1 if self._excess(group) >= 0 else -1
            rank = self._neediest(self.group_size[group], sign)
            if rank >= 0:
                self._put(self._chunks(group), rank)
            else:
                loose += self._chunks(group)
        rank = 0
        for chunk in sorted(loose):
            while self.room[rank] == 0:
                rank += 1
            self._put([chunk], rank)


class Ledger:
    """Ranks' area and traffic under exchanges of chunks; all methods take arrays of chunks."""

    def __init__(self, row: Row, owner: np.ndarray) -> None:
        self.row = row
        self.owner = owner
        self.area = np.zeros(row.ranks, dtype=np.int64)
        np.add.at(self.area, owner, row.area)
        shape = (row.ranks, len(row.head))
        self.held = np.zeros(shape, dtype=np.int64)
        self.last, self.second = np.full(shape, -1), np.full(shape, -1)
        chained = np.flatnonzero(row.chain >= 0)
        keys = (owner[chained], row.chain[chained])
        np.add.at(self.held, keys, 1)
        np.maximum.at(self.last, keys, chained)
        earlier = chained != self.last[keys]
        np.maximum.at(self.second, (keys[0][earlier], keys[1][earlier]), chained[earlier])
        self.traffic = np.array([self._traffic(rank) for rank in range(row.ranks)])

    def costs(self) -> np.ndarray:
        """Cost of each rank, int64 [ranks]."""
        return rank_cost(self.row, self.area, self.traffic)

    def _traffic(self, rank: int) -> int:
        return int(self.received(np.array(rank), np.arange(len(self.row.head))).sum())

    def _head_tokens(self, rank: np.ndarray, chain: np.ndarray) -> np.ndarray:
        has_head = self.owner[self.row.head[chain]] == rank
        return np.where(has_head, 0, self.row.head_tokens[chain])

    def received(self, rank: np.ndarray, chain: np.ndarray) -> np.ndarray:
        """Tokens of a chain that a rank receives."""
        held = self.held[rank, chain]
        missing = (self.last[rank, chain] - self.row.head[chain] - held) * self.row.chunk
        return np.where(held == 0, 0, missing + self._head_tokens(rank, chain))

    def _last_without(self, rank: np.ndarray, chunk: np.ndarray) -> np.ndarray:
        chain = self.row.chain[chunk]
        last = self.last[rank, chain]
        return np.where(last == chunk, self.second[rank, chain], last)

    def giving(self, chunk: np.ndarray) -> np.ndarray:
        """Change of the owners' traffic in the chunks' own chains when given away."""
        rank, chain = self.owner[chunk], self.row.chain[chunk]
        fewer = self._last_without(rank, chunk) - self.last[rank, chain] + 1
        change = np.where(
            self.held[rank, chain] == 1, -self.received(rank, chain), fewer * self.row.chunk
        )
        return np.where(chain < 0, 0, change)

    def taking(self, chunk: np.ndarray, rank: np.ndarray) -> np.ndarray:
        """The same for ranks that take chunks they do not hold."""
        chain = self.row.chain[chunk]
        last = self.last[rank, chain]
        more = (np.maximum(last, chunk) - last - 1) * self.row.chunk
        all_of_it = (chunk - self.row.head[chain] - 1) * self.row.chunk
        anew = all_of_it + self._head_tokens(rank, chain)
        return np.where(chain < 0, 0, np.where(self.held[rank, chain] > 0, more, anew))

    def trading(self, out: np.ndarray, into: np.ndarray, rank: np.ndarray) -> np.ndarray:
        """And for ranks that take `into` for `out` of the same chain."""
        chain = self.row.chain[out]
        last = np.maximum(self._last_without(rank, out), into)
        return (last - self.last[rank, chain]) * self.row.chunk

    def headed(self, chunk: np.ndarray, rank: np.ndarray) -> np.ndarray:
        """Tokens of the document starting in a chunk and leaving it, if the rank sees them."""
        chain = self.row.next_chain[chunk]
        seen = (chain >= 0) & (self.held[rank, chain] > 0)
        return np.where(seen, self.row.head_tokens[chain], 0)

    def exchanging(self, out: np.ndarray, into: np.ndarray, rank: np.ndarray) -> np.ndarray:
        """Change of the traffic of ranks that give `out` away and take `into`, in all chains."""
        chain = self.row.chain[out]
        apart = self.giving(out) + self.taking(into, rank)
        is_same = (chain >= 0) & (chain == self.row.chain[into])
        change = np.where(is_same, self.trading(out, into, rank), apart)
        return change + self.headed(out, rank) - self.headed(into, rank)

    def exchange(self, a: int, b: int) -> None:
        """Swap the owners of two chunks."""
        ranks = int(self.owner[a]), int(self.owner[b])
        self.owner[a], self.owner[b] = ranks[1], ranks[0]
        change = self.row.area[b] - self.row.area[a]
        self.area[ranks[0]] += change
        self.area[ranks[1]] -= change
        for chain in {int(self.row.chain[a]), int(self.row.chain[b])} - {-1}:
            low, high = self.row.low[chain], self.row.high[chain]
            for rank in ranks:
                mine = low + np.flatnonzero(self.owner[low : high + 1] == rank)
                self.held[rank, chain] = len(mine)
                self.last[rank, chain] = mine[-1] if len(mine) else -1
                self.second[rank, chain] = mine[-2] if len(mine) > 1 else -1
        for rank in ranks:
            self.traffic[rank] = self._traffic(rank)


def improve(row: Row, ledger: Ledger, rank: int, round_number: int) -> bool:
    """Make the best exchange found of a chunk of `rank` with another's; False if none helps."""
    stride = -(-row.quota // NUMBERS.candidates)
    cost = ledger.costs()
    order = np.argsort(cost, kind="stable")
    partners = order[order != rank][: NUMBERS.partners]
    a = np.flatnonzero(ledger.owner == rank)[round_number % stride :: stride][:, None]
    sampled = [
        np.flatnonzero(ledger.owner == partner)[round_number // stride % stride :: stride]
        for partner in partners
    ]
    b = np.sort(np.concatenate(sampled))[None, :]
    other, own = ledger.owner[b], np.array([[rank]])
    change = row.area[b] - row.area[a]
    traffic = ledger.traffic[own] + ledger.exchanging(a, b, own)
    own_gain = cost[own] - rank_cost(row, ledger.area[own] + change, traffic)
    traffic = ledger.traffic[other] + ledger.exchanging(b, a, other)
    gain = own_gain + cost[other] - rank_cost(row, ledger.area[other] - change, traffic)

    is_head = (row.next_chain[a] >= 0) & (row.next_chain[a] == row.chain[b])
    is_head |= (row.next_chain[b] >= 0) & (row.next_chain[b] == row.chain[a])
    gain = np.where((own_gain <= 0) | is_head, 0, gain)
    best = int(np.argmax(gain))
    if gain.flat[best] <= 0:
        return False
    ledger.exchange(int(a[best // b.size, 0]), int(b[0, best % b.size]))
    return True


def refine(row: Row, ledger: Ledger) -> None:
    """Rounds for the rank that costs most; one not helped waits for another's change."""
    candidates = min(NUMBERS.candidates, row.quota)
    pairs = candidates * candidates * min(NUMBERS.partners, row.ranks - 1)
    rounds = min(max(NUMBERS.pair_budget // max(1, pairs), NUMBERS.min_rounds), NUMBERS.max_rounds)
    is_stuck = np.zeros(row.ranks, dtype=bool)
    for round_number in range(rounds):
        if is_stuck.all():
            return
        worst = int(np.argmax(np.where(is_stuck, -1, ledger.costs())))
        if row.ranks > 1 and improve(row, ledger, worst, round_number):
            is_stuck[:] = False
        else:
            is_stuck[worst] = True


def assign_chunks(
    doc_lengths: np.ndarray, num_ranks: int, chunk: int, implementation: str = "auto"
) -> np.ndarray:
    """Rank that holds each chunk of a row; every rank gets equally many chunks.

    Balances attention area (visible query-key pairs) over the ranks and keeps small what the worst
    rank must receive: keys its queries see that it does not hold. Deterministic; both
    implementations give the same result.

    Args:
        doc_lengths: int64 [documents], tokens, all positive; num_ranks * chunk must divide their
            sum. The caller has checked it.
        num_ranks: at least 1.
        chunk: tokens per chunk, at least 1.
        implementation: "native" (C++), "reference" (NumPy), or "auto": native where it is built.

    Returns:
        int32 [row length / chunk].

    Raises:
        ValueError: an unknown implementation, or a native library that is missing or too old.
    """
    library = choose_library(implementation)
    if library is None:
        return _assign_chunks_twin(doc_lengths, num_ranks, chunk)
    lengths = np.ascontiguousarray(doc_lengths, dtype=np.int64)
    numbers, deals = np.array(NUMBERS, np.int64), np.array(DEALS, np.int64)
    owner = np.empty(int(lengths.sum()) // chunk, dtype=np.int32)
    inputs = (lengths.ctypes.data, len(lengths), num_ranks, chunk, numbers.ctypes.data)
    library.lclm_assign_chunks(*inputs, deals.ctypes.data, len(deals), owner.ctypes.data)
    return owner


def _assign_chunks_twin(doc_lengths: np.ndarray, num_ranks: int, chunk: int) -> np.ndarray:
    row = make_row(doc_lengths, num_ranks, chunk)
    ledgers = (Ledger(row, np.array(Deal(row, share, shift).owner)) for share, shift in DEALS)
    best = min(ledgers, key=lambda ledger: int(ledger.costs().sum()))
    refine(row, best)
    return best.owner.astype(np.int32)

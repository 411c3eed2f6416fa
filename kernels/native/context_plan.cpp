// Which rank of a context-parallel group holds which chunk of a packed row.
//
// Two things make a plan slow: attention area (visible query-key pairs) that differs between ranks,
// and keys a rank must receive because its queries see them and it does not hold them. A chunk
// late in a long document needs every key before it, so further chunks of that document cost its
// rank nothing to receive. Hence: a long document goes to as few ranks as its area fills, each
// taking one stretch from its end and one from its start, so that they differ in how far they
// look; documents that fit stay whole; the shortest fill up the token counts. Several such deals
// are made, the best is refined by exchanging chunks with the rank that is worst off.
//
// All arithmetic is on integers; context_plan.py takes the same decisions in the same
// order. Change both or neither.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <numeric>
#include <utility>
#include <vector>

#include "context_row.h"

namespace {

using lclm::Int;
using lclm::Ints;
using lclm::Ledger;
using lclm::Numbers;
using lclm::Row;
using lclm::rank_cost;

Int floor_div(Int a, Int b) {  // b > 0
  const Int quotient = a / b;
  return quotient * b > a ? quotient - 1 : quotient;
}

// Groups sorted by what is dealt first: most chunks, then largest area, then first in the row.
struct Groups {
  Ints order, area, size;
};

Groups sort_groups(const Row& row) {
  Groups groups;
  const Int count = Int(row.group_start.size()) - 1;
  for (Int g = 0; g < count; ++g) {
    const auto begin = row.area.begin();
    groups.size.push_back(row.group_start[g + 1] - row.group_start[g]);
    groups.area.push_back(std::accumulate(begin + row.group_start[g],
                                          begin + row.group_start[g + 1], Int{0}));
  }
  groups.order.resize(count);
  std::iota(groups.order.begin(), groups.order.end(), Int{0});
  std::stable_sort(groups.order.begin(), groups.order.end(), [&](Int a, Int b) {
    if (groups.size[a] != groups.size[b]) return groups.size[a] > groups.size[b];
    return groups.area[a] > groups.area[b];
  });
  return groups;
}

// One deal. The shortest groups, a share of the row, are set aside as fillers; every chunk counts
// by its area above the fillers' mean, so filling up later to equal tokens keeps areas equal.
class Deal {
 public:
  Deal(const Row& row, const Groups& groups, Int fill_share, Int overfill_shift)
      : row_(row), groups_(groups), owner(row.num_chunks, -1), room_(row.ranks, row.quota) {
    const Int wanted = row.num_chunks * fill_share / row.numbers.fill_parts;
    Int first_filler = Int(groups.order.size()), tokens = 0, area = 0;
    while (first_filler > 0 && tokens + groups.size[groups.order[first_filler - 1]] <= wanted) {
      const Int g = groups.order[--first_filler];
      tokens += groups.size[g];
      area += groups.area[g];
    }
    filler_ = tokens ? area / tokens : 0;
    const Int target = row.fair_area - row.quota * filler_;
    overfill_ = std::max<Int>(0, target) >> overfill_shift;
    need_.assign(row.ranks, target);
    for (Int k = 0; k < first_filler; ++k) place(groups.order[k]);
    fill(first_filler);
  }

 private:
  const Row& row_;
  const Groups& groups_;

 public:
  Ints owner;  // per chunk

 private:
  Ints room_;  // chunks a rank still takes
  Ints need_;  // area above filler it still wants
  Int filler_, overfill_;

  Int excess(Int g) const { return groups_.area[g] - filler_ * groups_.size[g]; }

  void put(Int chunk, Int rank) {
    owner[chunk] = rank;
    --room_[rank];
    need_[rank] -= row_.area[chunk] - filler_;
  }

  void put_group(Int g, Int rank) {
    for (Int i = row_.group_start[g]; i < row_.group_start[g + 1]; ++i) put(i, rank);
  }

  // The rank that wants most (or, with sign -1, least) among those with room; -1 if none.
  Int neediest(Int chunks, Int sign) const {
    Int best = -1;
    for (Int rank = 0; rank < row_.ranks; ++rank) {
      if (room_[rank] < chunks) continue;
      if (best < 0 || sign * need_[rank] > sign * need_[best]) best = rank;
    }
    return best;
  }

  void place(Int g) {
    const Int rank = neediest(groups_.size[g], 1);
    if (rank >= 0 && need_[rank] + overfill_ >= excess(g)) {
      put_group(g, rank);
    } else {
      split(g);
    }
  }

  // Fewest ranks, neediest first; each takes a stretch from the end and one from the start.
  void split(Int g) {
    Ints by_need(row_.ranks), takers;
    std::iota(by_need.begin(), by_need.end(), Int{0});
    std::stable_sort(by_need.begin(), by_need.end(),
                     [&](Int a, Int b) { return need_[a] > need_[b]; });
    const Int first = row_.group_start[g], size = groups_.size[g];
    Int wants = 0, room = 0, weight = 0;
    for (Int rank : by_need) {
      const Int count = Int(takers.size());
      if (count && wants + count * overfill_ >= excess(g) && room >= size) break;
      if (room_[rank] == 0) continue;
      takers.push_back(rank);
      wants += need_[rank];
      room += room_[rank];
      weight += std::max<Int>(1, need_[rank]);
    }
    Ints before(size + 1, 0);
    for (Int j = 0; j < size; ++j) before[j + 1] = before[j] + row_.area[first + j] - filler_;
    Int bottom = 0, top = size, left = before[size];
    for (std::size_t k = 0; k < takers.size(); ++k) {
      const Int rank = takers[k], others = Int(takers.size() - k) - 1, chunks = top - bottom;
      const Int own_weight = std::max<Int>(1, need_[rank]);
      room -= room_[rank];
      Int take = chunks;
      if (others) take = std::clamp(chunks / (others + 1), chunks - room, room_[rank]);
      const Int target = others ? floor_div(left * own_weight, weight) : left;
      Int late = 0, nearest = -1, taken = 0;
      for (Int u = 0; u <= take; ++u) {
        const Int area = before[top] - before[top - u] + before[bottom + take - u] - before[bottom];
        const Int miss = std::llabs(area - target);
        if (nearest < 0 || miss < nearest) nearest = miss, late = u, taken = area;
      }
      for (Int u = 0; u < late; ++u) put(first + --top, rank);
      for (Int u = late; u < take; ++u) put(first + bottom++, rank);
      left -= taken;
      weight -= own_weight;
    }
  }

  // Fillers that matter most for area first, each whole where one rank has room for it.
  void fill(Int first_filler) {
    Ints fillers(groups_.order.begin() + first_filler, groups_.order.end());
    std::stable_sort(fillers.begin(), fillers.end(), [&](Int a, Int b) {
      return std::llabs(excess(a)) > std::llabs(excess(b));
    });
    Ints loose;
    for (Int g : fillers) {
      const Int rank = neediest(groups_.size[g], excess(g) >= 0 ? 1 : -1);
      if (rank >= 0) {
        put_group(g, rank);
      } else {
        for (Int i = row_.group_start[g]; i < row_.group_start[g + 1]; ++i) loose.push_back(i);
      }
    }
    std::sort(loose.begin(), loose.end());
    Int rank = 0;
    for (Int i : loose) {
      while (room_[rank] == 0) ++rank;
      put(i, rank);
    }
  }
};

// Every stride-th chunk, from the offset-th on, of each of the ranks; sorted.
Ints sample_chunks(const Ledger& ledger, const Ints& ranks, Int offset, Int stride) {
  Ints phase(ledger.area.size(), -1), chunks;
  for (Int rank : ranks) phase[rank] = offset;
  for (Int i = 0; i < Int(ledger.owner.size()); ++i) {
    Int& wait = phase[ledger.owner[i]];
    if (wait < 0) continue;
    if (wait-- > 0) continue;
    chunks.push_back(i);
    wait = stride - 1;
  }
  return chunks;
}

// The ranks, but for one, that cost least.
Ints best_off(const Ints& cost, Int except, Int partners) {
  Ints ranks;
  for (Int rank = 0; rank < Int(cost.size()); ++rank) {
    if (rank != except) ranks.push_back(rank);
  }
  std::stable_sort(ranks.begin(), ranks.end(), [&](Int a, Int b) { return cost[a] < cost[b]; });
  if (Int(ranks.size()) > partners) ranks.resize(partners);
  return ranks;
}

// Make the best exchange found of a chunk of `rank` with a chunk of another; false if none helps.
// A chunk is never exchanged with the head of its own chain: their effects do not add up.
bool improve(const Row& row, Ledger& ledger, Int rank, Int round) {
  const Int stride = (row.quota + row.numbers.candidates - 1) / row.numbers.candidates;
  Ints cost(row.ranks), giving, taking, heading, other_taking(row.ranks), other_heading(row.ranks);
  for (Int other = 0; other < row.ranks; ++other) cost[other] = ledger.cost(other);
  const Ints partners = best_off(cost, rank, row.numbers.partners);
  const Ints mine = sample_chunks(ledger, {rank}, round % stride, stride);
  const Ints theirs = sample_chunks(ledger, partners, round / stride % stride, stride);
  for (Int b : theirs) {
    giving.push_back(ledger.giving(b) + ledger.headed(b, ledger.owner[b]));
    heading.push_back(ledger.headed(b, rank));
    taking.push_back(ledger.taking(b, rank) - heading.back());
  }
  Int best_gain = 0, best_a = -1, best_b = -1;
  for (Int a : mine) {
    const Int own_heading = ledger.headed(a, rank), own_giving = ledger.giving(a) + own_heading;
    for (Int other : partners) {
      other_heading[other] = ledger.headed(a, other);
      other_taking[other] = ledger.taking(a, other) - other_heading[other];
    }
    for (std::size_t k = 0; k < theirs.size(); ++k) {
      const Int b = theirs[k], other = ledger.owner[b], change = row.area[b] - row.area[a];
      const bool same_chain = row.chain[a] >= 0 && row.chain[a] == row.chain[b];
      Int traffic = own_giving + taking[k];
      if (same_chain) traffic = ledger.trading(a, b, rank) + own_heading - heading[k];
      const Int own_gain = cost[rank] - rank_cost(row, ledger.area[rank] + change,
                                                  ledger.traffic[rank] + traffic);
      if (own_gain <= 0 || own_gain + cost[other] <= best_gain) continue;
      if (ledger.is_head_of(a, b) || ledger.is_head_of(b, a)) continue;
      traffic = giving[k] + other_taking[other];
      if (same_chain) {
        traffic = ledger.trading(b, a, other) + ledger.headed(b, other) - other_heading[other];
      }
      const Int gain = own_gain + cost[other] - rank_cost(row, ledger.area[other] - change,
                                                          ledger.traffic[other] + traffic);
      if (gain > best_gain) best_gain = gain, best_a = a, best_b = b;
    }
  }
  if (best_a < 0) return false;
  ledger.exchange(best_a, best_b);
  return true;
}

// Rounds for the rank that costs most; one that could not be helped waits for another's change.
void refine(const Row& row, Ledger& ledger) {
  const Numbers& numbers = row.numbers;
  const Int candidates = std::min(numbers.candidates, row.quota);
  const Int pairs = candidates * candidates * std::min(numbers.partners, row.ranks - 1);
  const Int rounds = std::clamp(numbers.pair_budget / std::max<Int>(1, pairs),
                                numbers.min_rounds, numbers.max_rounds);
  std::vector<char> is_stuck(row.ranks, 0);
  for (Int round = 0; round < rounds; ++round) {
    Int worst = -1, worst_cost = 0;
    for (Int rank = 0; rank < row.ranks; ++rank) {
      if (is_stuck[rank]) continue;
      const Int cost = ledger.cost(rank);
      if (worst < 0 || cost > worst_cost) worst = rank, worst_cost = cost;
    }
    if (worst < 0) return;
    if (improve(row, ledger, worst, round)) {
      std::fill(is_stuck.begin(), is_stuck.end(), 0);
    } else {
      is_stuck[worst] = 1;
    }
  }
}

}  // namespace

extern "C" {

// owner[i]: rank of chunk i, int32 [row length / chunk]. deals[num_deals][2]: fill share
// and overfill shift of each deal to make. The caller has checked that the lengths are positive and that
// chunk * num_ranks divides their sum.
void lclm_assign_chunks(const std::int64_t* doc_lengths, std::int64_t num_docs,
                        std::int64_t num_ranks, std::int64_t chunk, const Numbers* numbers,
                        const std::int64_t* deals, std::int64_t num_deals, std::int32_t* owner) {
  const Row row = lclm::make_row(doc_lengths, num_docs, num_ranks, chunk, *numbers);
  const Groups groups = sort_groups(row);
  Ints best;
  Int best_cost = -1;
  for (Int k = 0; k < num_deals; ++k) {
    Deal deal(row, groups, deals[2 * k], deals[2 * k + 1]);
    const Int cost = Ledger(row, deal.owner).total_cost();
    if (best_cost >= 0 && cost >= best_cost) continue;
    best_cost = cost;
    best = std::move(deal.owner);
  }
  Ledger ledger(row, std::move(best));
  refine(row, ledger);
  for (Int i = 0; i < row.num_chunks; ++i) owner[i] = std::int32_t(ledger.owner[i]);
}

}  // extern "C"

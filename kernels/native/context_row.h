// A packed row cut into chunks, and what dealing the chunks out to ranks costs (context_plan.cpp).
//
// Integers only; context_plan.py holds the twins of these names.

#ifndef LCLM_CONTEXT_ROW_H_
#define LCLM_CONTEXT_ROW_H_

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

namespace lclm {

using Int = std::int64_t;
using Ints = std::vector<Int>;

// The numbers that shape a plan; context_plan.py (class Numbers) says what they are and
// gives their values in this order.
struct Numbers {
  Int share, free_share, fraction_bits, area_bits, fill_parts, partners, candidates, pair_budget;
  Int min_rounds, max_rounds;
};

// The row cut into chunks. A document that crosses a chunk border makes a chain: the chunks whose
// first token it holds, and before them the head chunk, in which it starts.
struct Row {
  Numbers numbers;
  Int ranks, chunk, num_chunks, quota;  // quota: chunks per rank
  Ints area;                            // per chunk, in units
  Ints chain;                           // per chunk, -1: its first token starts a document
  Ints head, head_tokens, low, high;    // per chain; low..high are its chunks, both included
  Ints group_start;                     // chunks of a group stay together; last entry num_chunks
  Int fair_area;                        // units per rank
  // quantity * factor >> fraction_bits is in 1/share of a fair share
  Int area_factor, traffic_factor;
  Int free_traffic;  // in 1/share of a ring: what the longest document needs, or hides anyway
};

inline Row make_row(const Int* lengths, Int num_docs, Int ranks, Int chunk,
                    const Numbers& numbers) {
  Row row;
  row.numbers = numbers;
  const Int length = std::accumulate(lengths, lengths + num_docs, Int{0});
  const Int num_chunks = length / chunk;
  row.ranks = ranks;
  row.chunk = chunk;
  row.num_chunks = num_chunks;
  row.quota = num_chunks / ranks;
  row.area.assign(num_chunks, 0);
  row.chain.assign(num_chunks, -1);
  Int start = 0, longest = 0;
  for (Int doc = 0; doc < num_docs; ++doc) {
    const Int end = start + lengths[doc], first = start / chunk, last = (end - 1) / chunk;
    longest = std::max(longest, lengths[doc]);
    for (Int i = first; i <= last; ++i) {
      const Int a = std::max(start, i * chunk) - start, b = std::min(end, (i + 1) * chunk) - start;
      row.area[i] += (b - a) * (a + b + 1) / 2;
    }
    if (last > first) {
      std::fill(row.chain.begin() + first + 1, row.chain.begin() + last + 1, Int(row.head.size()));
      row.head.push_back(first);
      row.head_tokens.push_back((first + 1) * chunk - start);
      row.low.push_back(first + 1);
      row.high.push_back(last);
    }
    start = end;
  }
  Int total = std::accumulate(row.area.begin(), row.area.end(), Int{0});
  const Int unit = std::max<Int>(1, (total / ranks) >> numbers.area_bits);
  total = 0;
  for (Int& area : row.area) total += area /= unit;
  row.fair_area = std::max<Int>(1, total / ranks);
  const Int ring = std::max<Int>(1, (ranks - 1) * (length / ranks));
  row.area_factor = (numbers.share << numbers.fraction_bits) / row.fair_area;
  row.traffic_factor = (numbers.share << numbers.fraction_bits) / ring;
  const Int least = std::max<Int>(0, longest - length / ranks);
  row.free_traffic =
      std::max(numbers.free_share, (least * row.traffic_factor) >> numbers.fraction_bits);
  for (Int i = 0; i < num_chunks; ++i) {
    const Int chain = row.chain[i];
    const bool joins = i > 0 && chain >= 0 && (row.chain[i - 1] < 0 || row.chain[i - 1] == chain);
    if (!joins) row.group_start.push_back(i);
  }
  row.group_start.push_back(num_chunks);
  return row;
}

// What a rank costs the row: squares, so that the worst ranks weigh most. Area below the mean
// counts half; traffic counts a little everywhere and fully above what is free.
inline Int rank_cost(const Row& row, Int area, Int traffic) {
  const Numbers& numbers = row.numbers;
  Int x = ((area * row.area_factor) >> numbers.fraction_bits) - numbers.share;
  if (x < 0) x >>= 1;
  const Int y = (traffic * row.traffic_factor) >> numbers.fraction_bits;
  const Int over = std::max<Int>(0, y - row.free_traffic);
  return x * x + over * over + ((y * y) >> 12);
}

// Ranks' area and traffic under exchanges of chunks. Per (rank, chain) it keeps how many chunks
// the rank holds and the last two of them: the rank receives what lies below its last one.
class Ledger {
 public:
  Ledger(const Row& row, Ints owners)
      : row_(row), owner(std::move(owners)), area(row.ranks, 0), traffic(row.ranks, 0),
        chains_(Int(row.head.size())), held_(row.ranks * chains_, 0),
        last_(row.ranks * chains_, -1), second_(row.ranks * chains_, -1) {
    for (Int i = 0; i < row.num_chunks; ++i) {
      area[owner[i]] += row.area[i];
      if (row.chain[i] < 0) continue;
      const Int key = owner[i] * chains_ + row.chain[i];
      ++held_[key];
      second_[key] = last_[key];
      last_[key] = i;
    }
    for (Int rank = 0; rank < row.ranks; ++rank) recount(rank);
  }

  Int total_cost() const {
    Int sum = 0;
    for (Int rank = 0; rank < row_.ranks; ++rank) sum += cost(rank);
    return sum;
  }

  Int cost(Int rank) const { return rank_cost(row_, area[rank], traffic[rank]); }

  // Tokens of one chain that a rank receives.
  Int received(Int rank, Int chain) const {
    const Int key = rank * chains_ + chain, head = row_.head[chain];
    if (held_[key] == 0) return 0;
    return (last_[key] - head - held_[key]) * row_.chunk +
           (owner[head] == rank ? 0 : row_.head_tokens[chain]);
  }

  // Change of the owner's traffic, in the chunk's own chain, when it gives the chunk away.
  Int giving(Int i) const {
    const Int chain = row_.chain[i];
    if (chain < 0) return 0;
    const Int key = owner[i] * chains_ + chain;
    if (held_[key] == 1) return -received(owner[i], chain);
    return (last_without(key, i) - last_[key] + 1) * row_.chunk;
  }

  // The same for `rank` when it takes a chunk it does not hold.
  Int taking(Int i, Int rank) const {
    const Int chain = row_.chain[i];
    if (chain < 0) return 0;
    const Int key = rank * chains_ + chain, head = row_.head[chain];
    if (held_[key]) return (std::max(last_[key], i) - last_[key] - 1) * row_.chunk;
    return (i - head - 1) * row_.chunk + (owner[head] == rank ? 0 : row_.head_tokens[chain]);
  }

  // And when it takes chunk `in` for chunk `out` of the same chain.
  Int trading(Int out, Int in, Int rank) const {
    const Int key = rank * chains_ + row_.chain[in];
    return (std::max(last_without(key, out), in) - last_[key]) * row_.chunk;
  }

  // Tokens of the document that starts in chunk i and leaves it, if `rank` sees them later on.
  Int headed(Int i, Int rank) const {
    const Int chain = i + 1 < row_.num_chunks ? row_.chain[i + 1] : -1;
    if (chain < 0 || row_.head[chain] != i) return 0;
    return held_[rank * chains_ + chain] ? row_.head_tokens[chain] : 0;
  }

  bool is_head_of(Int i, Int other) const {
    return row_.chain[other] >= 0 && row_.head[row_.chain[other]] == i;
  }

  void exchange(Int a, Int b) {
    const Int rank = owner[a], other = owner[b], change = row_.area[b] - row_.area[a];
    owner[a] = other;
    owner[b] = rank;
    area[rank] += change;
    area[other] -= change;
    for (Int chain : {row_.chain[a], row_.chain[b]}) {
      if (chain < 0) continue;
      refresh(rank, chain);
      refresh(other, chain);
    }
    recount(rank);
    recount(other);
  }

 private:
  const Row& row_;

 public:
  Ints owner, area, traffic;  // owner per chunk; area (units) and traffic (tokens) per rank

 private:
  Int chains_;
  Ints held_, last_, second_;

  Int last_without(Int key, Int i) const { return last_[key] == i ? second_[key] : last_[key]; }

  void refresh(Int rank, Int chain) {
    const Int key = rank * chains_ + chain;
    held_[key] = 0;
    last_[key] = second_[key] = -1;
    for (Int i = row_.low[chain]; i <= row_.high[chain]; ++i) {
      if (owner[i] != rank) continue;
      ++held_[key];
      second_[key] = last_[key];
      last_[key] = i;
    }
  }

  void recount(Int rank) {
    traffic[rank] = 0;
    for (Int chain = 0; chain < chains_; ++chain) traffic[rank] += received(rank, chain);
  }
};

}  // namespace lclm

#endif  // LCLM_CONTEXT_ROW_H_

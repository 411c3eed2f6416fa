// Best-fit packing of documents into rows, and the seeded order of documents, behind a C ABI.
//
// Integer arithmetic only; best_fit.py holds the twins that take the same decisions in Python.

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace {

// A set of integers 0 .. size - 1 that finds its smallest member at or above a number: a tree of
// 64-bit words, each bit of a level telling whether the word below has any member.
class IntegerSet {
 public:
  explicit IntegerSet(int64_t size) {
    do {
      size = (size + 63) / 64;
      levels_.emplace_back(size, 0);
    } while (size > 1);
  }

  void insert(int64_t item) {
    for (auto& level : levels_) {
      level[item >> 6] |= uint64_t{1} << (item & 63);
      item >>= 6;
    }
  }

  void erase(int64_t item) {
    for (auto& level : levels_) {
      level[item >> 6] &= ~(uint64_t{1} << (item & 63));
      if (level[item >> 6] != 0) return;
      item >>= 6;
    }
  }

  // -1 when there is none.
  int64_t at_or_above(int64_t item) const {
    for (std::size_t up = 0; up < levels_.size(); ++up) {
      const int64_t word = item >> 6;
      if (word >= int64_t(levels_[up].size())) return -1;
      const uint64_t found = levels_[up][word] & (~uint64_t{0} << (item & 63));
      if (found != 0) {
        item = (word << 6) + __builtin_ctzll(found);
        while (up-- > 0) item = (item << 6) + __builtin_ctzll(levels_[up][item]);
        return item;
      }
      item = word + 1;
    }
    return -1;
  }

 private:
  std::vector<std::vector<uint64_t>> levels_;
};

// Rows opened so far by the room left in them; of equal rows the one used last comes first.
class Rows {
 public:
  Rows(int64_t row_length, int64_t num_rows)
      : num_rows_(num_rows), with_room_(row_length + 1), last_(row_length + 1, -1) {
    before_.reserve(num_rows);
  }

  // The row with the least room that holds `length` tokens, opened if need be; -1 if none can.
  int32_t take(int64_t length, int64_t row_length) {
    const int64_t room = with_room_.at_or_above(length);
    int32_t row;
    if (room >= 0) {
      row = last_[room];
      last_[room] = before_[row];
      if (last_[room] < 0) with_room_.erase(room);
      put(row, room - length);
    } else {
      if (opened() == num_rows_) return -1;
      row = int32_t(opened());
      before_.push_back(-1);
      put(row, row_length - length);
    }
    return row;
  }

  int64_t opened() const { return int64_t(before_.size()); }

 private:
  void put(int32_t row, int64_t room) {
    if (room == 0) return;
    before_[row] = last_[room];
    if (last_[room] < 0) with_room_.insert(room);
    last_[room] = row;
  }

  int64_t num_rows_;
  IntegerSet with_room_;
  std::vector<int32_t> last_, before_;
};

uint64_t split_mix(uint64_t start, uint64_t number) {
  uint64_t mixed = (number + 1) * 0x9E3779B97F4A7C15u + start;
  mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9u;
  mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EBu;
  return mixed ^ (mixed >> 31);
}

}  // namespace

extern "C" {

// Give every piece of a stream of documents a row. A document longer than a row is cut from the
// front into pieces of a row each, what is left being one more piece; with drop_long it is left
// out. The stream ends before the first document that fits nowhere when num_rows rows are open.
//
// row_of_piece[num_documents + num_rows]: pieces in stream order, -1: cut but not needed (only of
// the last document). stats[5]: documents used, pieces, documents left out, tokens left out,
// tokens of pieces not needed. Returns 0, or -1 when the documents do not open num_rows rows.
int32_t lclm_pack_best_fit(const int32_t* lengths, int64_t num_documents, int64_t row_length,
                           int64_t num_rows, int32_t drop_long, int32_t* row_of_piece,
                           int64_t* stats) {
  Rows rows(row_length, num_rows);
  int64_t pieces = 0, dropped = 0, dropped_tokens = 0, unused = 0, document = 0;
  for (; document < num_documents; ++document) {
    int64_t left = lengths[document];
    if (left > row_length && drop_long) {
      ++dropped;
      dropped_tokens += left;
      continue;
    }
    if (left > row_length && rows.opened() == num_rows) break;
    while (left > 0) {
      const int64_t take = std::min(left, row_length);
      const int32_t row = rows.take(take, row_length);
      if (row < 0) break;
      row_of_piece[pieces++] = row;
      left -= take;
    }
    if (left > 0 && lengths[document] <= row_length) break;
    unused += left;  // the end of a document whose front opened the last row
  }
  stats[0] = document;
  stats[1] = pieces;
  stats[2] = dropped;
  stats[3] = dropped_tokens;
  stats[4] = unused;
  return rows.opened() == num_rows ? 0 : -1;
}

// Sort the pieces of lclm_pack_best_fit by row, keeping their order within one.
//
// lengths[num_documents]: those used, each as far as it is in pieces, also where it ended early.
// row_start[num_rows + 1]; place, offset, length[num_pieces]: of each piece.
void lclm_sort_best_fit(const int32_t* lengths, int64_t num_documents, int64_t row_length,
                        int64_t num_rows, int32_t drop_long, const int32_t* row_of_piece,
                        int64_t num_pieces, int64_t* row_start, int32_t* place, int32_t* offset,
                        int32_t* length) {
  std::fill(row_start, row_start + num_rows + 1, 0);
  for (int64_t piece = 0; piece < num_pieces; ++piece) ++row_start[row_of_piece[piece] + 1];
  for (int64_t row = 0; row < num_rows; ++row) row_start[row + 1] += row_start[row];
  std::vector<int64_t> next(row_start, row_start + num_rows);
  int64_t piece = 0;
  for (int64_t document = 0; document < num_documents && piece < num_pieces; ++document) {
    if (lengths[document] > row_length && drop_long) continue;
    int64_t at = 0;
    while (at < lengths[document] && piece < num_pieces) {
      const int64_t take = std::min<int64_t>(lengths[document] - at, row_length);
      const int64_t slot = next[row_of_piece[piece++]]++;
      place[slot] = int32_t(document);
      offset[slot] = int32_t(at);
      length[slot] = int32_t(take);
      at += take;
    }
  }
}

// order[num_items]: 0 .. num_items - 1 sorted by SplitMix64 of their number, started at `start`.
// Keys are all different. They are made again where they are needed, not stored.
void lclm_seeded_order(uint64_t start, int64_t num_items, int32_t* order) {
  int bits = 0;
  while (bits < 24 && (num_items >> bits) > 2048) ++bits;
  const auto bucket_of = [&](int64_t item) {
    return bits ? split_mix(start, uint64_t(item)) >> (64 - bits) : uint64_t{0};
  };
  std::vector<int64_t> begin((int64_t{1} << bits) + 1, 0);
  for (int64_t item = 0; item < num_items; ++item) ++begin[bucket_of(item) + 1];
  for (std::size_t k = 1; k < begin.size(); ++k) begin[k] += begin[k - 1];
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  for (int64_t item = 0; item < num_items; ++item) order[next[bucket_of(item)]++] = int32_t(item);
  std::vector<std::pair<uint64_t, int32_t>> keyed;
  for (std::size_t k = 0; k + 1 < begin.size(); ++k) {
    keyed.clear();
    for (int64_t at = begin[k]; at < begin[k + 1]; ++at) {
      keyed.emplace_back(split_mix(start, uint64_t(order[at])), order[at]);
    }
    std::sort(keyed.begin(), keyed.end());
    for (std::size_t n = 0; n < keyed.size(); ++n) order[begin[k] + int64_t(n)] = keyed[n].second;
  }
}

}  // extern "C"

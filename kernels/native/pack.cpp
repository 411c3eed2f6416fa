// Row packing and mixture assignment behind a C ABI.
//
// Integer arithmetic only, so that reference.py (NumPy) gives the same results bit for bit.
// The caller owns and sizes every array. A "place" is an index into the stream of documents given.

#include <cstdint>
#include <vector>

extern "C" {

// Raised when the meaning of a function here changes; ops.py refuses a library of another number.
int32_t lclm_native_abi() { return 3; }

// Cut a stream of documents into rows of row_length tokens; what is left of a document at the end
// of a row starts the next row. With place == nullptr only counts.
//
// lengths[num_documents]: tokens of each document; start_offset: tokens of the first one already
// used. row_start[num_rows + 1]: first piece of each row. place, offset, length[pieces].
// next[2]: place and offset of the first unused token. Returns the number of pieces, or -1 when the
// documents do not fill num_rows rows.
int64_t lclm_pack_concat(const int32_t* lengths, int64_t num_documents, int64_t start_offset,
                         int64_t row_length, int64_t num_rows, int64_t* row_start, int32_t* place,
                         int32_t* offset, int32_t* length, int64_t* next) {
  int64_t pieces = 0;
  int64_t document = 0;
  int64_t at = start_offset;
  for (int64_t row = 0; row < num_rows; ++row) {
    if (place != nullptr) row_start[row] = pieces;
    int64_t room = row_length;
    while (room > 0) {
      while (document < num_documents && at >= lengths[document]) {
        ++document;
        at = 0;
      }
      if (document == num_documents) return -1;
      const int64_t left = lengths[document] - at;
      const int64_t take = left < room ? left : room;
      if (place != nullptr) {
        place[pieces] = static_cast<int32_t>(document);
        offset[pieces] = static_cast<int32_t>(at);
        length[pieces] = static_cast<int32_t>(take);
      }
      ++pieces;
      at += take;
      room -= take;
    }
  }
  while (document < num_documents && at >= lengths[document]) {
    ++document;
    at = 0;
  }
  if (place != nullptr) {
    row_start[num_rows] = pieces;
    next[0] = document;
    next[1] = at;
  }
  return pieces;
}

// Cut each document from the front into the longest target it still fills, until needs are met.
//
// targets[num_targets]: piece lengths, falling; needs[num_targets]: pieces wanted of each.
// place, offset[sum of needs]: the pieces of target 0, then of target 1, ...
// found[num_targets]: pieces written of each. stats[3]: documents cut, tokens of tails shorter than
// the last target, tokens of pieces cut but not needed. Returns 0, or -1 when documents ran out.
int32_t lclm_pack_exact(const int32_t* lengths, int64_t num_documents, const int64_t* targets,
                        const int64_t* needs, int32_t num_targets, int32_t* place, int32_t* offset,
                        int64_t* found, int64_t* stats) {
  std::vector<int64_t> base(num_targets);
  int64_t wanted = 0;
  for (int32_t k = 0; k < num_targets; ++k) {
    base[k] = wanted;
    wanted += needs[k];
    found[k] = 0;
  }
  int64_t document = 0;
  int64_t tails = 0;
  int64_t unused = 0;
  for (; document < num_documents && wanted > 0; ++document) {
    int64_t at = 0;
    for (int32_t k = 0; k < num_targets; ++k) {
      while (lengths[document] - at >= targets[k]) {
        if (found[k] < needs[k]) {
          place[base[k] + found[k]] = static_cast<int32_t>(document);
          offset[base[k] + found[k]] = static_cast<int32_t>(at);
          ++found[k];
          --wanted;
        } else {
          unused += targets[k];
        }
        at += targets[k];
      }
    }
    tails += lengths[document] - at;
  }
  stats[0] = document;
  stats[1] = tails;
  stats[2] = unused;
  return wanted == 0 ? 0 : -1;
}

// Give each row to an entry so that after any number of rows every entry is within one row of its
// share (R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32, 1980).
//
// weights[num_entries]: the shares as integers; lag[i] is (share * rows - rows given) * total.
// Row by row, among the entries whose lag has reached total / (2n - 2), the one that would be
// overdue first is served; ties go to the first entry.
void lclm_assign_rows(const int64_t* weights, int32_t num_entries, int64_t num_rows,
                      int16_t* entry_of_row) {
  int64_t total = 0;
  for (int32_t i = 0; i < num_entries; ++i) total += weights[i];
  // 2n - 2, and 1 for a single entry, which then takes every row
  const __int128 span = num_entries > 1 ? 2 * static_cast<__int128>(num_entries) - 2 : 1;
  std::vector<int64_t> lag(num_entries, 0);
  for (int64_t row = 0; row < num_rows; ++row) {
    int32_t best = -1;
    __int128 best_slack = 0;
    for (int32_t i = 0; i < num_entries; ++i) {
      lag[i] += weights[i];
      if (span * lag[i] < total) continue;
      const __int128 slack = span * (total - lag[i]) - total;
      if (best < 0 || slack * weights[best] < best_slack * weights[i]) {
        best = i;
        best_slack = slack;
      }
    }
    entry_of_row[row] = static_cast<int16_t>(best);
    lag[best] -= total;
  }
}

}  // extern "C"

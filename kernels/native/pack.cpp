// Packing of rows by concatenation behind a C ABI.
//
// Integer arithmetic only, so that the twin in ops.py (NumPy) gives the same results bit for bit.
// The caller owns and sizes every array. A "place" is an index into the stream of documents given.

#include <cstdint>

extern "C" {

// Raised when the meaning of a function here changes; ops.py refuses a library of another number.
int32_t lclm_native_abi() { return 5; }

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

}  // extern "C"

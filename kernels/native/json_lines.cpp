// Strings of one key out of JSON lines, behind a C ABI.
//
// A line is checked as a whole. Whatever is not plainly right, or not worth code here, is left to
// the caller, line by line: wrong JSON, a key that is missing, not a string, or there twice, half a
// surrogate pair, deep nesting, a byte order mark.

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

enum Kind : int8_t { TEXT = 0, BLANK = 1, LEFT = 2 };

constexpr int MAX_DEPTH = 64;
bool is_space(uint8_t c) { return c == ' ' || c == '\t' || c == '\r' || c == '\n'; }

// Copies a block of bytes; the place of the first that is not plain (a quote, a backslash, a control
// character, beyond ASCII), or BLOCK when all are.
#if defined(__x86_64__)
constexpr int BLOCK = 16;
int copy_plain(const uint8_t* from, uint8_t* to) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
  const __m128i quote = _mm_cmpeq_epi8(bytes, _mm_set1_epi8('"'));
  const __m128i slash = _mm_cmpeq_epi8(bytes, _mm_set1_epi8('\\'));
  // as signed bytes, those beyond ASCII are below 0x20 too
  const __m128i low = _mm_cmplt_epi8(bytes, _mm_set1_epi8(0x20));
  const int found = _mm_movemask_epi8(_mm_or_si128(_mm_or_si128(quote, slash), low));
  return __builtin_ctz(static_cast<unsigned>(found) | 1U << BLOCK);
}

#define WIDE __attribute__((target("avx512f,avx512bw,avx512vbmi2")))
const bool HAS_WIDE = __builtin_cpu_supports("avx512vbmi2");

WIDE inline uint64_t equal(__m512i bytes, char c) {
  return _mm512_cmpeq_epi8_mask(bytes, _mm512_set1_epi8(c));
}

// Decodes 64 bytes at a time, escapes of two characters included: backslashes that escape are
// squeezed out. Moves *from and *to up to the first byte it cannot decode, or within 64 of limit.
WIDE void decode_wide(const uint8_t** from, const uint8_t* limit, uint8_t** to) {
  while (limit - *from >= 64) {
    __m512i bytes = _mm512_loadu_si512(*from);
    const uint64_t slash = equal(bytes, '\\');
    // which characters follow an odd number of backslashes (simdjson, arXiv 1902.08318, 3.1.1)
    constexpr uint64_t EVEN = 0x5555555555555555ULL;
    const uint64_t follows = slash << 1;
    const uint64_t odd_starts = slash & ~EVEN & ~follows;
    const uint64_t escaped = (EVEN ^ ((odd_starts + slash) << 1)) & follows;
    const uint64_t escaping = slash & ~escaped;
    const uint64_t quote = equal(bytes, '"');
    const uint64_t n = equal(bytes, 'n'), t = equal(bytes, 't'), r = equal(bytes, 'r');
    const uint64_t b = equal(bytes, 'b'), f = equal(bytes, 'f');
    const uint64_t known = n | t | r | b | f | quote | slash | equal(bytes, '/');
    const uint64_t low = _mm512_cmplt_epi8_mask(bytes, _mm512_set1_epi8(0x20));
    // an escape that is not known here, or cut by the end of the block, is left with its backslash
    const uint64_t unknown = (escaped & ~known) >> 1 | (escaping & 1ULL << 63);
    const uint64_t stop = (quote & ~escaped) | low | unknown;
    const uint64_t taken = stop == 0 ? ~0ULL : (stop & -stop) - 1;
    bytes = _mm512_mask_blend_epi8(escaped & n, bytes, _mm512_set1_epi8('\n'));
    bytes = _mm512_mask_blend_epi8(escaped & t, bytes, _mm512_set1_epi8('\t'));
    bytes = _mm512_mask_blend_epi8(escaped & r, bytes, _mm512_set1_epi8('\r'));
    bytes = _mm512_mask_blend_epi8(escaped & b, bytes, _mm512_set1_epi8('\b'));
    bytes = _mm512_mask_blend_epi8(escaped & f, bytes, _mm512_set1_epi8('\f'));
    const uint64_t kept = taken & ~escaping;
    _mm512_storeu_si512(*to, _mm512_maskz_compress_epi8(kept, bytes));
    *from += __builtin_popcountll(taken);
    *to += __builtin_popcountll(kept);
    if (stop != 0) return;
  }
}
#else
constexpr int BLOCK = 8;
int copy_plain(const uint8_t* from, uint8_t* to) {
  int place = BLOCK;
  for (int n = BLOCK - 1; n >= 0; --n) {
    const uint8_t c = to[n] = from[n];
    if (c == '"' || c == '\\' || c < 0x20 || c >= 0x80) place = n;
  }
  return place;
}
constexpr bool HAS_WIDE = false;
void decode_wide(const uint8_t**, const uint8_t*, uint8_t**) {}
#endif

// What an escape of two characters stands for, by its second; 0: there is none.
struct Escapes {
  uint8_t of[256] = {};
  Escapes() {
    const char* names = "\"\\/bfnrt";
    const char* values = "\"\\/\b\f\n\r\t";
    for (int n = 0; n < 8; ++n) of[static_cast<uint8_t>(names[n])] = static_cast<uint8_t>(values[n]);
  }
};
const Escapes ESCAPES;

int hex4(const uint8_t* at) {
  int value = 0;
  for (int n = 0; n < 4; ++n) {
    const uint8_t c = at[n];
    const uint8_t low = c | 0x20;
    if (c >= '0' && c <= '9') value = value * 16 + (c - '0');
    else if (low >= 'a' && low <= 'f') value = value * 16 + (low - 'a' + 10);
    else return -1;
  }
  return value;
}

// Bytes of the UTF-8 sequence at `at`, which starts beyond ASCII; 0: it is not right (RFC 3629).
int sequence_length(const uint8_t* at, const uint8_t* end) {
  const uint8_t first = at[0];
  const int size = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
  if (first < 0xC2 || first > 0xF4 || end - at < size) return 0;
  for (int n = 1; n < size; ++n)
    if ((at[n] & 0xC0) != 0x80) return 0;
  if (first == 0xE0 && at[1] < 0xA0) return 0;  // too long a spelling
  if (first == 0xED && at[1] > 0x9F) return 0;  // half of a surrogate pair
  if (first == 0xF0 && at[1] < 0x90) return 0;
  if (first == 0xF4 && at[1] > 0x8F) return 0;  // beyond U+10FFFF
  return size;
}

uint8_t* put(uint8_t* out, uint32_t c) {
  if (c < 0x80) {
    *out++ = static_cast<uint8_t>(c);
  } else if (c < 0x800) {
    *out++ = static_cast<uint8_t>(0xC0 | (c >> 6));
    *out++ = static_cast<uint8_t>(0x80 | (c & 0x3F));
  } else if (c < 0x10000) {
    *out++ = static_cast<uint8_t>(0xE0 | (c >> 12));
    *out++ = static_cast<uint8_t>(0x80 | ((c >> 6) & 0x3F));
    *out++ = static_cast<uint8_t>(0x80 | (c & 0x3F));
  } else {
    *out++ = static_cast<uint8_t>(0xF0 | (c >> 18));
    *out++ = static_cast<uint8_t>(0x80 | ((c >> 12) & 0x3F));
    *out++ = static_cast<uint8_t>(0x80 | ((c >> 6) & 0x3F));
    *out++ = static_cast<uint8_t>(0x80 | (c & 0x3F));
  }
  return out;
}

// One line. Every function returns whether what it looked for is right, and then stands behind it.
struct Line {
  const uint8_t* at;
  const uint8_t* end;
  const uint8_t* limit;  // bytes up to here may be read; behind `end` stands a newline, or nothing

  void skip_space() {
    while (at < end && is_space(*at)) ++at;
  }

  bool take(uint8_t c) {
    if (at == end || *at != c) return false;
    ++at;
    return true;
  }

  bool word(const char* text, int size) {
    if (end - at < size || std::memcmp(at, text, static_cast<size_t>(size)) != 0) return false;
    at += size;
    return true;
  }

  // A string, its opening quote included, decoded behind *out.
  bool string(uint8_t** out) {
    if (!take('"')) return false;
    uint8_t* to = *out;
    for (;;) {
      if (HAS_WIDE) {
        decode_wide(&at, limit, &to);
      } else if (limit - at >= BLOCK) {
        const int plain = copy_plain(at, to);
        at += plain;
        to += plain;
        if (plain == BLOCK) continue;
      }
      if (at >= end) return false;
      if (*at == '"') {
        ++at;
        *out = to;
        return true;
      }
      if (*at == '\\') {
        if (!escape(&to)) return false;
      } else if (*at < 0x20) {
        return false;
      } else if (*at < 0x80) {
        *to++ = *at++;
      }
      while (at < end && *at >= 0x80) {
        const int size = sequence_length(at, end);
        if (size == 0) return false;
        for (int n = 0; n < size; ++n) *to++ = *at++;
      }
    }
  }

  bool escape(uint8_t** to) {
    if (end - at < 2) return false;
    const uint8_t stands_for = ESCAPES.of[at[1]];
    if (stands_for != 0) {
      *(*to)++ = stands_for;
      at += 2;
      return true;
    }
    if (at[1] != 'u' || end - at < 6) return false;
    int first = hex4(at + 2);
    if (first < 0 || (first >= 0xDC00 && first < 0xE000)) return false;
    at += 6;
    if (first >= 0xD800 && first < 0xDC00) {
      if (end - at < 6 || at[0] != '\\' || at[1] != 'u') return false;
      const int second = hex4(at + 2);
      if (second < 0xDC00 || second >= 0xE000) return false;
      first = 0x10000 + ((first - 0xD800) << 10) + (second - 0xDC00);
      at += 6;
    }
    *to = put(*to, static_cast<uint32_t>(first));
    return true;
  }

  bool digits() {
    const uint8_t* start = at;
    while (at < end && *at >= '0' && *at <= '9') ++at;
    return at > start;
  }

  bool number() {
    take('-');
    if (!take('0') && !digits()) return false;
    if (take('.') && !digits()) return false;
    if (at < end && (*at | 0x20) == 'e') {
      ++at;
      if (!take('+')) take('-');
      if (!digits()) return false;
    }
    return true;
  }

  // Any value; strings in it are decoded over one another behind `scratch` and forgotten.
  bool value(uint8_t* scratch, int depth) {
    skip_space();
    if (at == end || depth == MAX_DEPTH) return false;
    uint8_t* to = scratch;
    switch (*at) {
      case '"': return string(&to);
      case 't': return word("true", 4);
      case 'f': return word("false", 5);
      case 'n': return word("null", 4);
      case '{':
      case '[': break;
      default: return number();
    }
    const bool is_object = *at++ == '{';
    const uint8_t close = is_object ? '}' : ']';
    skip_space();
    if (take(close)) return true;
    do {
      if (is_object) {
        skip_space();
        to = scratch;
        if (!string(&to)) return false;
        skip_space();
        if (!take(':')) return false;
      }
      if (!value(scratch, depth + 1)) return false;
      skip_space();
    } while (take(','));
    return take(close);
  }

  // The object; the string under the key lies from *out on, and *out is moved behind it.
  bool object(const uint8_t* key, int64_t key_size, uint8_t** out) {
    skip_space();
    if (!take('{')) return false;
    bool is_found = false;
    uint8_t* text_end = *out;
    do {
      skip_space();
      uint8_t* to = text_end;
      if (!string(&to)) return false;
      const bool is_key = to - text_end == key_size &&
                          std::memcmp(text_end, key, static_cast<size_t>(key_size)) == 0;
      skip_space();
      if (!take(':')) return false;
      if (is_key) {
        if (is_found) return false;
        is_found = true;
        skip_space();
        if (!string(&text_end)) return false;
      } else if (!value(text_end, 0)) {
        return false;
      }
      skip_space();
    } while (take(','));
    if (!take('}') || !is_found) return false;
    skip_space();
    if (at != end) return false;
    *out = text_end;
    return true;
  }
};

bool is_blank(const uint8_t* at, const uint8_t* end) {
  while (at < end && (is_space(*at) || *at == '\v' || *at == '\f')) ++at;
  return at == end;
}

}  // namespace

extern "C" {

// Lines from data[start] on, until there are max_lines or max_text bytes of text.
//
// line_end[max_lines]: where each line ends in data, its newline not counted. text_end[max_lines]:
// where its text ends in text; it starts where the one before ends. kind[max_lines]: 0 a text, 1 a
// line of white space, 2 left to the caller. text: room for
// size - start + 64 bytes. Returns the lines.
int64_t lclm_json_texts(const uint8_t* data, int64_t start, int64_t size, const uint8_t* key,
                        int64_t key_size, int64_t max_lines, int64_t max_text, uint8_t* text,
                        int64_t* line_end, int64_t* text_end, int8_t* kind) {
  int64_t count = 0;
  uint8_t* out = text;
  while (start < size && count < max_lines && out - text < max_text) {
    const void* newline = std::memchr(data + start, '\n', static_cast<size_t>(size - start));
    const uint8_t* end =
        newline == nullptr ? data + size : static_cast<const uint8_t*>(newline);
    Line line{data + start, end, data + size};
    const bool is_right = line.object(key, key_size, &out);
    kind[count] = is_right ? TEXT : is_blank(data + start, end) ? BLANK : LEFT;
    line_end[count] = end - data;
    text_end[count] = out - text;
    ++count;
    start = end - data + 1;
  }
  return count;
}

}  // extern "C"

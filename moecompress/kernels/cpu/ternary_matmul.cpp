// Products with matrices of three or two values a row (pack/SPEC.md, sections 5 to 7), for the CPU.
//
// Plain C++17 with a C interface that ctypes loads. y = W x is computed from the packed codes: a row is two levels, so
// y = low * (sum of x where the trit is 0) + high * (sum of x where it is 2), and only the sums need the codes.
//
// Part 1: everywhere. A row becomes trits, then float32 weights, in the first-level cache. Also unpacks matrices.
// Part 2: AVX-512 with VNNI. x is fixed-point and trits are bytes, 64 of them multiplied and added in one instruction.
// Part 3: the work, cut for torch's threads, and the exported functions.

#include "pool.h"

#include <cstdlib>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "needs a little-endian machine"
#endif

namespace {

constexpr int kInterface = 2;  // raise when an exported function changes; ternary_matmul.py refuses any other

enum Outcome : int { kBadBank = 1, kBadSlot = 4, kBadCodes = 5, kBadArgument = 6 };  // and those of pool.h
enum Format : int { kTernary = 0, kSign = 1, kDictionary = 2 };
enum Type : int { kFloat32 = 0, kBfloat16 = 1 };

constexpr int64_t kWords = 1 << 16;
constexpr int64_t kRoom = 64;  // bytes that may be written behind a row of trits or pairs: four words and more
constexpr int64_t kItemBytes = 1 << 14;  // of codes: the least that is worth another thread's attention

struct Job {  // mirrored by ternary_matmul.py
  const uint8_t* codes;    // [count, rows, row bytes]; dictionary: the words, uint16 [count, room]
  const uint16_t* levels;  // bfloat16 [count, rows, 2]; sign: [count, rows]
  const int32_t* ends;     // dictionary: [count, rows], words up to the end of a row, counted in its matrix
  const uint64_t* book;    // dictionary: [65536], a word's pairs t0 + 4 t1 in 14 half-bytes, its length in bits 56 to 59
  const void* x;           // product: [tokens, cols]
  const int32_t* slots;    // product: [tokens]
  const int64_t* index;    // unpacking: [chosen], the matrices
  void* out;               // product: [tokens, rows]; unpacking: [chosen, last - first, cols]
  int64_t codes_bytes, levels_bytes, ends_bytes, book_bytes, x_bytes, slots_bytes, index_bytes, out_bytes;
  int64_t count, rows, cols, first, last;
  int32_t format, type;
};

bool has_bytes(const void* data, int64_t bytes, int64_t count, int64_t rows, int64_t each) {
  int64_t all;
  if (__builtin_mul_overflow(count, rows, &all) || __builtin_mul_overflow(all, each, &all)) return false;
  return bytes == all && (all == 0 || data != nullptr);
}

// Every size that a file can influence is compared with the memory behind it before anything is read.
bool is_valid(const Job& j) {
  constexpr int64_t kLimit = int64_t{1} << 31;  // keeps every product of a column count in range
  if (j.count < 0 || j.rows < 0 || j.cols < 1 || j.cols > kLimit) return false;
  if (j.type != kFloat32 && j.type != kBfloat16) return false;
  const int64_t each = j.format == kSign ? 2 : 4;
  if (!has_bytes(j.levels, j.levels_bytes, j.count, j.rows, each)) return false;
  if (j.format == kTernary) return has_bytes(j.codes, j.codes_bytes, j.count, j.rows, (j.cols + 4) / 5);
  if (j.format == kSign) return has_bytes(j.codes, j.codes_bytes, j.count, j.rows, (j.cols + 7) / 8);
  if (j.format != kDictionary || !has_bytes(j.ends, j.ends_bytes, j.count, j.rows, 4)) return false;
  if (!has_bytes(j.book, j.book_bytes, kWords, 1, 8)) return false;
  if (j.codes_bytes < 0 || (j.codes_bytes > 0 && j.codes == nullptr)) return false;
  return j.count ? j.codes_bytes % (2 * j.count) == 0 : j.codes_bytes == 0;
}

int64_t row_bytes(const Job& j) {  // of codes; the dictionary's rows have about as many
  return j.format == kTernary ? (j.cols + 4) / 5 : (j.cols + 7) / 8;
}

INLINE float from_bfloat16(uint16_t h) {
  const uint32_t bits = uint32_t{h} << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

INLINE uint16_t to_bfloat16(float f) {  // to nearest, ties to even, as torch
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

struct Pair {
  uint16_t low, high;  // bfloat16
};

Pair levels_of(const Job& j, int64_t row) {
  if (j.format == kSign) return {uint16_t(j.levels[row] ^ 0x8000), j.levels[row]};
  return {j.levels[2 * row], j.levels[2 * row + 1]};
}

INLINE void put(const Job& j, int64_t at, float value) {
  if (j.type == kFloat32)
    static_cast<float*>(j.out)[at] = value;
  else
    static_cast<uint16_t*>(j.out)[at] = to_bfloat16(value);
}

// The words of a row; none if its ends do not lie among the words of its matrix in this order.
struct Words {
  const uint8_t* first;
  int64_t count;  // -1: damaged
};

INLINE Words words_of(const Job& j, int64_t row) {
  const int64_t room = j.codes_bytes / 2 / j.count;
  const int64_t from = row % j.rows ? j.ends[row - 1] : 0, to = j.ends[row];
  if (from < 0 || to < from || to > room) return {nullptr, -1};
  return {j.codes + 2 * (row / j.rows * room + from), to - from};
}

struct Item {  // a range of rows of one matrix, times `tokens` vectors x
  int64_t matrix, first, last;
  const int32_t* tokens;  // row numbers in x and out
  int64_t count;
};

struct Product {
  const Job* job;
  const Item* items;
  uint8_t* prepared;  // x as the kernel wants it
  int64_t stride;     // bytes of one of them, a multiple of 64
  std::atomic<int>* status;
};

struct Kernel {
  const char* name;
  bool (*pairs_of)(const Job&, int64_t row, uint8_t* pairs);
  int64_t (*prepared_bytes)(const Job&);
  void (*prepare)(const Job&, int64_t token, uint8_t* out, float* scratch);
  void (*multiply)(const Product&, const Item&, float* scratch);
  int64_t (*scratch_floats)(const Job&);
};

const Kernel& kernel();  // the one in use

// ---- part 1: everywhere ------------------------------------------------------------------------------------------

// Trits of a byte, one in each byte of a word, the first lowest: its digits, or twice its bits.
template <int BASE, int DIGITS, int TIMES>
struct Digits {
  uint64_t of[256];
  constexpr Digits() : of() {
    for (int v = 0; v < 256; ++v) {
      int left = v;
      for (int k = 0; k < DIGITS; ++k, left /= BASE) of[v] |= uint64_t(left % BASE * TIMES) << (8 * k);
    }
  }
};
constexpr Digits<3, 5, 1> kTrits;
constexpr Digits<2, 8, 2> kSigns;

INLINE uint64_t spread_half_bytes(uint32_t eight) {  // to bytes
  uint64_t v = eight;
  v = (v | v << 16) & 0x0000ffff0000ffff;
  v = (v | v << 8) & 0x00ff00ff00ff00ff;
  return (v | v << 4) & 0x0f0f0f0f0f0f0f0f;
}

// Pairs t0 + 4 t1 of one row, a byte each; `pairs` has kRoom bytes more. False if the row has another length.
bool pairs_of(const Job& j, int64_t row, uint8_t* pairs) {
  const int64_t length = (j.cols + 1) / 2;
  const Words words = words_of(j, row);
  int64_t at = 0;
  for (int64_t w = 0; w < words.count; ++w) {
    if (at >= length) return false;
    uint16_t word;
    std::memcpy(&word, words.first + 2 * w, 2);
    const uint64_t entry = j.book[word];
    const uint64_t low = spread_half_bytes(uint32_t(entry)), high = spread_half_bytes(uint32_t(entry >> 32));
    std::memcpy(pairs + at, &low, 8);
    std::memcpy(pairs + at + 8, &high, 8);
    at += int64_t(entry >> 56 & 15);
  }
  return words.count >= 0 && at == length;
}

FAST uint8_t largest_of(const uint8_t* codes, int64_t bytes) {
  uint8_t most = 0;
  for (int64_t i = 0; i < bytes; ++i) most = std::max(most, codes[i]);
  return most;
}

FAST void trits_of_pairs(const uint8_t* __restrict pairs, int64_t count, uint8_t* __restrict trits) {
  for (int64_t i = 0; i < count; ++i) {
    trits[2 * i] = pairs[i] & 3;
    trits[2 * i + 1] = uint8_t(pairs[i] >> 2);
  }
}

// Trits of one row, a byte each; `trits` and `pairs` have kRoom more than the row needs. False if it is damaged.
bool trits_of(const Job& j, int64_t row, uint8_t* __restrict trits, uint8_t* pairs) {
  if (j.format == kDictionary) {
    if (!kernel().pairs_of(j, row, pairs)) return false;
    trits_of_pairs(pairs, (j.cols + 1) / 2, trits);
    return true;
  }
  const int64_t bytes = row_bytes(j);
  const uint8_t* __restrict codes = j.codes + row * bytes;
  if (j.format == kSign) {
    for (int64_t i = 0; i < bytes; ++i) std::memcpy(trits + 8 * i, &kSigns.of[codes[i]], 8);
    return true;
  }
  for (int64_t i = 0; i < bytes; ++i) std::memcpy(trits + 5 * i, &kTrits.of[codes[i]], 8);
  return largest_of(codes, bytes) < 243;
}

FAST void floats_of(const uint8_t* __restrict trits, int64_t cols, Pair levels, float* __restrict out) {
  const float low = from_bfloat16(levels.low), high = from_bfloat16(levels.high);
  for (int64_t i = 0; i < cols; ++i) out[i] = trits[i] == 0 ? low : trits[i] == 2 ? high : 0.0f;
}

FAST void bfloat16s_of(const uint8_t* __restrict trits, int64_t cols, Pair levels, uint16_t* __restrict out) {
  const uint16_t low = levels.low, high = levels.high;
  for (int64_t i = 0; i < cols; ++i) out[i] = uint16_t(trits[i] == 0 ? low : trits[i] == 2 ? high : 0);
}

// y[t] = w · x[t] over whole vectors.
FAST void dot(const float* w, const float* const* x, int count, int64_t floats, float* y) {
  if (count == 1) {
    Vector total[4] = {};
    int64_t i = 0;
    for (; i + 4 * kLane <= floats; i += 4 * kLane)
      for (int k = 0; k < 4; ++k) total[k] += load(w + i + k * kLane) * load(x[0] + i + k * kLane);
    for (; i < floats; i += kLane) total[0] += load(w + i) * load(x[0] + i);
    total[0] += total[1] + total[2] + total[3];
    for (int64_t lane = 0; lane < kLane; ++lane) y[0] += total[0][lane];
    return;
  }
  const float* four[4];
  for (int t = 0; t < 4; ++t) four[t] = x[std::min(t, count - 1)];
  Vector total[4] = {};
  for (int64_t i = 0; i < floats; i += kLane) {
    const Vector weight = load(w + i);
    for (int t = 0; t < 4; ++t) total[t] += weight * load(four[t] + i);
  }
  for (int t = 0; t < count; ++t)
    for (int64_t lane = 0; lane < kLane; ++lane) y[t] += total[t][lane];
}

constexpr int64_t kStrip = 8;  // rows of pairs that are decoded together

int64_t pair_stride(const Job& j) { return (j.cols + 255) / 256 * 128 + kRoom; }  // bytes

int64_t whole_vectors(int64_t cols) { return (cols + kLane - 1) / kLane * kLane; }

// Floats: the weights, then trits, then pairs of one row.
int64_t row_floats(const Job& j) { return whole_vectors(j.cols) + (j.cols + 3 * kRoom) / 4 + pair_stride(j) / 4; }

bool read_row(const Job& j, int64_t row, float* scratch, uint8_t** trits) {
  *trits = reinterpret_cast<uint8_t*>(scratch + whole_vectors(j.cols));
  return trits_of(j, row, *trits, *trits + (j.cols + 2 * kRoom));
}

int64_t portable_bytes(const Job& j) { return (j.cols + kLane - 1) / kLane * 64; }

void portable_prepare(const Job& j, int64_t token, uint8_t* out, float*) {
  float* x = reinterpret_cast<float*>(out);
  std::fill(x + j.cols, x + whole_vectors(j.cols), 0.0f);
  if (j.type == kFloat32) {
    std::memcpy(x, static_cast<const float*>(j.x) + token * j.cols, size_t(j.cols) * 4);
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(j.x) + token * j.cols;
    for (int64_t i = 0; i < j.cols; ++i) x[i] = from_bfloat16(from[i]);
  }
}

void portable_multiply(const Product& p, const Item& item, float* scratch) {
  const Job& j = *p.job;
  for (int64_t r = item.first; r < item.last; ++r) {
    const int64_t row = item.matrix * j.rows + r;
    uint8_t* trits;
    if (!read_row(j, row, scratch, &trits)) {
      *p.status = kBadCodes;
      return;
    }
    floats_of(trits, j.cols, levels_of(j, row), scratch);
    std::fill(scratch + j.cols, scratch + whole_vectors(j.cols), 0.0f);
    for (int64_t t = 0; t < item.count; t += 4) {
      const int count = int(std::min<int64_t>(4, item.count - t));
      const float* x[4];
      for (int i = 0; i < count; ++i) x[i] = reinterpret_cast<const float*>(p.prepared + item.tokens[t + i] * p.stride);
      float y[4] = {};
      dot(scratch, x, count, whole_vectors(j.cols), y);
      for (int i = 0; i < count; ++i) put(j, item.tokens[t + i] * j.rows + r, y[i]);
    }
  }
}

const Kernel portable = {"portable", pairs_of, portable_bytes, portable_prepare, portable_multiply, row_floats};

}  // namespace

// ---- part 2: AVX-512 with VNNI -------------------------------------------------------------------------------------
//
// 64 trits of a row are a vector u of bytes, and x in fixed point is P vectors of signed bytes: 2 for bfloat16, 3 for
// float32, with one power of two as scale for each lane of 32 bits over a span of a few steps (32 to 80 columns).
// Numbers of x are off by at most 2^-13 (bfloat16; exact above 1/32) or 2^-21 (float32) of the largest of their lane.
//
// Ternary: trits are the digits of v, t[k] = q[k] - 3 q[k + 1] with q[k] = floor(v / 3^k). They are never separated:
// the sum of t[k] x[k] is that of q[k] (x[k] - 3 x[k - 1]), all in integers; and t[k] is 1 where q[k] + q[k + 1] is odd.

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif

namespace {
namespace vnni {

#define UNROLL _Pragma("GCC unroll 8")  // or GCC keeps the sums in memory

// A step is what one load of codes holds: D vectors of 64 columns. KINDS: x itself, and for ternary the differences.
template <int F>
constexpr int kD = F == kTernary ? 5 : F == kSign ? 1 : 2;
template <int F>
constexpr int kKinds = F == kTernary ? 2 : 1;
template <int F>
constexpr int kSpan = F == kSign ? 8 : 4;  // steps that share scales
template <int F>
constexpr int kStepBytes = F == kSign ? 8 : 64;  // of codes (dictionary: of pairs)
template <int F>
constexpr int kSums = F == kSign ? 1 : 2;

template <int F>
int64_t steps_of(int64_t cols) {
  return (cols + 64 * kD<F> - 1) / (64 * kD<F>);
}

// x: for every step int8 [D][KINDS][P][64]; and for every span 16 scales, and 16 sums of x as integers.
template <int F, int P>
struct Prepared {
  static constexpr int64_t kStep = 64 * kD<F> * kKinds<F> * P;
  const uint8_t *data, *spans;
  INLINE void seek(const uint8_t* p, int64_t cols) { data = p, spans = p + steps_of<F>(cols) * kStep; }
  // The planes of a step. With many of them, the compiler must not see that several rows read the same ones: it would
  // keep them in registers, and the sums in memory.
  INLINE const uint8_t* planes(int64_t step) const {
    const uint8_t* here = data + step * kStep;
    if (F == kTernary) asm("" : "+r"(here));
    return here;
  }
  INLINE __m512 scale(int64_t span) const { return _mm512_load_ps(spans + 128 * span); }
  INLINE __m512i total(int64_t span) const { return _mm512_load_si512(spans + 128 * span + 64); }
  static int64_t bytes(int64_t cols) {
    const int64_t steps = steps_of<F>(cols);
    return steps * kStep + (steps + kSpan<F> - 1) / kSpan<F> * 128;
  }
};

// Columns of a step in the order of the codes: vector v, byte i.
template <int F>
INLINE int64_t column(int64_t step, int v, int i) {
  return 64 * kD<F> * step + (F == kTernary ? 5 * i + v : F == kSign ? i : 2 * i + v);
}

template <int F, int P>
void prepare(const Job& j, int64_t token, uint8_t* out, float* scratch) {
  constexpr int D = kD<F>, K = kKinds<F>;
  const int64_t steps = steps_of<F>(j.cols);
  portable_prepare(j, token, reinterpret_cast<uint8_t*>(scratch), nullptr);
  std::fill(scratch + j.cols, scratch + steps * 64 * D, 0.0f);
  alignas(64) float x[kSpan<F> * D][64];
  uint8_t* spans = out + steps * Prepared<F, P>::kStep;
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  for (int64_t from = 0; from < steps; from += kSpan<F>, spans += 128) {
    const int here = int(std::min<int64_t>(kSpan<F>, steps - from));
    for (int n = 0; n < here; ++n)
      for (int v = 0; v < D; ++v)
        for (int i = 0; i < 64; ++i) x[n * D + v][i] = scratch[column<F>(from + n, v, i)];
    // A bound of what must fit: |x|, or a quarter of |x[k]| + 3 |x[k - 1]|.
    __m512i most[4] = {};
    for (int n = 0; n < here * D; ++n)
      for (int g = 0; g < 4; ++g) {
        __m512 bound = _mm512_abs_ps(_mm512_load_ps(x[n] + 16 * g));
        if (K == 2) {
          const __m512 before = n % D ? _mm512_abs_ps(_mm512_load_ps(x[n - (n % D != 0)] + 16 * g)) : _mm512_setzero_ps();
          bound = _mm512_fmadd_ps(before, _mm512_set1_ps(0.75f), _mm512_mul_ps(bound, _mm512_set1_ps(0.25f)));
        }
        most[g] = _mm512_max_epi32(most[g], _mm512_and_si512(_mm512_castps_si512(bound), magnitude));
      }
    alignas(64) int32_t largest[64], lane[16];
    for (int g = 0; g < 4; ++g) _mm512_store_si512(largest + 16 * g, most[g]);
    for (int d = 0; d < 16; ++d)
      lane[d] = std::max(std::max(largest[4 * d], largest[4 * d + 1]), std::max(largest[4 * d + 2], largest[4 * d + 3]));
    // A power of two, so that 1.01 times the bound is less than 2^15 or 2^23 of it (a quarter: 2^13 or 2^21). Nothing is
    // left of lanes below 2^-95; infinite ones give NaN.
    constexpr int kBits = (P == 2 ? 14 : 22) - (K == 2 ? 2 : 0);
    const __m512i with_margin = _mm512_castps_si512(_mm512_mul_ps(_mm512_castsi512_ps(_mm512_load_si512(lane)), _mm512_set1_ps(1.01f)));
    const __m512i exponent = _mm512_and_si512(with_margin, _mm512_set1_epi32(0x7f800000));
    const __mmask16 tiny = _mm512_cmplt_epi32_mask(exponent, _mm512_set1_epi32(32 << 23));
    const __mmask16 infinite = _mm512_cmpeq_epi32_mask(exponent, _mm512_set1_epi32(0x7f800000));
    const __m512i power = _mm512_sub_epi32(exponent, _mm512_set1_epi32(kBits << 23));
    const __mmask16 usable = __mmask16(~(tiny | infinite));
    const __m512i inverse = _mm512_maskz_sub_epi32(usable, _mm512_set1_epi32(254 << 23), power);
    const __m512i scale = _mm512_mask_mov_epi32(_mm512_maskz_mov_epi32(usable, power), infinite, _mm512_set1_epi32(0x7fc00000));
    __m512i total[4] = {}, before[4] = {};
    for (int n = 0; n < here * D; ++n)
      for (int g = 0; g < 4; ++g) {
        const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        const __m512i factor = _mm512_permutexvar_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(4 * g)), inverse);
        const __mmask16 live = _mm512_test_epi32_mask(factor, factor);  // not NaN times 0
        const __m512i q = _mm512_maskz_cvtps_epi32(live, _mm512_mul_ps(_mm512_load_ps(x[n] + 16 * g), _mm512_castsi512_ps(factor)));
        total[g] = _mm512_add_epi32(total[g], q);
        uint8_t* planes = out + (from + n / D) * Prepared<F, P>::kStep + 64 * (n % D) * K * P + 16 * g;
        for (int kind = 0; kind < K; ++kind) {
          __m512i value = q;
          if (K == 2 && kind == 0 && n % D)
            value = _mm512_sub_epi32(q, _mm512_mullo_epi32(before[g], _mm512_set1_epi32(3)));
          for (int p = P - 1; p >= 0; --p) {  // the highest plane first in memory
            const __m512i byte = _mm512_srai_epi32(_mm512_slli_epi32(value, 24), 24);
            _mm_store_si128(reinterpret_cast<__m128i*>(planes + 64 * (kind * P + p)), _mm512_cvtepi32_epi8(byte));
            value = _mm512_srai_epi32(_mm512_sub_epi32(value, byte), 8);
          }
        }
        before[g] = q;
      }
    alignas(64) int32_t sums[64], of_lane[16];
    for (int g = 0; g < 4; ++g) _mm512_store_si512(sums + 16 * g, total[g]);
    for (int d = 0; d < 16; ++d) of_lane[d] = sums[4 * d] + sums[4 * d + 1] + sums[4 * d + 2] + sums[4 * d + 3];
    _mm512_store_si512(spans, scale);
    _mm512_store_si512(spans + 64, _mm512_load_si512(of_lane));
  }
}

INLINE __m512i load_bytes(const uint8_t* p, int64_t left) {  // up to 64, zeros beyond
  if (left >= 64) return _mm512_loadu_si512(p);
  return _mm512_maskz_loadu_epi8(left > 0 ? _bzhi_u64(~uint64_t{0}, unsigned(left)) : 0, p);
}

// Integer sums of one row and one x over a span.
template <int F, int P>
struct Sums {
  __m512i of[kSums<F>][P];
  INLINE void add(int sum, __m512i u, const uint8_t* planes, int vector, int kind) {
    UNROLL for (int p = 0; p < P; ++p)
      of[sum][p] = _mm512_dpbusd_epi32(of[sum][p], u, _mm512_load_si512(planes + 64 * ((vector * kKinds<F> + kind) * P + p)));
  }
  INLINE __m512i joined(int sum) const {
    __m512i all = of[sum][0];
    UNROLL for (int p = 1; p < P; ++p) all = _mm512_add_epi32(_mm512_slli_epi32(all, 8), of[sum][p]);
    return all;
  }
};

// One step of one row into the sums of T vectors x; unless WHOLE, only `left` bytes of codes are there. `most` gathers the largest ternary code.
template <int F, int P, int T, bool WHOLE>
INLINE void one_step(const uint8_t* codes, int64_t left, int64_t step, const Prepared<F, P>* x, Sums<F, P>* sums, __m512i* most) {
  const uint8_t* planes[T];
  UNROLL for (int t = 0; t < T; ++t) planes[t] = x[t].planes(step);
  if constexpr (F == kTernary) {
    const __m512i v = load_bytes(codes, WHOLE ? 64 : left), upper = _mm512_set1_epi16(int16_t(0xff00)), one = _mm512_set1_epi8(1);
    *most = _mm512_max_epu8(*most, v);
    const __m512i even = _mm512_andnot_si512(upper, v), odd = _mm512_and_si512(upper, v);
    const __m512i third = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5));
    constexpr int kInverse[3] = {21846, 7282, 2428};  // 2^16 / 3^(k + 1), rounded up
    __m512i q = v;
    UNROLL for (int k = 0; k < 5; ++k) {
      __m512i next = _mm512_setzero_si512();
      if (k < 3) {
        const __m512i by = _mm512_set1_epi16(kInverse[k]);
        next = _mm512_ternarylogic_epi32(_mm512_mulhi_epu16(even, by), _mm512_mulhi_epu16(odd, by), upper, 0xf8);  // a | b & c
      } else if (k == 3) {
        next = _mm512_shuffle_epi8(third, q);
      }
      const __m512i zero = k < 4 ? _mm512_ternarylogic_epi32(q, next, one, 0x28) : _mm512_and_si512(q, one);  // (a ^ b) & c
      UNROLL for (int t = 0; t < T; ++t) {
        sums[t].add(0, q, planes[t], k, 0);
        sums[t].add(1, zero, planes[t], k, 1);
      }
      q = next;
    }
  } else if constexpr (F == kSign) {
    uint64_t bits = 0;
    if (WHOLE)
      std::memcpy(&bits, codes, 8);
    else
      for (int64_t i = 0; i < left; ++i) bits |= uint64_t{codes[i]} << (8 * i);
    const __m512i u = _mm512_maskz_mov_epi8(bits, _mm512_set1_epi8(1));
    UNROLL for (int t = 0; t < T; ++t) sums[t].add(0, u, planes[t], 0, 0);
  } else {
    // Pairs t0 + 4 t1 are 0 ... 10.
    const __m512i pairs = _mm512_load_si512(codes);
    const __m512i first_high = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0));
    const __m512i first_low = _mm512_broadcast_i32x4(_mm_setr_epi8(1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0));
    const __m512i second_high = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0));
    const __m512i second_low = _mm512_broadcast_i32x4(_mm_setr_epi8(1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0));
    UNROLL for (int v = 0; v < 2; ++v) {
      const __m512i high = _mm512_shuffle_epi8(v ? second_high : first_high, pairs);
      const __m512i low = _mm512_shuffle_epi8(v ? second_low : first_low, pairs);
      UNROLL for (int t = 0; t < T; ++t) {
        sums[t].add(0, high, planes[t], v, 0);
        sums[t].add(1, low, planes[t], v, 0);
      }
    }
  }
}

// y = R rows times T prepared vectors x. codes: R rows, `stride` bytes apart, `bytes` of them in each.
template <int F, int P, int R, int T>
INLINE void tile(int64_t cols, const uint8_t* const* codes, int64_t bytes, int64_t ahead, const Prepared<F, P>* x,
                 const Pair* levels, float (*y)[T], __m512i* most) {
  const int64_t steps = steps_of<F>(cols), whole = std::min(steps, bytes / kStepBytes<F>);
  __m512 high[R][T] = {}, low[R][T] = {};
  __m512i largest = *most;
  for (int64_t from = 0, span = 0; from < steps; from += kSpan<F>, ++span) {
    Sums<F, P> sums[R][T] = {};
    if (F == kSign)
      UNROLL for (int r = 0; r < R; ++r) __builtin_prefetch(codes[r] + from * kStepBytes<F> + ahead, 0, 2);
    const int64_t to = std::min(from + kSpan<F>, whole);
    for (int64_t n = from; n < to; ++n)
      UNROLL for (int r = 0; r < R; ++r) {
        if (F == kTernary) __builtin_prefetch(codes[r] + n * kStepBytes<F> + ahead, 0, 2);
        one_step<F, P, T, true>(codes[r] + n * kStepBytes<F>, 0, n, x, sums[r], &largest);
      }
    if (whole < steps && whole < from + kSpan<F>)  // the last step
      UNROLL for (int r = 0; r < R; ++r)
        one_step<F, P, T, false>(codes[r] + whole * kStepBytes<F>, bytes - whole * kStepBytes<F>, whole, x, sums[r], &largest);
    UNROLL for (int t = 0; t < T; ++t) {
      const __m512 scale = x[t].scale(span);
      const __m512i total = x[t].total(span);
      UNROLL for (int r = 0; r < R; ++r) {
        __m512i a = sums[r][t].joined(0);
        if constexpr (F == kSign) {  // + less -
          a = _mm512_sub_epi32(_mm512_slli_epi32(a, 1), total);
        } else {
          __m512i b = sums[r][t].joined(1);
          if (F == kTernary) {  // from sums of t x and of x where t is 1
            a = _mm512_srai_epi32(_mm512_sub_epi32(a, b), 1);
            b = _mm512_sub_epi32(_mm512_sub_epi32(total, b), a);
          }
          low[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(b), scale, low[r][t]);
        }
        high[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a), scale, high[r][t]);
      }
    }
  }
  *most = largest;
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int t = 0; t < T; ++t) {
      y[r][t] = from_bfloat16(levels[r].high) * _mm512_reduce_add_ps(high[r][t]);
      if (F != kSign) y[r][t] += from_bfloat16(levels[r].low) * _mm512_reduce_add_ps(low[r][t]);
    }
}

// One word's pairs to pairs + at; the place behind them.
INLINE int64_t put_word(const Job& j, const uint8_t* word, uint8_t* pairs, int64_t at) {
  uint16_t number;
  std::memcpy(&number, word, 2);
  const __m128i entry = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(j.book + number));
  const __m128i both = _mm_unpacklo_epi8(entry, _mm_srli_epi16(entry, 4));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(pairs + at), _mm_and_si128(both, _mm_set1_epi8(15)));
  return at + int64_t(j.book[number] >> 56 & 15);
}

// As pairs_of.
bool read_pairs(const Job& j, int64_t row, uint8_t* pairs) {
  const int64_t length = (j.cols + 1) / 2;
  const Words words = words_of(j, row);
  int64_t at = 0, w = 0;
  for (; w + 4 <= words.count; w += 4) {  // four words end less than kRoom behind the row
    if (at >= length) return false;
    for (int i = 0; i < 4; ++i) at = put_word(j, words.first + 2 * (w + i), pairs, at);
  }
  for (; w < words.count; ++w) {
    if (at >= length) return false;
    at = put_word(j, words.first + 2 * w, pairs, at);
  }
  return words.count >= 0 && at == length;
}

// Rows first ... last - 1 of the item times up to T of its vectors x, from `token` on; missing ones repeat the last.
template <int F, int P, int T>
void columns(const Product& p, const Item& item, int64_t first, int64_t last, const uint8_t* codes, int64_t stride,
             int64_t token, __m512i* most) {
  constexpr int R = F == kSign ? (T == 4 ? 2 : 4) : (T == 4 ? 1 : 2);  // more rows at once, and GCC runs out of registers
  const Job& j = *p.job;
  const int64_t bytes = F == kDictionary ? stride : row_bytes(j);
  Prepared<F, P> x[T];
  for (int t = 0; t < T; ++t) x[t].seek(p.prepared + item.tokens[std::min(token + t, item.count - 1)] * p.stride, j.cols);
  for (int64_t row = first; row < last; row += R) {
    const uint8_t* at[R];
    Pair levels[R];
    for (int r = 0; r < R; ++r) {
      const int64_t here = std::min(row + r, last - 1);
      at[r] = codes + (here - first) * stride;
      levels[r] = levels_of(j, item.matrix * j.rows + here);
    }
    float y[R][T];
    tile<F, P, R, T>(j.cols, at, bytes, row + 3 * R <= last ? 2 * R * stride : 0, x, levels, y, most);
    for (int r = 0; r < R && row + r < last; ++r)
      for (int t = 0; t < T && token + t < item.count; ++t) put(j, item.tokens[token + t] * j.rows + row + r, y[r][t]);
  }
}

template <int F, int P>
void multiply_rows(const Product& p, const Item& item, int64_t first, int64_t last, const uint8_t* codes, int64_t stride, __m512i* most) {
  for (int64_t token = 0; token < item.count;) {
    const int64_t left = item.count - token;
    if (left > 2) {
      columns<F, P, 4>(p, item, first, last, codes, stride, token, most), token += 4;
    } else if (left > 1) {
      columns<F, P, 2>(p, item, first, last, codes, stride, token, most), token += 2;
    } else {
      columns<F, P, 1>(p, item, first, last, codes, stride, token, most), token += 1;
    }
  }
}

template <int F, int P>
void multiply(const Product& p, const Item& item, float* scratch) {
  const Job& j = *p.job;
  __m512i most = _mm512_setzero_si512();
  if (F != kDictionary) {
    const int64_t bytes = row_bytes(j);
    multiply_rows<F, P>(p, item, item.first, item.last, j.codes + (item.matrix * j.rows + item.first) * bytes, bytes, &most);
    if (F == kTernary && _mm512_cmpge_epu8_mask(most, _mm512_set1_epi8(int8_t(243)))) *p.status = kBadCodes;
    return;
  }
  uint8_t* pairs = reinterpret_cast<uint8_t*>(scratch);
  const int64_t stride = pair_stride(j);
  for (int64_t first = item.first; first < item.last; first += kStrip) {
    const int64_t last = std::min(first + kStrip, item.last);
    for (int64_t r = first; r < last; ++r)
      if (!read_pairs(j, item.matrix * j.rows + r, pairs + (r - first) * stride)) {
        *p.status = kBadCodes;
        return;
      }
    multiply_rows<F, P>(p, item, first, last, pairs, stride, &most);
  }
}

// CALL(F, P) for the job's format and type.
#define MOEC_EACH(CALL)                                                                     \
  (j.format == kTernary ? (j.type == kBfloat16 ? CALL(kTernary, 2) : CALL(kTernary, 3))     \
   : j.format == kSign  ? (j.type == kBfloat16 ? CALL(kSign, 2) : CALL(kSign, 3))           \
                        : (j.type == kBfloat16 ? CALL(kDictionary, 2) : CALL(kDictionary, 3)))

int64_t bytes_any(const Job& j) {
#define MOEC_CALL(F, P) Prepared<F, P>::bytes(j.cols)
  return MOEC_EACH(MOEC_CALL);
#undef MOEC_CALL
}

void prepare_any(const Job& j, int64_t token, uint8_t* out, float* scratch) {
#define MOEC_CALL(F, P) prepare<F, P>(j, token, out, scratch)
  MOEC_EACH(MOEC_CALL);
#undef MOEC_CALL
}

void multiply_any(const Product& p, const Item& item, float* scratch) {
  const Job& j = *p.job;
#define MOEC_CALL(F, P) multiply<F, P>(p, item, scratch)
  MOEC_EACH(MOEC_CALL);
#undef MOEC_CALL
}

int64_t scratch_any(const Job& j) {  // a row of x, padded to whole steps; or a strip of pairs
  return std::max(steps_of<kTernary>(j.cols) * 320 + 320, kStrip * pair_stride(j) / 4);
}

const Kernel kernel = {"avx512_vnni", read_pairs, bytes_any, prepare_any, multiply_any, scratch_any};

}  // namespace vnni
}  // namespace

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__

// ---- part 3: work, threads and the exported functions --------------------------------------------------------------

namespace {

std::vector<const Kernel*> available() {  // best first
  std::vector<const Kernel*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("bmi2"))
    found.push_back(&vnni::kernel);
#endif
  found.push_back(&portable);
  return found;
}

std::atomic<const Kernel*> chosen{nullptr};

const Kernel& kernel() {
  const Kernel* one = chosen.load();
  if (one == nullptr) chosen.store(one = available().front());
  return *one;
}

// The tokens sorted by matrix (`order`), and the rows of the matrices cut into items: eight for every thread, so that
// none waits long for the last, but not too small.
std::vector<Item> cut_work(const Job& j, int64_t tokens, int threads, std::vector<int32_t>& order) {
  std::vector<int64_t> end(size_t(j.count) + 1, 0);
  for (int64_t s = 0; s < tokens; ++s)
    if (j.slots[s] >= 0) ++end[size_t(j.slots[s]) + 1];
  int64_t matrices = 0;
  for (size_t m = 1; m < end.size(); ++m) {
    matrices += end[m] > 0;
    end[m] += end[m - 1];
  }
  order.resize(size_t(end.back()));
  std::vector<int64_t> next(end.begin(), end.end() - 1);
  for (int64_t s = 0; s < tokens; ++s)
    if (j.slots[s] >= 0) order[size_t(next[size_t(j.slots[s])]++)] = int32_t(s);
  const int64_t least = kItemBytes / row_bytes(j), fair = matrices * j.rows / (8 * threads);
  const int64_t step = std::min<int64_t>(std::max<int64_t>(std::max(least, fair) / 8 * 8, 8), 512);
  std::vector<Item> items;
  for (int64_t m = 0; m < j.count; ++m) {
    const int64_t from = end[size_t(m)], count = end[size_t(m) + 1] - from;
    for (int64_t r = 0; count && r < j.rows; r += step)
      items.push_back({m, r, std::min(r + step, j.rows), order.data() + from, count});
  }
  return items;
}

void prepare_task(const void* job, int64_t token, float* scratch) {
  const Product& p = *static_cast<const Product*>(job);
  const Job& j = *p.job;
  const int64_t each = j.type == kFloat32 ? 4 : 2;
  if (j.slots[token] < 0)
    std::memset(static_cast<char*>(j.out) + token * j.rows * each, 0, size_t(j.rows * each));
  else
    kernel().prepare(j, token, p.prepared + token * p.stride, scratch);
}

void multiply_task(const void* job, int64_t item, float* scratch) {
  const Product& p = *static_cast<const Product*>(job);
  if (p.status->load(std::memory_order_relaxed) == kGood) kernel().multiply(p, p.items[item], scratch);
}

int run_tasks(void (*run)(const void*, int64_t, float*), const void* job, int64_t tasks, int64_t floats, Parallel parallel, int threads) {
  Pool pool;
  pool.tasks = tasks;
  pool.run = run;
  pool.job = job;
  pool.scratch_floats = floats;
  return spread(pool, parallel, int(std::min<int64_t>(threads, tasks)));
}

struct Unpacking {
  const Job* job;
  int64_t steps, step;  // of rows, for each matrix
  std::atomic<int>* status;
};

void unpack_task(const void* job, int64_t task, float* scratch) {
  const Unpacking& u = *static_cast<const Unpacking*>(job);
  const Job& j = *u.job;
  const int64_t i = task / u.steps, from = j.first + task % u.steps * u.step, to = std::min(from + u.step, j.last);
  for (int64_t r = from; r < to; ++r) {
    const int64_t row = j.index[i] * j.rows + r, at = (i * (j.last - j.first) + r - j.first) * j.cols;
    uint8_t* trits;
    if (!read_row(j, row, scratch, &trits)) {
      *u.status = kBadCodes;
      return;
    }
    if (j.type == kFloat32)
      floats_of(trits, j.cols, levels_of(j, row), static_cast<float*>(j.out) + at);
    else
      bfloat16s_of(trits, j.cols, levels_of(j, row), static_cast<uint16_t*>(j.out) + at);
  }
}

}  // namespace

#define MOEC_EXPORT __attribute__((visibility("default")))

extern "C" {

MOEC_EXPORT int moec_ternary_matmul_interface() { return kInterface; }

MOEC_EXPORT const char* moec_ternary_kernel() { return kernel().name; }

// Choose a kernel by name, for tests; kBadArgument if this machine lacks it.
MOEC_EXPORT int moec_ternary_choose(const char* name) {
  for (const Kernel* one : available())
    if (std::strcmp(one->name, name) == 0) {
      chosen.store(one);
      return kGood;
    }
  return kBadArgument;
}

// out[s] = matrix slots[s] times x[s]; zeros where slots[s] is -1.
MOEC_EXPORT int moec_ternary_matmul(const Job* job, Parallel parallel, int threads) try {
  const Job& j = *job;
  if (!is_valid(j)) return kBadBank;
  const int64_t tokens = j.slots_bytes / 4, each = j.type == kFloat32 ? 4 : 2;
  if (!has_bytes(j.slots, j.slots_bytes, tokens, 1, 4) || tokens > INT32_MAX || !has_bytes(j.x, j.x_bytes, tokens, j.cols, each) ||
      !has_bytes(j.out, j.out_bytes, tokens, j.rows, each))
    return kBadArgument;
  for (int64_t s = 0; s < tokens; ++s)
    if (j.slots[s] < -1 || j.slots[s] >= j.count) return kBadSlot;
  threads = std::max(threads, 1);
  std::vector<int32_t> order;
  const std::vector<Item> items = cut_work(j, tokens, threads, order);
  std::atomic<int> status{kGood};
  const int64_t stride = (kernel().prepared_bytes(j) + 63) / 64 * 64;
  int64_t bytes;
  if (__builtin_mul_overflow(stride, std::max<int64_t>(tokens, 1), &bytes)) return kNoMemory;
  const std::unique_ptr<uint8_t, void (*)(void*)> room(static_cast<uint8_t*>(std::aligned_alloc(64, size_t(bytes))), std::free);
  if (!room) return kNoMemory;
  const Product product = {&j, items.data(), room.get(), stride, &status};
  const int64_t floats = kernel().scratch_floats(j);
  int failed = run_tasks(prepare_task, &product, tokens, floats, parallel, tokens * j.cols < (1 << 14) ? 1 : threads);
  if (!failed) failed = run_tasks(multiply_task, &product, int64_t(items.size()), floats, parallel, threads);
  return failed ? failed : status.load();
} catch (const std::bad_alloc&) {
  return kNoMemory;
}

// out: rows first ... last - 1 of the matrices index[0], index[1], ...
MOEC_EXPORT int moec_ternary_dequantize(const Job* job, Parallel parallel, int threads) {
  const Job& j = *job;
  if (!is_valid(j)) return kBadBank;
  const int64_t chosen_count = j.index_bytes / 8, rows = j.last - j.first, each = j.type == kFloat32 ? 4 : 2;
  if (j.first < 0 || j.last < j.first || j.last > j.rows || !has_bytes(j.index, j.index_bytes, chosen_count, 1, 8) ||
      !has_bytes(j.out, j.out_bytes, chosen_count, rows, j.cols * each))
    return kBadArgument;
  for (int64_t i = 0; i < chosen_count; ++i)
    if (j.index[i] < 0 || j.index[i] >= j.count) return kBadSlot;
  std::atomic<int> status{kGood};
  const int64_t step = std::max<int64_t>(1, kItemBytes / row_bytes(j));
  const Unpacking unpacking = {&j, (rows + step - 1) / step, step, &status};
  const int failed = run_tasks(unpack_task, &unpacking, chosen_count * unpacking.steps, row_floats(j), parallel, std::max(threads, 1));
  return failed ? failed : status.load();
}

}  // extern "C"

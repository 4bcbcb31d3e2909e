// Arithmetic on packed matrices of the format "int" (pack/SPEC.md, section 1), for the CPU.
//
// Plain C++17 with GNU vector extensions and a C interface that ctypes loads; no Python and no PyTorch headers.
// The file includes itself once for each instruction set (part 2), because GCC and Clang compile a function for
// another instruction set only where it is written; the best set that the machine has is chosen when the library
// is loaded.
//
// y = W x is computed without storing W: 16 codes at a time become 16 float32 weights in a register (by a table
// look-up where the table of a group fits a register), and are multiplied with up to 8 vectors x. The weights are
// bit for bit those of the reference, scale * (code - zero); only the order of the sums differs. Where the machine has
// AVX-512 VNNI, bfloat16 x take another way, in integers (avx512_vnni below).

#ifndef MOEC_SET

#if !defined(__GNUC__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "needs GNU vector extensions and a little-endian machine"
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// ---- part 1: what all instruction sets share ---------------------------------------------------------------------

namespace {

constexpr int kInterface = 3;       // raise when an exported function changes; native.py refuses any other
constexpr int64_t kItemBytes = 1 << 15;  // of codes: the least that is worth another thread's attention
constexpr int64_t kMaxRows = 512;        // rows in one item of work

enum Status : int { kOk = 0, kBadBank = 1, kBadSlot = 2, kBadArgument = 3, kNoMemory = 4 };
enum Type : int { kFloat32 = 0, kBfloat16 = 1 };

struct Bank {  // mirrored by native.py
  const uint8_t* codes;
  const uint16_t* row_scales;
  const uint8_t* scales;  // null if absent
  const uint8_t* zeros;
  int64_t codes_bytes, row_scales_bytes, scales_bytes, zeros_bytes;
  int64_t count, rows, cols;
  int32_t bits, group;
  int32_t has_scales, has_zeros;  // an empty tensor may have a null pointer and is not absent
};

struct Layout {
  int64_t blocks;            // blocks of 16 columns in a row
  int64_t blocks_per_group;  // a group is the whole row if group == 0
  int64_t groups;
  int64_t row_bytes, low_bytes;  // one row of codes; its first plane
  int64_t zero_bytes;            // one row of zeros
};

Layout layout_of(const Bank& b) {
  Layout l;
  l.blocks = (b.cols + 15) / 16;
  l.groups = b.group ? (b.cols + b.group - 1) / b.group : 1;
  l.blocks_per_group = b.group ? b.group / 16 : l.blocks;
  l.row_bytes = 2 * b.bits * l.blocks;
  l.low_bytes = 2 * (b.bits == 3 ? 2 : b.bits) * l.blocks;
  l.zero_bytes = (l.groups * b.bits + 7) / 8;
  return l;
}

bool has_bytes(const void* data, int64_t bytes, int64_t count, int64_t rows, int64_t each) {
  int64_t all;
  if (__builtin_mul_overflow(count, rows, &all) || __builtin_mul_overflow(all, each, &all)) return false;
  return bytes == all && (all == 0 || data != nullptr);
}

// Every size that a file can influence is compared with the memory behind it before anything is read.
bool is_valid(const Bank& b) {
  const bool bits = b.bits == 2 || b.bits == 3 || b.bits == 4 || b.bits == 8;
  const bool group = b.group == 0 || b.group == 32 || b.group == 64 || b.group == 128;
  constexpr int64_t kLimit = int64_t{1} << 40;  // keeps every product below in range
  if (!bits || !group || b.count < 0 || b.rows < 0 || b.cols < 1 || b.cols > kLimit) return false;
  const Layout l = layout_of(b);
  return has_bytes(b.codes, b.codes_bytes, b.count, b.rows, l.row_bytes) &&
         has_bytes(b.row_scales, b.row_scales_bytes, b.count, b.rows, 2) &&
         (b.has_scales != 0) == (b.group != 0) &&
         has_bytes(b.scales, b.scales_bytes, b.count, b.rows, b.has_scales ? l.groups : 0) &&
         has_bytes(b.zeros, b.zeros_bytes, b.count, b.rows, b.has_zeros ? l.zero_bytes : 0);
}

inline float from_bfloat16(uint16_t h) {
  const uint32_t bits = uint32_t{h} << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t to_bfloat16(float f) {  // to nearest, ties to even, as torch
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

struct Rows {  // a range of rows of one matrix, times `tokens` vectors x
  int64_t matrix, first, last;
  const int32_t* tokens;  // row numbers in x and y
  int32_t count;
};

struct Kernels {
  const char* name;
  // Floats that one prepared row of x takes: a multiple of 16.
  int64_t (*prepared_floats)(const Bank&, int type);
  // One row of x as `multiply` wants it: padded with zeros, in the order in which the codes are decoded.
  void (*prepare)(const Bank&, const void* x, int type, float* prepared);
  // y[token, row] for the rows and tokens given; x as prepared, `stride` floats apart.
  void (*multiply)(const Bank&, const Layout&, const Rows&, const float* x, int64_t stride, void* y, int type);
  // Weights (last - first, cols) of one matrix.
  void (*dequantize)(const Bank&, const Layout&, int64_t matrix, int64_t first, int64_t last, void* out, int type);
  // Some sum of the bytes, whole kilobytes of them.
  uint32_t (*read)(const uint8_t*, int64_t bytes);
};

}  // namespace

// ---- the passes over part 2 --------------------------------------------------------------------------------------

#define MOEC_SET portable
#define MOEC_LANES 4
#if defined(__aarch64__)
#define MOEC_NAME "neon"
#else
#define MOEC_NAME "scalar"
#endif
#include "int_matmul.cpp"
#undef MOEC_SET
#undef MOEC_LANES
#undef MOEC_NAME

#if defined(__x86_64__)

#define MOEC_SET avx2
#define MOEC_LANES 8
#define MOEC_NAME "avx2"
#define MOEC_AVX2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#include "int_matmul.cpp"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef MOEC_SET
#undef MOEC_LANES
#undef MOEC_NAME
#undef MOEC_AVX2

#define MOEC_SET avx512
#define MOEC_LANES 16
#define MOEC_NAME "avx512"
#define MOEC_AVX512
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi2,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#include "int_matmul.cpp"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef MOEC_SET
#undef MOEC_LANES
#undef MOEC_NAME
#undef MOEC_AVX512

// ---- AVX-512 with VNNI: bfloat16 x in integers ---------------------------------------------------------------------
//
// Decoding 16 codes to float32 takes three vector instructions, and that, not memory, limits a single x. Here 64 codes
// are one vector of bytes, and x is fixed-point: 15 bits and a sign in two signed bytes, with one power of two as scale
// for each 4 to 16 neighbouring columns (those that share a 32-bit lane). A bfloat16 has 8 significant bits, so numbers
// down to 1/64 of the largest of their neighbours are exact, and smaller ones are wrong by at most 2^-14 of it.
// (The bfloat16 dot product instruction was measured too, and is no faster than float32: one in two cycles.)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif

namespace {
namespace avx512_vnni {

#define MOEC_INLINE inline __attribute__((always_inline))

using avx512::Row;
using avx512::Sixteen;

template <int BITS>
constexpr int kVectors = BITS == 8 ? 1 : BITS == 4 ? 2 : 4;  // of 64 codes, in 64 bytes of the first plane
template <int BITS>
constexpr int kColumns = 64 * kVectors<BITS>;  // in a chunk

// A chunk of x. Byte i of vector k belongs to column kVectors * i + k, as it does in the codes; lane d to the 4 kVectors
// columns from 4 kVectors d on. x = scale * (256 high + low).
template <int BITS>
struct alignas(64) Chunk {
  int8_t high[kVectors<BITS>][64], low[kVectors<BITS>][64];
  float scale[16];
  float offset[16];  // sum of x over the lane; times minus the zero if that is a constant
};

template <int BITS>
int64_t chunks(const Bank& b) {
  return (b.cols + kColumns<BITS> - 1) / kColumns<BITS>;
}

template <int BITS>
void prepare(const Bank& b, const void* x, float* prepared) {
  constexpr int V = kVectors<BITS>, C = 4 * V;  // C columns in a lane
  auto* out = reinterpret_cast<Chunk<BITS>*>(prepared);
  const __m512i lane = _mm512_mullo_epi32((__m512i)avx512::lanes(), _mm512_set1_epi32(C));
  const __m512 constant = _mm512_set1_ps(-0.5f * ((1 << BITS) - 1));
  for (int64_t n = 0; n < chunks<BITS>(b); n++) {
    uint16_t columns[kColumns<BITS>] = {};
    const int64_t from = n * kColumns<BITS>, count = std::min<int64_t>(kColumns<BITS>, b.cols - from);
    std::memcpy(columns, static_cast<const uint16_t*>(x) + from, size_t(count) * 2);
    __m512i bits[C];  // column j of every lane
    __m512i largest = _mm512_setzero_si512();
    for (int j = 0; j < C; j += 2) {
      const __m512i pair = _mm512_i32gather_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(j)), columns, 2);
      bits[j] = _mm512_slli_epi32(pair, 16);
      bits[j + 1] = _mm512_and_si512(pair, _mm512_set1_epi32(int(0xffff0000)));
      for (int i = j; i < j + 2; i++)
        largest = _mm512_max_epi32(largest, _mm512_and_si512(bits[i], _mm512_set1_epi32(0x7fffffff)));
    }
    // 2^(exponent - 13), so that |x| < 2^14 scale. Nothing is left of lanes below 2^-100; infinite ones give NaN.
    const __m512i exponent = _mm512_and_si512(largest, _mm512_set1_epi32(0x7f800000));
    const __mmask16 tiny = _mm512_cmplt_epi32_mask(exponent, _mm512_set1_epi32(27 << 23));
    const __mmask16 infinite = _mm512_cmpeq_epi32_mask(exponent, _mm512_set1_epi32(0x7f800000));
    const __m512i scale = _mm512_mask_mov_epi32(_mm512_sub_epi32(exponent, _mm512_set1_epi32(13 << 23)), infinite, _mm512_set1_epi32(0x7fc00000));
    const __m512 inverse = _mm512_castsi512_ps(_mm512_maskz_sub_epi32(_mm512_knot(tiny), _mm512_set1_epi32(254 << 23), scale));
    __m512i sum = _mm512_setzero_si512(), high[V], low[V];
    for (int k = 0; k < V; k++) high[k] = low[k] = _mm512_setzero_si512();
    for (int j = 0; j < C; j++) {
      const __m512i q = _mm512_maskz_cvtps_epi32(_mm512_knot(infinite), _mm512_mul_ps(_mm512_castsi512_ps(bits[j]), inverse));
      sum = _mm512_add_epi32(sum, q);
      const __m512i h = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
      const __m512i byte = _mm512_set1_epi32(255);
      const __m512i place = _mm512_set1_epi32(8 * (j / V));
      high[j % V] = _mm512_or_si512(high[j % V], _mm512_sllv_epi32(_mm512_and_si512(h, byte), place));
      low[j % V] = _mm512_or_si512(low[j % V], _mm512_sllv_epi32(_mm512_and_si512(q, byte), place));  // q - 256 h
    }
    const __m512 factor = _mm512_castsi512_ps(_mm512_mask_mov_epi32(scale, tiny, _mm512_setzero_si512()));
    __m512 offset = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), factor);
    if (!b.has_zeros) offset = _mm512_mul_ps(offset, constant);
    for (int k = 0; k < V; k++) {
      _mm512_store_si512(out[n].high[k], high[k]);
      _mm512_store_si512(out[n].low[k], low[k]);
    }
    _mm512_store_ps(out[n].scale, factor);
    _mm512_store_ps(out[n].offset, offset);
  }
}

MOEC_INLINE __m512i load_bytes(const uint8_t* p, int64_t left) {  // up to 64, zeros beyond
  if (left >= 64) return _mm512_loadu_si512(p);
  return _mm512_maskz_loadu_epi8(left > 0 ? _bzhi_u64(~uint64_t{0}, unsigned(left)) : 0, p);
}

// The codes of a chunk, 64 to a vector of bytes.
template <int BITS>
MOEC_INLINE void decode(const Row& row, const Layout& l, int64_t n, __m512i* codes) {
  const __m512i packed = load_bytes(row.low + 64 * n, l.low_bytes - 64 * n);
  if constexpr (BITS == 8) {
    codes[0] = packed;
  } else if constexpr (BITS == 4) {
    const __m512i mask = _mm512_set1_epi8(15);
    codes[0] = _mm512_and_si512(packed, mask);
    codes[1] = _mm512_and_si512(_mm512_srli_epi32(packed, 4), mask);
  } else {
    const __m512i mask = _mm512_set1_epi8(3);
    codes[0] = _mm512_and_si512(packed, mask);
    codes[1] = _mm512_and_si512(_mm512_srli_epi32(packed, 2), mask);
    codes[2] = _mm512_and_si512(_mm512_srli_epi32(packed, 4), mask);
    codes[3] = _mm512_and_si512(_mm512_srli_epi32(packed, 6), mask);
    if constexpr (BITS == 3) {
      const int64_t left = l.row_bytes - l.low_bytes - 32 * n;
      const __m256i top = left >= 32 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row.high + 32 * n))
                                     : _mm512_castsi512_si256(load_bytes(row.high + 32 * n, left));
      // Four bits of the plane to the low half of every byte: those of the byte's four codes, one in each vector.
      const __m512i wide = _mm512_cvtepu8_epi16(top);
      const __m512i four = _mm512_or_si512(wide, _mm512_slli_epi16(wide, 4));
      const __m512i third = _mm512_set1_epi8(4);
      constexpr int kOrAnd = 0xf8;  // a | (b & c)
      codes[0] = _mm512_ternarylogic_epi32(codes[0], _mm512_slli_epi32(four, 2), third, kOrAnd);
      codes[1] = _mm512_ternarylogic_epi32(codes[1], _mm512_slli_epi32(four, 1), third, kOrAnd);
      codes[2] = _mm512_ternarylogic_epi32(codes[2], four, third, kOrAnd);
      codes[3] = _mm512_ternarylogic_epi32(codes[3], _mm512_srli_epi32(four, 1), third, kOrAnd);
    }
  }
}

// y = R rows times T prepared vectors x.
template <int BITS, bool ZEROS, int R, int T>
MOEC_INLINE void tile(const Bank& b, const Layout& l, const Row* rows, const Chunk<BITS>* const* x, int64_t ahead, float (*y)[T]) {
  constexpr int V = kVectors<BITS>;
  const int64_t count = chunks<BITS>(b);
  const int shift = b.group ? __builtin_ctz(unsigned(b.group)) : 62;  // column >> shift is the group
  const int64_t refill = b.group ? 16 * b.group / kColumns<BITS> : count;
  const __m512i column = _mm512_mullo_epi32((__m512i)avx512::lanes(), _mm512_set1_epi32(4 * V));
  const __m512i group_of_lane = _mm512_srl_epi32(column, _mm_cvtsi32_si128(shift));  // from the chunk's first
  __m512 total[R][T] = {};
  Sixteen of[R];
  for (int64_t n = 0; n < count; n++) {
    const int64_t group = (n * kColumns<BITS>) >> shift;
    if (n % refill == 0)
      for (int r = 0; r < R; r++) of[r].template read_from<BITS>(rows[r], l, group);
    for (int r = 0; r < R; r++) {
      __builtin_prefetch(rows[r].low + 64 * n + ahead, 0, 2);
      if (BITS == 3) __builtin_prefetch(rows[r].high + 32 * n + ahead, 0, 2);
      __m512i codes[V];
      decode<BITS>(rows[r], l, n, codes);
      const __m512 scale = _mm512_permutexvar_ps(group_of_lane, _mm512_loadu_ps(of[r].scale + group % 16));
      const __m512 zero = ZEROS ? _mm512_permutexvar_ps(group_of_lane, _mm512_loadu_ps(of[r].zero + group % 16)) : scale;
      for (int t = 0; t < T; t++) {
        const Chunk<BITS>& c = x[t][n];
        __m512i high = _mm512_setzero_si512(), low = high;
        for (int k = 0; k < V; k++) {
          high = _mm512_dpbusd_epi32(high, codes[k], _mm512_load_si512(c.high[k]));
          low = _mm512_dpbusd_epi32(low, codes[k], _mm512_load_si512(c.low[k]));
        }
        const __m512 dot = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
        const __m512 factor = _mm512_load_ps(c.scale), offset = _mm512_load_ps(c.offset);
        const __m512 centred = ZEROS ? _mm512_fnmadd_ps(zero, offset, _mm512_mul_ps(dot, factor))
                                     : _mm512_fmadd_ps(dot, factor, offset);
        total[r][t] = _mm512_fmadd_ps(scale, centred, total[r][t]);
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) y[r][t] = _mm512_reduce_add_ps(total[r][t]);
}

// All rows of the item times up to T of its vectors x, from the vector `token` on; missing ones repeat the last.
template <int BITS, bool ZEROS, int T>
void columns(const Bank& b, const Layout& l, const Rows& item, int token, const float* x, int64_t stride, void* y) {
  constexpr int R = T == 1 ? 4 : 2;
  const Chunk<BITS>* vectors[T];
  for (int t = 0; t < T; t++)
    vectors[t] = reinterpret_cast<const Chunk<BITS>*>(x + stride * item.tokens[std::min(token + t, item.count - 1)]);
  for (int64_t row = item.first; row < item.last; row += R) {
    Row rows[R];
    for (int r = 0; r < R; r++) rows[r].seek(b, l, item.matrix * b.rows + std::min(row + r, item.last - 1));
    float sums[R][T];
    tile<BITS, ZEROS, R, T>(b, l, rows, vectors, row + 3 * R <= item.last ? 2 * R * l.row_bytes : 0, sums);
    for (int r = 0; r < R && row + r < item.last; r++)
      for (int t = 0; t < T && token + t < item.count; t++)
        avx512::put(y, item.tokens[token + t] * b.rows + row + r, sums[r][t], kBfloat16);
  }
}

template <int BITS, bool ZEROS>
void multiply(const Bank& b, const Layout& l, const Rows& item, const float* x, int64_t stride, void* y) {
  for (int token = 0; token < item.count;) {
    const int left = item.count - token;
    if (left > 2) {
      columns<BITS, ZEROS, 4>(b, l, item, token, x, stride, y), token += 4;
    } else if (left > 1) {
      columns<BITS, ZEROS, 2>(b, l, item, token, x, stride, y), token += 2;
    } else {
      columns<BITS, ZEROS, 1>(b, l, item, token, x, stride, y), token += 1;
    }
  }
}

template <int BITS>
int64_t floats(const Bank& b) {
  return chunks<BITS>(b) * int64_t(sizeof(Chunk<BITS>) / sizeof(float));
}

int64_t prepared_floats(const Bank& b, int type) {
  if (type != kBfloat16) return avx512::prepared_floats(b, type);
  return b.bits == 2 ? floats<2>(b) : b.bits == 3 ? floats<3>(b) : b.bits == 4 ? floats<4>(b) : floats<8>(b);
}

void prepare_any(const Bank& b, const void* x, int type, float* prepared) {
  if (type != kBfloat16) return avx512::prepare_any(b, x, type, prepared);
  (b.bits == 2 ? prepare<2> : b.bits == 3 ? prepare<3> : b.bits == 4 ? prepare<4> : prepare<8>)(b, x, prepared);
}

template <bool ZEROS>
void multiply_with(const Bank& b, const Layout& l, const Rows& item, const float* x, int64_t stride, void* y) {
  (b.bits == 2   ? multiply<2, ZEROS>
   : b.bits == 3 ? multiply<3, ZEROS>
   : b.bits == 4 ? multiply<4, ZEROS>
                 : multiply<8, ZEROS>)(b, l, item, x, stride, y);
}

void multiply_any(const Bank& b, const Layout& l, const Rows& item, const float* x, int64_t stride, void* y, int type) {
  if (type != kBfloat16) return avx512::multiply_any(b, l, item, x, stride, y, type);
  (b.has_zeros ? multiply_with<true> : multiply_with<false>)(b, l, item, x, stride, y);
}

const Kernels kernels = {"avx512_vnni", prepared_floats, prepare_any, multiply_any, avx512::dequantize_any,
                         avx512::read_all};

#undef MOEC_INLINE

}  // namespace avx512_vnni
}  // namespace

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__

// ---- part 3: work, threads and the exported functions --------------------------------------------------------------

namespace {

std::vector<const Kernels*> available() {  // best first
  std::vector<const Kernels*> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512_all = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("bmi2");
  if (avx512_all && __builtin_cpu_supports("avx512vnni")) sets.push_back(&avx512_vnni::kernels);
  if (avx512_all) sets.push_back(&avx512::kernels);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.push_back(&avx2::kernels);
#endif
  sets.push_back(&portable::kernels);
  return sets;
}

std::atomic<const Kernels*> chosen{nullptr};

const Kernels& kernels() {
  const Kernels* set = chosen.load();
  if (set == nullptr) chosen.store(set = available().front());
  return *set;
}

// The entry point of the OpenMP runtime that torch itself uses. A pool of our own would fight with torch's, whose
// threads keep spinning for a while after each of its operations.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<Parallel> parallel{nullptr};

template <class Work>  // work(i) for i in 0 ... items - 1, in any order, on any thread
void for_each(int64_t items, int threads, const Work& work) {
  struct Shared {
    std::atomic<int64_t> next;
    int64_t items;
    const Work& work;
  } shared{{0}, items, work};
  auto run = [](void* data) {
    Shared& s = *static_cast<Shared*>(data);
    for (int64_t i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.items;) s.work(i);
  };
  const Parallel start = parallel.load();
  threads = int(std::min<int64_t>(threads, items));
  if (threads > 1 && start != nullptr)
    start(run, &shared, unsigned(threads), 0);
  else
    run(&shared);
}

// The rows of x sorted by matrix (`order`), and the rows of the matrices cut into items: eight for every thread, so
// that none waits long for the last, but not too small.
std::vector<Rows> cut_work(const Bank& b, const Layout& l, const int32_t* slots, int64_t count, int threads,
                           std::vector<int32_t>& order) {
  std::vector<int64_t> end(size_t(b.count) + 1, 0);
  for (int64_t s = 0; s < count; s++)
    if (slots[s] >= 0) end[size_t(slots[s]) + 1]++;
  for (size_t m = 1; m < end.size(); m++) end[m] += end[m - 1];
  order.resize(size_t(end.back()));
  std::vector<int64_t> next(end.begin(), end.end() - 1);
  for (int64_t s = 0; s < count; s++)
    if (slots[s] >= 0) order[size_t(next[size_t(slots[s])]++)] = int32_t(s);

  int64_t matrices = 0;
  for (int64_t m = 0; m < b.count; m++) matrices += end[size_t(m) + 1] > end[size_t(m)];
  const int64_t least = kItemBytes / l.row_bytes, fair = matrices * b.rows / (8 * threads);
  const int64_t step = std::clamp<int64_t>(std::max(least, fair) / 8 * 8, 8, kMaxRows);
  std::vector<Rows> items;
  for (int64_t m = 0; m < b.count; m++) {
    const int64_t from = end[size_t(m)], tokens = end[size_t(m) + 1] - from;
    for (int64_t r = 0; tokens && r < b.rows; r += step)
      items.push_back({m, r, std::min(r + step, b.rows), order.data() + from, int32_t(tokens)});
  }
  return items;
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};

int64_t element_bytes(int type) { return type == kFloat32 ? 4 : 2; }

}  // namespace

#define MOEC_EXPORT __attribute__((visibility("default")))

extern "C" {

MOEC_EXPORT int moec_interface() { return kInterface; }

MOEC_EXPORT const char* moec_instruction_set() { return kernels().name; }

// Whether the machine multiplies bfloat16 in hardware (then torch's dense bfloat16 product is faster than float32).
MOEC_EXPORT int moec_multiplies_bfloat16() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16") != 0;
#else
  return 0;
#endif
}

// Choose an instruction set by name, for tests; kBadArgument if this machine lacks it.
MOEC_EXPORT int moec_choose(const char* name) {
  for (const Kernels* set : available())
    if (std::strcmp(set->name, name) == 0) {
      chosen.store(set);
      return kOk;
    }
  return kBadArgument;
}

MOEC_EXPORT void moec_use_parallel(void* gomp_parallel) {
  parallel.store(reinterpret_cast<Parallel>(gomp_parallel));
}

// y (count, rows) = for every s, matrix slots[s] times x[s] (cols); zeros where slots[s] == -1. x and y contiguous.
MOEC_EXPORT int moec_grouped_matmul(const Bank* bank, const void* x, int64_t x_bytes, const int32_t* slots,
                                                               int64_t count, void* y, int64_t y_bytes, int type, int threads) try {
  const Bank& b = *bank;
  if (!is_valid(b)) return kBadBank;
  if (type != kFloat32 && type != kBfloat16) return kBadArgument;
  const int64_t each = element_bytes(type);
  if (!has_bytes(x, x_bytes, count, b.cols, each) || !has_bytes(y, y_bytes, count, b.rows, each) || count > INT32_MAX)
    return kBadArgument;
  for (int64_t s = 0; s < count; s++)
    if (slots[s] < -1 || slots[s] >= b.count) return kBadSlot;

  const Layout l = layout_of(b);
  const Kernels& k = kernels();
  const int64_t stride = k.prepared_floats(b, type);
  int64_t floats;
  if (__builtin_mul_overflow(stride, std::max<int64_t>(count, 1), &floats) || floats > (int64_t{1} << 60)) return kNoMemory;
  std::unique_ptr<float, Free> prepared(static_cast<float*>(std::aligned_alloc(64, size_t(floats) * 4)));
  if (!prepared) return kNoMemory;
  for_each(count, count * b.cols < (1 << 16) ? 1 : threads, [&](int64_t s) {
    if (slots[s] < 0)
      std::memset(static_cast<char*>(y) + s * b.rows * each, 0, size_t(b.rows * each));
    else
      k.prepare(b, static_cast<const char*>(x) + s * b.cols * each, type, prepared.get() + s * stride);
  });
  std::vector<int32_t> order;
  const std::vector<Rows> items = cut_work(b, l, slots, count, std::max(threads, 1), order);
  for_each(int64_t(items.size()), threads,
           [&](int64_t i) { k.multiply(b, l, items[size_t(i)], prepared.get(), stride, y, type); });
  return kOk;
} catch (const std::bad_alloc&) {
  return kNoMemory;
}

// out (count, last - first, cols): rows first ... last - 1 of the matrices index[0] ... index[count - 1].
MOEC_EXPORT int moec_dequantize(const Bank* bank, const int64_t* index, int64_t count, int64_t first,
                                                           int64_t last, void* out, int64_t out_bytes, int type, int threads) {
  const Bank& b = *bank;
  if (!is_valid(b)) return kBadBank;
  if (type != kFloat32 && type != kBfloat16) return kBadArgument;
  if (first < 0 || last < first || last > b.rows || count < 0) return kBadArgument;
  const int64_t rows = last - first, each = element_bytes(type);
  if (!has_bytes(out, out_bytes, count, rows, b.cols * each)) return kBadArgument;
  for (int64_t i = 0; i < count; i++)
    if (index[i] < 0 || index[i] >= b.count) return kBadSlot;

  const Layout l = layout_of(b);
  const Kernels& k = kernels();
  const int64_t step = std::max<int64_t>(1, kItemBytes / l.row_bytes);
  const int64_t steps = (rows + step - 1) / step;
  for_each(count * steps, threads, [&](int64_t item) {
    const int64_t i = item / steps, from = item % steps * step, to = std::min(from + step, rows);
    char* target = static_cast<char*>(out) + (i * rows + from) * b.cols * each;
    k.dequantize(b, l, index[i], first + from, first + to, target, type);
  });
  return kOk;
}

// Read a buffer once, as fast as the machine does, to measure its memory bandwidth. The sum keeps the reading alive.
MOEC_EXPORT uint64_t moec_read(const uint8_t* data, int64_t bytes, int threads) {
  constexpr int64_t kStep = 1 << 18;
  std::atomic<uint64_t> total{0};
  const Kernels& k = kernels();
  for_each((bytes + kStep - 1) / kStep, threads,
           [&](int64_t i) { total += k.read(data + i * kStep, std::min(kStep, bytes - i * kStep)); });
  return total;
}

}  // extern "C"

#else  // MOEC_SET

// ---- part 2: one instruction set -----------------------------------------------------------------------------------

namespace {
namespace MOEC_SET {

#define MOEC_INLINE inline __attribute__((always_inline))

constexpr int L = MOEC_LANES;  // float32 in a register
constexpr int P = 16 / L;      // registers in a block of 16 columns

typedef float F __attribute__((vector_size(4 * L)));
typedef uint32_t U __attribute__((vector_size(4 * L)));
typedef int32_t I __attribute__((vector_size(4 * L)));

struct Block {
  F part[P];
};

MOEC_INLINE F splat(float value) { return value - F{}; }
MOEC_INLINE U splat(uint32_t value) { return value - U{}; }

MOEC_INLINE U lanes() {  // 0, 1, 2, ...
  U result;
  for (int i = 0; i < L; i++) result[i] = uint32_t(i);
  return result;
}

// Through int32: every instruction set converts signed integers at once, not all of them unsigned ones.
MOEC_INLINE F to_float(U value) { return __builtin_convertvector((I)value, F); }

MOEC_INLINE U widen(const uint8_t* p) {  // L bytes
#if defined(MOEC_AVX512)
  return (U)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(MOEC_AVX2)
  return (U)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  U result;
  for (int i = 0; i < L; i++) result[i] = p[i];
  return result;
#endif
}

MOEC_INLINE F load(const float* p) {
  F f;
  std::memcpy(&f, p, sizeof f);
  return f;
}

MOEC_INLINE float sum(const Block& b) {
#if defined(MOEC_AVX512)
  return _mm512_reduce_add_ps((__m512)b.part[0]);
#else
  F total = b.part[0];
  for (int p = 1; p < P; p++) total += b.part[p];
  float part[L];
  std::memcpy(part, &total, sizeof part);
  for (int width = L / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) part[i] += part[i + width];
  return part[0];
#endif
}

template <int BYTES>
MOEC_INLINE uint64_t read(const uint8_t* p) {
  uint64_t value = 0;
  std::memcpy(&value, p, BYTES);
  return value;
}

// Group: what turns the codes of one group of one row into weights. weights(low, high) decodes one block, where
// `low` is at the block's codes in the first plane and `high` at those in the second (3 bits only).

template <int BITS>
struct Group {
  static constexpr bool kPlainOrder = true;
  F scale, zero;

  MOEC_INLINE void set(float s, float z) { scale = splat(s), zero = splat(z); }

  MOEC_INLINE Block weights(const uint8_t* low, const uint8_t* high) const {
    Block result;
    for (int p = 0; p < P; p++) {
      U code;
      if constexpr (BITS == 8) {
        code = widen(low + p * L);
      } else {
        constexpr int width = BITS == 3 ? 2 : BITS;
        const uint32_t word = uint32_t(read<2 * width>(low) >> (width * L * p));
        code = (splat(word) >> (lanes() * width)) & ((1u << width) - 1);
        if constexpr (BITS == 3) {
          const uint32_t top = uint32_t(read<2>(high)) << 2 >> (L * p);
          code |= (splat(top) >> lanes()) & 4;
        }
      }
      result.part[p] = (to_float(code) - zero) * scale;
    }
    return result;
  }
};

#if defined(MOEC_AVX512) || defined(MOEC_AVX2)

// A table of the 2^BITS weights of the group, repeated until it fills a register. The look-up uses only the low bits
// of an index, so what a shift leaves above them does no harm.
template <int BITS>
struct Table {
  F table;
  MOEC_INLINE void set(float s, float z) {
    const U level = lanes() & ((1u << BITS) - 1);
    table = (to_float(level) - z) * s;
  }
  MOEC_INLINE F at(U index) const {
#if defined(MOEC_AVX512)
    return (F)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
#else
    return (F)_mm256_permutevar8x32_ps((__m256)table, (__m256i)index);
#endif
  }
};

template <>
struct Group<2> : Table<2> {
  static constexpr bool kPlainOrder = true;
  MOEC_INLINE Block weights(const uint8_t* low, const uint8_t*) const {
    const U word = splat(uint32_t(read<4>(low)));
    Block result;
    for (int p = 0; p < P; p++) result.part[p] = at(word >> (lanes() * 2 + 2 * L * p));
    return result;
  }
};

#endif

#if defined(MOEC_AVX512)

// Sixteen 4-bit indices in a 64-bit word, as two 32-bit words broadcast alternately (one instruction): lane 2j decodes
// column j, lane 2j + 1 column 8 + j.
template <int BITS>
struct Nibbles : Table<BITS> {
  static constexpr bool kPlainOrder = false;
  MOEC_INLINE Block look_up(uint64_t nibbles) const {
    return {this->at((U)_mm512_set1_epi64(int64_t(nibbles)) >> (lanes() / 2 * 4))};
  }
};

template <>
struct Group<4> : Nibbles<4> {
  MOEC_INLINE Block weights(const uint8_t* low, const uint8_t*) const { return look_up(read<8>(low)); }
};

template <>
struct Group<3> : Nibbles<3> {  // the scalar unit, else idle, joins the planes
  MOEC_INLINE Block weights(const uint8_t* low, const uint8_t* high) const {
    return look_up(_pdep_u64(read<4>(low), 0x3333333333333333) | _pdep_u64(read<2>(high), 0x4444444444444444));
  }
};

MOEC_INLINE Block shuffle(const Block& b, U index) { return {(F)_mm512_permutexvar_ps((__m512i)index, (__m512)b.part[0])}; }
MOEC_INLINE Block to_decoded_order(const Block& b) { return shuffle(b, lanes() / 2 + (lanes() & 1) * 8); }
MOEC_INLINE Block to_plain_order(const Block& b) { return shuffle(b, (lanes() & 7) * 2 + (lanes() >> 3)); }

#else

#if defined(MOEC_AVX2)

template <>
struct Group<3> : Table<3> {
  static constexpr bool kPlainOrder = true;
  MOEC_INLINE Block weights(const uint8_t* low, const uint8_t* high) const {
    const U word = splat(uint32_t(read<4>(low))), top = splat(uint32_t(read<2>(high)) << 2);
    Block result;
    for (int p = 0; p < P; p++) {
      const U two = word >> (lanes() * 2 + 2 * L * p), third = top >> (lanes() + L * p);
      result.part[p] = at((two & 3) | (third & ~3u));
    }
    return result;
  }
};

#endif

MOEC_INLINE Block to_decoded_order(const Block& b) { return b; }
MOEC_INLINE Block to_plain_order(const Block& b) { return b; }

#endif

// Where a row's numbers lie.
struct Row {
  const uint8_t *low, *high, *scales, *zeros;
  float row_scale;

  MOEC_INLINE void seek(const Bank& b, const Layout& l, int64_t row) {  // row = matrix * rows + row of the matrix
    low = b.codes + row * l.row_bytes;
    high = low + l.low_bytes;
    scales = b.has_scales ? b.scales + row * l.groups : nullptr;
    zeros = b.has_zeros ? b.zeros + row * l.zero_bytes : nullptr;
    row_scale = from_bfloat16(b.row_scales[row]);
  }
};

// Scales and zeros of 16 groups, from group `first` (a multiple of 16) on; beyond the last group they mean nothing.
struct Sixteen {
  float scale[32], zero[32];  // 16 are used; a vector may be loaded from any of them

  template <int BITS>
  MOEC_INLINE void read_from(const Row& row, const Layout& l, int64_t first) {
    uint8_t bytes[16];
    if (row.scales) fetch<16>(bytes, row.scales + first, l.groups - first);
    for (int p = 0; p < P; p++) {
      F s = splat(row.row_scale);
      if (row.scales) s *= to_float(widen(bytes + p * L));
      std::memcpy(scale + p * L, &s, sizeof s);
    }
    if (row.zeros) fetch<2 * BITS>(bytes, row.zeros + first * BITS / 8, l.zero_bytes - first * BITS / 8);
    for (int p = 0; p < P; p++) {
      F z = splat(((1 << BITS) - 1) * 0.5f);
      if (row.zeros) z = to_float(unpack<BITS>(bytes, p));
      std::memcpy(zero + p * L, &z, sizeof z);
    }
  }

  // COUNT bytes, or as many as are left, never reading beyond them: pieces that overlap are quicker than a loop.
  template <int COUNT>
  static MOEC_INLINE void fetch(uint8_t* to, const uint8_t* from, int64_t left) {
    if (left >= COUNT) {
      std::memcpy(to, from, COUNT);
    } else if (left >= 8) {
      std::memcpy(to, from, 8);
      std::memcpy(to + left - 8, from + left - 8, 8);
    } else if (left >= 4) {
      std::memcpy(to, from, 4);
      std::memcpy(to + left - 4, from + left - 4, 4);
    } else {
      for (int64_t i = 0; i < left; i++) to[i] = from[i];
    }
  }

  // Register p of 16 numbers of BITS bits; below 8 bits, eight of them lie in one 32-bit word.
  template <int BITS>
  static MOEC_INLINE U unpack(const uint8_t* bytes, int p) {
    if constexpr (BITS == 8) {
      return widen(bytes + p * L);
    } else {
      const uint64_t stream = read<2 * BITS>(bytes);
      const U first = splat(uint32_t(stream)), second = splat(uint32_t(stream >> (8 * BITS)));
      const U index = lanes() + uint32_t(p * L);
      return ((index < 8 ? first : second) >> ((index & 7) * BITS)) & ((1u << BITS) - 1);
    }
  }
};

// y += R rows times T vectors x, over the blocks from ... to - 1. R * T sums stay in registers, and each block of x is
// loaded once for R rows. `from` is at a group whose number is a multiple of 8. Codes `ahead` bytes further on are
// asked for meanwhile: several short rows at once are no stream that the processor foresees (4 bits: 1.7 times faster).
template <int BITS, int R, int T>
MOEC_INLINE void tile(const Layout& l, const Row* rows, const float* const* x, int64_t from, int64_t to, int64_t ahead,
                      float* const* y) {
  constexpr int low_step = 2 * (BITS == 3 ? 2 : BITS);
  Block total[R][T] = {};
  Sixteen of[R];
  const int64_t first = from / l.blocks_per_group;
  for (int64_t block = from, group = 0; block < to; group++) {
    if (group % 16 == 0)
      for (int r = 0; r < R; r++) of[r].template read_from<BITS>(rows[r], l, first + group);
    Group<BITS> of_row[R];
    for (int r = 0; r < R; r++) of_row[r].set(of[r].scale[group % 16], of[r].zero[group % 16]);
    const int64_t end = std::min(block + l.blocks_per_group, to);
    if (ahead)
      for (int r = 0; r < R; r++)
        for (const uint8_t* p = rows[r].low + ahead + 2 * BITS * block; p < rows[r].low + ahead + 2 * BITS * end; p += 64)
          __builtin_prefetch(p, 0, 2);
    for (; block < end; block++)
      for (int r = 0; r < R; r++) {
        const Block w = of_row[r].weights(rows[r].low + low_step * block, rows[r].high + 2 * block);
        for (int t = 0; t < T; t++)
          for (int p = 0; p < P; p++) total[r][t].part[p] += w.part[p] * load(x[t] + 16 * block + p * L);
      }
  }
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) y[r][t] += sum(total[r][t]);
}

MOEC_INLINE void put(void* out, int64_t at, float value, int type) {
  if (type == kFloat32)
    static_cast<float*>(out)[at] = value;
  else
    static_cast<uint16_t*>(out)[at] = to_bfloat16(value);
}

// All rows of the item times up to T of its vectors x, from the vector `token` on; missing ones repeat the last.
template <int BITS, int T>
void columns(const Bank& b, const Layout& l, const Rows& item, int token, const float* x, int64_t stride, void* y, int type) {
  constexpr int R = L == 16 ? (T == 8 ? 2 : 4) : (T >= 4 ? 1 : 4 / T);  // so many sums fit the registers
  // The part of x in use stays in the first-level cache (32 KB). With one vector, its single pass needs no cache.
  const int64_t step = T == 1 ? l.blocks : 512 / T;
  const float* vectors[T];
  for (int t = 0; t < T; t++) vectors[t] = x + stride * item.tokens[std::min(token + t, item.count - 1)];
  float sums[kMaxRows][T] = {};
  for (int64_t from = 0; from < l.blocks; from += step)
    for (int64_t row = item.first; row < item.last; row += R) {
      Row rows[R];
      float* to[R];
      float spare[T];
      for (int r = 0; r < R; r++) {
        rows[r].seek(b, l, item.matrix * b.rows + std::min(row + r, item.last - 1));
        to[r] = row + r < item.last ? sums[row + r - item.first] : spare;
      }
      const int64_t ahead = row + 3 * R <= item.last ? 2 * R * l.row_bytes : 0;
      tile<BITS, R, T>(l, rows, vectors, from, std::min(from + step, l.blocks), ahead, to);
    }
  for (int64_t row = item.first; row < item.last; row++)
    for (int t = 0; t < T && token + t < item.count; t++)
      put(y, item.tokens[token + t] * b.rows + row, sums[row - item.first][t], type);
}

template <int BITS>
void multiply(const Bank& b, const Layout& l, const Rows& item, const float* x, int64_t stride, void* y, int type) {
  for (int token = 0; token < item.count;) {
    const int left = item.count - token;
    if (left > 4 && L == 16) {
      columns<BITS, 8>(b, l, item, token, x, stride, y, type), token += 8;
    } else if (left > 2) {
      columns<BITS, 4>(b, l, item, token, x, stride, y, type), token += 4;
    } else if (left > 1) {
      columns<BITS, 2>(b, l, item, token, x, stride, y, type), token += 2;
    } else {
      columns<BITS, 1>(b, l, item, token, x, stride, y, type), token += 1;
    }
  }
}

MOEC_INLINE void store(float* out, const Block& w) { std::memcpy(out, &w, sizeof w); }

MOEC_INLINE void store(uint16_t* out, const Block& w) {  // as to_bfloat16
  for (int p = 0; p < P; p++) {
    const U bits = (U)w.part[p];
    const U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const U result = (bits & 0x7fffffff) > 0x7f800000 ? splat(uint32_t{0x7fc0}) : rounded;
#if defined(MOEC_AVX512)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16((__m512i)result));
#else
    for (int i = 0; i < L; i++) out[p * L + i] = uint16_t(result[i]);
#endif
  }
}

template <int BITS, class T>
void dequantize(const Bank& b, const Layout& l, int64_t matrix, int64_t first, int64_t last, T* out) {
  constexpr int low_step = 2 * (BITS == 3 ? 2 : BITS);
  for (int64_t r = first; r < last; r++, out += b.cols) {
    Row row;
    row.seek(b, l, matrix * b.rows + r);
    Sixteen of;
    for (int64_t block = 0, group = 0; block < l.blocks; group++) {
      if (group % 16 == 0) of.template read_from<BITS>(row, l, group);
      Group<BITS> here;
      here.set(of.scale[group % 16], of.zero[group % 16]);
      const int64_t end = std::min(block + l.blocks_per_group, l.blocks);
      for (; block < end; block++) {
        Block w = here.weights(row.low + low_step * block, row.high + 2 * block);
        if constexpr (!Group<BITS>::kPlainOrder) w = to_plain_order(w);
        const int64_t left = b.cols - 16 * block;
        if (left >= 16) {
          store(out + 16 * block, w);
        } else {
          T values[16];
          store(values, w);
          std::memcpy(out + 16 * block, values, size_t(left) * sizeof(T));
        }
      }
    }
  }
}

template <int BITS>
void prepare(const Bank& b, const void* x, int type, float* prepared) {
  const int64_t blocks = (b.cols + 15) / 16;
  for (int64_t block = 0; block < blocks; block++) {
    const int64_t from = 16 * block, count = std::min<int64_t>(16, b.cols - from);
    float values[16] = {};
    if (type == kFloat32)
      std::memcpy(values, static_cast<const float*>(x) + from, size_t(count) * 4);
    else if (count == 16)
      for (int i = 0; i < 16; i++) values[i] = from_bfloat16(static_cast<const uint16_t*>(x)[from + i]);
    else
      for (int64_t i = 0; i < count; i++) values[i] = from_bfloat16(static_cast<const uint16_t*>(x)[from + i]);
    Block v;
    std::memcpy(&v, values, sizeof v);
    if constexpr (!Group<BITS>::kPlainOrder) v = to_decoded_order(v);
    std::memcpy(prepared + from, &v, sizeof v);
  }
}

void prepare_any(const Bank& b, const void* x, int type, float* prepared) {
  (b.bits == 3 || b.bits == 4 ? prepare<4> : prepare<8>)(b, x, type, prepared);  // 3 and 4 bits share an order
}

int64_t prepared_floats(const Bank& b, int) { return (b.cols + 15) / 16 * 16; }

void multiply_any(const Bank& b, const Layout& l, const Rows& item, const float* x, int64_t stride, void* y, int type) {
  (b.bits == 2 ? multiply<2> : b.bits == 3 ? multiply<3> : b.bits == 4 ? multiply<4> : multiply<8>)(b, l, item, x, stride, y, type);
}

template <class T>
void dequantize_to(const Bank& b, const Layout& l, int64_t matrix, int64_t first, int64_t last, T* out) {
  (b.bits == 2   ? dequantize<2, T>
   : b.bits == 3 ? dequantize<3, T>
   : b.bits == 4 ? dequantize<4, T>
                 : dequantize<8, T>)(b, l, matrix, first, last, out);
}

void dequantize_any(const Bank& b, const Layout& l, int64_t matrix, int64_t first, int64_t last, void* out, int type) {
  if (type == kFloat32)
    dequantize_to(b, l, matrix, first, last, static_cast<float*>(out));
  else
    dequantize_to(b, l, matrix, first, last, static_cast<uint16_t*>(out));
}

uint32_t read_all(const uint8_t* data, int64_t bytes) {
  U sums[4] = {};
  for (int64_t from = 0; from + 1024 <= bytes; from += 1024) {
    for (int line = 0; line < 1024; line += 64) __builtin_prefetch(data + from + 4096 + line, 0, 2);
    for (int at = 0; at < 1024; at += int(sizeof(U))) {
      U part;
      std::memcpy(&part, data + from + at, sizeof part);
      sums[at / sizeof(U) % 4] += part;
    }
  }
  sums[0] += sums[1] + sums[2] + sums[3];
  return sums[0][0] + sums[0][L - 1];
}

const Kernels kernels = {MOEC_NAME, prepared_floats, prepare_any, multiply_any, dequantize_any, read_all};

#undef MOEC_INLINE

}  // namespace MOEC_SET
}  // namespace

#endif  // MOEC_SET

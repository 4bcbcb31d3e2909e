// Arithmetic on matrices of the format "trellis" (pack/SPEC.md, section 9), for the CPU: products, decoding, rotation.
//
// y = T x never stores T. A strip of rows (as many as a tile has) is decoded a few tiles at a time into the first-level cache, for all the x
// that want the matrix (up to 16 or 64 at once), and multiplied from there. There are three ways: plain C++ with float32 x;
// AVX-512 VBMI, where a decoded weight is one byte and x is fixed-point (see namespace vbmi); and the same with AMX.
// Whatever a file can influence is compared with the sizes of the memory behind it before anything is read; the bits of a
// stream may be any.
#include "pool.h"
#include "trellis_codes.h"

#include <cmath>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define MOEC_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace {

constexpr int kInterface = 1;  // raise when an exported function changes; trellis_matmul.py refuses any other
constexpr int kBadSlot = 4, kBadBank = 5;
constexpr int kTile = 256;          // weights of a tile: 64 / V rows of 4 steps
constexpr int kRows = 16;           // of a chunk, which is 64 steps of a tile
constexpr int kMostRows = 64;       // of a strip
constexpr int kBlock = 16;          // columns of x that are prepared together
constexpr int64_t kMostTogether = 64;
constexpr int64_t kSegment = 64;    // tiles decoded at a time: 16 KB of bytes, which x of 8 vectors leave room for in the first-level cache
constexpr int64_t kAlone = 1 << 17; // weights (or floats) below which one thread is quicker than two
constexpr float kStep = 1.0f / 32;  // value of one in the table

enum Type : int32_t { kFloat32 = 0, kBfloat16 = 1 };

struct Bank {  // mirrored by trellis_matmul.py
  const uint8_t* stream;  // [n, tiles, 32 B / V bytes]
  const float* scales;    // [n]
  const uint8_t* tables;  // low [V, 64], high [V, 64], levels int8 [256]
  const int8_t* values;   // [4096, V]: what a window stands for, from the same tables
  int64_t stream_bytes, scales_bytes, tables_bytes, values_bytes;
  int64_t count, rows, cols;
  int32_t bits, vector;   // B and V: bits and values of a step
};

struct Multiply {
  Bank bank;
  const float* x;        // [batch, cols]
  const int32_t* slots;  // [batch], -1 for zeros
  float* y;              // [batch, rows]
  int64_t x_bytes, slots_bytes, y_bytes, batch;
};

struct Dequantize {
  Bank bank;
  const int64_t* index;  // [chosen]
  void* out;             // [chosen, last - first, cols]
  int64_t index_bytes, out_bytes, chosen, first, last;  // first and last: rows, first where a strip begins
  int32_t type;
};

struct Rotate {
  const void* x;      // [count, size] of type
  const float* sign;  // [size]
  float* out;         // [count, size]
  int64_t x_bytes, sign_bytes, out_bytes, count, size;
  int32_t type, undo;
};

bool has_bytes(const void* data, int64_t bytes, int64_t a, int64_t b, int64_t each) {
  int64_t all;
  if (a < 0 || b < 0 || __builtin_mul_overflow(a, b, &all) || __builtin_mul_overflow(all, each, &all)) return false;
  return bytes == all && (all == 0 || data != nullptr);
}

int64_t high(const Bank& b) { return 64 / b.vector; }  // rows and columns of a tile
int64_t wide(const Bank& b) { return 4 * b.vector; }
int64_t down(const Bank& b) { return (b.rows + high(b) - 1) / high(b); }
int64_t across(const Bank& b) { return (b.cols + wide(b) - 1) / wide(b); }
int64_t blocks(const Bank& b) { return (b.cols + kBlock - 1) / kBlock; }
int64_t tile_bytes(const Bank& b) { return 32 * b.bits / b.vector; }

bool is_valid(const Bank& b) {
  constexpr int64_t kLimit = int64_t{1} << 30;  // keeps every product in range
  if (!known(b.bits, b.vector) || b.rows < 0 || b.rows > kLimit || b.cols < 1 || b.cols > kLimit) return false;
  return b.count <= kLimit && has_bytes(b.stream, b.stream_bytes, b.count, down(b) * across(b), tile_bytes(b)) &&
         has_bytes(b.scales, b.scales_bytes, b.count, 1, 4) &&
         has_bytes(b.tables, b.tables_bytes, 1, 128 * b.vector + 256, 1) &&
         has_bytes(b.values, b.values_bytes, 4096, b.vector, 1);
}

const uint8_t* strip_of(const Bank& b, int64_t matrix, int64_t strip) {
  return b.stream + (matrix * down(b) + strip) * across(b) * tile_bytes(b);
}

// One strip of rows times up to kMostTogether vectors.
struct Strip {
  const Bank* bank;
  const uint8_t* stream;   // of its tiles
  const float* prepared;   // the vectors, as `prepare` left them
  int64_t together;        // how many
  float scale;             // of the matrix
  float (*sums)[kMostRows];  // [kMostTogether][64], the result; beyond `together` scratch
  float* scratch;
};

struct Kernels {
  const char* name;
  int64_t together;  // vectors x for which a matrix is decoded once, at most
  int64_t (*prepared_floats)(const Bank&);  // of one vector; a multiple of 16
  int64_t scratch_floats;
  // Vector `which` of `together` that share the memory `prepared`.
  void (*prepare)(const Bank&, const float* x, int64_t which, int64_t together, float* prepared);
  void (*multiply)(const Strip&);
  // `tiles` tiles side by side to levels, int8, with rows `stride` bytes apart
  void (*decode)(const Bank&, const uint8_t* stream, int64_t tiles, int8_t* out, int64_t stride);
};

// ---- plain C++ -----------------------------------------------------------------------------------------------------

namespace portable {

constexpr int64_t kTogether = 16;
constexpr int64_t kPart = 256;                       // columns decoded at a time
constexpr int64_t kFloats = kPart + kLane;           // of a row of them, apart from multiples of 4096 bytes

template <int B, int V>
INLINE void decode_tiles(const Bank& b, const uint8_t* stream, int64_t tiles, int8_t* out, int64_t stride) {
  constexpr int bytes = 32 * B / V;
  for (int64_t t = 0; t < tiles; ++t, stream += bytes) {
    uint8_t line[2 + bytes + 8] = {};  // a circle cut open: the first windows begin in its last two bytes
    std::memcpy(line, stream + bytes - 2, 2);
    std::memcpy(line + 2, stream, bytes);
    int8_t tile[kTile];
    for (int group = 0; group < kTile / V / 8; ++group) {  // 8 steps take B bytes
      uint64_t word;
      std::memcpy(&word, line + group * B, 8);
      for (int j = 0; j < 8; ++j)
        std::memcpy(tile + (group * 8 + j) * V, b.values + (word >> (4 + (j + 1) * B) & 4095) * V, V);
    }
    for (int row = 0; row < 64 / V; ++row) std::memcpy(out + row * stride + t * 4 * V, tile + row * 4 * V, 4 * V);
  }
}

FAST void decode(const Bank& b, const uint8_t* stream, int64_t tiles, int8_t* out, int64_t stride) {
#define MOEC_CASE(B, V) \
  case code_number(B, V): return decode_tiles<B, V>(b, stream, tiles, out, stride);
  switch (code_number(b.bits, b.vector)) { MOEC_TRELLIS_CODES(MOEC_CASE) }
#undef MOEC_CASE
}

int64_t prepared_floats(const Bank& b) { return blocks(b) * kBlock + kLane; }  // padded with zeros

void prepare(const Bank& b, const float* x, int64_t which, int64_t, float* prepared) {
  prepared += which * prepared_floats(b);
  std::fill(std::copy(x, x + b.cols, prepared), prepared + prepared_floats(b), 0.0f);
}

// total[t][r] += R rows of weights times T vectors, over `count` columns.
template <int R, int T>
INLINE void dots(const float* weights, const float* x, int64_t stride, int64_t count, Vector (*total)[kMostRows]) {
  Vector sum[T][R];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum[t][r] = total[t][r];
  for (int64_t at = 0; at < count; at += kLane)
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const Vector v = load(x + t * stride + at);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[t][r] += load(weights + r * kFloats + at) * v;
    }
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) total[t][r] = sum[t][r];
}

template <int R, int T>
INLINE void all_rows(const float* weights, const float* x, int64_t stride, int64_t count, int64_t rows, Vector (*total)[kMostRows]) {
  for (int64_t r = 0; r < rows; r += R)
    dots<R, T>(weights + r * kFloats, x, stride, count, reinterpret_cast<Vector(*)[kMostRows]>(&total[0][r]));
}

FAST void multiply(const Strip& s) {
  const Bank& b = *s.bank;
  const int64_t tiles = across(b), stride = prepared_floats(b), rows = high(b), parts = kPart / wide(b);
  auto* weights = s.scratch;                                                            // [64][kFloats]
  auto* total = reinterpret_cast<Vector(*)[kMostRows]>(weights + kMostRows * kFloats);  // [kTogether][64] vectors
  auto* bytes = reinterpret_cast<int8_t*>(total + kTogether);                           // [64][kPart]
  for (int64_t t = 0; t < s.together; ++t)
    for (int r = 0; r < rows; ++r) total[t][r] = Vector{};
  for (int64_t first = 0; first < tiles; first += parts) {
    const int64_t part = std::min(parts, tiles - first);
    const int64_t count = (part * wide(b) + kLane - 1) / kLane * kLane;  // x is zero where no tile is
    decode(b, s.stream + first * tile_bytes(b), part, bytes, kPart);
    for (int r = 0; r < rows; ++r)
      for (int64_t i = 0; i < count; ++i) weights[r * kFloats + i] = bytes[r * kPart + i];
    const float* x = s.prepared + first * wide(b);
    int64_t t = 0;
    for (; t + 4 <= s.together; t += 4) all_rows<1, 4>(weights, x + t * stride, stride, count, rows, total + t);
    for (; t < s.together; ++t) all_rows<4, 1>(weights, x + t * stride, stride, count, rows, total + t);
  }
  for (int64_t t = 0; t < s.together; ++t)
    for (int r = 0; r < rows; ++r) {
      float lane[kLane];
      store(lane, total[t][r]);
      for (int width = kLane / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
      s.sums[t][r] = lane[0] * kStep * s.scale;
    }
}

constexpr int64_t kScratch = kMostRows * kFloats + kTogether * kMostRows * kLane + kMostRows * kPart / 4;
const Kernels kernels = {"portable", kTogether, prepared_floats, kScratch, prepare, multiply, decode};

}  // namespace portable

// ---- AVX-512 with VBMI and VNNI ------------------------------------------------------------------------------------
//
// 64 steps are a chunk. 8 steps take B bytes, so the windows of step group q of chunk c lie in the 8 bytes from byte
// (8 c + q) B - 2 of the circular stream on: one byte permutation gathers the 8 words, two multishifts cut the halves of the
// 64 windows out, and look-ups in registers make bytes of them. Levels are antisymmetric: 128 of them are one register pair,
// the sign follows. A weight is 128 + level, an unsigned byte; x = scale (128 h + l) is two signed bytes, accurate to
// 2^-15 of its largest number. vpdpbusd multiplies and adds; its sums are exact, and start at -128 times the sum of x.

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC diagnostic push  // GCC 12 warns of its own headers, where values are left undefined on purpose
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx2,fma,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")
#endif

namespace vbmi {

template <int BYTES>
INLINE __m512i load_bytes(const uint8_t* p) {  // BYTES of them, at most 64
  if constexpr (BYTES == 64) return _mm512_loadu_si512(p);
  if constexpr (BYTES == 32) return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  if constexpr (BYTES == 16) return _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm512_maskz_loadu_epi8((uint64_t{1} << BYTES % 64) - 1, p);
}

template <int B, int V>
struct Decoder {
  static constexpr int kChunks = 4 / V, kBytes = 32 * B / V;

  __m512i gather[kChunks], older, newer, low[V], high[V], positive[2];

  INLINE explicit Decoder(const Bank& b) {
    alignas(64) uint8_t at[64];
    for (int c = 0; c < kChunks; ++c) {
      for (int i = 0; i < 64; ++i) at[i] = uint8_t(((8 * c + i / 8) * B - 2 + i % 8 + kBytes) % kBytes);
      gather[c] = _mm512_load_si512(at);
    }
    for (int i = 0; i < 64; ++i) at[i] = uint8_t(4 + (i % 8 + 1) * B);
    older = _mm512_load_si512(at);
    newer = _mm512_add_epi8(older, _mm512_set1_epi8(6));
    const __m512i half = _mm512_set1_epi8(-128);  // the top bit of a sum says then that the level is negative
    for (int v = 0; v < V; ++v) {
      low[v] = _mm512_loadu_si512(b.tables + 64 * v);
      high[v] = _mm512_xor_si512(_mm512_loadu_si512(b.tables + 64 * (V + v)), half);
    }
    for (int i = 0; i < 2; ++i) positive[i] = _mm512_xor_si512(_mm512_loadu_si512(b.tables + 128 * V + 128 + 64 * i), half);
  }

  // codes[c * V + v]: value v of the 64 steps of chunk c, plus 128.
  INLINE void tile(const uint8_t* stream, __m512i* codes) const {
    const __m512i first = load_bytes<(kBytes > 64 ? 64 : kBytes)>(stream);
    __m512i second = first;
    if constexpr (kBytes > 64) second = load_bytes<kBytes - 64>(stream + 64);
    for (int c = 0; c < kChunks; ++c) {
      const __m512i words = kBytes > 64 ? _mm512_permutex2var_epi8(first, gather[c], second) : _mm512_permutexvar_epi8(gather[c], first);
      const __m512i begin = _mm512_multishift_epi64_epi8(older, words), end = _mm512_multishift_epi64_epi8(newer, words);
      for (int v = 0; v < V; ++v) {
        const __m512i sum = _mm512_add_epi8(_mm512_permutexvar_epi8(begin, low[v]), _mm512_permutexvar_epi8(end, high[v]));
        const __mmask64 negative = _mm512_movepi8_mask(sum);
        const __m512i index = _mm512_mask_sub_epi8(sum, negative, _mm512_set1_epi8(-1), sum);
        const __m512i code = _mm512_permutex2var_epi8(positive[0], index, positive[1]);
        codes[c * V + v] = _mm512_mask_sub_epi8(code, negative, _mm512_setzero_si512(), code);
      }
    }
  }
};

// Vectors x that are multiplied together: for every four blocks 64 bytes h of each vector, then 64 bytes l of each; in a tile's
// 4 V columns v, V + v, 2 V + v, 3 V + v together for every v. Behind that, for each vector, what its sums start at in each
// segment, and its scale.
int64_t segments(const Bank& b) { return (across(b) + kSegment - 1) / kSegment; }
int64_t plane_bytes(const Bank& b) { return (blocks(b) + 3) / 4 * 128; }  // of a vector, both planes
int64_t prepared_floats(const Bank& b) { return (plane_bytes(b) + segments(b) * 128 + 64) / 4; }
INLINE int64_t block_at(int64_t block, int64_t together) { return (block >> 2) * 128 * together + (block & 3) * kBlock; }
template <int V>
INLINE int64_t tile_at(int64_t tile, int64_t together) {
  constexpr int each = 4 / V;  // tiles in a block
  return block_at(tile / each, together) + tile % each * 4 * V;
}

struct Tail {  // of one vector
  const int8_t* starts;  // [segments][2][64]: h and l
  const float* scale;
};

INLINE Tail tail(const Bank& b, const float* prepared, int64_t which, int64_t together) {
  const int8_t* starts = reinterpret_cast<const int8_t*>(prepared) + plane_bytes(b) * together + which * (segments(b) * 128 + 64);
  return {starts, reinterpret_cast<const float*>(starts + segments(b) * 128)};
}

INLINE __m512i broadcast(const int8_t* p) {  // 4 bytes
  int32_t word;
  std::memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}

template <int V>
INLINE void prepare_as(const Bank& b, const float* x, int64_t which, int64_t together, float* prepared) {
  auto* planes = reinterpret_cast<int8_t*>(prepared) + which * 64;
  auto* starts = const_cast<int8_t*>(tail(b, prepared, which, together).starts);
  const int64_t all = blocks(b), to_low = 64 * together;
  const auto columns = [&](int64_t t) {
    const int64_t left = b.cols - t * kBlock;
    return _mm512_maskz_loadu_ps(left >= kBlock ? __mmask16(0xffff) : __mmask16((1u << left) - 1), x + t * kBlock);
  };
  __m512i largest = _mm512_setzero_si512();  // as integers, where not-a-number is the largest
  for (int64_t t = 0; t < all; ++t)
    largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_castps_si512(columns(t)), _mm512_set1_epi32(0x7fffffff)));
  const int32_t bits = _mm512_reduce_max_epi32(largest);
  float top;
  std::memcpy(&top, &bits, 4);
  constexpr float kMost = 127 * 128 + 63;
  const bool finite = bits < 0x7f800000, tiny = bits < (27 << 23);  // below 2^-100 nothing is left
  const float inverse = finite && !tiny ? kMost / top : 0.0f;
  *const_cast<float*>(tail(b, prepared, which, together).scale) = !finite ? std::nanf("") : tiny ? 0.0f : top / kMost;
  alignas(16) uint8_t order[16];  // columns v, V + v, ... of a tile together
  for (int i = 0; i < 16; ++i) order[i] = uint8_t(i / (4 * V) * 4 * V + i % 4 * V + i % (4 * V) / 4);
  const __m128i by_value = _mm_load_si128(reinterpret_cast<const __m128i*>(order));
  const int64_t last = block_at(all - 1, together) / 64 * 64;  // the last four blocks may be fewer
  std::memset(planes + last, 0, 64);
  std::memset(planes + last + to_low, 0, 64);
  constexpr int64_t step = kSegment * V / 4;  // blocks of a segment
  for (int64_t first = 0; first < all; first += step) {
    __m512i high = _mm512_setzero_si512(), low = high;
    const __m512i half = _mm512_set1_epi8(-128);
    for (int64_t t = first; t < std::min(first + step, all); ++t) {
      const __mmask16 all = finite ? 0xffff : 0;
      const __m512i q = _mm512_maskz_cvtps_epi32(all, _mm512_mul_ps(columns(t), _mm512_set1_ps(inverse)));
      const __m512i h = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(64)), 7);
      const __m512i l = _mm512_sub_epi32(q, _mm512_slli_epi32(h, 7));
      int8_t* to = planes + block_at(t, together);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(_mm512_cvtepi32_epi8(h), by_value));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + to_low), _mm_shuffle_epi8(_mm512_cvtepi32_epi8(l), by_value));
      for (int word = 0; word < 16; word += 4) {
        high = _mm512_dpbusd_epi32(high, half, broadcast(to + word));
        low = _mm512_dpbusd_epi32(low, half, broadcast(to + to_low + word));
      }
    }
    int8_t* start = starts + first / step * 128;
    _mm512_storeu_si512(start, _mm512_sub_epi32(_mm512_setzero_si512(), high));
    _mm512_storeu_si512(start + 64, _mm512_sub_epi32(_mm512_setzero_si512(), low));
  }
}

void prepare(const Bank& b, const float* x, int64_t which, int64_t together, float* prepared) {
  (b.vector == 1 ? prepare_as<1> : b.vector == 2 ? prepare_as<2> : prepare_as<4>)(b, x, which, together, prepared);
}

// The sums of the 16 rows of a chunk.
INLINE void add_rows(__m512i high, __m512i low, float factor, float* sums) {
  const __m512 lanes = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(128.0f), _mm512_cvtepi32_ps(low));
  _mm512_storeu_ps(sums, _mm512_fmadd_ps(lanes, _mm512_set1_ps(factor), _mm512_loadu_ps(sums)));
}

// A segment of `tiles` tiles times T vectors, decoded to registers.
template <int B, int V, int T>
INLINE void decode_and_multiply(const Strip& s, const Decoder<B, V>& decoder, int64_t first, int64_t tiles) {
  constexpr int C = 4 / V;
  const auto* x = reinterpret_cast<const int8_t*>(s.prepared);
  __m512i high[C][T], low[C][T];
  for (int t = 0; t < T; ++t) {
    const int8_t* start = tail(*s.bank, s.prepared, t, T).starts + first / kSegment * 128;
    for (int c = 0; c < C; ++c) high[c][t] = _mm512_loadu_si512(start), low[c][t] = _mm512_loadu_si512(start + 64);
  }
  const uint8_t* stream = s.stream + first * decoder.kBytes;
  for (int64_t i = 0; i < tiles; ++i) {
    __m512i codes[4];
    decoder.tile(stream + i * decoder.kBytes, codes);
    for (int v = 0; v < V; ++v)
      for (int t = 0; t < T; ++t) {
        const int8_t* at = x + tile_at<V>(first + i, T) + t * 64 + v * 4;
        const __m512i h = broadcast(at), l = broadcast(at + 64 * T);
        for (int c = 0; c < C; ++c) {
          high[c][t] = _mm512_dpbusd_epi32(high[c][t], codes[c * V + v], h);
          low[c][t] = _mm512_dpbusd_epi32(low[c][t], codes[c * V + v], l);
        }
      }
  }
  for (int t = 0; t < T; ++t)
    for (int c = 0; c < C; ++c)
      add_rows(high[c][t], low[c][t], *tail(*s.bank, s.prepared, t, T).scale, s.sums[t] + c * kRows);
}

// The same from codes in the cache, [chunk][tile][v][64], for the T vectors from `from` on; missing ones repeat the last, and
// their sums mean nothing.
template <int V, int T>
INLINE void multiply_decoded(const Strip& s, const uint8_t* codes, int64_t from, int64_t first, int64_t tiles) {
  constexpr int K = T == 4 && V > 1 ? 2 : 1;  // sums for each x and plane: enough to hide the latency of one
  const int8_t *x[T], *start[T];
  float scale[T];
  const int64_t n = s.together, to_low = 64 * n;
  for (int t = 0; t < T; ++t) {
    const int64_t which = std::min(from + t, n - 1);
    const Tail end = tail(*s.bank, s.prepared, which, n);
    scale[t] = *end.scale;
    start[t] = end.starts + first / kSegment * 128;
    x[t] = reinterpret_cast<const int8_t*>(s.prepared) + which * 64 + tile_at<V>(first, n);
  }
  for (int c = 0; c < 4 / V; ++c) {
    __m512i high[T * K], low[T * K];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      high[t] = _mm512_loadu_si512(start[t]), low[t] = _mm512_loadu_si512(start[t] + 64);
      if constexpr (K == 2) high[T + t] = low[T + t] = _mm512_setzero_si512();
    }
    for (int64_t i = 0; i < tiles; ++i, codes += 64 * V) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const __m512i code = _mm512_loadu_si512(codes + 64 * v);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          const int8_t* at = x[t] + tile_at<V>(i, n) + v * 4;
          const int k = v % K * T + t;
          high[k] = _mm512_dpbusd_epi32(high[k], code, broadcast(at));
          low[k] = _mm512_dpbusd_epi32(low[k], code, broadcast(at + to_low));
        }
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const __m512i h = K == 2 ? _mm512_add_epi32(high[t], high[(K - 1) * T + t]) : high[t];
      const __m512i l = K == 2 ? _mm512_add_epi32(low[t], low[(K - 1) * T + t]) : low[t];
      add_rows(h, l, scale[t], s.sums[from + t] + c * kRows);
    }
  }
}

template <int V>
void multiply_all_decoded(const Strip& s, const uint8_t* codes, int64_t first, int64_t tiles) {
  for (int64_t from = 0; from < s.together;)
    if (s.together - from > 4) {
      multiply_decoded<V, 8>(s, codes, from, first, tiles), from += 8;
    } else {
      multiply_decoded<V, 4>(s, codes, from, first, tiles), from += 4;
    }
}

template <int B, int V>
void multiply_as(const Strip& s) {
  const Decoder<B, V> decoder(*s.bank);
  const int64_t all = across(*s.bank);
  for (int64_t first = 0; first < all; first += kSegment) {
    const int64_t tiles = std::min(kSegment, all - first);
    if (s.together == 1) {
      decode_and_multiply<B, V, 1>(s, decoder, first, tiles);
    } else if (s.together == 2) {
      decode_and_multiply<B, V, 2>(s, decoder, first, tiles);
    } else {
      auto* codes = reinterpret_cast<uint8_t*>(s.scratch);
      for (int64_t i = 0; i < tiles; ++i) {
        __m512i tile[4];
        decoder.tile(s.stream + (first + i) * decoder.kBytes, tile);
        for (int c = 0; c < 4 / V; ++c)
          for (int v = 0; v < V; ++v) _mm512_storeu_si512(codes + ((c * tiles + i) * V + v) * 64, tile[c * V + v]);
      }
      multiply_all_decoded<V>(s, codes, first, tiles);
    }
  }
  for (int64_t t = 0; t < s.together; ++t)
    for (int r = 0; r < 64 / V; ++r) s.sums[t][r] = s.sums[t][r] * kStep * s.scale;
}

void multiply(const Strip& s) {
  std::fill(s.sums[0], s.sums[0] + kMostTogether * kMostRows, 0.0f);
#define MOEC_CASE(B, V) \
  case code_number(B, V): return multiply_as<B, V>(s);
  switch (code_number(s.bank->bits, s.bank->vector)) { MOEC_TRELLIS_CODES(MOEC_CASE) }
#undef MOEC_CASE
}

template <int B, int V>
void decode_as(const Bank& b, const uint8_t* stream, int64_t tiles, int8_t* out, int64_t stride) {
  const Decoder<B, V> decoder(b);
  for (int64_t t = 0; t < tiles; ++t) {
    __m512i codes[4], rows[4];
    decoder.tile(stream + t * decoder.kBytes, codes);
    if constexpr (V == 1) {
      for (int c = 0; c < 4; ++c) rows[c] = codes[c];
    } else if constexpr (V == 2) {
      for (int c = 0; c < 2; ++c) {
        rows[2 * c] = _mm512_unpacklo_epi8(codes[2 * c], codes[2 * c + 1]);
        rows[2 * c + 1] = _mm512_unpackhi_epi8(codes[2 * c], codes[2 * c + 1]);
      }
    } else {
      const __m512i low[2] = {_mm512_unpacklo_epi8(codes[0], codes[1]), _mm512_unpacklo_epi8(codes[2], codes[3])};
      const __m512i high[2] = {_mm512_unpackhi_epi8(codes[0], codes[1]), _mm512_unpackhi_epi8(codes[2], codes[3])};
      rows[0] = _mm512_unpacklo_epi16(low[0], low[1]), rows[1] = _mm512_unpackhi_epi16(low[0], low[1]);
      rows[2] = _mm512_unpacklo_epi16(high[0], high[1]), rows[3] = _mm512_unpackhi_epi16(high[0], high[1]);
    }
    for (int i = 0; i < 4; ++i) {
      alignas(64) int8_t levels[64];
      _mm512_store_si512(levels, _mm512_xor_si512(rows[i], _mm512_set1_epi8(-128)));
      for (int k = 0; k < 16 / V; ++k) {  // rows in this vector; unpacking dealt those of 4 out within 128 bits
        const int row = V == 1 ? kRows * i + k : V == 2 ? kRows * (i / 2) + k / 2 * 4 + i % 2 * 2 + k % 2 : 4 * k + i;
        std::memcpy(out + row * stride + t * 4 * V, levels + k * 4 * V, 4 * V);
      }
    }
  }
}

void decode(const Bank& b, const uint8_t* stream, int64_t tiles, int8_t* out, int64_t stride) {
#define MOEC_CASE(B, V) \
  case code_number(B, V): return decode_as<B, V>(b, stream, tiles, out, stride);
  switch (code_number(b.bits, b.vector)) { MOEC_TRELLIS_CODES(MOEC_CASE) }
#undef MOEC_CASE
}

const Kernels kernels = {"avx512_vbmi", 16, prepared_floats, kSegment * kTile / 4, prepare, multiply, decode};

}  // namespace vbmi

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

// ---- AMX: 16 vectors x times 16 rows times 64 columns in one instruction -------------------------------------------------
//
// An operand B has 16 lines of 64 bytes: for each of the 16 rows of a chunk 4 of the 64 columns, in any order that x shares.
// The order of the decoder is that one: 16 vectors of it are a B, and 64 bytes of a plane of x are a line of A.

#if defined(MOEC_AMX)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,amx-tile,amx-int8"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,amx-tile,amx-int8")
#endif

namespace amx {

using vbmi::Decoder;

struct alignas(64) Config {  // as ldtilecfg reads it
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3: sums of h and l for the first 16 vectors, and for 16 more; 4: B; 5 and 6: h and l of x, 7: spare.
void configure(int64_t first, int64_t second) {
  Config c;
  const int64_t rows[8] = {first, first, second, second, kRows, first, second, 0};
  for (int i = 0; i < 7; ++i) c.rows[i] = uint8_t(rows[i]), c.bytes[i] = rows[i] ? 64 : 0;
  _tile_loadconfig(&c);
}

// sums of chunk c += scale (128 h + l) for `count` vectors from `from` on; h and l int32 [16][16].
void add(const int32_t* high, const int32_t* low, int64_t count, const Strip& s, int64_t from, int c) {
  for (int64_t t = 0; t < count; ++t)
    vbmi::add_rows(_mm512_load_si512(high + t * kRows), _mm512_load_si512(low + t * kRows),
                   *vbmi::tail(*s.bank, s.prepared, from + t, s.together).scale, s.sums[from + t] + c * kRows);
}

// Up to 32 vectors from `from` on times `quads` operands B.
void multiply_pair(const Strip& s, const uint8_t* codes, int64_t from, int64_t block, int64_t quads, int c) {
  const int64_t left = s.together - from, one = std::min<int64_t>(left, 16), two = std::min<int64_t>(left - one, 16);
  const auto* x = reinterpret_cast<const int8_t*>(s.prepared) + from * 64 + vbmi::block_at(block, s.together);
  const int64_t to_low = 64 * s.together;
  alignas(64) int32_t sums[4][kTile];
  configure(one, two);
  _tile_zero(0);
  _tile_zero(1);
  if (two > 0) {
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t q = 0; q < quads; ++q) {
      const int8_t* at = x + q * 2 * to_low;
      _tile_loadd(4, codes + q * 1024, 64);
      _tile_loadd(5, at, 64);
      _tile_dpbssd(0, 5, 4);
      _tile_loadd(6, at + 1024, 64);
      _tile_dpbssd(2, 6, 4);
      _tile_loadd(5, at + to_low, 64);
      _tile_dpbssd(1, 5, 4);
      _tile_loadd(6, at + to_low + 1024, 64);
      _tile_dpbssd(3, 6, 4);
    }
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
  } else {
    for (int64_t q = 0; q < quads; ++q) {
      _tile_loadd(4, codes + q * 1024, 64);
      _tile_loadd(5, x + q * 2 * to_low, 64);
      _tile_dpbssd(0, 5, 4);
      _tile_loadd(5, x + q * 2 * to_low + to_low, 64);
      _tile_dpbssd(1, 5, 4);
    }
  }
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  add(sums[0], sums[1], one, s, from, c);
  add(sums[2], sums[3], two, s, from + 16, c);
}

template <int B, int V>
void multiply_as(const Strip& s) {
  const Decoder<B, V> decoder(*s.bank);
  const int64_t all = across(*s.bank);
  auto* codes = reinterpret_cast<uint8_t*>(s.scratch);
  for (int64_t first = 0; first < all; first += kSegment) {
    const int64_t tiles = std::min(kSegment, all - first);
    for (int64_t i = 0; i < tiles; ++i) {
      __m512i tile[4];
      decoder.tile(s.stream + (first + i) * decoder.kBytes, tile);
      for (int c = 0; c < 4 / V; ++c)
        for (int v = 0; v < V; ++v)
          _mm512_store_si512(codes + ((c * kSegment + i) * V + v) * 64, _mm512_xor_si512(tile[c * V + v], _mm512_set1_epi8(-128)));
    }
    __asm__ volatile("" ::: "memory");  // the intrinsics that load tiles do not say that they read memory
    const int64_t quads = (tiles * V + 15) / 16;  // where the last has too few tiles, x is zero
    for (int c = 0; c < 4 / V; ++c)
      for (int64_t from = 0; from < s.together; from += 32)
        multiply_pair(s, codes + c * kSegment * V * 64, from, first * V / 4, quads, c);
  }
  _tile_release();
  for (int64_t t = 0; t < s.together; ++t)
    for (int r = 0; r < 64 / V; ++r) s.sums[t][r] = s.sums[t][r] * kStep * s.scale;
}

void multiply(const Strip& s) {
  if (s.together <= 2) return vbmi::multiply(s);
  std::fill(s.sums[0], s.sums[0] + s.together * kMostRows, 0.0f);
#define MOEC_CASE(B, V) \
  case code_number(B, V): return multiply_as<B, V>(s);
  switch (code_number(s.bank->bits, s.bank->vector)) { MOEC_TRELLIS_CODES(MOEC_CASE) }
#undef MOEC_CASE
}

const Kernels kernels = {"amx", kMostTogether, vbmi::prepared_floats, kSegment * kTile / 4, vbmi::prepare, multiply, vbmi::decode};

// Whether the processor has it and the kernel lets this process use it (which must be asked for).
bool granted() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 25 & 1)) return false;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

}  // namespace amx

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // MOEC_AMX

#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#endif  // __x86_64__

// ---- which way, and the work ---------------------------------------------------------------------------------------

std::atomic<const Kernels*> chosen{nullptr};

std::vector<const Kernels*> available() {  // best first
  std::vector<const Kernels*> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni")) {
#if defined(MOEC_AMX)
    if (amx::granted()) sets.push_back(&amx::kernels);
#endif
    sets.push_back(&vbmi::kernels);
  }
#endif
  sets.push_back(&portable::kernels);
  return sets;
}

const Kernels& kernels() {
  const Kernels* set = chosen.load();
  if (set == nullptr) chosen.store(set = available().front());
  return *set;
}

struct Item {  // strips first ... last - 1 of one matrix, times the vectors order[from] ... order[from + together - 1]
  int64_t matrix, first, last, from, together;
};

struct Place {  // a row of x, and its place among those that are multiplied together
  int64_t row, which, together;
};

struct Plan {
  const Multiply* job;
  const Kernels* kernels;
  std::vector<Place> order;  // rows of x by matrix
  std::vector<Item> items;
  float* prepared;             // in that order
  int64_t each;                // floats of one
};

void prepare_one(const void* job, int64_t task, float*) {
  const Plan& p = *static_cast<const Plan*>(job);
  const Place& v = p.order[size_t(task)];
  p.kernels->prepare(p.job->bank, p.job->x + v.row * p.job->bank.cols, v.which, v.together, p.prepared + (task - v.which) * p.each);
}

void multiply_item(const void* job, int64_t task, float* scratch) {
  const Plan& p = *static_cast<const Plan*>(job);
  const Bank& b = p.job->bank;
  const Item& item = p.items[size_t(task)];
  for (int64_t strip = item.first; strip < item.last; ++strip) {
    float sums[kMostTogether][kMostRows];
    p.kernels->multiply({&b, strip_of(b, item.matrix, strip), p.prepared + item.from * p.each, item.together,
                         b.scales[item.matrix], sums, scratch});
    const int64_t rows = std::min<int64_t>(high(b), b.rows - strip * high(b));
    for (int64_t t = 0; t < item.together; ++t)
      std::memcpy(p.job->y + p.order[size_t(item.from + t)].row * b.rows + strip * high(b), sums[t], size_t(rows) * 4);
  }
}

// Rows of x sorted by matrix, so many of one matrix at a time as the kernels take; strips cut so that every thread gets several items.
void plan_work(Plan& p, int threads) {
  const Multiply& m = *p.job;
  const Bank& b = m.bank;
  std::vector<int64_t> end(size_t(b.count) + 1, 0);
  for (int64_t s = 0; s < m.batch; ++s)
    if (m.slots[s] >= 0) end[size_t(m.slots[s]) + 1]++;
  int64_t passes = 0;
  const int64_t together = p.kernels->together;
  for (size_t i = 1; i < end.size(); ++i) {
    passes += (end[i] + together - 1) / together;
    end[i] += end[i - 1];
  }
  p.order.resize(size_t(end.back()));
  std::vector<int64_t> next(end.begin(), end.end() - 1);
  for (int64_t s = 0; s < m.batch; ++s)
    if (m.slots[s] >= 0) {
      const auto matrix = size_t(m.slots[s]);
      const int64_t at = next[matrix]++, before = (at - end[matrix]) / together * together;
      p.order[size_t(at)] = {s, at - end[matrix] - before, std::min(together, end[matrix + 1] - end[matrix] - before)};
    }
  const int64_t strips = down(b), step = std::max<int64_t>(1, passes * strips / (8 * threads));
  for (int64_t matrix = 0; matrix < b.count; ++matrix)
    for (int64_t from = end[size_t(matrix)]; from < end[size_t(matrix) + 1]; from += together)
      for (int64_t first = 0; first < strips; first += step)
        p.items.push_back({matrix, first, std::min(first + step, strips), from, std::min(together, end[size_t(matrix) + 1] - from)});
}

int run_tasks(int64_t tasks, void (*run)(const void*, int64_t, float*), const void* job, int64_t scratch, Parallel parallel, int threads) {
  Pool pool;
  pool.tasks = tasks;
  pool.run = run;
  pool.job = job;
  pool.scratch_floats = scratch;
  return spread(pool, parallel, int(std::min<int64_t>(threads, tasks)));
}

INLINE uint16_t to_bfloat16(float f) {  // to nearest, ties to even, as torch
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

FAST void write_floats(const int8_t* levels, int64_t count, float scale, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = float(levels[i]) * kStep * scale;
}

FAST void write_bfloat16(const int8_t* levels, int64_t count, float scale, uint16_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = to_bfloat16(float(levels[i]) * kStep * scale);
}

constexpr int64_t kLine = kSegment * 16 + 64;  // bytes from one row of levels to the next, for the widest tiles

void dequantize_strip(const void* job, int64_t task, float* scratch) {
  const Dequantize& d = *static_cast<const Dequantize*>(job);
  const Bank& b = d.bank;
  const int64_t strips = (d.last - d.first + high(b) - 1) / high(b), i = task / strips, top = d.first + task % strips * high(b);
  const int64_t rows = std::min<int64_t>(high(b), d.last - top), tiles = across(b);
  auto* levels = reinterpret_cast<int8_t*>(scratch);
  for (int64_t first = 0; first < tiles; first += kSegment) {
    const int64_t part = std::min(kSegment, tiles - first), cols = std::min(part * wide(b), b.cols - first * wide(b));
    kernels().decode(b, strip_of(b, d.index[i], top / high(b)) + first * tile_bytes(b), part, levels, kLine);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (i * (d.last - d.first) + top - d.first + r) * b.cols + first * wide(b);
      if (d.type == kFloat32) {
        write_floats(levels + r * kLine, cols, b.scales[d.index[i]], static_cast<float*>(d.out) + at);
      } else {
        write_bfloat16(levels + r * kLine, cols, b.scales[d.index[i]], static_cast<uint16_t*>(d.out) + at);
      }
    }
  }
}

// ---- rotation ------------------------------------------------------------------------------------------------------

typedef float Four __attribute__((vector_size(16), aligned(4)));
#if defined(__clang__)
#define SHUFFLE(v, a, b, c, d) __builtin_shufflevector(v, v, a, b, c, d)
#else
#define SHUFFLE(v, a, b, c, d) __builtin_shuffle(v, (Integers4){a, b, c, d})
typedef int32_t Integers4 __attribute__((vector_size(16)));
#endif

// Sums and differences of numbers `HALF` apart, several of them (a T) at a time.
template <class T, int N, int HALF>
INLINE void butterflies(float* x) {
  constexpr int lanes = int(sizeof(T) / sizeof(float));
#pragma GCC unroll 32
  for (int i = 0; i < N / 2 / lanes; ++i) {
    float* at = x + i * lanes / HALF * (2 * HALF) + i * lanes % HALF;
    T a, b;
    std::memcpy(&a, at, sizeof a);
    std::memcpy(&b, at + HALF, sizeof b);
    const T sum = a + b, difference = a - b;
    std::memcpy(at, &sum, sizeof sum);
    std::memcpy(at + HALF, &difference, sizeof difference);
  }
}

// In place, without the factor 1 / sqrt(N).
template <int N>
INLINE void hadamard(float* x) {
  if constexpr (N >= 128) butterflies<Vector, N, 64>(x);
  if constexpr (N >= 64) butterflies<Vector, N, 32>(x);
  if constexpr (N >= 32) butterflies<Vector, N, 16>(x);
  if constexpr (N >= 16) butterflies<Four, N, 8>(x);
  if constexpr (N >= 8) butterflies<Four, N, 4>(x);
  if constexpr (N == 2) butterflies<float, N, 1>(x);
  if constexpr (N >= 4)
#pragma GCC unroll 32
    for (int i = 0; i < N; i += 4) {
      Four v;
      std::memcpy(&v, x + i, sizeof v);
      v = SHUFFLE(v, 2, 3, 0, 1) + v * Four{1, 1, -1, -1};
      v = SHUFFLE(v, 1, 0, 3, 2) + v * Four{1, -1, 1, -1};
      std::memcpy(x + i, &v, sizeof v);
    }
}

template <int N>
INLINE void rotate_block(const Rotate& r, int64_t row, int64_t at) {
  const float norm = 1 / std::sqrt(float(N));
  const float* sign = r.sign + at;
  float block[N];
  if (r.type == kFloat32) {
    std::memcpy(block, static_cast<const float*>(r.x) + row * r.size + at, sizeof block);
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(r.x) + row * r.size + at;
    uint32_t bits[N];
    for (int i = 0; i < N; ++i) bits[i] = uint32_t{from[i]} << 16;
    std::memcpy(block, bits, sizeof block);
  }
  if (!r.undo)
    for (int i = 0; i < N; ++i) block[i] *= sign[i];
  hadamard<N>(block);
  for (int i = 0; i < N; ++i) block[i] *= norm;
  if (r.undo)
    for (int i = 0; i < N; ++i) block[i] *= sign[i];
  std::memcpy(r.out + row * r.size + at, block, sizeof block);
}

FAST void rotate_row(const Rotate& r, int64_t row) {
  int64_t at = 0;
  for (; at + 128 <= r.size; at += 128) rotate_block<128>(r, row, at);
  const int64_t rest = r.size - at;
  if (rest & 64) rotate_block<64>(r, row, at), at += 64;
  if (rest & 32) rotate_block<32>(r, row, at), at += 32;
  if (rest & 16) rotate_block<16>(r, row, at), at += 16;
  if (rest & 8) rotate_block<8>(r, row, at), at += 8;
  if (rest & 4) rotate_block<4>(r, row, at), at += 4;
  if (rest & 2) rotate_block<2>(r, row, at), at += 2;
  if (rest & 1) rotate_block<1>(r, row, at);
}

int64_t rows_a_task(const Rotate& r) { return std::max<int64_t>(1, (kAlone / 4) / r.size); }

void rotate_task(const void* job, int64_t task, float*) {
  const Rotate& r = *static_cast<const Rotate*>(job);
  const int64_t first = task * rows_a_task(r), last = std::min(first + rows_a_task(r), r.count);
  for (int64_t row = first; row < last; ++row) rotate_row(r, row);
}

}  // namespace

#define EXPORT __attribute__((visibility("default")))

extern "C" {

EXPORT int moec_trellis_matmul_interface() { return kInterface; }

EXPORT const char* moec_trellis_matmul_name() { return kernels().name; }

// Choose "amx", "avx512_vbmi" or "portable", for tests; not kGood if this machine lacks it.
EXPORT int moec_trellis_matmul_choose(const char* name) {
  for (const Kernels* set : available())
    if (std::strcmp(set->name, name) == 0) {
      chosen.store(set);
      return kGood;
    }
  return kBadSize;
}

// y [batch, rows] = for every s, matrix slots[s] times x[s]; zeros where slots[s] is -1.
EXPORT int moec_trellis_multiply(const Multiply* job, Parallel parallel, int threads) try {
  const Multiply& m = *job;
  const Bank& b = m.bank;
  if (!is_valid(b)) return kBadBank;
  if (!has_bytes(m.x, m.x_bytes, m.batch, b.cols, 4) || !has_bytes(m.y, m.y_bytes, m.batch, b.rows, 4) ||
      !has_bytes(m.slots, m.slots_bytes, m.batch, 1, 4))
    return kBadSize;
  for (int64_t s = 0; s < m.batch; ++s)
    if (m.slots[s] < -1 || m.slots[s] >= b.count) return kBadSlot;
  for (int64_t s = 0; s < m.batch; ++s)
    if (m.slots[s] < 0) std::fill(m.y + s * b.rows, m.y + (s + 1) * b.rows, 0.0f);
  Plan p{&m, &kernels(), {}, {}, nullptr, kernels().prepared_floats(b)};
  plan_work(p, std::max(threads, 1));
  if (p.items.empty()) return kGood;
  const int64_t vectors = int64_t(p.order.size());
  std::vector<float> room(size_t(vectors * p.each + kLane));
  p.prepared = room.data() + (kLane - reinterpret_cast<uintptr_t>(room.data()) / sizeof(float) % kLane) % kLane;
  int status = run_tasks(vectors, prepare_one, &p, 0, parallel, vectors * b.cols < kAlone ? 1 : threads);
  if (status != kGood) return status;
  const int64_t weights = vectors * b.rows * b.cols;
  return run_tasks(int64_t(p.items.size()), multiply_item, &p, p.kernels->scratch_floats, parallel, weights < kAlone ? 1 : threads);
} catch (const std::bad_alloc&) {
  return kNoMemory;
}

// Rows first ... last - 1 of chosen matrices, rotation not undone.
EXPORT int moec_trellis_dequantize(const Dequantize* job, Parallel parallel, int threads) {
  const Dequantize& d = *job;
  const Bank& b = d.bank;
  if (!is_valid(b)) return kBadBank;
  if ((d.type != kFloat32 && d.type != kBfloat16) || d.first < 0 || d.last < d.first || d.last > b.rows || d.first % high(b) != 0)
    return kBadSize;
  int64_t weights;
  if (__builtin_mul_overflow(d.last - d.first, b.cols, &weights) || !has_bytes(d.index, d.index_bytes, d.chosen, 1, 8) ||
      !has_bytes(d.out, d.out_bytes, d.chosen, weights, d.type == kFloat32 ? 4 : 2))
    return kBadSize;
  for (int64_t i = 0; i < d.chosen; ++i)
    if (d.index[i] < 0 || d.index[i] >= b.count) return kBadSlot;
  const int64_t strips = (d.last - d.first + high(b) - 1) / high(b);
  return run_tasks(d.chosen * strips, dequantize_strip, &d, kMostRows * kLine / 4, parallel, d.chosen * weights < kAlone ? 1 : threads);
}

// out[s] = H (sign * x[s]), or sign * (H x[s]): blockwise orthonormal Hadamard, blocks of 128, then the binary digits of the rest.
EXPORT int moec_trellis_rotate(const Rotate* job, Parallel parallel, int threads) {
  const Rotate& r = *job;
  if ((r.type != kFloat32 && r.type != kBfloat16) || r.size < 1 || !has_bytes(r.sign, r.sign_bytes, r.size, 1, 4) ||
      !has_bytes(r.x, r.x_bytes, r.count, r.size, r.type == kFloat32 ? 4 : 2) || !has_bytes(r.out, r.out_bytes, r.count, r.size, 4))
    return kBadSize;
  const int64_t step = rows_a_task(r);
  return run_tasks((r.count + step - 1) / step, rotate_task, &r, 0, parallel, r.count * r.size < kAlone ? 1 : threads);
}

}  // extern "C"

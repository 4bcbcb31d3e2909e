// Tail-biting Viterbi search for the bitshift trellis code (QTIP, arXiv:2406.11235), many tiles of 256 weights at once.
//
// A tile is 256 / V steps; each step appends B bits to a window of L = 12 bits, and the window selects V values from a table:
// B / V bits a weight. The search keeps the cost of every window. Windows that differ only in their B oldest bits have the
// same continuations, so a step is: the cheapest of 2^B windows for each of the 2^(L-B) overlaps (the winner's number sits in
// the lowest bits of the float that is compared), then the cost of the step's V values for all 2^L windows.
// Tail-biting: a first search on the tile rolled by half finds the overlap at the seam, a second one is held to it.
// The plain-torch decoder is in pack/trellis.py; the tests hold this file to it and to an exhaustive search.
#include "pool.h"

#include <cstdint>
#include <cstring>

namespace {

constexpr int kInterface = 1;
constexpr int kWindow = 12;
constexpr int kStates = 1 << kWindow;
constexpr int kTile = 256;
constexpr float kFar = 1e30f;  // cost of what is not allowed
constexpr float kStart = 1.0f;  // positive costs compare like the integers of their bits

typedef int32_t Integers __attribute__((vector_size(64), aligned(4)));
typedef uint8_t Bytes __attribute__((vector_size(16), aligned(1)));

INLINE Integers load_bits(const float* p) {
  Integers v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

struct Encode {
  const float* values;  // [n, 256] in the order of the steps
  const float* table;   // [V, 4096]: the values of every window
  uint8_t* stream;      // [n, 256 / V * B / 8 bytes]
  float* decoded;       // [n, 256]
  int64_t count;
  int32_t bits;         // B
  int32_t vector;       // V
};

struct Search {
  float* cost;    // [4096]
  float* best;    // [4096 / 2 + 16], by overlap
  uint8_t* back;  // [steps, overlaps]: which window an overlap came from
  uint16_t* path; // [steps]: the windows found
};

template <int B>
INLINE void cheapest(const Search& s, uint8_t* back) {
  constexpr int overlaps = kStates >> B, choices = 1 << B;
  for (int q = 0; q < overlaps; q += kLane) {
    Integers least = load_bits(s.cost + q) & ~(choices - 1);
    for (int h = 1; h < choices; ++h) {
      const Integers other = (load_bits(s.cost + h * overlaps + q) & ~(choices - 1)) | h;
      least = other < least ? other : least;
    }
    std::memcpy(s.best + q, &least, sizeof least);
    const Bytes winners = __builtin_convertvector(least & (choices - 1), Bytes);
    std::memcpy(back + q, &winners, sizeof winners);
  }
}

template <int B, int V>
INLINE void extend(const Search& s, const float* values, const float* table) {
  Vector wanted[V];
  for (int v = 0; v < V; ++v) wanted[v] = Vector{} + values[v];
  Integers spread;
  for (int lane = 0; lane < kLane; ++lane) spread[lane] = lane >> B;
  for (int state = 0; state < kStates; state += kLane) {
    Vector total;
    if constexpr (B >= 4) {
      total = Vector{} + s.best[state >> B];
    } else {
      total = __builtin_shuffle(load(s.best + (state >> B)), spread);
    }
    for (int v = 0; v < V; ++v) {
      const Vector off = wanted[v] - load(table + v * kStates + state);
      total += off * off;
    }
    store(s.cost + state, total);
  }
}

// One search over a tile; overlap: the L - B bits that enter the first step and must leave the last one, or -1.
template <int B, int V>
INLINE void search(const Search& s, const float* values, int64_t roll, const float* table, int overlap) {
  constexpr int overlaps = kStates >> B, steps = kTile / V;
  for (int q = 0; q < overlaps; ++q) s.best[q] = overlap < 0 || q == overlap ? kStart : kFar;
  std::memset(s.back, 0, overlaps);
  for (int step = 0; step < steps; ++step) {
    if (step > 0) cheapest<B>(s, s.back + step * overlaps);
    extend<B, V>(s, values + (step * V + roll) % kTile, table);
  }
  int last = overlap < 0 ? 0 : overlap;
  const int stride = overlap < 0 ? 1 : overlaps;
  for (int state = last; state < kStates; state += stride) {
    if (s.cost[state] < s.cost[last]) last = state;
  }
  for (int step = steps - 1; step >= 0; --step) {
    s.path[step] = static_cast<uint16_t>(last);
    const int q = last >> B;
    last = s.back[step * overlaps + q] * overlaps + q;
  }
}

template <int B, int V>
INLINE void encode_tile(const Encode& e, int64_t tile, const Search& s) {
  constexpr int steps = kTile / V, overlaps = kStates >> B;
  const float* values = e.values + tile * kTile;
  search<B, V>(s, values, kTile / 2, e.table, -1);
  const int overlap = s.path[steps / 2 - 1] & (overlaps - 1);
  search<B, V>(s, values, 0, e.table, overlap);
  uint8_t* stream = e.stream + tile * (steps * B / 8);
  std::memset(stream, 0, steps * B / 8);
  for (int step = 0; step < steps; ++step) {
    for (int bit = 0; bit < B; ++bit) {  // oldest first
      const int at = step * B + bit;
      stream[at / 8] |= static_cast<uint8_t>((s.path[step] >> (B - 1 - bit) & 1) << at % 8);
    }
    for (int v = 0; v < V; ++v) e.decoded[tile * kTile + step * V + v] = e.table[v * kStates + s.path[step]];
  }
}

FAST void encode_any(const Encode& e, int64_t tile, const Search& s) {
  switch (e.vector * 16 + e.bits) {
    case 1 * 16 + 3: return encode_tile<3, 1>(e, tile, s);
    case 1 * 16 + 4: return encode_tile<4, 1>(e, tile, s);
    case 2 * 16 + 1: return encode_tile<1, 2>(e, tile, s);
    case 2 * 16 + 2: return encode_tile<2, 2>(e, tile, s);
    case 2 * 16 + 3: return encode_tile<3, 2>(e, tile, s);
    case 2 * 16 + 4: return encode_tile<4, 2>(e, tile, s);
    case 2 * 16 + 5: return encode_tile<5, 2>(e, tile, s);
    case 4 * 16 + 3: return encode_tile<3, 4>(e, tile, s);
    case 4 * 16 + 5: return encode_tile<5, 4>(e, tile, s);
  }
}

constexpr int64_t kBackFloats = kTile / 2 * (kStates / 2) / 4;

void encode_task(const void* job, int64_t tile, float* scratch) {
  float* best = scratch + kStates;
  float* back = best + kStates / 2 + kLane;
  float* path = back + kBackFloats;
  encode_any(*static_cast<const Encode*>(job), tile,
             Search{scratch, best, reinterpret_cast<uint8_t*>(back), reinterpret_cast<uint16_t*>(path)});
}

bool known(int bits, int vector) {
  if (vector == 1) return bits == 3 || bits == 4;
  if (vector == 2) return bits >= 1 && bits <= 5;
  return vector == 4 && (bits == 3 || bits == 5);
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int moec_trellis_interface() { return kInterface; }

__attribute__((visibility("default"))) int moec_trellis_encode(const Encode* e, Parallel parallel, int threads) {
  if (e->count < 0 || !known(e->bits, e->vector)) return kBadSize;
  Pool pool;
  pool.tasks = e->count;
  pool.run = encode_task;
  pool.job = e;
  pool.scratch_floats = kStates + kStates / 2 + kLane + kBackFloats + kTile;
  return spread(pool, parallel, threads);
}

}  // extern "C"

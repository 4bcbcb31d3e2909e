// Tail-biting Viterbi search for the bitshift trellis code (QTIP, arXiv:2406.11235), many tiles of 256 weights at once.
//
// A tile is 256 / V steps; each step appends B bits to a window of L = 12 bits, and the window selects V values from a table:
// B / V bits a weight. The search keeps, for every overlap (the L - B newest bits), the cost of the best window that has it:
// of the 2^B windows that differ only in their B oldest bits, whose continuations are the same. A step computes the cost of all
// 2^L windows, |values|^2 + |table|^2 - 2 values . table more than that of the overlap they begin with, and keeps the cheapest
// of each 2^B in registers; the winner's number sits in the lowest bits of the float that is compared. Two tiles at a time
// share what is read of the table.
// Tail-biting: a first search over the steps around the seam finds the overlap there, a second one, of all steps, is held to it.
// The plain-torch decoder is in pack/trellis.py; the tests hold this file to it and to an exhaustive search.
#include "pool.h"
#include "trellis_codes.h"

#include <cstdint>
#include <cstring>

namespace {

constexpr int kInterface = 2;
constexpr int kWindow = 12;
constexpr int kStates = 1 << kWindow;
constexpr int kTile = 256;
constexpr float kFar = 1e30f;  // cost of what is not allowed
constexpr float kStart = 1.0f;  // positive costs compare like the integers of their bits

typedef int32_t Integers __attribute__((vector_size(64), aligned(4)));
typedef uint8_t Bytes __attribute__((vector_size(16), aligned(1)));

template <class To, class From>
INLINE To bits(From from) {
  To to;
  static_assert(sizeof to == sizeof from, "the same bits");
  std::memcpy(&to, &from, sizeof to);
  return to;
}

struct Encode {
  const float* values;  // [n, 256] in the order of the steps
  const float* table;   // [V + 1, 4096]: the values of every window, and the sum of their squares
  uint8_t* stream;      // [n, 256 / V * B / 8 bytes]
  float* decoded;       // [n, 256]
  int64_t count;
  int32_t bits;         // B
  int32_t vector;       // V
};

struct Search {
  float* cost[2];  // [4096 / 2 + 16] before and after a step, by overlap
  uint8_t* back;   // [steps, overlaps]: which window an overlap came from
  uint16_t* path;  // [steps]: the windows found
};

// The cheapest windows of one step of T tiles. energy: what the next step's values add to every cost, the sum of their squares.
template <int B, int V, int T>
INLINE void advance(const Search* s, int turn, int64_t row, const float (*values)[V], const float* energy, const float* table) {
  constexpr int overlaps = kStates >> B, choices = 1 << B;
  Integers spread;
  for (int lane = 0; lane < kLane; ++lane) spread[lane] = lane >> B;
  Vector pull[T][V];
  for (int k = 0; k < T; ++k) {
    for (int v = 0; v < V; ++v) pull[k][v] = Vector{} - 2 * values[k][v];
  }
  for (int q = 0; q < overlaps; q += kLane) {
    Integers least[T];
    for (int h = 0; h < choices; ++h) {
      const int state = h * overlaps + q;
      const Vector squares = load(table + V * kStates + state);
      for (int k = 0; k < T; ++k) {
        const float* cost = s[k].cost[turn] + (state >> B);
        Vector total;
        if constexpr (B >= 4) {
          total = squares + *cost;
        } else {
          total = squares + __builtin_shuffle(load(cost), spread);
        }
        for (int v = 0; v < V; ++v) total += load(table + v * kStates + state) * pull[k][v];
        const Integers one = (bits<Integers>(total) & ~(choices - 1)) | h;
        least[k] = h == 0 ? one : one < least[k] ? one : least[k];
      }
    }
    for (int k = 0; k < T; ++k) {
      store(s[k].cost[1 - turn] + q, bits<Vector>(least[k]) + energy[k]);
      const Bytes winners = __builtin_convertvector(least[k] & (choices - 1), Bytes);
      std::memcpy(s[k].back + row * overlaps + q, &winners, sizeof winners);
    }
  }
}

// Search `count` steps of T tiles from step `first` on (in a circle). overlap: the bits that enter the first step and must
// leave the last one, or -1.
template <int B, int V, int T>
INLINE void search(const Search* s, const float* tiles, int64_t first, int count, const float* table, const int* overlap) {
  constexpr int overlaps = kStates >> B, steps = kTile / V;
  float values[T][V], energy[T];
  const auto take = [&](int step) {
    for (int k = 0; k < T; ++k) {
      energy[k] = 0;
      for (int v = 0; v < V; ++v) {
        values[k][v] = tiles[k * kTile + (first + step) % steps * V + v];
        energy[k] += values[k][v] * values[k][v];
      }
    }
  };
  take(0);
  for (int k = 0; k < T; ++k) {
    for (int q = 0; q < overlaps; ++q) s[k].cost[0][q] = energy[k] + (overlap[k] < 0 || q == overlap[k] ? kStart : kFar);
  }
  for (int step = 0; step < count; ++step) {
    float now[T][V];
    std::memcpy(now, values, sizeof now);
    if (step + 1 < count) take(step + 1);
    advance<B, V, T>(s, step % 2, step, now, energy, table);
  }
  for (int k = 0; k < T; ++k) {
    const float* cost = s[k].cost[count % 2];
    int q = overlap[k];
    if (q < 0) q = static_cast<int>(std::min_element(cost, cost + overlaps) - cost);
    for (int step = count - 1; step >= 0; --step) {
      const int state = s[k].back[step * overlaps + q] * overlaps + q;
      s[k].path[step] = static_cast<uint16_t>(state);
      q = state >> B;
    }
  }
}

template <int B, int V, int T>
INLINE void encode_tiles(const Encode& e, int64_t tile, const Search* s) {
  constexpr int steps = kTile / V, overlaps = kStates >> B;
  // Five windows' lengths on either side of the seam, and survivors have long met.
  constexpr int side = std::min(steps / 2, (5 * kWindow + B - 1) / B);
  const float* values = e.values + tile * kTile;
  int overlap[T];
  for (int k = 0; k < T; ++k) overlap[k] = -1;
  search<B, V, T>(s, values, steps - side, 2 * side, e.table, overlap);
  for (int k = 0; k < T; ++k) overlap[k] = s[k].path[side - 1] & (overlaps - 1);
  search<B, V, T>(s, values, 0, steps, e.table, overlap);
  for (int k = 0; k < T; ++k) {
    uint8_t* stream = e.stream + (tile + k) * (steps * B / 8);
    std::memset(stream, 0, steps * B / 8);
    for (int step = 0; step < steps; ++step) {
      const int state = s[k].path[step];
      for (int bit = 0; bit < B; ++bit) {  // oldest first
        const int at = step * B + bit;
        stream[at / 8] |= static_cast<uint8_t>((state >> (B - 1 - bit) & 1) << at % 8);
      }
      for (int v = 0; v < V; ++v) e.decoded[(tile + k) * kTile + step * V + v] = e.table[v * kStates + state];
    }
  }
}

template <int B, int V>
INLINE void encode_pair(const Encode& e, int64_t pair, const Search* s) {
  if (2 * pair + 1 < e.count) {
    encode_tiles<B, V, 2>(e, 2 * pair, s);
  } else {
    encode_tiles<B, V, 1>(e, 2 * pair, s);
  }
}

FAST void encode_any(const Encode& e, int64_t pair, const Search* s) {
#define MOEC_CASE(B, V) \
  case code_number(B, V): return encode_pair<B, V>(e, pair, s);
  switch (code_number(e.bits, e.vector)) { MOEC_TRELLIS_CODES(MOEC_CASE) }
#undef MOEC_CASE
}

constexpr int64_t kCosts = kStates / 2 + kLane;
constexpr int64_t kBackFloats = kTile / 2 * (kStates / 2) / 4;
constexpr int64_t kSearchFloats = 2 * kCosts + kBackFloats + kTile;

void encode_task(const void* job, int64_t pair, float* scratch) {
  Search searches[2];
  for (Search& s : searches) {
    s.cost[0] = scratch;
    s.cost[1] = scratch + kCosts;
    s.back = reinterpret_cast<uint8_t*>(scratch + 2 * kCosts);
    s.path = reinterpret_cast<uint16_t*>(scratch + 2 * kCosts + kBackFloats);
    scratch += kSearchFloats;
  }
  encode_any(*static_cast<const Encode*>(job), pair, searches);
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int moec_trellis_interface() { return kInterface; }

__attribute__((visibility("default"))) int moec_trellis_encode(const Encode* e, Parallel parallel, int threads) {
  if (e->count < 0 || !known(e->bits, e->vector)) return kBadSize;
  Pool pool;
  pool.tasks = (e->count + 1) / 2;
  pool.run = encode_task;
  pool.job = e;
  pool.scratch_floats = 2 * kSearchFloats;
  return spread(pool, parallel, threads);
}

}  // extern "C"

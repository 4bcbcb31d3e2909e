// What outliers add to products with packed integers (pack/SPEC.md, section 11).
//
// Row after row of x: y[r] += value[i][r] * x[start[i] + column[i][r]] for the k outliers i of every row r of its matrix. The
// k are outermost in memory, so 16 rows go side by side. x comes padded to whole segments: a byte cannot point outside.
#include "pool.h"

#include <cstdint>
#include <cstring>

namespace {

constexpr int kInterface = 1;
constexpr int64_t kSegment = 256;  // columns that one byte can tell apart
constexpr int64_t kStrip = 256;    // rows of a task

struct Outliers {
  const float* x;           // [batch, segments * kSegment]
  const int32_t* slots;     // [batch] which matrix, -1: none
  const uint16_t* values;   // [count, k, rows] bfloat16
  const uint8_t* columns;   // [count, k, rows]
  const int64_t* segment;   // [k] which segment each outlier is in
  float* y;                 // [batch, rows] added to
  int64_t batch, count, k, rows, segments;
};

FAST void add(const uint16_t* values, const uint8_t* columns, const float* x, float* y, int64_t rows) {
#pragma GCC ivdep
  for (int64_t r = 0; r < rows; ++r) {
    const uint32_t bits = static_cast<uint32_t>(values[r]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    y[r] += value * x[columns[r]];
  }
}

void task(const void* job, int64_t number, float*) {
  const Outliers& o = *static_cast<const Outliers*>(job);
  const int64_t strips = (o.rows + kStrip - 1) / kStrip;
  const int64_t s = number / strips, first = number % strips * kStrip, rows = std::min(kStrip, o.rows - first);
  const int64_t slot = o.slots[s];
  if (slot < 0) return;
  for (int64_t i = 0; i < o.k; ++i) {
    const int64_t at = (slot * o.k + i) * o.rows + first;
    add(o.values + at, o.columns + at, o.x + (s * o.segments + o.segment[i]) * kSegment, o.y + s * o.rows + first, rows);
  }
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int moec_outliers_interface() { return kInterface; }

__attribute__((visibility("default"))) int moec_outliers_add(const Outliers* o, Parallel parallel, int threads) {
  if (o->batch < 0 || o->count < 0 || o->k < 0 || o->rows < 1 || o->segments < 1) return kBadSize;
  for (int64_t i = 0; i < o->k; ++i) {
    if (o->segment[i] < 0 || o->segment[i] >= o->segments) return kBadOrder;
  }
  for (int64_t s = 0; s < o->batch; ++s) {
    if (o->slots[s] < -1 || o->slots[s] >= o->count) return kBadOrder;
  }
  Pool pool;
  pool.tasks = o->batch * ((o->rows + kStrip - 1) / kStrip);
  pool.run = task;
  pool.job = o;
  pool.scratch_floats = 1;
  return spread(pool, parallel, threads);
}

}  // extern "C"

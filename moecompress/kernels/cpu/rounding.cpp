// Rounding with error feedback (GPTQ), coordinate descent, scale search and scale refit, for many experts at once.
//
// Rows are independent: a task is a few rows of one expert, and tasks are handed out to the threads of torch's own OpenMP
// pool. Columns are processed in blocks: inside a block every column updates the rest of the block, and after it one
// rank-BLOCK update of the columns behind runs from registers. The plain-torch version of every function here is in
// quantize/gptq.py and quantize/grid.py; the tests hold the two together.
#include "pool.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kInterface = 4;
constexpr int64_t kRows = 8;    // rows of a task: they share every row of the matrix that is streamed
constexpr int64_t kBlock = 32;  // columns between two updates of everything behind them
constexpr int kWidths = 3;      // numbers of bits that one nested code may serve
constexpr int kNestedCodes = 16;

struct Feedback {
  const float* values;    // [n, rows, widths, cols] weights (round) or pulls (descend), in the order of processing
  const float* matrix;    // [n, cols, cols] upper factor (round) or Hessian (descend), in the order of processing
  const float* scales;    // [n, rows, groups]
  const float* zeros;     // [n, rows, groups]
  const int64_t* order;   // [n, cols] column that is processed at each step, or null
  uint8_t* codes;         // [n, rows, cols] in the columns' own order; read by descend, written by both
  const float* balance;   // [widths] how much an error counts at bits - widths + 1, ..., bits bits; unused if widths is 1
  const uint8_t* exact;   // [n, rows, cols] in the columns' own order, or null: where rounding loses nothing; only if widths is 1
  int64_t count, rows, cols, groups, width;
  int32_t bits;
  int32_t descend;
  int32_t widths;         // 1, or of nested codes: the top bits - w bits of a code are rounded with their own feedback
};

INLINE float clamp_round(float x, float top) { return std::min(std::max(std::nearbyintf(x), 0.0f), top); }

// What nested codes stand for at each number of bits, in steps of the finest grid.
struct NestedLevels {
  float at[kWidths][kNestedCodes];
  NestedLevels(int bits, int widths) {
    for (int q = 0; q < widths; ++q) {
      const int dropped = widths - 1 - q;
      const float middle = static_cast<float>((1 << (bits - dropped)) - 1) / 2;
      for (int c = 0; c < kNestedCodes; ++c) at[q][c] = (1 << dropped) * (static_cast<float>(c >> dropped) - middle);
    }
  }
};

// The code with the least balanced error over all numbers of bits, given what is wanted at each.
template <int kCount>
INLINE int nearest_nested(const NestedLevels& levels, const Feedback& f, const float* wanted, float s) {
  float cost[kNestedCodes] = {};
  for (int q = 0; q < kCount; ++q) {
    for (int c = 0; c < kNestedCodes; ++c) {
      const float d = s * levels.at[q][c] - wanted[q];
      cost[c] += f.balance[q] * d * d;
    }
  }
  int best = 0;
  for (int c = 1; c < 1 << f.bits; ++c) best = cost[c] < cost[best] ? c : best;
  return best;
}

// One task: n rows of work, those of rows first, first + 1, ... of expert e at all widths. work: kRows x stride floats.
// errors: kRows x kBlock floats. kCount: f.widths.
template <int kCount>
INLINE void feedback_rows(const Feedback& f, int64_t e, int64_t first, int64_t n, float* work, float* errors) {
  const int64_t cols = f.cols, stride = (cols + kLane - 1) / kLane * kLane;
  const float top = static_cast<float>((1 << f.bits) - 1);
  const float* matrix = f.matrix + e * cols * cols;
  const NestedLevels levels(f.bits, kCount);
  for (int64_t r = 0; r < n; ++r) {
    std::memcpy(work + r * stride, f.values + ((e * f.rows + first) * kCount + r) * cols, cols * sizeof(float));
  }
  for (int64_t begin = 0; begin < cols; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, cols);
    std::fill(errors, errors + kRows * kBlock, 0.0f);
    for (int64_t j = begin; j < end; ++j) {
      const float* line = matrix + j * cols;
      const float pivot = line[j];
      const int64_t column = f.order ? f.order[e * cols + j] : j;
      const int64_t group = column / f.width;
      for (int64_t r = 0; r < n; r += kCount) {
        const int64_t row = e * f.rows + first + r / kCount;
        const float s = f.scales[row * f.groups + group], z = f.zeros[row * f.groups + group];
        uint8_t& code = f.codes[row * cols + column];
        float* w = work + r * stride;
        float error[kCount];
        if constexpr (kCount > 1) {
          const int old = code;
          float wanted[kCount];
          for (int q = 0; q < kCount; ++q) {
            wanted[q] = f.descend ? s * levels.at[q][old] + w[q * stride + j] / pivot : w[q * stride + j];
          }
          const int fresh = nearest_nested<kCount>(levels, f, wanted, s);
          for (int q = 0; q < kCount; ++q) {
            const float value = s * levels.at[q][fresh];
            error[q] = f.descend ? value - s * levels.at[q][old] : (wanted[q] - value) / pivot;
          }
          code = static_cast<uint8_t>(fresh);
        } else if (f.descend) {
          const float old = static_cast<float>(code);
          const float fresh = clamp_round((s * (old - z) + w[j] / pivot) / s + z, top);
          error[0] = s * (fresh - old);
          code = static_cast<uint8_t>(fresh);
        } else {
          const float fresh = clamp_round(w[j] / s + z, top);
          error[0] = f.exact && f.exact[row * cols + column] ? 0.0f : (w[j] - s * (fresh - z)) / pivot;
          code = static_cast<uint8_t>(fresh);
        }
        for (int q = 0; q < kCount; ++q, w += stride) {
          errors[(r + q) * kBlock + j - begin] = error[q];
          for (int64_t k = j + 1; k < end; ++k) w[k] -= error[q] * line[k];
        }
      }
    }
    int64_t k = end;
    for (; k + kLane <= cols; k += kLane) {
      Vector total[kRows];
      for (int64_t r = 0; r < kRows; ++r) total[r] = load(work + r * stride + k);
      for (int64_t b = 0; b < end - begin; ++b) {
        const Vector u = load(matrix + (begin + b) * cols + k);
        for (int64_t r = 0; r < kRows; ++r) total[r] -= errors[r * kBlock + b] * u;
      }
      for (int64_t r = 0; r < kRows; ++r) store(work + r * stride + k, total[r]);
    }
    for (; k < cols; ++k) {
      for (int64_t r = 0; r < n; ++r) {
        float total = work[r * stride + k];
        for (int64_t b = 0; b < end - begin; ++b) total -= errors[r * kBlock + b] * matrix[(begin + b) * cols + k];
        work[r * stride + k] = total;
      }
    }
  }
}

FAST void plain_rows(const Feedback& f, int64_t e, int64_t first, int64_t n, float* work, float* errors) {
  feedback_rows<1>(f, e, first, n, work, errors);
}

FAST void rows_of_two_widths(const Feedback& f, int64_t e, int64_t first, int64_t n, float* work, float* errors) {
  feedback_rows<2>(f, e, first, n, work, errors);
}

FAST void rows_of_three_widths(const Feedback& f, int64_t e, int64_t first, int64_t n, float* work, float* errors) {
  feedback_rows<3>(f, e, first, n, work, errors);
}

struct Search {
  const float* weights;     // [n, rows, cols]
  const float* importance;  // [n, cols]
  const float* shrinks;
  float* scales;            // [n, rows, groups] out
  float* zeros;             // [n, rows, groups] out
  int64_t count, rows, cols, groups, width, tries, steps;
  int32_t bits;
  int32_t symmetric;
};

constexpr float kSmallest = 1e-30f;

// The best scale of one group of at most width weights, padded with zero weights of zero importance to whole vectors.
FAST void search_group(const Search& s, const float* w, const float* h, int64_t length, float* scale_out, float* zero_out) {
  const float top = static_cast<float>((1 << s.bits) - 1);
  float low = 0, high = 0, most = 0;
  for (int64_t i = 0; i < length; ++i) {
    low = std::min(low, w[i]);
    high = std::max(high, w[i]);
    most = std::max(most, h[i]);
  }
  const float floor = 1e-6f * std::max(most, kSmallest);
  float full, zero;
  if (s.symmetric) {
    full = std::max(std::max(-low, high) / (top / 2), kSmallest);
    zero = top / 2;
  } else {
    full = std::max((high - low) / top, kSmallest);
    zero = clamp_round(-low / full, top);
  }
  float best = INFINITY, scale = full;
  for (int64_t t = 0; t < s.tries; ++t) {
    const float trial = full * s.shrinks[t], inverse = 1.0f / trial;
    float total = 0;
#pragma GCC ivdep
    for (int64_t i = 0; i < length; ++i) {
      const float d = trial * (clamp_round(w[i] * inverse + zero, top) - zero) - w[i];
      total += (h[i] + floor) * d * d;
    }
    if (total < best) {
      best = total;
      scale = trial;
    }
  }
  for (int64_t step = 0; step < s.steps; ++step) {
    float up = 0, down = 0;
    for (int64_t i = 0; i < length; ++i) {
      const float level = clamp_round(w[i] / scale + zero, top) - zero;
      up += (h[i] + floor) * w[i] * level;
      down += (h[i] + floor) * level * level;
    }
    if (up > 0 && down > 0) scale = std::max(up / std::max(down, kSmallest), kSmallest);
  }
  *scale_out = scale;
  *zero_out = zero;
}

struct Refit {
  const uint8_t* codes;   // [n, rows, cols]
  const float* zeros;     // [n, rows, groups]
  const float* matrix;    // [n, cols, cols] Hessian
  const float* target;    // [n, rows, cols] weights times Hessian
  const float* scales;    // [n, rows, groups] the present ones
  float* steps;           // [n, rows] in and out: row scales
  uint8_t* factors;       // [n, rows, groups] in and out: multipliers, or null if a row is one group
  int64_t count, rows, cols, groups, width;
};

float to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits += 0x7fff + ((bits >> 16) & 1);
  bits &= 0xffff0000u;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Solve (left + ridge) x = right for a symmetric positive definite matrix [g, g]; false if it is not one.
bool solve(double* left, const double* right, double* x, int64_t g) {
  double mean = 0;
  for (int64_t i = 0; i < g; ++i) mean += left[i * g + i] / g;
  for (int64_t i = 0; i < g; ++i) left[i * g + i] += left[i * g + i] * 1e-4 + mean * 1e-6 + 1e-30;
  for (int64_t j = 0; j < g; ++j) {
    for (int64_t i = j; i < g; ++i) {
      double total = left[i * g + j];
      for (int64_t k = 0; k < j; ++k) total -= left[i * g + k] * left[j * g + k];
      if (i == j) {
        if (!(total > 0)) return false;
        left[i * g + j] = std::sqrt(total);
      } else {
        left[i * g + j] = total / left[j * g + j];
      }
    }
  }
  for (int64_t i = 0; i < g; ++i) {
    double total = right[i];
    for (int64_t k = 0; k < i; ++k) total -= left[i * g + k] * x[k];
    x[i] = total / left[i * g + i];
  }
  for (int64_t i = g - 1; i >= 0; --i) {
    double total = x[i];
    for (int64_t k = i + 1; k < g; ++k) total -= left[k * g + i] * x[k];
    x[i] = total / left[i * g + i];
  }
  return true;
}

// Squared error under the Hessian, less what does not depend on the scales.
double scale_error(const double* left, const double* right, const double* scale, int64_t g) {
  double total = 0;
  for (int64_t i = 0; i < g; ++i) {
    double row = -2 * right[i];
    for (int64_t k = 0; k < g; ++k) row += left[i * g + k] * scale[k];
    total += row * scale[i];
  }
  return total;
}

// left[r][g][h] = levels in g · H · levels in h, right[r][g] = target · levels in g, for n rows of expert e.
FAST void normal_equations(const Refit& f, int64_t e, int64_t first, int64_t n, float* levels, double* left, double* right) {
  const int64_t cols = f.cols, stride = (cols + kLane - 1) / kLane * kLane, groups = f.groups;
  const float* matrix = f.matrix + e * cols * cols;
  for (int64_t r = 0; r < n; ++r) {
    const int64_t row = e * f.rows + first + r;
    for (int64_t j = 0; j < cols; ++j) {
      levels[r * stride + j] = static_cast<float>(f.codes[row * cols + j]) - f.zeros[row * groups + j / f.width];
    }
    for (int64_t g = 0; g < groups; ++g) {
      float total = 0;
      for (int64_t j = g * f.width; j < std::min((g + 1) * f.width, cols); ++j) {
        total += f.target[row * cols + j] * levels[r * stride + j];
      }
      right[r * groups + g] = total;
    }
  }
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = g * f.width, end = std::min(begin + f.width, cols);
    for (int64_t h = g; h < groups; ++h) {
      const int64_t stop = std::min((h + 1) * f.width, cols);
      Vector sums[kRows] = {};
      float rest[kRows] = {};
      int64_t k = h * f.width;
      for (; k + kLane <= stop; k += kLane) {
        Vector total[kRows] = {};
        for (int64_t j = begin; j < end; ++j) {
          const Vector u = load(matrix + j * cols + k);
          for (int64_t r = 0; r < kRows; ++r) total[r] += levels[r * stride + j] * u;
        }
        for (int64_t r = 0; r < kRows; ++r) sums[r] += total[r] * load(levels + r * stride + k);
      }
      for (; k < stop; ++k) {
        for (int64_t r = 0; r < n; ++r) {
          float total = 0;
          for (int64_t j = begin; j < end; ++j) total += levels[r * stride + j] * matrix[j * cols + k];
          rest[r] += total * levels[r * stride + k];
        }
      }
      for (int64_t r = 0; r < n; ++r) {
        double total = rest[r];
        for (int64_t lane = 0; lane < kLane; ++lane) total += sums[r][lane];
        left[(r * groups + g) * groups + h] = left[(r * groups + h) * groups + g] = total;
      }
    }
  }
}

// The scales of a row by least squares, rounded to what is stored, and taken if they are better than the present ones.
void refit_row(const Refit& f, int64_t row, double* left, const double* right, double* copy, double* fresh) {
  const int64_t g = f.groups;
  std::memcpy(copy, left, g * g * sizeof(double));
  if (!solve(copy, right, fresh, g)) return;
  double most = 0;
  for (int64_t i = 0; i < g; ++i) {
    if (!(fresh[i] > 0) || !std::isfinite(fresh[i])) return;
    most = std::max(most, fresh[i]);
  }
  uint8_t* factors = f.factors ? f.factors + row * g : nullptr;
  const float step = to_bfloat16(factors ? std::max(static_cast<float>(most) / 255.0f, kSmallest) : static_cast<float>(fresh[0]));
  double* now = copy;  // the factorisation is not needed any more
  for (int64_t i = 0; i < g; ++i) {
    now[i] = f.scales[row * g + i];
    if (factors) fresh[i] = step * std::min(std::max(std::nearbyintf(static_cast<float>(fresh[i]) / step), 1.0f), 255.0f);
  }
  if (!factors) fresh[0] = step;
  if (!(scale_error(left, right, fresh, g) < scale_error(left, right, now, g))) return;
  f.steps[row] = step;
  for (int64_t i = 0; factors && i < g; ++i) factors[i] = static_cast<uint8_t>(std::nearbyint(fresh[i] / step));
}

void feedback_task(const void* job, int64_t task, float* scratch) {
  const Feedback& f = *static_cast<const Feedback*>(job);
  const int64_t together = kRows / f.widths;  // rows of a task
  const int64_t per = (f.rows + together - 1) / together, stride = (f.cols + kLane - 1) / kLane * kLane;
  const int64_t first = task % per * together;
  const auto rows = f.widths == 1 ? plain_rows : f.widths == 2 ? rows_of_two_widths : rows_of_three_widths;
  rows(f, task / per, first, std::min(together, f.rows - first) * f.widths, scratch, scratch + kRows * stride);
}

void search_task(const void* job, int64_t row, float*) {
  const Search& s = *static_cast<const Search*>(job);
  for (int64_t g = 0; g < s.groups; ++g) {
    const int64_t begin = g * s.width, length = std::min(s.width, s.cols - begin);
    search_group(s, s.weights + row * s.cols + begin, s.importance + row / s.rows * s.cols + begin, length,
                 s.scales + row * s.groups + g, s.zeros + row * s.groups + g);
  }
}

int64_t refit_floats(const Refit& f) {
  const int64_t stride = (f.cols + kLane - 1) / kLane * kLane, g = f.groups;
  return kRows * stride + 2 * (kRows * g * g + kRows * g + g * g + g);  // doubles count twice
}

void refit_task(const void* job, int64_t task, float* scratch) {
  const Refit& f = *static_cast<const Refit*>(job);
  const int64_t per = (f.rows + kRows - 1) / kRows, stride = (f.cols + kLane - 1) / kLane * kLane, g = f.groups;
  const int64_t e = task / per, first = task % per * kRows, n = std::min(kRows, f.rows - first);
  double* left = reinterpret_cast<double*>(scratch + kRows * stride);  // kRows * stride is even: still aligned
  double* right = left + kRows * g * g;
  double* copy = right + kRows * g;
  normal_equations(f, e, first, n, scratch, left, right);
  for (int64_t r = 0; r < n; ++r) refit_row(f, e * f.rows + first + r, left + r * g * g, right + r * g, copy, copy + g * g);
}

bool sizes_fit(int64_t count, int64_t rows, int64_t cols, int64_t groups, int64_t width, int bits) {
  return count >= 0 && rows > 0 && cols > 0 && width > 0 && groups == (cols + width - 1) / width && bits >= 1 && bits <= 8;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int moec_rounding_interface() { return kInterface; }

__attribute__((visibility("default"))) int moec_feedback(const Feedback* f, Parallel parallel, int threads) {
  if (!sizes_fit(f->count, f->rows, f->cols, f->groups, f->width, f->bits)) return kBadSize;
  if (f->widths < 1 || f->widths > kWidths || (f->widths > 1 && (f->bits > 4 || f->widths > f->bits))) return kBadSize;
  if (f->exact != nullptr && (f->widths > 1 || f->descend)) return kBadSize;
  if (f->order != nullptr) {
    for (int64_t i = 0; i < f->count * f->cols; ++i) {
      if (f->order[i] < 0 || f->order[i] >= f->cols) return kBadOrder;
    }
  }
  const int64_t stride = (f->cols + kLane - 1) / kLane * kLane;
  Pool pool;
  pool.tasks = f->count * ((f->rows + kRows / f->widths - 1) / (kRows / f->widths));
  pool.run = feedback_task;
  pool.job = f;
  pool.scratch_floats = kRows * (stride + kBlock);
  return spread(pool, parallel, threads);
}

__attribute__((visibility("default"))) int moec_search(const Search* s, Parallel parallel, int threads) {
  if (!sizes_fit(s->count, s->rows, s->cols, s->groups, s->width, s->bits)) return kBadSize;
  Pool pool;
  pool.tasks = s->count * s->rows;
  pool.run = search_task;
  pool.job = s;
  pool.scratch_floats = 1;
  return spread(pool, parallel, threads);
}

__attribute__((visibility("default"))) int moec_refit(const Refit* f, Parallel parallel, int threads) {
  if (!sizes_fit(f->count, f->rows, f->cols, f->groups, f->width, 8)) return kBadSize;
  if (f->factors == nullptr && f->groups != 1) return kBadSize;
  Pool pool;
  pool.tasks = f->count * ((f->rows + kRows - 1) / kRows);
  pool.run = refit_task;
  pool.job = f;
  pool.scratch_floats = refit_floats(*f);
  return spread(pool, parallel, threads);
}

}  // extern "C"

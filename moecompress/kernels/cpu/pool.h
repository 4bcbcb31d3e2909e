// What the encoders share: vectors of 16 floats, one function for several instruction sets, tasks for torch's threads.
#ifndef MOECOMPRESS_POOL_H_
#define MOECOMPRESS_POOL_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

namespace {

constexpr int64_t kLane = 16;  // floats of a vector

enum Status { kGood = 0, kBadSize = 1, kNoMemory = 2, kBadOrder = 3 };

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FAST __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FAST
#endif
#define INLINE inline __attribute__((always_inline))

typedef float Vector __attribute__((vector_size(64), aligned(4)));

INLINE Vector load(const float* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
INLINE void store(float* p, Vector v) { std::memcpy(p, &v, sizeof v); }

struct Pool {
  std::atomic<int64_t> next{0};
  std::atomic<int> status{kGood};
  int64_t tasks = 0;
  void (*run)(const void* job, int64_t task, float* scratch) = nullptr;
  const void* job = nullptr;
  int64_t scratch_floats = 0;
};

void work_through(void* argument) {
  Pool& pool = *static_cast<Pool*>(argument);
  std::unique_ptr<float[]> room(new (std::nothrow) float[pool.scratch_floats + kLane]);
  if (!room) {
    pool.status = kNoMemory;
    return;
  }
  std::fill(room.get(), room.get() + pool.scratch_floats + kLane, 0.0f);
  const size_t off = reinterpret_cast<uintptr_t>(room.get()) / sizeof(float) % kLane;
  float* scratch = room.get() + (kLane - off) % kLane;  // vectors that straddle two cache lines cost twice
  for (int64_t task; (task = pool.next++) < pool.tasks;) pool.run(pool.job, task, scratch);
}

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

int spread(Pool& pool, Parallel parallel, int threads) {
  if (parallel != nullptr && threads > 1) {
    parallel(work_through, &pool, static_cast<unsigned>(threads), 0);
  } else {
    work_through(&pool);
  }
  return pool.status;
}

}  // namespace

#endif

// Work on many tensors in one parallel region: cut into tasks by elements, whichever tensor they belong to.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "parallel.h"

namespace quantkern::cpu {

// Elements a task has at most: few microseconds of work, so that the threads end together, and a small part of a
// second-level cache, so that what one pass read the next still finds.
constexpr int64_t kTaskElements = 16384;

// f(i) for every task, which the threads take in order. A task may wait for one before it: that one has been taken,
// and by a thread that runs.
template <class F>
void run_tasks(int64_t tasks, int64_t elements, const F& f) {
  const int64_t worth = (elements + kGrain - 1) / kGrain;
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>({at::get_num_threads(), worth, tasks}));
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next.fetch_add(1); i < tasks; i = next.fetch_add(1)) f(i);
  });
}

// f(begin, end) for every task of `numel` elements, each a multiple of kStretch away from the start.
template <class F>
void for_tasks(int64_t numel, const F& f) {
  for (int64_t begin = 0; begin < numel; begin += kTaskElements) f(begin, std::min(numel, begin + kTaskElements));
}

}  // namespace quantkern::cpu

// Splitting a tensor between threads: always at multiples of kStretch, so that no two threads share a mask byte.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>

#include "fake_quantize_loops.h"
#include "stream_fence.h"

namespace quantkern::cpu {

// Fewer elements than this are not worth a second thread: they take about 10 us, waking a thread takes up to 20.
constexpr int64_t kGrain = 98304;

// Sums are made over stretches of this many elements and then added in memory order, so that they do not depend on the
// number of threads.
constexpr int64_t kSumStretch = 4096;

// From this size on an output goes past the caches: it would not stay in them, and a line written past them need not
// be read first, which is a third of the traffic.
constexpr size_t kStreamBytes = size_t{16} << 20;
inline bool is_streamed(const at::Tensor& in, const at::Tensor& out) {
  return out.nbytes() >= kStreamBytes && !in.is_same(out);
}

// The same for elements that take ten times as long.
constexpr int64_t kTanhGrain = 16384;

template <class F>
void for_stretches(int64_t numel, const F& f, int64_t grain = kGrain) {
  const int64_t stretches = (numel + kStretch - 1) / kStretch;
  at::parallel_for(0, stretches, grain / kStretch,
                   [&](int64_t begin, int64_t end) { f(begin * kStretch, std::min(numel, end * kStretch)); });
}

}  // namespace quantkern::cpu

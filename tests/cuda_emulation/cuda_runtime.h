// A CUDA runtime for one processor core, so that the kernels' logic is tested on machines without a GPU.
//
// Stands in for the toolkit's header of the same name. Blocks run one after the other; the threads of a block are
// fibers that take turns at barriers and shuffles. A barrier that not every thread reaches is a launch failure.
// What it cannot show: data races between blocks, memory ordering, speed.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorLaunchFailure };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
using cudaStream_t = void*;

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned count) : x(count) {}
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;

struct Barrier {
  int arrived = 0;
  uint64_t generation = 0;
};
struct Warp {
  Barrier barrier;
  alignas(8) unsigned char slot[kWarp][32];  // what a lane shows to the others
};
// Entered once through its context; afterwards it changes places with the scheduler by _longjmp, which unlike
// swapcontext needs no system call.
struct Fiber {
  ucontext_t context;
  jmp_buf place;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool entered = false, done = false;
};

inline int multiprocessors = 2;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Barrier block_barrier;
inline jmp_buf scheduler;
inline size_t current;
inline bool progressed;
inline std::function<void()> kernel_call;

// Back to the scheduler, until it is this fiber's turn again.
inline void yield() {
  if (_setjmp(fibers[current].place) == 0) _longjmp(scheduler, 1);
}

inline void fiber_main() {
  for (;;) {
    kernel_call();
    fibers[current].done = progressed = true;
    yield();
  }
}

inline void resume(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.entered) _longjmp(fiber.place, 1);
  fiber.entered = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber.context, fiber_main, 0);
  setcontext(&fiber.context);
}

inline void wait(Barrier& barrier, int expected) {
  const uint64_t generation = barrier.generation;
  progressed = true;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) yield();
}

// Runs the threads of one block in turns; false when those left all wait for ever.
inline bool run_block() {
  warps.assign(blockDim.x / kWarp, {});
  block_barrier = {};
  for (size_t i = 0; i < blockDim.x; ++i) fibers[i].done = false;
  for (bool alive = true; alive;) {
    alive = progressed = false;
    for (current = 0; current < blockDim.x; ++current) {
      if (fibers[current].done) continue;
      threadIdx.x = static_cast<unsigned>(current);
      resume(fibers[current]);
      alive = alive || !fibers[current].done;
    }
    if (alive && !progressed) return false;
  }
  return true;
}

inline cudaError_t run(const cudaLaunchConfig_t& config, std::function<void()> call) {
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  kernel_call = std::move(call);
  if (gridDim.x == 0 || blockDim.x == 0 || blockDim.x > 1024 || blockDim.x % kWarp) return cudaErrorInvalidValue;
  if (fibers.size() < blockDim.x) fibers = std::vector<Fiber>(blockDim.x);
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
    if (!run_block()) {
      fibers.clear();  // they stand in the middle of a kernel
      return cudaErrorLaunchFailure;
    }
  return cudaSuccess;
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::block_barrier, static_cast<int>(blockDim.x)); }

namespace emulation {

inline int lane() { return static_cast<int>(current) % kWarp; }

// Every lane of a warp gives a value; f(value_of) makes of them what this lane receives, value_of(i) being lane i's.
template <class V, class F>
auto exchange(const V& value, F f) {
  Warp& warp = warps[current / kWarp];
  static_assert(sizeof(V) <= sizeof(warp.slot[0]) && alignof(V) <= 8);
  std::memcpy(warp.slot[lane()], &value, sizeof value);
  wait(warp.barrier, kWarp);
  const auto received = f([&](int from) -> const V& { return *reinterpret_cast<const V*>(warp.slot[from]); });
  wait(warp.barrier, kWarp);
  return received;
}

}  // namespace emulation

inline void __syncwarp() {
  emulation::wait(emulation::warps[emulation::current / emulation::kWarp].barrier, emulation::kWarp);
}

template <class V>
V __shfl_xor_sync(unsigned, V value, int distance) {
  return emulation::exchange(value, [&](auto value_of) { return value_of(emulation::lane() ^ distance); });
}

inline unsigned __ballot_sync(unsigned, bool value) {
  return emulation::exchange(value, [](auto value_of) {
    unsigned bits = 0;
    for (int i = 0; i < emulation::kWarp; ++i) bits |= static_cast<unsigned>(value_of(i)) << i;
    return bits;
  });
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

inline int atomicOr(int* address, int value) {
  const int old = *address;
  *address |= value;
  return old;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  return emulation::run(*config, [=] { kernel(arguments...); });
}

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulation::multiprocessors;
  return cudaSuccess;
}

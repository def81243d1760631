// The instructions of csrc/cuda/instructions.cuh, from their definitions there.
//
// Asynchronous copies are kept back as long as the batches allow, so that a kernel that reads before it waits reads
// what lay there before.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <deque>
#include <vector>

namespace emulation {

struct Copy {
  void* shared;
  const void* global;  // null: zeros
  int bytes;
};
using Batch = std::vector<Copy>;
// Of each thread, the oldest batch first; the last one is still open.
struct Batches {
  std::deque<Batch> closed;
  Batch open;
};
inline std::vector<Batches> batches;

inline Batches& own_batches() {
  if (batches.size() < fibers.size()) batches.resize(fibers.size());
  return batches[current];
}

inline bool bit_products = true;

}  // namespace emulation

namespace quantkern::cuda {

inline bool has_bit_products() { return emulation::bit_products; }

inline int fresh_thread_index() { return static_cast<int>(threadIdx.x); }

template <int kBytes>
void start_copy(void* shared, const void* global, bool wanted) {
  static_assert(kBytes == 4 || kBytes == 16);
  // An address that hardware would refuse is refused: the sanitizer looks at this access.
  struct alignas(kBytes) Unit {
    volatile char bytes[kBytes];
  };
  if (wanted) (void)static_cast<const Unit*>(global)->bytes[0];
  (void)static_cast<const Unit*>(shared)->bytes[0];
  emulation::own_batches().open.push_back({shared, wanted ? global : nullptr, kBytes});
}

inline void end_batch() {
  emulation::Batches& own = emulation::own_batches();
  own.closed.push_back(std::move(own.open));
  own.open.clear();
}

template <int kBatches>
void wait_for_batches() {
  emulation::Batches& own = emulation::own_batches();
  for (; own.closed.size() > kBatches; own.closed.pop_front())
    for (const emulation::Copy& copy : own.closed.front()) {
      if (copy.global) std::memcpy(copy.shared, copy.global, copy.bytes);
      if (!copy.global) std::memset(copy.shared, 0, copy.bytes);
    }
}

inline void load_matrices(const void* row, unsigned& first, unsigned& second, unsigned& third, unsigned& fourth) {
  struct alignas(16) Row {
    unsigned words[4];
  };
  const auto words = emulation::exchange(static_cast<const Row*>(row), [](auto row_of) {
    std::array<unsigned, 4> read;
    for (int i = 0; i < 4; ++i) read[i] = row_of(i * 8 + emulation::lane() / 4)->words[emulation::lane() % 4];
    return read;
  });
  first = words[0], second = words[1], third = words[2], fourth = words[3];
}

// sums += the products of rows of eight words, each pair of words multiplied by multiply(a, b)
template <class F>
void multiply_fragments(int (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2], F multiply) {
  struct Operands {
    unsigned a[4], b[2];
  };
  const Operands mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const auto added = emulation::exchange(mine, [&](const auto& operands_of) {
    std::array<int, 4> dots{};
    for (int i = 0; i < 4; ++i) {
      const int row = emulation::lane() / 4 + i / 2 * 8, column = emulation::lane() % 4 * 2 + i % 2;
      for (int word = 0; word < 8; ++word) {
        const unsigned x = operands_of(row % 8 * 4 + word % 4).a[row / 8 + word / 4 * 2];
        dots[i] += multiply(x, operands_of(column * 4 + word % 4).b[word / 4]);
      }
    }
    return dots;
  });
  for (int i = 0; i < 4; ++i) sums[i] += added[i];
}

inline void multiply_bits(int (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  multiply_fragments(sums, a, b, [](unsigned x, unsigned y) { return __popc(x & y); });
}

inline void multiply_bytes(int (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  multiply_fragments(sums, a, b, [](unsigned x, unsigned y) {
    int dot = 0;
    for (int byte = 0; byte < 32; byte += 8) dot += static_cast<int>((x >> byte & 0xffu) * (y >> byte & 0xffu));
    return dot;
  });
}

}  // namespace quantkern::cuda

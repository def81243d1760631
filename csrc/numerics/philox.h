// Philox4x32-10, the counter-based random numbers of Salmon et al. 2011: word i of a stream is word i % 4 of block
// i / 4, so every element finds its own number and every device the same.
#pragma once

#include <cstdint>

#include "platform.h"

namespace quantkern {

struct PhiloxBlock {
  uint32_t word[4];
};

QK_HOST_DEVICE PhiloxBlock philox(uint64_t seed, uint64_t block) {
  uint32_t w0 = static_cast<uint32_t>(block), w1 = static_cast<uint32_t>(block >> 32), w2 = 0, w3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(w0) * 0xD2511F53u, b = static_cast<uint64_t>(w2) * 0xCD9E8D57u;
    const uint32_t high_a = static_cast<uint32_t>(a >> 32), high_b = static_cast<uint32_t>(b >> 32);
    w0 = high_b ^ w1 ^ k0;
    w1 = static_cast<uint32_t>(b);
    w2 = high_a ^ w3 ^ k1;
    w3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{w0, w1, w2, w3}};
}

// Uniform in [-1/2, 1/2), on a grid of 2^-24.
QK_HOST_DEVICE float centered_uniform(uint32_t word) { return static_cast<float>(word >> 8) * 0x1p-24f - 0.5f; }

}  // namespace quantkern

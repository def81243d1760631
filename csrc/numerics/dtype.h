// The element types the kernels know, without torch.
#pragma once

#include <cstdint>

namespace quantkern {

enum class DType { kFloat, kHalf, kBFloat16, kDouble };

// Storage of the 16-bit formats on the host; they are converted to float32 before any arithmetic.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

}  // namespace quantkern

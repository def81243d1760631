// What the torch-aware entries of packed tensors share: their pointers. Never included by a kernel file.
#pragma once

#include <optional>

#include "../common/check_packed.h"
#include "host_entry.h"

namespace quantkern::cuda {

inline uint32_t* mutable_words(const at::Tensor& packed) { return static_cast<uint32_t*>(packed.mutable_data_ptr()); }

inline const uint32_t* const_words(const at::Tensor& packed) {
  return static_cast<const uint32_t*>(packed.const_data_ptr());
}

inline const float* floats_of(const std::optional<at::Tensor>& vector) {
  return vector.has_value() ? vector->const_data_ptr<float>() : nullptr;
}

// arrange_signs on CUDA: the ones in every row, int32. Null without, or where the bytes do not lie as int32 do.
inline const int* ones_of(const std::optional<at::Tensor>& arranged, const at::Tensor& x, int64_t rows) {
  check_arranged(arranged, x, rows * static_cast<int64_t>(sizeof(int)));
  if (!arranged.has_value()) return nullptr;
  const void* bytes = arranged->const_data_ptr();
  return reinterpret_cast<uintptr_t>(bytes) % sizeof(int) == 0 ? static_cast<const int*>(bytes) : nullptr;
}

}  // namespace quantkern::cuda

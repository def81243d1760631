// Running a product of packed rows: threads, arranged weights, and the fields that matrices and images share.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../common/check_packed.h"
#include "binary_product.h"

namespace quantkern::cpu {

inline const uint8_t* bytes_of(const at::Tensor& packed) {
  return reinterpret_cast<const uint8_t*>(packed.const_data_ptr<int32_t>());
}

// Bits behind the k signs of the rows are 0.
void check_padding_bits(const at::Tensor& packed, int64_t k, const char* name);

// The fields that follow from the weights [n, ...words]: n, bytes, weights.
BinaryProduct product_with(const at::Tensor& weights);
void set_values(BinaryProduct& p, const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& bias,
                const at::Tensor& values);
void set_signs(BinaryProduct& p, const at::Tensor& threshold, const at::Tensor& flip, const at::Tensor& signs);

at::Tensor arrange_signs_cpu(const at::Tensor& packed);

// Items of rows and columns, taken by the threads as they become free.
void run_product(BinaryProduct p, const at::Tensor& weights, const std::optional<at::Tensor>& arranged);

}  // namespace quantkern::cpu

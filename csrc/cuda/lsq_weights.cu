// All weights of a model on the grids of their learned scales.
//
//   the formula of fake_quantize.cu, for a list of tensors
//
// Layout: every tensor as in fake_quantize.cu; which task belongs to which a table in the kernel's arguments says
// (task_table.cuh), about 30 tensors a launch.
// Grid: one launch a table and element type; one block owns 1024 groups of eight elements of one tensor.
// Bytes an element: reads x and writes y, 8 in float32 and 4 in 16 bits.
// Numerics: those of fake_quantize.cu, bit for bit.
#include "lsq_weights.cuh"

#include <type_traits>

#include "task_table.cuh"

namespace quantkern::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kBlock) lsq_weights_kernel(const __grid_constant__ TaskTable<QuantizeEntry> table) {
  for (int64_t task = blockIdx.x; task < table.tasks(); task += gridDim.x) quantize_task<T>(table, task);
}

template <class T>
cudaError_t launch_typed(DType dtype, const FakeQuantizeArguments* weights, int64_t count, cudaStream_t stream) {
  const auto make = [&](int64_t i, QuantizeEntry& entry) {
    entry = quantize_entry(weights[i]);
    return weights[i].dtype == dtype ? quantize_tasks(weights[i].view) : 0;
  };
  return for_tables<QuantizeEntry>(count, make, [&](const TaskTable<QuantizeEntry>& table) {
    return launch(lsq_weights_kernel<T>, table.tasks(), kBlock, stream, table);
  });
}

}  // namespace

cudaError_t launch_lsq_weights(const FakeQuantizeArguments* weights, int64_t count, cudaStream_t stream) {
  for (const DType dtype : {DType::kFloat, DType::kHalf, DType::kBFloat16}) {
    const cudaError_t error = for_dtype(dtype, [&](auto* type) {
      return launch_typed<std::remove_pointer_t<decltype(type)>>(dtype, weights, count, stream);
    });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace quantkern::cuda

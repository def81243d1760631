// All weights of a model on the grids of their learned scales.
//
//   the formula of fake_quantize.cu, for a list of tensors
//
// Layout: every tensor as in fake_quantize.cu; which task belongs to which a table in the kernel's arguments says
// (task_table.cuh), about 30 tensors a launch.
// Grid: one launch a table and pair of element types; one block owns 1024 groups of eight elements of one tensor.
// Bytes an element: reads x and writes y, 8 in float32, 4 in 16 bits, 6 from the one to the other.
// Numerics: those of fake_quantize.cu, bit for bit.
#include "lsq_weights.cuh"

#include <type_traits>

#include "task_table.cuh"

namespace quantkern::cuda {
namespace {

template <class T, class Y>
__global__ void __launch_bounds__(kBlock) lsq_weights_kernel(const __grid_constant__ TaskTable<QuantizeEntry> table) {
  for (int64_t task = blockIdx.x; task < table.tasks(); task += gridDim.x) quantize_task<T, Y>(table, task);
}

}  // namespace

cudaError_t launch_lsq_weights(const FakeQuantizeArguments* weights, int64_t count, cudaStream_t stream) {
  return for_dtype_pairs([&](DType x, DType y, auto* of_x, auto* of_y) {
    const auto make = [&](int64_t i, QuantizeEntry& entry) {
      entry = quantize_entry(weights[i]);
      return is_of(weights[i], x, y) ? quantize_tasks(weights[i].view) : 0;
    };
    return for_tables<QuantizeEntry>(count, make, [&](const TaskTable<QuantizeEntry>& table) {
      using T = std::remove_pointer_t<decltype(of_x)>;
      using Y = std::remove_pointer_t<decltype(of_y)>;
      return launch(lsq_weights_kernel<T, Y>, table.tasks(), kBlock, stream, table);
    });
  });
}

}  // namespace quantkern::cuda

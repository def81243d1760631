// All weights of a model: their ranges, scales and zero points, and the fake-quantized tensors.
//
//   the formulas of fake_quantize_weight.cu, for a list of tensors
//
// Layout: every tensor as in fake_quantize_weight.cu. Which task belongs to which tensor a table in the kernel's
// arguments says (task_table.cuh), about 30 tensors a launch.
// Grid: three launches a table and element type, the last one a pair of types. Ranges: one block owns one task of a
// tensor's RangePlan, as in ranges.cu. Scales: one warp a channel. Quantize: one block owns 1024 groups of eight
// elements of one tensor.
// Bytes an element: 12 in float32, 6 in 16 bits, 10 from the one to the other, plus 1/8 for the mask; what the second
// pass reads the first has left in the second-level cache, as far as all weights fit.
// Numerics: those of fake_quantize_weight.cu, bit for bit.
#include "fake_quantize_weights.cuh"

#include <type_traits>
#include <vector>

#include "range_tasks.cuh"
#include "task_table.cuh"
#include "weight_choice.cuh"

namespace quantkern::cuda {
namespace {

struct RangeEntry {
  const void* x;
  RangePlan plan;
  Range* partials;
  Choice choice;
  bool vectorizable;
};

template <class T>
__global__ void __launch_bounds__(kBlock) weights_ranges_kernel(const __grid_constant__ TaskTable<RangeEntry> table) {
  for (int64_t task = blockIdx.x; task < table.tasks(); task += gridDim.x) {
    const int which = table.find(task);
    const RangeEntry& e = table.entries[which];
    const T* x = static_cast<const T*>(e.x);
    if (e.plan.by_column) {
      range_of_columns(x, e.vectorizable, e.plan, tile_columns(e.plan.view), e.partials, task - table.first[which]);
    } else {
      range_of_rows(x, e.vectorizable, e.plan, e.partials, task - table.first[which]);
    }
  }
}

// One warp a channel.
__global__ void __launch_bounds__(kBlock) weights_scale_kernel(const __grid_constant__ TaskTable<RangeEntry> table) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (kBlock / kWarp);
  for (int64_t task = (static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x) / kWarp; task < table.tasks();
       task += stride) {
    const int which = table.find(task);
    const RangeEntry& e = table.entries[which];
    const int64_t channel = task - table.first[which];
    const Range range = combine_partials(e.plan, e.partials, channel);
    if (threadIdx.x % kWarp == 0) write(choose(range, e.choice), channel, e.choice);
  }
}

template <class T, class Y>
__global__ void __launch_bounds__(kBlock) weights_quantize_kernel(const __grid_constant__ TaskTable<QuantizeEntry> t) {
  for (int64_t task = blockIdx.x; task < t.tasks(); task += gridDim.x) quantize_task<T, Y>(t, task);
}

int64_t range_tasks(const RangePlan& plan) {
  return plan.splits * (plan.by_column ? tile_columns(plan.view).tiles : plan.view.channels);
}

RangeEntry range_entry(const WeightArguments& a, const RangePlan& plan, Range* partials) {
  const int64_t rows = plan.by_column ? a.view.outer : a.view.outer * a.view.channels;
  const Choice choice = {a.scale, a.zero_point, a.quant_min, a.quant_max, a.symmetric};
  return {a.x, plan, partials, choice, is_vectorizable(a.x, rows, a.view.numel() / rows)};
}

FakeQuantizeArguments last_pass(const WeightArguments& a) {
  const Parameters parameters = {a.scale, a.zero_point, false, 0.0f, 0.0f};
  return {a.dtype, a.x, a.y, a.mask, a.view, parameters, a.gate, a.quant_min, a.quant_max, {}, a.y_dtype};
}

auto sender(cudaStream_t stream) {
  return [=](auto kernel, int64_t tasks_a_block) {
    return [=](const auto& table) {
      return launch(kernel, ceil_div(table.tasks(), tasks_a_block), kBlock, stream, table);
    };
  };
}

// Ranges and scales of the weights of one element type.
template <class T>
cudaError_t launch_scales(DType dtype, const WeightArguments* weights, const std::vector<RangeEntry>& ranges,
                          cudaStream_t stream) {
  const int64_t count = static_cast<int64_t>(ranges.size());
  const auto send = sender(stream);
  const auto range_pass = [&](int64_t i, RangeEntry& entry) {
    entry = ranges[i];
    return weights[i].dtype == dtype ? range_tasks(entry.plan) : 0;
  };
  const auto scale_pass = [&](int64_t i, RangeEntry& entry) {
    entry = ranges[i];
    return weights[i].dtype == dtype ? entry.plan.view.channels : 0;
  };
  const cudaError_t error = for_tables<RangeEntry>(count, range_pass, send(weights_ranges_kernel<T>, 1));
  if (error != cudaSuccess) return error;
  return for_tables<RangeEntry>(count, scale_pass, send(weights_scale_kernel, kBlock / kWarp));
}

// The last pass over the weights of one pair of element types.
template <class T, class Y>
cudaError_t launch_quantize(DType x, DType y, const WeightArguments* weights, int64_t count, cudaStream_t stream) {
  const auto pass = [&](int64_t i, QuantizeEntry& entry) {
    entry = quantize_entry(last_pass(weights[i]));
    return is_of(weights[i], x, y) ? quantize_tasks(weights[i].view) : 0;
  };
  return for_tables<QuantizeEntry>(count, pass, sender(stream)(weights_quantize_kernel<T, Y>, 1));
}

}  // namespace

cudaError_t weights_workspace_bytes(const WeightArguments* weights, int64_t count, int64_t& bytes) {
  bytes = 0;
  for (int64_t i = 0; i < count; ++i) {
    RangePlan plan;
    const cudaError_t error = plan_ranges(weights[i].view, plan);
    if (error != cudaSuccess) return error;
    bytes += plan.partials() * static_cast<int64_t>(sizeof(Range));
  }
  return cudaSuccess;
}

cudaError_t launch_fake_quantize_weights(const WeightArguments* weights, int64_t count, void* workspace,
                                         cudaStream_t stream) {
  Range* partials = static_cast<Range*>(workspace);
  std::vector<RangeEntry> ranges;
  for (int64_t i = 0; i < count; ++i) {
    RangePlan plan;
    const cudaError_t error = plan_ranges(weights[i].view, plan);
    if (error != cudaSuccess) return error;
    ranges.push_back(range_entry(weights[i], plan, partials));
    partials += plan.partials();
  }
  for (const DType dtype : {DType::kFloat, DType::kHalf, DType::kBFloat16}) {
    const cudaError_t error = for_dtype(dtype, [&](auto* type) {
      return launch_scales<std::remove_pointer_t<decltype(type)>>(dtype, weights, ranges, stream);
    });
    if (error != cudaSuccess) return error;
  }
  return for_dtype_pairs([&](DType x, DType y, auto* of_x, auto* of_y) {
    using T = std::remove_pointer_t<decltype(of_x)>;
    using Y = std::remove_pointer_t<decltype(of_y)>;
    return launch_quantize<T, Y>(x, y, weights, count, stream);
  });
}

}  // namespace quantkern::cuda

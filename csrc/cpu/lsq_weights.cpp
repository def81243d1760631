// lsq_weights on the CPU: all weights of a model in one parallel region, each on the grid of its scale.
#include <torch/library.h>

#include <deque>
#include <vector>

#include "../common/check_lists.h"
#include "fake_quantize.h"
#include "fake_quantize_weight.h"
#include "tasks.h"

namespace quantkern::cpu {
namespace {

struct Weight {
  at::Tensor in;  // what the memory below is of
  QuantizeMemory memory;
  PreparedParams params;

  Weight(const DenseInOut& dense, const Layout& layout, const at::Tensor& scale, int64_t quant_min, int64_t quant_max)
      : in(dense.in), memory(dense.in, dense.out, /*bits=*/nullptr), params(layout, quant_min, quant_max) {
    set_lsq_params(params, layout, scale, std::nullopt);
  }
};

struct Task {
  const Weight* weight;
  int64_t begin, end;
};

void lsq_weights_cpu(at::TensorList xs, at::TensorList ys, at::TensorList scales, at::IntArrayRef quant_min,
                     at::IntArrayRef quant_max, at::IntArrayRef axes) {
  check_lsq_lists(xs, ys, scales, quant_min, quant_max, axes);
  std::deque<Weight> weights;  // their addresses stay
  std::vector<Task> tasks;
  int64_t elements = 0;
  for (size_t i = 0; i < xs.size(); ++i) {
    const DenseInOut dense = dense_into(xs[i], ys[i]);
    const Layout layout = layout_of(dense.out, axis_of(xs[i], axes[i]));
    Weight& w = weights.emplace_back(dense, layout, scales[i], quant_min[i], quant_max[i]);
    for_tasks(w.memory.numel, [&](int64_t begin, int64_t end) { tasks.push_back({&w, begin, end}); });
    elements += w.memory.numel;
  }
  run_tasks(static_cast<int64_t>(tasks.size()), elements, [&](int64_t i) {
    const Task& task = tasks[i];
    task.weight->memory.quantize(task.begin, task.end, task.weight->params.view());
  });
}

}  // namespace
}  // namespace quantkern::cpu

TORCH_LIBRARY_IMPL(quantkern, CPU, m) { m.impl("lsq_weights_forward", quantkern::cpu::lsq_weights_cpu); }

// fake_quantize_weights on the CPU: all weights of a model in one parallel region.
//
// A weight whose channels are rows, and one that fits one task, is done in one go. A large one with a single range
// takes two rounds of tasks: the last of the first round chooses the scale, and the second round waits for it, at most
// as long as one task takes. Both rounds of a weight come before the next one, which would push it out of the cache.
#include <torch/library.h>

#include <deque>
#include <thread>
#include <vector>

#include "../common/check_lists.h"
#include "fake_quantize.h"
#include "fake_quantize_weight.h"
#include "tasks.h"

namespace quantkern::cpu {
namespace {

struct Weight {
  at::Tensor in, out, mask;
  Layout layout;
  WeightState state;
  QuantizeMemory memory;
  PreparedParams params;
  std::vector<Range> parts;        // of a weight that takes two rounds
  std::atomic<int64_t> unread{0};  // tasks of the first round that are not done
  std::atomic<bool> chosen{false};

  Weight(const DenseInOut& dense, const at::Tensor& mask, const Layout& layout, const WeightState& state)
      : in(dense.in),
        out(dense.out),
        mask(mask),
        layout(layout),
        state(state),
        memory(in, out, mask_bits(mask)),
        params(layout, state.quant_min, state.quant_max) {}
};

enum class Kind { kWhole, kRows, kRange, kQuantize };

struct Task {
  Kind kind;
  Weight* weight;
  int64_t begin, end;  // elements, or rows
};

void read_range(Weight& w, int64_t begin, int64_t end) {
  w.parts[begin / kTaskElements] = w.memory.range(begin, end);
  if (w.unread.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
  Range range = empty_range();
  for (const Range& part : w.parts) range = merge(range, part);
  w.state.choose(range, 0, w.params);
  w.params.finish();
  w.chosen.store(true, std::memory_order_release);
}

void run(const Task& task) {
  Weight& w = *task.weight;
  switch (task.kind) {
    case Kind::kWhole:
      return run_fake_quantize_weight(w.in, w.out, w.mask, w.layout, w.state, /*delayed=*/false);
    case Kind::kRows:
      return quantize_rows(w.memory, w.layout, w.state, w.params, task.begin, task.end);
    case Kind::kRange:
      return read_range(w, task.begin, task.end);
    case Kind::kQuantize:
      while (!w.chosen.load(std::memory_order_acquire)) std::this_thread::yield();
      return w.memory.quantize(task.begin, task.end, w.params.view());
  }
}

class Queue {
 public:
  void add(Weight& w) {
    const int64_t numel = w.memory.numel;
    elements_ += numel;
    if (numel <= kTaskElements) {
      tasks_.push_back({Kind::kWhole, &w, 0, numel});
    } else if (is_row_by_row(w.layout)) {
      const int64_t unit = rows_a_unit(w.layout);
      const int64_t rows = std::max(unit, kTaskElements / w.layout.inner / unit * unit);
      for (int64_t row = 0; row < w.layout.channels; row += rows)
        tasks_.push_back({Kind::kRows, &w, row, std::min(w.layout.channels, row + rows)});
    } else {
      add_two_rounds(w);
    }
  }
  void run_all() const {
    run_tasks(static_cast<int64_t>(tasks_.size()), elements_, [&](int64_t i) { run(tasks_[i]); });
  }

 private:
  // What was read last is quantized first: it still lies in the cache.
  void add_two_rounds(Weight& w) {
    const size_t first = tasks_.size();
    for_tasks(w.memory.numel, [&](int64_t begin, int64_t end) { tasks_.push_back({Kind::kRange, &w, begin, end}); });
    const size_t last = tasks_.size();
    w.unread = static_cast<int64_t>(last - first);
    w.parts.assign(last - first, empty_range());
    for (size_t i = last; i-- > first;) tasks_.push_back({Kind::kQuantize, &w, tasks_[i].begin, tasks_[i].end});
  }
  std::vector<Task> tasks_;
  int64_t elements_ = 0;
};

void fake_quantize_weights_cpu(at::TensorList xs, at::TensorList ys, at::TensorList masks, at::TensorList scales,
                               at::TensorList zero_points, at::IntArrayRef quant_min, at::IntArrayRef quant_max,
                               const c10::List<bool>& symmetric, at::IntArrayRef axes, const TensorListOfMaybe& steps,
                               at::IntArrayRef start_steps) {
  check_weight_lists(xs, ys, masks, scales, zero_points, quant_min, quant_max, symmetric, axes, steps, start_steps);
  std::deque<Weight> weights;  // their addresses stay
  Queue queue;
  for (size_t i = 0; i < xs.size(); ++i) {
    if (xs[i].numel() == 0) continue;
    const DenseInOut dense = dense_into(xs[i], ys[i]);
    const Layout layout = layout_of(dense.out, axis_of(xs[i], axes[i]));
    const WeightState state{scales[i].mutable_data_ptr<float>(), zero_points[i].mutable_data_ptr<int32_t>(),
                            static_cast<int>(quant_min[i]), static_cast<int>(quant_max[i]), symmetric[i]};
    const bool delayed = is_delayed(steps.get(i), start_steps[i]);
    const bool parts = layout.channels == 1 || is_row_by_row(layout) || xs[i].numel() <= kTaskElements;
    if (delayed || !parts)
      run_fake_quantize_weight(dense.in, dense.out, masks[i], layout, state, delayed);
    else
      queue.add(weights.emplace_back(dense, masks[i], layout, state));
  }
  queue.run_all();
}

}  // namespace
}  // namespace quantkern::cpu

TORCH_LIBRARY_IMPL(quantkern, CPU, m) {
  m.impl("fake_quantize_weights_forward", quantkern::cpu::fake_quantize_weights_cpu);
}

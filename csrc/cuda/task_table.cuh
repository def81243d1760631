// Many tensors in one launch: a table of them in the kernel's arguments, and tasks that are numbered through.
//
// The table lies in constant memory and needs no copy of its own, so that a launch waits for nothing and can be
// captured. What does not fit into one table takes a launch more.
#pragma once

#include "launch.cuh"
#include "quantize_group.cuh"

namespace quantkern::cuda {

// Every architecture takes 4 KB of arguments; a kernel here has 32 bytes of others at most.
constexpr int64_t kTableBytes = 4096 - 32;

template <class Entry>
struct TaskTable {
  static constexpr int kEntries = (kTableBytes - 16) / (sizeof(Entry) + sizeof(int64_t));
  Entry entries[kEntries];
  int64_t first[kEntries + 1];  // task of each entry; the last one ends the list
  int count;

  QK_HOST_DEVICE int64_t tasks() const { return first[count]; }
  // The entry that a task belongs to.
  QK_HOST_DEVICE int find(int64_t task) const {
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first[middle] <= task)
        low = middle;
      else
        high = middle;
    }
    return low;
  }
};

// Calls send(table) for as many tables as `count` entries take; make(i, entry) returns how many tasks the entry has,
// 0 leaves it out.
template <class Entry, class Make, class Send>
cudaError_t for_tables(int64_t count, const Make& make, const Send& send) {
  TaskTable<Entry> table = {};
  for (int64_t i = 0; i < count; ++i) {
    const int64_t tasks = make(i, table.entries[table.count]);
    if (tasks == 0) continue;
    table.first[table.count + 1] = table.first[table.count] + tasks;
    if (++table.count < table.kEntries) continue;
    const cudaError_t error = send(table);
    if (error != cudaSuccess) return error;
    table.count = 0;
  }
  return table.count > 0 ? send(table) : cudaSuccess;
}

// One tensor to be written on its grid.
struct QuantizeEntry {
  const void* x;
  void* y;
  uint8_t* mask;  // null: not wanted
  ChannelView view;
  Parameters parameters;
  Gate gate;
  int quant_min, quant_max;
  bool x_vectorizable, y_vectorizable;
};

// Whether a tensor is read as x and written as y.
template <class Arguments>
bool is_of(const Arguments& a, DType x, DType y) {
  return a.dtype == x && a.y_dtype.value_or(a.dtype) == y;
}

inline QuantizeEntry quantize_entry(const FakeQuantizeArguments& a) {
  const int64_t numel = a.view.numel();
  return {a.x,
          a.y,
          a.mask,
          a.view,
          a.parameters,
          a.gate,
          a.quant_min,
          a.quant_max,
          is_vectorizable(a.x, 1, numel),
          is_vectorizable(a.y, 1, numel)};
}

// Groups of eight elements a block takes of an entry.
constexpr int64_t kTaskGroups = 4 * kBlock;
inline int64_t quantize_tasks(const ChannelView& view) { return ceil_div(ceil_div(view.numel(), kGroup), kTaskGroups); }

// Fake-quantizes a group of any layout; returns its mask byte.
template <class T>
__device__ __forceinline__ unsigned quantize_group(Group<T>& group, int64_t begin, const QuantizeEntry& e,
                                                   float quant_min, float quant_max) {
  const ChannelView& view = e.view;
  if (view.channels > 1 && view.inner % kGroup != 0)
    return quantize_across_rows(group, begin, view, e.parameters, quant_min, quant_max);
  const int64_t channel = view.channels == 1 ? 0 : begin / view.inner % view.channels;
  return quantize_in_place(group, affine_of(e.parameters, channel), quant_min, quant_max);
}

// What one block does of writing all tensors of a table on their grids.
template <class T, class Y>
__device__ __forceinline__ void quantize_task(const TaskTable<QuantizeEntry>& table, int64_t task) {
  const int which = table.find(task);
  const QuantizeEntry& e = table.entries[which];
  const T* x = static_cast<const T*>(e.x);
  Y* y = static_cast<Y*>(e.y);
  const bool open = is_open(e.gate);
  const int64_t numel = e.view.numel(), first = (task - table.first[which]) * kTaskGroups;
  const float quant_min = static_cast<float>(e.quant_min), quant_max = static_cast<float>(e.quant_max);
  for (int64_t index = first + threadIdx.x; index < first + kTaskGroups; index += kBlock) {
    const int64_t begin = index * kGroup;
    if (begin >= numel) return;
    Group<T> group = load_group(x, begin, numel, e.x_vectorizable);
    unsigned bits = 0xffu;
    if (open) bits = quantize_group(group, begin, e, quant_min, quant_max);
    store_group(y, begin, numel, e.y_vectorizable, converted<Y>(group));
    if (e.mask != nullptr) e.mask[index] = static_cast<uint8_t>(bits & element_bits(begin, numel));
  }
}

}  // namespace quantkern::cuda

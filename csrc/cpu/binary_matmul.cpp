// Matrix products of packed rows on the CPU: checks, threads. The kernels are in binary_product_*.h.
//
//   layout    items of up to 64 left rows and some columns. A thread stays with the rows it has prepared while they
//             have columns left, then helps elsewhere
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "../common/check_args.h"
#include "binary_product_run.h"
#include "parallel.h"

namespace quantkern::cpu {

void check_padding_bits(const at::Tensor& packed, int64_t k, const char* name) {
  const int64_t words = packed.size(-1), rows = words ? packed.numel() / words : 0;
  if (k % kWordBits == 0) return;
  const int32_t* last = packed.const_data_ptr<int32_t>() + words - 1;
  uint32_t found = 0;
  for (int64_t row = 0; row < rows; ++row) found |= static_cast<uint32_t>(last[row * words]);
  TORCH_CHECK_VALUE((found & ~bits_in_use(words - 1, k)) == 0, name, " has padding bits that are not 0 behind its ", k,
                    " signs; pack it with pack_signs");
}

BinaryProduct product_with(const at::Tensor& weights) {
  BinaryProduct p{};
  p.n = weights.size(0);
  p.bytes = weights.numel() / std::max<int64_t>(1, p.n) * 4;
  p.weights = bytes_of(weights);
  return p;
}

void set_values(BinaryProduct& p, const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& bias,
                const at::Tensor& values) {
  p.scale = scale.has_value() ? scale->const_data_ptr<float>() : nullptr;
  p.bias = bias.has_value() ? bias->const_data_ptr<float>() : nullptr;
  p.values = values.mutable_data_ptr<float>();
}

void set_signs(BinaryProduct& p, const at::Tensor& threshold, const at::Tensor& flip, const at::Tensor& signs) {
  p.threshold = threshold.const_data_ptr<int32_t>();
  p.flip = reinterpret_cast<const uint32_t*>(flip.const_data_ptr<int32_t>());
  p.signs = reinterpret_cast<uint32_t*>(signs.mutable_data_ptr<int32_t>());
}

at::Tensor arrange_signs_cpu(const at::Tensor& packed) {
  TORCH_CHECK_TYPE(packed.scalar_type() == at::kInt, "packed must hold packed signs, int32 from pack_signs, got ",
                   packed.scalar_type());
  TORCH_CHECK_VALUE(packed.dim() > 1 && packed.is_contiguous(),
                    "packed must be contiguous weights [N, ...words], got shape ", packed.sizes(), " and strides ",
                    packed.strides());
  const BinaryProduct p = product_with(packed);
  const at::Tensor arranged = at::empty({arranged_bytes(p.n, p.bytes)}, packed.options().dtype(at::kByte));
  uint8_t* out = arranged.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, arranged_rows(p.n) / kRowsTogether, 1 + (1 << 15) / (1 + p.bytes * kRowsTogether),
                   [&](int64_t begin, int64_t end) { arrange_blocks(p.weights, p.n, p.bytes, out, begin, end); });
  return arranged;
}

namespace {

// Less work than this, in bytes of a row times rows times columns, is done before a second thread has woken.
constexpr int64_t kSmallProduct = 12 * kGrain;

// So many columns an item: all of them where there are rows enough for every thread, else some items a thread, so that
// no thread waits long for another.
int64_t columns_an_item(const BinaryProduct& p, int64_t groups, int64_t together, int64_t threads) {
  const int64_t tiles = (p.n + together - 1) / together, wanted = threads == 1 ? 1 : 12 * threads;
  const int64_t parts = groups >= 4 * threads ? 1 : std::clamp<int64_t>((wanted + groups - 1) / groups, 1, tiles);
  return (tiles + parts - 1) / parts * together;
}

}  // namespace

void run_product(BinaryProduct p, const at::Tensor& weights, const std::optional<at::Tensor>& arranged) {
  if (p.m == 0 || p.n == 0) return;
  const BinaryKernels& kernels = binary_kernels(p.m, arranged.has_value());
  at::Tensor own;
  if (kernels.wants_arranged) {
    own = arranged.has_value() ? *arranged : arrange_signs_cpu(weights);
    p.arranged = own.const_data_ptr<uint8_t>();
  }
  const int64_t rows = kernels.rows_together(p), groups = (p.m + rows - 1) / rows;
  const int64_t threads = p.m * p.n * (p.bytes + 8) < kSmallProduct ? 1 : at::get_num_threads();
  const int64_t width = columns_an_item(p, groups, kernels.columns_together, threads);
  const int64_t items = (p.n + width - 1) / width;
  std::vector<std::atomic<int64_t>> taken(groups);
  std::atomic<bool> failed{false};
  const auto work = [&](int64_t thread) {
    static thread_local Scratch scratch;
    for (int64_t k = 0; k < groups && !failed; ++k) {
      const int64_t group = (thread * groups / threads + k) % groups, first = group * rows;
      const int64_t count = std::min(rows, p.m - first);
      // Preparing another's rows for its last items would take longer than leaving them to it.
      if (items > 4 && k > 0 && taken[group].load(std::memory_order_relaxed) > items - 4) continue;
      bool ready = false;
      for (int64_t item; (item = taken[group].fetch_add(1, std::memory_order_relaxed)) < items;) {
        if (!ready && !(ready = kernels.prepare(p, first, count, scratch))) failed = true;
        if (failed) return;
        kernels.columns(p, first, count, item * width, std::min(p.n, (item + 1) * width), scratch);
      }
    }
  };
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) work(thread);
  });
  TORCH_CHECK(!failed, "out of memory for the tables of a binary product");
}

namespace {

struct Rows {
  const uint8_t* data;
  int64_t bytes;
};
void copy_rows(const void* source, int64_t first, int64_t count, uint8_t* out) {
  const Rows& rows = *static_cast<const Rows*>(source);
  if (rows.bytes == 0) return;  // of no elements; there is no memory then
  std::memcpy(out, rows.data + first * rows.bytes, count * rows.bytes);
}

void multiply(BinaryProduct p, const at::Tensor& a, const at::Tensor& b, int64_t k,
              const std::optional<at::Tensor>& arranged) {
  p.m = a.size(0);
  p.length = k;
  const Rows rows{bytes_of(a), p.bytes};
  p.source = &rows;
  p.rows = copy_rows;
  run_product(p, b, arranged);
}

void check_operands(const at::Tensor& a, const at::Tensor& b, int64_t k, const std::optional<at::Tensor>& arranged) {
  check_matmul(a, b, k);
  check_padding_bits(a, k, "a");
  check_padding_bits(b, k, "b");
  check_arranged(arranged, a, arranged_bytes(b.size(0), b.size(1) * 4));
}

void binary_matmul_into_cpu(const at::Tensor& a, const at::Tensor& b, int64_t k, const std::optional<at::Tensor>& scale,
                            const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& arranged,
                            const at::Tensor& out) {
  check_operands(a, b, k, arranged);
  check_vector(scale, a, b.size(0), at::kFloat, "scale");
  check_vector(bias, a, b.size(0), at::kFloat, "bias");
  check_dtype(out, at::kFloat, "out");
  const int64_t sizes[] = {a.size(0), b.size(0)};
  TORCH_CHECK_VALUE(out.sizes() == at::IntArrayRef(sizes) && out.is_contiguous() && out.is_cpu(),
                    "out must be a contiguous CPU tensor of shape ", at::IntArrayRef(sizes), ", got shape ",
                    out.sizes(), " and strides ", out.strides());
  BinaryProduct p = product_with(b);
  set_values(p, scale, bias, out);
  multiply(p, a, b, k, arranged);
}

at::Tensor binary_matmul_cpu(const at::Tensor& a, const at::Tensor& b, int64_t k,
                             const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& bias,
                             const std::optional<at::Tensor>& arranged) {
  check_matmul(a, b, k);
  const at::Tensor values = at::empty({a.size(0), b.size(0)}, a.options().dtype(at::kFloat));
  binary_matmul_into_cpu(a, b, k, scale, bias, arranged, values);
  return values;
}

at::Tensor binary_matmul_sign_cpu(const at::Tensor& a, const at::Tensor& b, int64_t k, const at::Tensor& threshold,
                                  const at::Tensor& flip, const std::optional<at::Tensor>& arranged) {
  check_operands(a, b, k, arranged);
  check_thresholds(threshold, flip, a, b.size(0));
  const at::Tensor signs = at::empty({a.size(0), words_of(b.size(0))}, a.options());
  BinaryProduct p = product_with(b);
  set_signs(p, threshold, flip, signs);
  multiply(p, a, b, k, arranged);
  return signs;
}

}  // namespace
}  // namespace quantkern::cpu

TORCH_LIBRARY_IMPL(quantkern, CPU, m) {
  m.impl("arrange_signs", quantkern::cpu::arrange_signs_cpu);
  m.impl("binary_matmul", quantkern::cpu::binary_matmul_cpu);
  m.impl("binary_matmul_into", quantkern::cpu::binary_matmul_into_cpu);
  m.impl("binary_matmul_sign", quantkern::cpu::binary_matmul_sign_cpu);
}

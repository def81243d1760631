// The range with the smallest squared error by a histogram, on the CPU: quantkern/clip_range.py, smallest_error, with
// the same candidates in the same order.
//
//   who       threads share the histogram's rows
//   bytes     some hundred passes over bins that lie in the first-level cache
//   numerics  float64; sums in another order than there, so that candidates equally good may change places
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <functional>
#include <vector>

#include "../common/check_args.h"
#include "../numerics/ranges.h"
#include "histogram_loops.h"
#include "parallel.h"

namespace quantkern::cpu {
namespace {

constexpr int kParts = 64, kFineParts = 9;
constexpr int64_t kCoarseBins = 512;

// Edges where the density of the values changes, with the change; padded to whole groups with changes of 0.
struct Profile {
  std::vector<double> edges, change;

  Profile(const double* counts, const double* edge, int64_t bins, int64_t step) {
    double below = 0;
    for (int64_t i = 0; i < bins + step; i += step) {
      double count = 0;
      for (int64_t k = i; k < std::min(bins, i + step); ++k) count += counts[k];
      const double density = count / ((edge[1] - edge[0]) * static_cast<double>(step));
      if (density != below) {
        edges.push_back(edge[0] + (edge[1] - edge[0]) * static_cast<double>(i));
        change.push_back(below - density);
      }
      below = density;
    }
    while (edges.size() % 8) {
      edges.push_back(0);
      change.push_back(0);
    }
  }
};

struct Parts {
  double lower, upper;
};

struct Search {
  Profile plain, coarse;
  double bottom, top;
  int quant_min, quant_max;
  bool symmetric;

  double error(const Profile& seen, const Parts& parts) const {
    const Range range{static_cast<float>(bottom * parts.lower), static_cast<float>(top * parts.upper)};
    const ScaleZeroPoint grid = choose_scale(range, quant_min, quant_max, symmetric);
    const double scale = grid.scale;
    return histogram_loops().error(seen.edges.data(), seen.change.data(), static_cast<int64_t>(seen.edges.size()),
                                   scale, quant_min - grid.zero_point, quant_max - grid.zero_point) *
           (scale * scale * scale);
  }

  Parts best(const Profile& seen, const std::vector<Parts>& candidates) const {
    Parts found = candidates[0];
    double smallest = error(seen, found);
    for (size_t i = 1; i < candidates.size(); ++i) {
      const double own = error(seen, candidates[i]);
      if (own < smallest) {
        smallest = own;
        found = candidates[i];
      }
    }
    return found;
  }

  static std::vector<Parts> coarse_steps(const std::function<Parts(double)>& at) {
    std::vector<Parts> candidates;
    for (int i = kParts; i > 0; --i) candidates.push_back(at(static_cast<double>(i) / kParts));
    return candidates;
  }

  static std::vector<Parts> fine_steps(double part, const std::function<Parts(double)>& at) {
    std::vector<Parts> candidates{at(part)};
    for (int i = 0; i < kFineParts; ++i) {
      const double offset = (2.0 * i / (kFineParts - 1) - 1.0) / kParts;
      candidates.push_back(at(std::clamp(part + offset, 0.0, 1.0)));
    }
    return candidates;
  }

  Parts run() const {
    const auto both = [](double part) { return Parts{part, part}; };
    if (symmetric || !(bottom < 0 && top > 0)) {
      const Parts found = best(coarse, coarse_steps(both));
      return best(plain, fine_steps(found.lower, both));
    }
    std::vector<Parts> start = coarse_steps(both);
    for (const Parts& more : coarse_steps([](double part) { return Parts{part, 1.0}; })) start.push_back(more);
    for (const Parts& more : coarse_steps([](double part) { return Parts{1.0, part}; })) start.push_back(more);
    Parts found = best(coarse, start);
    const auto lower = [&](double part) { return Parts{part, found.upper}; };
    const auto upper = [&](double part) { return Parts{found.lower, part}; };
    for (const std::function<Parts(double)>& end : {std::function<Parts(double)>(upper), {lower}}) {
      std::vector<Parts> candidates{found};
      for (const Parts& more : coarse_steps(end)) candidates.push_back(more);
      found = best(coarse, candidates);
    }
    found = best(plain, fine_steps(found.upper, upper));
    return best(plain, fine_steps(found.lower, lower));
  }
};

// What the bin that ends at 0 holds in rows of no negative value is 0, which is on every grid.
std::vector<double> without_zeros(const double* counts, const double* edges, int64_t bins, double low) {
  std::vector<double> kept(counts, counts + bins);
  for (int64_t i = 0; i < bins && low >= 0; ++i)
    if (edges[i + 1] == 0) kept[i] = 0;
  return kept;
}

std::tuple<at::Tensor, at::Tensor> histogram_range_cpu(const at::Tensor& counts, const at::Tensor& edges,
                                                       const at::Tensor& low, const at::Tensor& high, int64_t quant_min,
                                                       int64_t quant_max, bool symmetric) {
  check_quant_range(quant_min, quant_max);
  TORCH_CHECK_VALUE(counts.dim() == 2 && counts.size(1) > 0, "counts must be [rows, bins], got shape ", counts.sizes());
  const int64_t rows = counts.size(0), bins = counts.size(1);
  const std::tuple<const at::Tensor&, std::vector<int64_t>, const char*> all[] = {{counts, {rows, bins}, "counts"},
                                                                                  {edges, {rows, bins + 1}, "edges"},
                                                                                  {low, {rows}, "low"},
                                                                                  {high, {rows}, "high"}};
  for (const auto& [value, sizes, name] : all) {
    check_dtype(value, at::kDouble, name);
    TORCH_CHECK_VALUE(value.sizes() == at::IntArrayRef(sizes) && value.is_contiguous(), name,
                      " must be contiguous and of shape ", sizes, ", got shape ", value.sizes());
  }
  at::Tensor from = at::empty_like(low), to = at::empty_like(low);
  at::parallel_for(0, rows, 1, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const double* edge = edges.const_data_ptr<double>() + row * (bins + 1);
      double bottom = std::min(low.const_data_ptr<double>()[row], 0.0);
      double top = std::max(high.const_data_ptr<double>()[row], 0.0);
      const auto kept =
          without_zeros(counts.const_data_ptr<double>() + row * bins, edge, bins, low.const_data_ptr<double>()[row]);
      if (symmetric) bottom = -(top = std::max(-bottom, top));
      const int64_t step = (bins + kCoarseBins - 1) / kCoarseBins;
      const Search search{Profile(kept.data(), edge, bins, 1),
                          Profile(kept.data(), edge, bins, step),
                          bottom,
                          top,
                          static_cast<int>(quant_min),
                          static_cast<int>(quant_max),
                          symmetric};
      const Parts found = search.run();
      from.mutable_data_ptr<double>()[row] = bottom * found.lower;
      to.mutable_data_ptr<double>()[row] = top * found.upper;
    }
  });
  return {from, to};
}

}  // namespace
}  // namespace quantkern::cpu

TORCH_LIBRARY_IMPL(quantkern, CPU, m) { m.impl("histogram_range", quantkern::cpu::histogram_range_cpu); }

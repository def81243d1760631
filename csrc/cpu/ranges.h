// The smallest and largest value of every channel.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "../common/layout.h"
#include "../numerics/ranges.h"

namespace quantkern::cpu {

// ranges[c] of dense x; the result does not depend on the number of threads, since min and max do not.
std::vector<Range> channel_ranges(const at::Tensor& x, const Layout& layout);

}  // namespace quantkern::cpu

// How a convolution or a pooling goes over packed images [images, height, width, words].
#pragma once

#include <cstdint>

namespace quantkern {

struct Window {
  int64_t images, height, width, words;
  int64_t taps_y, taps_x, stride_y, stride_x, pad_y, pad_x, step_y, step_x;
  int64_t out_height, out_width;
};

}  // namespace quantkern

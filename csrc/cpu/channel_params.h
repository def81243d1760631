// The parameters of every channel, laid out the way the loops want them.
#pragma once

#include <memory>

#include "../common/layout.h"
#include "../numerics/ranges.h"
#include "fake_quantize_loops.h"

namespace quantkern::cpu {

// Rows shorter than this are cheaper as columns: the parameters are then written out element by element.
constexpr int64_t kShortRow = 32;
constexpr int64_t kLongestPeriod = int64_t{1} << 22;

class PreparedParams {
 public:
  PreparedParams(const Layout& layout, int64_t quant_min, int64_t quant_max, bool as_columns = true)
      : channels_(layout.channels),
        repeat_(as_columns && layout.channels > 1 && layout.inner < kShortRow &&
                        layout.channels * layout.inner <= kLongestPeriod
                    ? layout.inner
                    : 0),
        period_(repeat_ ? channels_ * repeat_ : channels_),
        size_(period_ + (is_columns() ? kMaxLanes : 0)),
        many_(3 * size_ > kFew ? new float[3 * size_] : nullptr),
        values_(many_ ? many_.get() : few_) {
    view_ = {values_,
             values_ + size_,
             values_ + 2 * size_,
             period_,
             is_columns() ? 1 : layout.inner,
             static_cast<float>(quant_min),
             static_cast<float>(quant_max)};
  }
  PreparedParams(const PreparedParams&) = delete;
  PreparedParams& operator=(const PreparedParams&) = delete;

  void set(int64_t channel, float inverse, float scale, float zero_point) {
    const float parts[] = {inverse, scale, zero_point};
    const int64_t times = repeat_ ? repeat_ : 1;
    for (int64_t part = 0; part < 3; ++part) {
      float* begin = values_ + part * size_ + channel * times;
      for (int64_t i = 0; i < times; ++i) begin[i] = parts[part];
    }
  }

  // Clip x before it is quantized.
  void clip(double lower, double upper) {
    view_.lower = lower;
    view_.upper = upper;
    view_.clips = true;
  }

  // Call once every channel is set, before reading view().
  void finish() {
    for (int64_t i = period_; i < size_; ++i)
      for (int64_t part = 0; part < 3; ++part) values_[part * size_ + i] = values_[part * size_ + i % period_];
  }

  const ChannelParams& view() const { return view_; }

  // Whether the parameters stand element by element, as short rows have them.
  bool is_columns() const { return repeat_ > 0; }

 private:
  static constexpr int64_t kFew = 64;
  int64_t channels_, repeat_, period_, size_;
  float few_[kFew];
  std::unique_ptr<float[]> many_;  // not initialised: every channel is set
  float* values_;
  ChannelParams view_;
};

}  // namespace quantkern::cpu

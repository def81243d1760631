// The CUDA kernels and launchers as a plain shared library for the tests, compiled against the headers beside this
// file. Pointers are host memory. Returns the cudaError_t; -1 when a launcher wrote beyond its workspace.
#include <cstring>
#include <vector>

#include "../../csrc/cuda/ranges.cu"
// ranges.cu comes first: the others launch what it defines.
#include "../../csrc/cuda/binarize.cu"
#include "../../csrc/cuda/binary_conv2d.cu"
#include "../../csrc/cuda/binary_matmul.cu"
#include "../../csrc/cuda/clip_activation.cu"
#include "../../csrc/cuda/codes.cu"
#include "../../csrc/cuda/dorefa_activation.cu"
#include "../../csrc/cuda/dorefa_gradient.cu"
#include "../../csrc/cuda/dorefa_weight.cu"
#include "../../csrc/cuda/fake_quantize.cu"
#include "../../csrc/cuda/fake_quantize_activation.cu"
#include "../../csrc/cuda/fake_quantize_weight.cu"
#include "../../csrc/cuda/fake_quantize_weights.cu"
#include "../../csrc/cuda/lsq.cu"
#include "../../csrc/cuda/lsq_weights.cu"
#include "../../csrc/cuda/pack_signs.cu"
#include "../../csrc/cuda/packed_max_pool2d.cu"

namespace {

using namespace quantkern;
using namespace quantkern::cuda;

// Memory filled with a pattern, and a guard behind it.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : bytes_(bytes), memory_((bytes + kGuard + 15) / 16) {
    std::memset(memory_.data(), 0x5a, memory_.size() * sizeof(Unit));
  }
  void* data() { return memory_.data(); }
  int checked(cudaError_t error) const {
    const char* guard = reinterpret_cast<const char*>(memory_.data()) + bytes_;
    for (int64_t i = 0; i < kGuard; ++i)
      if (guard[i] != 0x5a) return -1;
    return error;
  }

 private:
  struct alignas(16) Unit {
    char bytes[16];
  };
  static constexpr int64_t kGuard = 256;
  int64_t bytes_;
  std::vector<Unit> memory_;
};

Window window_of(const int64_t* w) {
  return {w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], w[9], w[10], w[11], w[12], w[13]};
}

// What y of single tensors is, where it is not x's type.
std::optional<DType> y_dtype;

}  // namespace

extern "C" {

void set_multiprocessors(int count) { emulation::multiprocessors = count; }

void set_y_dtype(int dtype) { y_dtype = dtype < 0 ? std::nullopt : std::optional(static_cast<DType>(dtype)); }

int fake_quantize(int dtype, const void* x, void* y, uint8_t* mask, const int64_t* view, const float* scale,
                  const void* zero_point, int zero_point_is_float, float scale_number, float zero_point_number,
                  int quant_min, int quant_max, const int64_t* step, int64_t start_step) {
  const Parameters parameters = {scale, zero_point, zero_point_is_float != 0, scale_number, zero_point_number};
  return launch_fake_quantize({static_cast<DType>(dtype),
                               x,
                               y,
                               mask,
                               {view[0], view[1], view[2]},
                               parameters,
                               {step, start_step, nullptr},
                               quant_min,
                               quant_max,
                               /*clip=*/{},
                               y_dtype},
                              nullptr);
}

int fake_quantize_backward(int dtype, const void* grad, const uint8_t* mask, void* out, int64_t numel) {
  return launch_fake_quantize_backward(static_cast<DType>(dtype), grad, mask, out, numel, nullptr);
}

int fake_quantize_weight(int dtype, const void* x, void* y, uint8_t* mask, const int64_t* view, float* scale,
                         int* zero_point, int quant_min, int quant_max, int symmetric, const int64_t* step,
                         int64_t start_step) {
  const WeightArguments arguments = {static_cast<DType>(dtype),
                                     x,
                                     y,
                                     mask,
                                     {view[0], view[1], view[2]},
                                     scale,
                                     zero_point,
                                     quant_min,
                                     quant_max,
                                     symmetric != 0,
                                     {step, start_step, nullptr},
                                     y_dtype};
  int64_t bytes = 0;
  if (const cudaError_t error = weight_workspace_bytes(arguments, bytes)) return error;
  Workspace workspace(bytes);
  return workspace.checked(launch_fake_quantize_weight(arguments, workspace.data(), nullptr));
}

// One entry a tensor; views holds three numbers of each, limits two.
int fake_quantize_weights(int64_t count, const int64_t* dtypes, const int64_t* y_dtypes, const void* const* xs,
                          void* const* ys, uint8_t* const* masks, const int64_t* views, float* const* scales,
                          int* const* zero_points, const int64_t* limits, const int64_t* symmetric,
                          const int64_t* const* steps, int64_t start_step) {
  std::vector<WeightArguments> weights;
  for (int64_t i = 0; i < count; ++i)
    weights.push_back({static_cast<DType>(dtypes[i]),
                       xs[i],
                       ys[i],
                       masks[i],
                       {views[3 * i], views[3 * i + 1], views[3 * i + 2]},
                       scales[i],
                       zero_points[i],
                       static_cast<int>(limits[2 * i]),
                       static_cast<int>(limits[2 * i + 1]),
                       symmetric[i] != 0,
                       {steps[i], start_step, nullptr},
                       static_cast<DType>(y_dtypes[i])});
  int64_t bytes = 0;
  if (const cudaError_t error = weights_workspace_bytes(weights.data(), count, bytes)) return error;
  Workspace workspace(bytes);
  return workspace.checked(launch_fake_quantize_weights(weights.data(), count, workspace.data(), nullptr));
}

int lsq_weights(int64_t count, const int64_t* dtypes, const int64_t* y_dtypes, const void* const* xs, void* const* ys,
                const int64_t* views, const float* const* scales, const int64_t* limits) {
  std::vector<FakeQuantizeArguments> weights;
  for (int64_t i = 0; i < count; ++i) {
    Parameters parameters;
    parameters.scale = scales[i];
    weights.push_back({static_cast<DType>(dtypes[i]),
                       xs[i],
                       ys[i],
                       nullptr,
                       {views[3 * i], views[3 * i + 1], views[3 * i + 2]},
                       parameters,
                       {},
                       static_cast<int>(limits[2 * i]),
                       static_cast<int>(limits[2 * i + 1]),
                       {},
                       static_cast<DType>(y_dtypes[i])});
  }
  return launch_lsq_weights(weights.data(), count, nullptr);
}

int fake_quantize_activation(int dtype, const void* x, void* y, uint8_t* mask, const int64_t* view, float* running_min,
                             float* running_max, float* scale, int* zero_point, const bool* observing, int quant_min,
                             int quant_max, int symmetric, double ema_decay, const int64_t* step, int64_t start_step,
                             float lower, float upper, int clips) {
  const ActivationArguments arguments = {static_cast<DType>(dtype),
                                         x,
                                         y,
                                         mask,
                                         {view[0], view[1], view[2]},
                                         running_min,
                                         running_max,
                                         scale,
                                         zero_point,
                                         observing,
                                         quant_min,
                                         quant_max,
                                         symmetric != 0,
                                         ema_decay,
                                         {lower, upper, clips != 0},
                                         {step, start_step, nullptr},
                                         y_dtype};
  int64_t bytes = 0;
  if (const cudaError_t error = activation_workspace_bytes(arguments, bytes)) return error;
  Workspace workspace(bytes);
  return workspace.checked(launch_fake_quantize_activation(arguments, workspace.data(), nullptr));
}

int clip_activation(int dtype, const void* x, void* y, uint8_t* mask, int64_t numel, float lower, float upper) {
  return launch_clip_activation({static_cast<DType>(dtype), x, y, mask, numel, lower, upper}, nullptr);
}

int to_codes(const float* x, uint8_t* codes, float* parameters, const int64_t* view, const float* scale,
             const int* zero_point, int quant_min, int quant_max) {
  return launch_to_codes({{view[0], view[1], view[2]}, quant_min, quant_max, x, scale, zero_point, codes, parameters},
                         nullptr);
}

int from_codes(const uint8_t* codes, const float* parameters, float* x, const int64_t* view, int quant_min) {
  return launch_from_codes(codes, parameters, x, {view[0], view[1], view[2]}, quant_min, nullptr);
}

int lsq_backward(int dtype, const void* x, const void* grad, void* dx, const int64_t* view, const float* scale,
                 const float* zero_point, int quant_min, int quant_max, double grad_scale, float* dscale,
                 float* dzero_point) {
  const LsqBackwardArguments arguments = {static_cast<DType>(dtype),
                                          x,
                                          grad,
                                          dx,
                                          {view[0], view[1], view[2]},
                                          {scale, zero_point, true, 0.0f, 0.0f},
                                          quant_min,
                                          quant_max,
                                          grad_scale,
                                          dscale,
                                          dzero_point};
  int64_t bytes = 0;
  if (const cudaError_t error = lsq_backward_workspace_bytes(arguments, bytes)) return error;
  Workspace workspace(bytes);
  return workspace.checked(launch_lsq_backward(arguments, workspace.data(), nullptr));
}

int dorefa_activation(int dtype, const void* x, void* y, uint8_t* mask, int64_t numel, float steps) {
  return launch_dorefa_activation({static_cast<DType>(dtype), x, y, mask, numel, steps}, nullptr);
}

int dorefa_weight(int dtype, const void* x, void* y, int64_t numel, float steps, float* largest) {
  int64_t bytes = 0;
  if (const cudaError_t error = dorefa_weight_workspace_bytes(numel, bytes)) return error;
  Workspace workspace(bytes);
  return workspace.checked(
      launch_dorefa_weight({static_cast<DType>(dtype), x, y, numel, steps, largest}, workspace.data(), nullptr));
}

int dorefa_weight_backward(int dtype, const void* x, const void* grad, void* dx, int64_t numel, const float* largest) {
  int64_t bytes = 0;
  if (const cudaError_t error = dorefa_weight_workspace_bytes(numel, bytes)) return error;
  Workspace workspace(bytes);
  return workspace.checked(launch_dorefa_weight_backward({static_cast<DType>(dtype), x, grad, dx, numel, largest},
                                                         workspace.data(), nullptr));
}

int dorefa_gradient(int dtype, const void* grad, void* out, const int64_t* view, float steps, const int64_t* seed) {
  const DorefaGradientArguments arguments = {static_cast<DType>(dtype),   grad,  out,
                                             {view[0], view[1], view[2]}, steps, seed};
  int64_t bytes = 0;
  if (const cudaError_t error = dorefa_gradient_workspace_bytes(arguments, bytes)) return error;
  Workspace workspace(bytes);
  return workspace.checked(launch_dorefa_gradient(arguments, workspace.data(), nullptr));
}

// Whether the tensor cores multiply bits, or bytes as where products of bits are emulated.
void set_bit_products(int present) { emulation::bit_products = present != 0; }

int binarize(int dtype, const void* x, void* y, uint8_t* mask, int64_t numel) {
  return launch_binarize({static_cast<DType>(dtype), x, y, mask, numel}, nullptr);
}

int pack_signs(int dtype, const void* x, uint32_t* packed, const int64_t* view) {
  return launch_pack_signs({static_cast<DType>(dtype), x, packed, {view[0], view[1], view[2]}}, nullptr);
}

int unpack_signs(int dtype, const uint32_t* packed, void* y, int64_t rows, int64_t k) {
  return launch_unpack_signs({static_cast<DType>(dtype), packed, y, rows, k}, nullptr);
}

int count_signs(const uint32_t* packed, int64_t rows, int64_t words, int* counts) {
  return launch_count_signs(packed, rows, words, counts, nullptr);
}

int packed_max_pool2d(const uint32_t* x, const uint32_t* flip, uint32_t* y, const int64_t* window) {
  return launch_packed_max_pool2d(x, flip, y, window_of(window), nullptr);
}

// sizes: m, n, k
int binary_matmul(const uint32_t* a, const uint32_t* b, const int64_t* sizes, const int* b_ones, float* y,
                  const float* scale, const float* bias) {
  return launch_binary_matmul({a, b, sizes[0], sizes[1], sizes[2], b_ones}, FloatOutput{y, scale, bias, sizes[1], 1},
                              nullptr);
}

int binary_matmul_sign(const uint32_t* a, const uint32_t* b, const int64_t* sizes, const int* b_ones, uint32_t* y,
                       const int* threshold, const uint32_t* flip) {
  return launch_binary_matmul({a, b, sizes[0], sizes[1], sizes[2], b_ones}, SignOutput{y, threshold, flip, sizes[1]},
                              nullptr);
}

// sizes: columns, channels
int binary_conv2d(const uint32_t* x, const uint32_t* weight, const int64_t* window, const int64_t* sizes,
                  const int* weight_ones, float* y, const float* scale, const float* bias, int64_t plane) {
  const BinaryConv2dArguments arguments = {x, weight, window_of(window), sizes[0], sizes[1], weight_ones};
  Workspace workspace(binary_conv2d_workspace_bytes(arguments));
  return workspace.checked(
      launch_binary_conv2d(arguments, FloatOutput{y, scale, bias, sizes[0], plane}, workspace.data(), nullptr));
}

int binary_conv2d_sign(const uint32_t* x, const uint32_t* weight, const int64_t* window, const int64_t* sizes,
                       const int* weight_ones, uint32_t* y, const int* threshold, const uint32_t* flip) {
  const BinaryConv2dArguments arguments = {x, weight, window_of(window), sizes[0], sizes[1], weight_ones};
  Workspace workspace(binary_conv2d_workspace_bytes(arguments));
  return workspace.checked(
      launch_binary_conv2d(arguments, SignOutput{y, threshold, flip, sizes[0]}, workspace.data(), nullptr));
}
}

// binary_conv2d on CUDA: checks, allocation, registration. The kernels are in binary_conv2d.cu.
#include <torch/library.h>

#include "binary_conv2d.cuh"
#include "packed_entry.h"

namespace quantkern::cuda {
namespace {

BinaryConv2dArguments checked_arguments(const at::Tensor& x, const at::Tensor& weight, int64_t channels,
                                        at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                        const std::optional<at::Tensor>& arranged) {
  const Window window = check_conv(x, weight, channels, stride, padding, dilation);
  for (const int64_t size : {window.height + 2 * window.pad_y, window.width + 2 * window.pad_x})
    TORCH_CHECK_VALUE(size <= INT32_MAX, "padded images must be smaller than ", INT32_MAX, " pixels in height and ",
                      "width, got ", size);
  return {const_words(x), const_words(weight), window, weight.size(0), channels, ones_of(arranged, x, weight.size(0))};
}

template <class Output>
void run(const BinaryConv2dArguments& arguments, const Output& output, const at::Tensor& x) {
  const at::Tensor workspace = new_workspace(x, binary_conv2d_workspace_bytes(arguments));
  C10_CUDA_CHECK(
      launch_binary_conv2d(arguments, output, workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
}

at::Tensor binary_conv2d_cuda(const at::Tensor& x, const at::Tensor& weight, int64_t channels, at::IntArrayRef stride,
                              at::IntArrayRef padding, at::IntArrayRef dilation, const std::optional<at::Tensor>& scale,
                              const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& arranged,
                              bool channels_last) {
  const auto arguments = checked_arguments(x, weight, channels, stride, padding, dilation, arranged);
  const int64_t columns = arguments.columns, height = arguments.window.out_height, width = arguments.window.out_width;
  check_vector(scale, x, columns, at::kFloat, "scale");
  check_vector(bias, x, columns, at::kFloat, "bias");
  const c10::cuda::CUDAGuard guard(x.device());
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const at::Tensor y =
      at::empty({arguments.window.images, columns, height, width}, x.options().dtype(at::kFloat), format);
  const FloatOutput output = {y.mutable_data_ptr<float>(), floats_of(scale), floats_of(bias), columns,
                              channels_last ? 1 : height * width};
  run(arguments, output, x);
  return y;
}

at::Tensor binary_conv2d_sign_cuda(const at::Tensor& x, const at::Tensor& weight, int64_t channels,
                                   at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                   const at::Tensor& threshold, const at::Tensor& flip,
                                   const std::optional<at::Tensor>& arranged) {
  const auto arguments = checked_arguments(x, weight, channels, stride, padding, dilation, arranged);
  const int64_t columns = arguments.columns;
  check_thresholds(threshold, flip, x, columns);
  const c10::cuda::CUDAGuard guard(x.device());
  const Window& window = arguments.window;
  const at::Tensor y = at::empty({window.images, window.out_height, window.out_width, words_of(columns)}, x.options());
  run(arguments, SignOutput{mutable_words(y), threshold.const_data_ptr<int>(), const_words(flip), columns}, x);
  return y;
}

}  // namespace
}  // namespace quantkern::cuda

TORCH_LIBRARY_IMPL(quantkern, CUDA, m) {
  m.impl("binary_conv2d", quantkern::cuda::binary_conv2d_cuda);
  m.impl("binary_conv2d_sign", quantkern::cuda::binary_conv2d_sign_cuda);
}

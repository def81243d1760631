// Convolution of packed images with packed weights, equal to the convolution of the +-1 tensors with zero padding.
//
//   dot[p, o] = sum over the taps t inside of the image of (channels - 2 popcount(x[p, t] xor weight[o, t]))
//   y = dot * scale[o] + bias[o], or the packed signs (dot >= threshold[o]) xor flip[o]
//
// Layout: x [images, height, width, words] and weight [columns, taps_y, taps_x, words] are packed along the channels,
// padding bits of any value; y is [images, columns, pixels] or [images, pixels, columns].
// Grid: an implicit matrix product (binary_tile.cuh): rows are output pixels, gathered tap by tap, columns are output
// channels. The taps inside of the image are a rectangle, so where images are padded, first one warp for each column
// sums the ones of the taps above and left of each corner (a table [taps_y + 1, taps_x + 1, columns]); a rectangle is
// four of these sums.
// Bytes an element: reads 1/8 byte of x for each tap and 64 or 128 columns, mostly from the caches, 1/8 of weight for
// each 64 or 128 pixels, and writes 4 or 1/8 byte.
// Numerics: the sums are integers and exact; then one float32 product and one sum (numerics/binary.h), no contraction.
#include "binary_conv2d.cuh"

#include "binary_tile.cuh"
#include "reduce.cuh"

namespace quantkern::cuda {
namespace {

struct Axis {
  int size, out, taps, stride, pad, step;
};

// The taps of an output position that lie inside of the image: [begin, end).
struct TapRange {
  int begin, end;
};
__device__ __forceinline__ TapRange taps_inside(const Axis& axis, int out) {
  const int first = out * axis.stride - axis.pad, room = axis.size - first;
  int begin = first < 0 ? (-first - 1) / axis.step + 1 : 0, end = room > 0 ? (room - 1) / axis.step + 1 : 0;
  if (begin > axis.taps) begin = axis.taps;
  if (end > axis.taps) end = axis.taps;
  return {begin, end > begin ? end : begin};
}

// The output pixels as rows of the words of their taps, zeros where a tap lies outside.
struct PixelRows {
  const uint32_t* words;
  int64_t rows;
  int row_words, period;  // period: words of a pixel
  uint32_t last_bits;
  int channels;
  Axis y, x;
  const int* table;  // null: no tap lies outside
  int64_t columns;

  // The pixel under the first tap, which may lie outside; no row: beyond every image.
  struct Row {
    int64_t begin;
    int top, left;
  };
  // A word of a tap, as steps from the first one.
  struct Place {
    int64_t words;
    int down, right;
  };
  struct Patch {
    int signs;
    bool whole;
    TapRange y, x;
  };

  __device__ __forceinline__ void locate_pixel(int64_t r, int64_t& image, int& out_y, int& out_x) const {
    const int64_t line = r / x.out;
    image = line / y.out;
    out_x = static_cast<int>(r - line * x.out);
    out_y = static_cast<int>(line - image * y.out);
  }
  __device__ __forceinline__ int64_t words_to(int line, int column) const {
    return (static_cast<int64_t>(line) * x.size + column) * period;
  }
  __device__ __forceinline__ Row row(int64_t r) const {
    if (r >= rows) return {0, INT32_MIN, 0};
    int64_t image;
    int out_y, out_x;
    locate_pixel(r, image, out_y, out_x);
    const int top = out_y * y.stride - y.pad, left = out_x * x.stride - x.pad;
    return {image * y.size * x.size * period + words_to(top, left), top, left};
  }
  __device__ __forceinline__ Place locate(int word) const {
    if (word >= row_words) return {0, 0, INT32_MIN};
    const int tap = word / period, line = tap / x.taps;
    const int down = line * y.step, right = (tap - line * x.taps) * x.step;
    return {words_to(down, right) + (word - tap * period), down, right};
  }
  __device__ __forceinline__ const uint32_t* address(const Row& r, const Place& place) const {
    // As unsigned numbers, so that what lies before the image is beyond its end too, and so is what begins at
    // INT32_MIN.
    const unsigned line = static_cast<unsigned>(r.top) + static_cast<unsigned>(place.down);
    const unsigned column = static_cast<unsigned>(r.left) + static_cast<unsigned>(place.right);
    const bool inside = line < static_cast<unsigned>(y.size) && column < static_cast<unsigned>(x.size);
    return inside ? words + r.begin + place.words : nullptr;
  }
  __device__ __forceinline__ Patch patch(int64_t r) const {
    if (table == nullptr) return {channels * y.taps * x.taps, true, {}, {}};
    int64_t image;
    int out_y, out_x;
    locate_pixel(r, image, out_y, out_x);
    const TapRange down = taps_inside(y, out_y), right = taps_inside(x, out_x);
    const int taps = (down.end - down.begin) * (right.end - right.begin);
    return {channels * taps, taps == y.taps * x.taps, down, right};
  }
  __device__ __forceinline__ int corner(int line, int tap, int64_t column) const {
    return table[(static_cast<int64_t>(line) * (x.taps + 1) + tap) * columns + column];
  }
  __device__ __forceinline__ int column_ones(const Patch& p, int64_t column) const {
    return corner(p.y.end, p.x.end, column) - corner(p.y.begin, p.x.end, column) - corner(p.y.end, p.x.begin, column) +
           corner(p.y.begin, p.x.begin, column);
  }
};

// table[i, j, column] = the ones of the taps above line i and left of tap j
__global__ void __launch_bounds__(kBlock) count_taps_kernel(MatrixRows weight, int taps_y, int taps_x, int* table) {
  const int lane = threadIdx.x % kWarp;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (kBlock / kWarp), line = (taps_x + 1) * weight.rows;
  for (int64_t column = (static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x) / kWarp; column < weight.rows;
       column += stride) {
    const uint32_t* words = weight.words + column * weight.row_words;
    int* above = table + column;
    for (int j = lane; j <= taps_x; j += kWarp) above[j * weight.rows] = 0;
    __syncwarp();
    for (int i = 0; i < taps_y; ++i, above += line) {
      int run = 0;
      if (lane == 0) above[line] = 0;
      for (int j = 0; j < taps_x; ++j, words += weight.period) {
        int ones = 0;
        for (int word = lane; word < weight.period; word += kWarp)
          ones += __popc(words[word] & (word + 1 == weight.period ? weight.last_bits : 0xffffffffu));
        run += warp_sum(ones);
        if (lane == 0) above[line + (j + 1) * weight.rows] = above[(j + 1) * weight.rows] + run;
      }
    }
  }
}

template <class Tile, int kVector, class Output>
__global__ void __launch_bounds__(kBlock, kTilesTogether)
    conv2d_tiles_kernel(PixelRows x, MatrixRows weight, const int* weight_ones, Output output, int64_t tiles_m,
                        int64_t tiles_n) {
  multiply_tiles<Tile, kVector>(x, weight, weight_ones, output, tiles_m, tiles_n);
}

bool is_padded(const BinaryConv2dArguments& a) { return (a.window.pad_y > 0 || a.window.pad_x > 0) && a.channels > 0; }

int64_t table_columns(const BinaryConv2dArguments& a) { return (a.window.taps_y + 1) * (a.window.taps_x + 1); }

Axis make_axis(int64_t size, int64_t out, int64_t taps, int64_t stride, int64_t pad, int64_t step) {
  // Steps of one output or one tap are never taken, and may be of any length.
  const auto narrow = [](int64_t value) { return static_cast<int>(std::min<int64_t>(value, INT32_MAX)); };
  return {narrow(size), narrow(out), narrow(taps), narrow(stride), narrow(pad), narrow(step)};
}

PixelRows make_pixel_rows(const BinaryConv2dArguments& a, const MatrixRows& weight, const int* table) {
  const Window& w = a.window;
  PixelRows x = {};
  x.words = a.x;
  x.rows = w.images * w.out_height * w.out_width;
  x.row_words = weight.row_words;
  x.period = weight.period;
  x.last_bits = weight.last_bits;
  x.channels = static_cast<int>(a.channels);
  x.y = make_axis(w.height, w.out_height, w.taps_y, w.stride_y, w.pad_y, w.step_y);
  x.x = make_axis(w.width, w.out_width, w.taps_x, w.stride_x, w.pad_x, w.step_x);
  x.table = table;
  x.columns = a.columns;
  return x;
}

template <class Output>
cudaError_t launch_convolution(const BinaryConv2dArguments& a, const Output& output, int* table, cudaStream_t stream) {
  if (a.window.images == 0 || a.columns == 0) return cudaSuccess;
  const MatrixRows weight = matrix_rows(a.weight, a.columns, a.window.taps_y * a.window.taps_x, a.channels);
  const int* weight_ones = a.weight_ones;
  if (is_padded(a)) {
    const cudaError_t error =
        launch_over_groups(count_taps_kernel, a.columns * kWarp * kGroup, stream, weight,
                           static_cast<int>(a.window.taps_y), static_cast<int>(a.window.taps_x), table);
    if (error != cudaSuccess) return error;
    weight_ones = table + (table_columns(a) - 1) * a.columns;
  }
  const PixelRows x = make_pixel_rows(a, weight, is_padded(a) ? table : nullptr);
  const bool chunked = is_chunked(x.words, x.period) && is_chunked(weight.words, weight.period);
  return for_tile(x.rows, weight.rows, chunked, [&](auto tile, auto width, int multiprocessors) {
    using Shape = decltype(tile);
    return launch_tiles<Shape>(conv2d_tiles_kernel<Shape, decltype(width)::value, Output>, x.rows, weight.rows,
                               multiprocessors, stream, x, weight, weight_ones, output);
  });
}

}  // namespace

int64_t binary_conv2d_workspace_bytes(const BinaryConv2dArguments& a) {
  return is_padded(a) ? table_columns(a) * a.columns * static_cast<int64_t>(sizeof(int)) : 0;
}

cudaError_t launch_binary_conv2d(const BinaryConv2dArguments& arguments, const FloatOutput& output, void* workspace,
                                 cudaStream_t stream) {
  return launch_convolution(arguments, output, static_cast<int*>(workspace), stream);
}

cudaError_t launch_binary_conv2d(const BinaryConv2dArguments& arguments, const SignOutput& output, void* workspace,
                                 cudaStream_t stream) {
  return launch_convolution(arguments, output, static_cast<int*>(workspace), stream);
}

}  // namespace quantkern::cuda

// Products of packed rows on the tensor cores, a tile of rows and columns at a time.
//
//   dot[m, n] = signs(m) - 2 popcount(a[m]) - 2 popcount(b[n]) + 4 popcount(a[m] and b[n])
//
// which is the sum of (2 a - 1) (2 b - 1) over the signs of row m. Words beyond the end of a row and taps outside of
// an image are zero in a, and so add to none of the counts of a; the counts of b then leave them out too.
//
// A block of eight warps owns a tile; every step takes kStepWords words of its rows and columns through shared memory
// in kStages rotating stages, filled ahead by asynchronous copies. A thread always copies the same rows, and after
// their arrival, before the barrier that shows them to the others, takes stray padding bits off and counts the ones.
// In a stage the 16-byte chunk c of row r lies at chunk c ^ (r / 2 % 4), so that eight rows of one chunk, which a
// matrix load reads together, lie in eight different groups of banks.
#pragma once

#include <type_traits>

#include "instructions.cuh"
#include "store_dots.cuh"

namespace quantkern::cuda {

constexpr int kStepWords = 16;
constexpr int kChunkWords = 4;
constexpr int kWarpColumns = 32;  // a word of packed signs

// kWarpsM x kWarpsN warps of kFragments * 16 rows and 32 columns.
template <int kWarpsM_, int kWarpsN_, int kFragments_, int kStages_>
struct Tile {
  static_assert(kWarpsM_ * kWarpsN_ * kWarp == kBlock);
  static constexpr int kWarpsN = kWarpsN_, kFragments = kFragments_, kStages = kStages_;
  static constexpr int kRows = kWarpsM_ * kFragments_ * 16, kColumns = kWarpsN_ * kWarpColumns;
  static constexpr int kStageChunks = (kRows + kColumns) * kStepWords / kChunkWords;
};
using LargeTile = Tile<2, 4, 4, 3>;  // 128 x 128, 48 KiB
using SmallTile = Tile<4, 2, 1, 4>;  // 64 x 64, 32 KiB

// Blocks of a multiprocessor, which bounds their registers: products of bytes need more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kTilesTogether = 1;
#else
constexpr int kTilesTogether = 2;
#endif

inline int64_t count_tiles(int64_t size, int tile) { return ceil_div(size, tile); }

// The rows of a packed matrix, and how many signs each of them holds.
struct MatrixRows {
  const uint32_t* words;
  int64_t rows;
  int row_words;
  int period;          // the last word of every `period` has padding bits
  uint32_t last_bits;  // and these are the others
  int row_signs;

  struct Row {
    const uint32_t* begin;
  };
  struct Place {
    int word;
  };
  struct Patch {
    int signs;
    bool whole;
  };
  __device__ __forceinline__ Row row(int64_t r) const { return {r < rows ? words + r * row_words : nullptr}; }
  __device__ __forceinline__ Place locate(int word) const { return {word}; }
  __device__ __forceinline__ const uint32_t* address(const Row& r, const Place& place) const {
    return r.begin != nullptr && place.word < row_words ? r.begin + place.word : nullptr;
  }
  __device__ __forceinline__ Patch patch(int64_t) const { return {row_signs, true}; }
  // Never asked: patches are whole.
  __device__ __forceinline__ int column_ones(const Patch&, int64_t) const { return 0; }
};

__device__ __forceinline__ uint32_t* chunk_of(uint32_t* tile, int row, int chunk) {
  return tile + row * kStepWords + (chunk ^ (row >> 1 & 3)) * kChunkWords;
}

// What one thread copies of the tiles of one operand: pieces of kVector words, always of the same rows and columns.
template <class Rows, int kTileRows, int kVector>
struct Loader {
  static constexpr int kAcross = kStepWords / kVector, kPieces = kTileRows * kAcross / kBlock;
  static_assert(kPieces * kBlock == kTileRows * kAcross && kBlock % kAcross == 0 && kAcross <= kWarp);
  typename Rows::Row rows[kPieces];
  int ones[kPieces];

  static __device__ __forceinline__ int tile_row(int piece) { return (threadIdx.x + piece * kBlock) / kAcross; }
  static __device__ __forceinline__ int word_of(int step) {
    return step * kStepWords + static_cast<int>(threadIdx.x) % kAcross * kVector;
  }
  static __device__ __forceinline__ uint32_t* target(uint32_t* tile, int piece) {
    const int word = word_of(0);
    return chunk_of(tile, tile_row(piece), word / kChunkWords) + word % kChunkWords;
  }

  __device__ __forceinline__ void begin(const Rows& operand, int64_t first) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      rows[i] = operand.row(first + tile_row(i));
      ones[i] = 0;
    }
  }

  __device__ __forceinline__ void start(const Rows& operand, int step, uint32_t* tile) const {
    const auto place = operand.locate(word_of(step));
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const uint32_t* source = operand.address(rows[i], place);
      const bool inside = source != nullptr;
      start_copy<kVector * 4>(target(tile, i), inside ? source : operand.words, inside);
    }
  }

  // After the arrival of this thread's words of a step.
  __device__ __forceinline__ void settle(const Rows& operand, int step, uint32_t* tile, bool counting) {
    const bool masking = operand.last_bits != 0xffffffffu && (word_of(step) + kVector) % operand.period == 0;
    if (!masking && !counting) return;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      uint32_t* words = target(tile, i);
      if (masking) words[kVector - 1] &= operand.last_bits;
      if (kVector == kChunkWords) {
        const uint4 chunk = *reinterpret_cast<const uint4*>(words);
        ones[i] += __popc(chunk.x) + __popc(chunk.y) + __popc(chunk.z) + __popc(chunk.w);
      } else {
        ones[i] += __popc(*words);
      }
    }
  }

  // counts[r] = the ones of row r of the tile. Called by whole warps.
  __device__ __forceinline__ void share(int* counts) const {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      int sum = ones[i];
#pragma unroll
      for (int distance = kAcross / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      if (threadIdx.x % kAcross == 0) counts[tile_row(i)] = sum;
    }
  }
};

// sums += popcount(a and b) for the fragments of a warp.
template <int kFragments>
__device__ __forceinline__ void multiply_by_bits(int (&sums)[kFragments][4][4], const unsigned (&a)[kFragments][4],
                                                 const unsigned (&b)[4][2]) {
#pragma unroll
  for (int i = 0; i < kFragments; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) multiply_bits(sums[i][j], a[i], b[j]);
}

// The same with products of bytes: bit i of every byte of the words is 0 or 1, and lies in the lane in which the
// product of bytes wants it.
template <int kFragments>
__device__ __forceinline__ void multiply_by_bytes(int (&sums)[kFragments][4][4], const unsigned (&a)[kFragments][4],
                                                  const unsigned (&b)[4][2]) {
#pragma unroll
  for (int bit = 0; bit < 8; ++bit) {
    unsigned columns[4][2];
#pragma unroll
    for (int j = 0; j < 8; ++j) columns[j / 2][j % 2] = b[j / 2][j % 2] >> bit & 0x01010101u;
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
      unsigned rows[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) rows[j] = a[i][j] >> bit & 0x01010101u;
#pragma unroll
      for (int j = 0; j < 4; ++j) multiply_bytes(sums[i][j], rows, columns[j]);
    }
  }
}

// One stage of shared memory: the rows of a, then those of b.
template <class Tile>
__device__ __forceinline__ void multiply_stage(int (&sums)[Tile::kFragments][4][4], uint32_t* a_tile,
                                               uint32_t* b_tile) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int row = warp / Tile::kWarpsN * Tile::kFragments * 16 + lane % 16;
  const int column = warp % Tile::kWarpsN * kWarpColumns + lane / 16 * 8 + lane % 8;
#pragma unroll
  for (int chunk = 0; chunk < kStepWords / kChunkWords; chunk += 2) {
    unsigned a[Tile::kFragments][4], b[4][2];
#pragma unroll
    for (int i = 0; i < Tile::kFragments; ++i)
      load_matrices(chunk_of(a_tile, row + i * 16, chunk + lane / 16), a[i][0], a[i][1], a[i][2], a[i][3]);
#pragma unroll
    for (int j = 0; j < 4; j += 2)
      load_matrices(chunk_of(b_tile, column + j * 8, chunk + lane / 8 % 2), b[j][0], b[j][1], b[j + 1][0], b[j + 1][1]);
    if (has_bit_products()) {
      multiply_by_bits(sums, a, b);
    } else {
      multiply_by_bytes(sums, a, b);
    }
  }
}

// Where a tile lies: sixteen rows of tiles are done together, column by column, so that blocks that run at the same
// time read the same rows and columns.
struct TilePlace {
  int m, n;  // 32 bits: memory ends long before
};
__device__ __forceinline__ TilePlace place_tile(int64_t tile, int64_t tiles_m, int64_t tiles_n) {
  constexpr int64_t kTogether = 16;
  const int64_t group = tile / (kTogether * tiles_n), within = tile - group * kTogether * tiles_n;
  const int64_t left = tiles_m - group * kTogether, height = left < kTogether ? left : kTogether;
  return {static_cast<int>(group * kTogether + within % height), static_cast<int>(within / height)};
}

// What the end of a tile needs to know, in the shared memory of its stages.
template <class Tile, class Rows, class Output>
struct Finish {
  int row_ones[Tile::kRows], column_ones[Tile::kColumns];
  int64_t offset[Tile::kRows];  // of the row in the output
  typename Rows::Patch patch[Tile::kRows];
  ColumnParameters<Output, Tile::kColumns> columns;
};

template <class Tile, class Rows, class Output>
__device__ __forceinline__ void prepare_finish(Finish<Tile, Rows, Output>& finish, int64_t first_row,
                                               int64_t first_column, const Rows& rows, const MatrixRows& b,
                                               const int* b_ones, const Output& output) {
  const int i = threadIdx.x;
  if (i < Tile::kRows) {
    finish.offset[i] = offset_of(output, first_row + i);
    finish.patch[i] = rows.patch(first_row + i);
  }
  if (i < Tile::kColumns) {
    finish.columns.load(output, first_column, i);
    if (b_ones != nullptr) finish.column_ones[i] = first_column + i < b.rows ? b_ones[first_column + i] : 0;
  }
}

template <class Tile, class Rows, class Output>
__device__ __forceinline__ void write_tile(const int (&sums)[Tile::kFragments][4][4],
                                           const Finish<Tile, Rows, Output>& finish, int64_t first_row,
                                           int64_t first_column, const Rows& rows, const Output& output) {
  const int index = fresh_thread_index();
  const int lane = index % kWarp, warp = index / kWarp, thread = lane % 4;
  const int column = warp % Tile::kWarpsN * kWarpColumns;
#pragma unroll
  for (int part = 0; part < Tile::kFragments * 2; ++part) {
    const int row = (warp / Tile::kWarpsN * Tile::kFragments * 2 + part) * 8 + lane / 4;
    const typename Rows::Patch patch = finish.patch[row];
    int dots[kFragmentColumns];
#pragma unroll
    for (int i = 0; i < kFragmentColumns; ++i) {
      const int at = column + fragment_column(thread, i);
      int ones = finish.column_ones[at];
      if (!patch.whole && first_column + at < output.columns) ones = rows.column_ones(patch, first_column + at);
      dots[i] = patch.signs - 2 * (finish.row_ones[row] + ones) + 4 * sums[part / 2][i / 2][part % 2 * 2 + i % 2];
    }
    store_fragment(output, finish.columns, column, finish.offset[row], first_column + column, thread, dots,
                   first_row + row < rows.rows);
    __syncwarp();  // keeps the compiler from holding the parameters of all columns in registers
  }
}

// The tiles of one block. b_ones: the ones in each row of b, null where they are to be counted here.
template <class Tile, int kVector, class Rows, class Output>
__device__ __forceinline__ void multiply_tiles(const Rows& a, const MatrixRows& b, const int* b_ones,
                                               const Output& output, int64_t tiles_m, int64_t tiles_n) {
  __shared__ uint4 memory[Tile::kStages * Tile::kStageChunks];
  uint32_t* const words = reinterpret_cast<uint32_t*>(memory);
  Finish<Tile, Rows, Output>& finish = *reinterpret_cast<Finish<Tile, Rows, Output>*>(memory);
  static_assert(sizeof(finish) <= sizeof(memory));
  const auto stage = [&](int step) { return words + step % Tile::kStages * Tile::kStageChunks * kChunkWords; };
  const int steps = (b.row_words + kStepWords - 1) / kStepWords;
  Loader<Rows, Tile::kRows, kVector> a_loader;
  Loader<MatrixRows, Tile::kColumns, kVector> b_loader;
  const auto start = [&](int step) {
    if (step < steps) {
      a_loader.start(a, step, stage(step));
      b_loader.start(b, step, stage(step) + Tile::kRows * kStepWords);
    }
    end_batch();
  };
  for (int64_t tile = blockIdx.x; tile < tiles_m * tiles_n; tile += gridDim.x) {
    const TilePlace place = place_tile(tile, tiles_m, tiles_n);
    int sums[Tile::kFragments][4][4] = {};
    a_loader.begin(a, static_cast<int64_t>(place.m) * Tile::kRows);
    b_loader.begin(b, static_cast<int64_t>(place.n) * Tile::kColumns);
#pragma unroll
    for (int step = 0; step < Tile::kStages - 1; ++step) start(step);
    for (int step = 0; step < steps; ++step) {
      uint32_t *const a_tile = stage(step), *const b_tile = a_tile + Tile::kRows * kStepWords;
      wait_for_batches<Tile::kStages - 2>();
      a_loader.settle(a, step, a_tile, true);
      b_loader.settle(b, step, b_tile, b_ones == nullptr);
      __syncthreads();  // everybody's words are there, and everybody is done with the stage filled next
      start(step + Tile::kStages - 1);
      multiply_stage<Tile>(sums, a_tile, b_tile);
    }
    wait_for_batches<0>();
    __syncthreads();
    const int64_t first_row = static_cast<int64_t>(place.m) * Tile::kRows;
    const int64_t first_column = static_cast<int64_t>(place.n) * Tile::kColumns;
    a_loader.share(finish.row_ones);
    if (b_ones == nullptr) b_loader.share(finish.column_ones);
    prepare_finish<Tile>(finish, first_row, first_column, a, b, b_ones, output);
    __syncthreads();
    write_tile<Tile>(sums, finish, first_row, first_column, a, output);
    __syncthreads();
  }
}

// `parts` packed parts of k signs a row.
inline MatrixRows matrix_rows(const uint32_t* words, int64_t rows, int64_t parts, int64_t k) {
  const int period = static_cast<int>(words_of(k));
  return {words,
          rows,
          static_cast<int>(parts) * period,
          period,
          k % kWordBits ? (1u << k % kWordBits) - 1u : ~0u,
          static_cast<int>(parts * k)};
}

// Calls f with the tile and the width of the copies: large tiles where they keep every multiprocessor busy; single
// words where rows or their parts do not begin at multiples of 16 bytes.
template <class F>
cudaError_t for_tile(int64_t rows, int64_t columns, bool aligned, F f) {
  int multiprocessors = 0;
  const cudaError_t error = count_multiprocessors(multiprocessors);
  if (error != cudaSuccess) return error;
  const int64_t large = count_tiles(rows, LargeTile::kRows) * count_tiles(columns, LargeTile::kColumns);
  constexpr std::integral_constant<int, 1> kWords;
  constexpr std::integral_constant<int, kChunkWords> kChunks;
  if (!aligned) return f(SmallTile(), kWords, multiprocessors);
  return large >= multiprocessors ? f(LargeTile(), kChunks, multiprocessors) : f(SmallTile(), kChunks, multiprocessors);
}

// Launches a kernel of multiply_tiles.
template <class Tile, class... Parameters, class... Arguments>
cudaError_t launch_tiles(void (*kernel)(Parameters...), int64_t rows, int64_t columns, int multiprocessors,
                         cudaStream_t stream, Arguments... arguments) {
  const int64_t tiles_m = count_tiles(rows, Tile::kRows), tiles_n = count_tiles(columns, Tile::kColumns);
  const int64_t most = static_cast<int64_t>(multiprocessors) * kBlocksPerMultiprocessor;
  return launch(kernel, std::min(tiles_m * tiles_n, most), kBlock, stream, arguments..., tiles_m, tiles_n);
}

// Whether rows of whole chunks begin at `base`.
inline bool is_chunked(const void* base, int64_t period) {
  return reinterpret_cast<uintptr_t>(base) % (kChunkWords * 4) == 0 && period % kChunkWords == 0;
}

}  // namespace quantkern::cuda

// One tile of channels x channels of one piece, summed by one thread block.
#pragma once

#include <algorithm>

#include "covariance_pieces.h"
#include "device.h"

namespace kfac2::cuda {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kChunk = 32;  // positions held in shared memory
constexpr int kPad = 4;     // keeps rows of shared memory 16-byte aligned and off one bank

// The offset in x of position `index` of a piece, numbered sample slowest, W fastest, and of its first channel.
__device__ int64_t offset_of(const RowSource& source, const Piece& piece, int64_t index) {
  int64_t offset = 0;
  for (int axis = kSpatialRank - 1; axis >= 0; --axis) {
    const AxisPiece& part = piece.axes[axis];
    int64_t place = 0;
    if (part.count > 1) {  // else there is nothing to divide, which takes long
      place = index % part.count * part.step;
      index /= part.count;
    }
    offset += (part.first + place) * source.spatial_stride[axis];
  }
  return offset + index * source.batch_stride;
}

template <typename Sum, int kTile>
struct SharedTile {
  static constexpr int kLanes = kTile / 4 * (kTile / 4);  // threads of 4 x 4 sums each
  static constexpr int kSlices = kThreads / kLanes;       // which share the positions
  union {
    struct {
      Sum left[2][kChunk][kTile + kPad];  // two chunks: one is read while the next is written
      Sum right[2][kChunk][kTile + kPad];
    };
    Sum slices[kSlices][kTile * kTile];
  };
  int64_t offset[2 * kWarps][kChunk];  // of chunks, in turn
  Sum ones[kThreads];                  // sums of x: of a channel, over a part of the positions
};

// A thread's part of a chunk: the numbers at position k + m * kPositionStep and channel c + m * kChannelStep, where m <
// kNumbers. With channels last, neighbouring threads take neighbouring channels. Else a warp takes 32 neighbouring
// positions, 128 bytes of memory, of one channel after the other, and each thread has neighbouring channels of its
// position: shared memory, whose rows are positions, takes 16 bytes of it at once, without bank conflicts.
template <int kTile, bool kChannelsLast>
struct Part {
  static constexpr int kNumbers = kTile * kChunk / kThreads;
  static constexpr int kPositionStep = kChannelsLast ? kThreads / kTile : 0, kChannelStep = kChannelsLast ? 0 : 1;
  const int k = static_cast<int>(kChannelsLast ? threadIdx.x / kTile : threadIdx.x % kChunk);
  const int c = static_cast<int>(kChannelsLast ? threadIdx.x % kTile : threadIdx.x / kChunk * kNumbers);
};

// One side of the products: a tile of channels, read from memory to registers, all loads before the first is waited
// for, and from there to shared memory.
template <typename T, int kTile>
struct Side {
  static constexpr int kNumbers = kTile * kChunk / kThreads;
  const T* x;  // of the tile's first channel
  int channels;
  T numbers[kNumbers];

  __device__ Side(const T* data, int64_t first_channel, const RowSource& source)
      : x(data + first_channel * source.channel_stride),
        channels(static_cast<int>(std::min<int64_t>(kTile, source.channels_per_group() - first_channel))) {}

  // Reads no position behind `positions` and no channel behind the last. Addresses step from number to number.
  template <bool kChannelsLast>
  __device__ void load(const int64_t* offset, int positions, int64_t channel_stride) {
    using Its = Part<kTile, kChannelsLast>;
    const Its part;
    const bool inside = part.k < positions && part.c < channels;
    const int left = !inside ? 0 : kChannelsLast ? positions - part.k : channels - part.c;
    const T* const at = inside ? x + part.c * channel_stride + (kChannelsLast ? 0 : offset[part.k]) : x;
#pragma unroll
    for (int m = 0; m < kNumbers; ++m) {
      if constexpr (kChannelsLast) {
        const int step = m * Its::kPositionStep;
        numbers[m] = step < left ? at[offset[part.k + step]] : T{};
      } else {
        const int step = m * Its::kChannelStep;
        numbers[m] = step < left ? at[step * channel_stride] : T{};
      }
    }
  }

  template <bool kChannelsLast>
  __device__ void store(SumType<T> (*to)[kTile + kPad]) const {
    using Its = Part<kTile, kChannelsLast>;
    const Its part;
#pragma unroll
    for (int m = 0; m < kNumbers; ++m)
      to[part.k + m * Its::kPositionStep][part.c + m * Its::kChannelStep] = to_sum_type(numbers[m]);
  }
};

// One tile of one piece over the positions [begin, end), into `out`: a matrix of `side` rows and columns. Tiles on the
// diagonal of a symmetric piece sum x, too, for the bias: behind the last row. While the products of a chunk are
// formed, the next one is on its way.
template <typename T, int kTile, bool kChannelsLast>
__device__ void add_tile(const RowSource& source, const Piece& piece, const T* x, int64_t begin, int64_t end,
                         int row_tile, int col_tile, int64_t side, SumType<T>* out,
                         SharedTile<SumType<T>, kTile>& shared) {
  using Sum = SumType<T>;
  using Shared = SharedTile<Sum, kTile>;
  const int64_t stride = kChannelsLast ? 1 : source.channel_stride;
  int64_t shift = 0;
  for (int axis = 0; axis < kSpatialRank; ++axis) shift += piece.axes[axis].shift * source.spatial_stride[axis];
  const int lane = threadIdx.x % Shared::kLanes, slice = threadIdx.x / Shared::kLanes;
  const int row = lane / (kTile / 4) * 4, col = lane % (kTile / 4) * 4;
  const bool takes_ones = piece.symmetric && row_tile == col_tile && source.window.bias != 0;
  Side<T, kTile> left(x, int64_t{row_tile} * kTile, source), right(x + shift, int64_t{col_tile} * kTile, source);
  // Where the positions of as many chunks lie as there are warps: each finds those of one, so that none waits for
  // another's divisions.
  const auto find = [&](int64_t first, int chunk_number) {
    static_assert(kChunk == 32, "a position for each thread of a warp");
    const int warp = static_cast<int>(threadIdx.x / 32), k = static_cast<int>(threadIdx.x % 32);
    const int64_t index = first + warp * kChunk + k;
    if (index < end) shared.offset[(chunk_number + warp) % (2 * kWarps)][k] = offset_of(source, piece, index);
  };
  const auto load = [&](int64_t first, int chunk_number) {
    const int positions = static_cast<int>(std::min<int64_t>(kChunk, end - first));  // 0 and less: no chunk
    left.template load<kChannelsLast>(shared.offset[chunk_number % (2 * kWarps)], positions, stride);
    right.template load<kChannelsLast>(shared.offset[chunk_number % (2 * kWarps)], positions, stride);
  };
  Sum sums[4][4] = {}, ones = 0;
  find(begin, 0);
  __syncthreads();
  load(begin, 0);
  int number = 0;  // of a chunk
  for (int64_t chunk = begin; chunk < end; chunk += kChunk, ++number) {
    const int buffer = number % 2;
    left.template store<kChannelsLast>(shared.left[buffer]);
    right.template store<kChannelsLast>(shared.right[buffer]);
    if (number % kWarps == 0) find(chunk + kWarps * kChunk, number + kWarps);
    __syncthreads();  // the chunk is there, and offsets; the last chunk is done with
    load(chunk + kChunk, number + 1);
#pragma unroll 2
    for (int k = slice; k < kChunk; k += Shared::kSlices) {
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) sums[i][j] += shared.left[buffer][k][row + i] * shared.right[buffer][k][col + j];
    }
    if (!takes_ones) continue;  // the same for all threads of the block
#pragma unroll 1
    for (int k = threadIdx.x / kTile; k < kChunk; k += kThreads / kTile)
      ones += shared.left[buffer][k][threadIdx.x % kTile];
  }
  __syncthreads();  // before the slices' sums overwrite the last chunk
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) shared.slices[slice][(row + i) * kTile + col + j] = sums[i][j];
  shared.ones[threadIdx.x] = ones;
  __syncthreads();
  for (int entry = threadIdx.x; entry < kTile * kTile; entry += kThreads) {
    Sum sum = 0;
    for (int s = 0; s < Shared::kSlices; ++s) sum += shared.slices[s][entry];
    out[(row_tile * kTile + entry / kTile) * side + col_tile * kTile + entry % kTile] = sum;
  }
  if (!takes_ones || threadIdx.x >= kTile) return;  // no barrier follows
  for (int part = kTile; part < kThreads; part += kTile) ones += shared.ones[threadIdx.x + part];
  out[side * side + row_tile * kTile + threadIdx.x] = ones;
}

}  // namespace kfac2::cuda

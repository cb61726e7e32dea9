// One tile of channels x channels of one piece, summed by one thread block.
#pragma once

#include <algorithm>

#include "covariance_pieces.h"
#include "device.h"

namespace kfac2::cuda {

constexpr int kThreads = 128;
constexpr int kPad = 4;  // keeps rows of shared memory 16-byte aligned and off one bank

// How the threads of a block share a tile. A thread with 8 x 8 sums reads 16 numbers from shared memory for 64
// products, one with 4 x 4 sums 8 for 16, which takes twice as long as these. 8 x 16 sums leave too few threads to hide
// loads: measured on an H100, where 8 x 8 is the fastest for 64 channels and 4 x 4 for fewer.
template <int kTile>
struct Split {
  static constexpr int kSums = kTile == 64 ? 8 : 4;           // a thread has kSums x kSums
  static constexpr int kAlong = kTile / kSums;                // threads along a side
  static constexpr int kSlices = kThreads / kAlong / kAlong;  // of threads, which share the positions
  static constexpr int kChunk = kTile == 64 ? 16 : 32;        // positions in shared memory
  static constexpr int kUnrolled = kTile == 32 ? 4 : 8;       // positions at most, as measured
};

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
  using Its = Split<kTile>;
  using Chunk = Sum[Its::kChunk][kTile + kPad];
  union {
    struct {
      Chunk left[2];  // two chunks: one is read while the next is written
      Chunk right[2];
    };
    Sum slices[Its::kSlices][kTile * kTile];
  };
  int64_t offset[2 * kThreads];  // of positions, counted from the block's first, in turn
  Sum ones[kThreads];            // sums of x: of a channel, over a part of the positions
};

// A thread's part of a chunk: the numbers at position k + m * kPositionStep and channel c + m * kChannelStep, where m <
// kNumbers. With channels last, neighbouring threads take neighbouring channels. Else they take neighbouring positions
// of one channel after the other, and each has neighbouring channels of its position: shared memory, whose rows are
// positions, takes 16 bytes of it at once, without bank conflicts.
template <int kTile, int kChunk, bool kChannelsLast>
struct Part {
  static constexpr int kNumbers = kTile * kChunk / kThreads;
  static constexpr int kPositionStep = kChannelsLast ? kThreads / kTile : 0, kChannelStep = kChannelsLast ? 0 : 1;
  static constexpr int kStep = kPositionStep + kChannelStep;  // along the axis on which its numbers lie
  const int k = static_cast<int>(kChannelsLast ? threadIdx.x / kTile : threadIdx.x % kChunk);
  const int c = static_cast<int>(kChannelsLast ? threadIdx.x % kTile : threadIdx.x / kChunk * kNumbers);
};

// One side of the products: a tile of channels, read from memory to registers, all loads before the first is waited
// for, and from there to shared memory.
template <typename T, int kTile>
struct Side {
  static constexpr int kChunk = Split<kTile>::kChunk, kNumbers = kTile * kChunk / kThreads;
  template <bool kChannelsLast>
  using Its = Part<kTile, kChunk, kChannelsLast>;
  const T* x;  // of the tile's first channel
  int channels;
  T numbers[kNumbers];

  __device__ Side(const T* data, int64_t first_channel, const RowSource& source)
      : x(data + first_channel * source.channel_stride),
        channels(static_cast<int>(std::min<int64_t>(kTile, source.channels_per_group() - first_channel))) {}

  // Reads no position behind `positions` and no channel behind the last. Addresses step from number to number.
  template <bool kChannelsLast>
  __device__ void load(const int64_t* offset, int positions, int64_t channel_stride) {
    const Its<kChannelsLast> part;
    const bool inside = part.k < positions && part.c < channels;
    const int left = !inside ? 0 : kChannelsLast ? positions - part.k : channels - part.c;
    const T* const at = inside ? x + part.c * channel_stride + (kChannelsLast ? 0 : offset[part.k]) : x;
    if (!kChannelsLast && left >= kNumbers) {  // nearly always: nothing is asked of each number
#pragma unroll
      for (int m = 0; m < kNumbers; ++m) numbers[m] = at[m * channel_stride];
      return;
    }
#pragma unroll
    for (int m = 0; m < kNumbers; ++m) {
      const int step = m * part.kStep;
      numbers[m] = step < left ? at[kChannelsLast ? offset[part.k + step] : step * channel_stride] : T{};
    }
  }

  template <bool kChannelsLast>
  __device__ void store(SumType<T> (*to)[kTile + kPad]) const {
    const Its<kChannelsLast> part;
#pragma unroll
    for (int m = 0; m < kNumbers; ++m)
      to[part.k + m * part.kPositionStep][part.c + m * part.kChannelStep] = to_sum_type(numbers[m]);
  }
};

// The sums of a thread: of channels in groups of four. A group lies apart from the next by a group of each thread, so
// that neighbouring threads read neighbouring 16 bytes.
template <typename Sum, int kTile>
struct ThreadSums {
  using Its = Split<kTile>;
  using Chunk = typename SharedTile<Sum, kTile>::Chunk;
  static constexpr int kGroup = 4, kSums = Its::kSums, kAlong = Its::kAlong;
  const int slice = static_cast<int>(threadIdx.x / (kAlong * kAlong));
  const int row = static_cast<int>(threadIdx.x / kAlong % kAlong * kGroup);
  const int column = static_cast<int>(threadIdx.x % kAlong * kGroup);
  Sum sums[kSums][kSums] = {};

  static __device__ int place(int first, int i) { return first + i / kGroup * kGroup * kAlong + i % kGroup; }

  static __device__ void read(const Sum* channels, int first, Sum (&numbers)[kSums]) {
    constexpr int kLanes = Vector<Sum>::kLanes;
#pragma unroll
    for (int i = 0; i < kSums; i += kLanes) {
      const Vector<Sum> some = *aligned<const Vector<Sum>>(channels + place(first, i));
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) numbers[i + lane] = some.lane[lane];
    }
  }

  __device__ void add(const Chunk& left, const Chunk& right) {
#pragma unroll Its::kUnrolled
    for (int i = 0; i < Its::kChunk / Its::kSlices; ++i) {
      const int k = i * Its::kSlices + slice;
      Sum a[kSums], b[kSums];
      read(left[k], row, a);
      read(right[k], column, b);
#pragma unroll
      for (int m = 0; m < kSums; ++m)
#pragma unroll
        for (int n = 0; n < kSums; ++n) sums[m][n] += a[m] * b[n];
    }
  }

  __device__ void store(Sum* tile) const {
#pragma unroll
    for (int m = 0; m < kSums; ++m)
#pragma unroll
      for (int n = 0; n < kSums; ++n) tile[place(row, m) * kTile + place(column, n)] = sums[m][n];
  }
};

// One tile of one piece over the positions [begin, end), into `out`: a matrix of `side` rows and columns. Tiles on the
// diagonal of a symmetric piece multiply x by itself, which is read once; they sum x, too, for the bias: behind the
// last row. While the products of a chunk are formed, the next one is on its way.
template <typename T, int kTile, bool kChannelsLast>
__device__ void add_tile(const RowSource& source, const Piece& piece, const T* x, int64_t begin, int64_t end,
                         int row_tile, int col_tile, int64_t side, SumType<T>* out,
                         SharedTile<SumType<T>, kTile>& shared) {
  using Sum = SumType<T>;
  using Its = Split<kTile>;
  constexpr int kChunk = Its::kChunk, kOffsets = 2 * kThreads;
  const int64_t stride = kChannelsLast ? 1 : source.channel_stride;
  int64_t shift = 0;
  for (int axis = 0; axis < kSpatialRank; ++axis) shift += piece.axes[axis].shift * source.spatial_stride[axis];
  const bool is_square = piece.symmetric && row_tile == col_tile, takes_ones = is_square && source.window.bias != 0;
  Side<T, kTile> left(x, int64_t{row_tile} * kTile, source), right(x + shift, int64_t{col_tile} * kTile, source);
  const int count = static_cast<int>(end - begin);  // of positions
  // Where the next kThreads positions lie: a thread finds one, so that none waits for another's divisions.
  const auto find = [&](int first) {
    const int position = first + static_cast<int>(threadIdx.x);
    if (position < count) shared.offset[position % kOffsets] = offset_of(source, piece, begin + position);
  };
  const auto load = [&](int first) {
    const int positions = std::min(kChunk, count - first);  // 0 and less: no chunk
    const int64_t* offset = shared.offset + first % kOffsets;
    left.template load<kChannelsLast>(offset, positions, stride);
    if (!is_square) right.template load<kChannelsLast>(offset, positions, stride);
  };
  ThreadSums<Sum, kTile> sums;
  Sum ones = 0;
  find(0);
  __syncthreads();
  load(0);
  int buffer = 0;
  for (int first = 0; first < count; first += kChunk, buffer = 1 - buffer) {
    left.template store<kChannelsLast>(shared.left[buffer]);
    if (!is_square) right.template store<kChannelsLast>(shared.right[buffer]);
    if (first % kThreads == 0) find(first + kThreads);
    __syncthreads();  // the chunk is there, and offsets; the last chunk is done with
    load(first + kChunk);
    sums.add(shared.left[buffer], is_square ? shared.left[buffer] : shared.right[buffer]);
    if (!takes_ones) continue;  // the same for all threads of the block
#pragma unroll 1
    for (int k = threadIdx.x / kTile; k < kChunk; k += kThreads / kTile)
      ones += shared.left[buffer][k][threadIdx.x % kTile];
  }
  __syncthreads();  // before the slices' sums overwrite the last chunk
  sums.store(shared.slices[sums.slice]);
  shared.ones[threadIdx.x] = ones;
  __syncthreads();
  for (int entry = threadIdx.x; entry < kTile * kTile; entry += kThreads) {
    Sum sum = 0;
    for (int s = 0; s < Its::kSlices; ++s) sum += shared.slices[s][entry];
    out[(row_tile * kTile + entry / kTile) * side + col_tile * kTile + entry % kTile] = sum;
  }
  if (!takes_ones || threadIdx.x >= kTile) return;  // no barrier follows
  for (int part = kTile; part < kThreads; part += kTile) ones += shared.ones[threadIdx.x + part];
  out[side * side + row_tile * kTile + threadIdx.x] = ones;
}

}  // namespace kfac2::cuda

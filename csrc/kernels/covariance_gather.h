// From the sums of all shares of all pieces to covariances: shares are added up, then each element takes its pieces.
#pragma once

#include "covariance_tables.h"
#include "device.h"
#include "triangle.h"

namespace kfac2::cuda {

constexpr int kSumThreads = 256;
constexpr int kSlices = kSumThreads / kColumns;  // warps, each with a part of the shares
constexpr int kInFlight = 8;                     // loads of a thread on their way

template <typename Sum>
using SliceSums = Sum[kSlices][kColumns];

// Adds up one column, `numbers` apart from share to share, into its first share: of neighbouring columns of a piece by
// neighbouring threads, and of one column by kSlices threads, in a fixed order.
template <typename Sum>
__device__ void sum_column(Sum* column, bool inside, int shares, int64_t numbers, SliceSums<Sum>& slices) {
  const int slice = threadIdx.x / kColumns;
  Sum sums[kInFlight] = {}, loaded[kInFlight];
  for (int first = slice; inside && first < shares; first += kSlices * kInFlight) {
#pragma unroll
    for (int m = 0; m < kInFlight; ++m) {
      const int share = first + m * kSlices;
      loaded[m] = share < shares ? column[share * numbers] : Sum{};
    }
#pragma unroll
    for (int m = 0; m < kInFlight; ++m) sums[m] += loaded[m];
  }
  Sum sum = 0;
#pragma unroll
  for (int m = 0; m < kInFlight; ++m) sum += sums[m];
  slices[slice][threadIdx.x % kColumns] = sum;
  __syncthreads();
  if (slice > 0 || !inside) return;
  for (int other = 1; other < kSlices; ++other) sum += slices[other][threadIdx.x];
  *column = sum;
}

template <typename Sum>
__device__ void sum_block(const LayerEntry& layer, const PieceEntry* pieces, int64_t item, unsigned char* workspace) {
  KFAC2_SHARED(SliceSums<Sum>, slices);
  const Cut& cut = layer.cut;
  const int64_t group = item / cut.group_sums, local = item % cut.group_sums;
  const PieceEntry& entry = pieces[entry_of(cut.piece_count, local, [pieces](int p) { return pieces[p].first_sum; })];
  const int64_t first = (local - entry.first_sum) * kColumns, side = cut.side();
  // The whole block lies in one tile then; what is under the diagonal is neither written nor read.
  const bool in_products = first < side * side;
  if (entry.piece.symmetric && in_products && first / side / cut.tile > first % side / cut.tile) return;
  const int64_t column = first + threadIdx.x % kColumns;
  Sum* partial = reinterpret_cast<Sum*>(workspace + layer.partial) +
                 (group * cut.group_shares + entry.first_share) * layer.numbers();
  sum_column(partial + column, column < layer.numbers_of(entry.piece), entry.shares, layer.numbers(), slices);
}

__global__ void __launch_bounds__(kSumThreads)
    sum_shares_kernel(const LayerEntry* layers, int count, const PieceEntry* pieces, unsigned char* workspace) {
  const LayerEntry& layer = layers[entry_of(count, blockIdx.x, [layers](int i) { return layers[i].first_sum; })];
  const int64_t item = blockIdx.x - layer.first_sum;
  if (layer.source.element_type == ElementType::kFloat64) {
    sum_block<double>(layer, pieces + layer.cut.pieces, item, workspace);
  } else {
    sum_block<float>(layer, pieces + layer.cut.pieces, item, workspace);
  }
}

// One element. Pieces have differences that lead with a positive number, and those without difference are written above
// the diagonal: where (row, column) is not so, the products hold the transposed element.
template <typename Sum>
__device__ void gather_element(const LayerEntry& layer, const int* held, int64_t item, int64_t group, int r, int c,
                               double kept, const unsigned char* workspace) {
  const RowSource& source = layer.source;
  const auto write = [&](Sum sum) {
    sum *= static_cast<Sum>(layer.scale);
    if (layer.previous != nullptr) sum += static_cast<Sum>(kept) * static_cast<const Sum*>(layer.previous)[item];
    static_cast<Sum*>(layer.covariances)[item] = sum;
  };
  const int last = static_cast<int>(source.row_length()) - 1, offsets = static_cast<int>(source.window.offsets());
  const bool with_ones = source.window.bias != 0 && c == last;
  if (with_ones && r == c) {
    write(static_cast<Sum>(source.batch * source.grid_places()));
    return;
  }
  if (with_ones) c = r;  // sums of x, which symmetric pieces hold
  int row = r / offsets, row_offset = r % offsets, column = c / offsets, column_offset = c % offsets;
  if (row_offset > column_offset || (row_offset == column_offset && row > column)) {
    const int other = row, other_offset = row_offset;
    row = column;
    row_offset = column_offset;
    column = other;
    column_offset = other_offset;
  }
  const int64_t side = layer.cut.side(), numbers = layer.numbers(),
                place = with_ones ? side * side + row : row * side + column;
  const Sum* partial =
      reinterpret_cast<const Sum*>(workspace + layer.partial) + group * layer.cut.group_shares * numbers + place;
  const int* its = held + int64_t{row_offset} * offsets + column_offset;
  const int end = its[1];
  Sum sum = 0;
#pragma unroll 4
  for (int i = its[0]; i < end; ++i) sum += partial[held[i] * numbers];
  write(sum);
}

__global__ void __launch_bounds__(kThreads)
    gather_kernel(const LayerEntry* layers, int count, const int* held, double kept, const unsigned char* workspace) {
  const LayerEntry& layer = layers[entry_of(count, blockIdx.x, [layers](int i) { return layers[i].first_output; })];
  const Triangle triangle{layer.source.row_length()};
  const int64_t first = (blockIdx.x - layer.first_output) * kThreads, width = triangle.width();
  // Only the line of the block's first element needs 64 bits. Lines are counted over all groups.
  const int width_short = static_cast<int>(width), behind = static_cast<int>(first % width + threadIdx.x);
  const int line = static_cast<int>(first / width) + behind / width_short, height = static_cast<int>(triangle.height());
  const int group = line / height;
  if (group >= layer.source.window.groups) return;
  int64_t r, c;  // r <= c
  triangle.element(line % height, behind % width_short, &r, &c);
  const int64_t item = first + threadIdx.x;
  if (layer.source.element_type == ElementType::kFloat64) {
    gather_element<double>(layer, held + layer.cut.held, item, group, static_cast<int>(r), static_cast<int>(c), kept,
                           workspace);
  } else {
    gather_element<float>(layer, held + layer.cut.held, item, group, static_cast<int>(r), static_cast<int>(c), kept,
                          workspace);
  }
}

}  // namespace kfac2::cuda

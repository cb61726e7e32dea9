// The pieces of include/covariance_pieces.h on a device. One launch forms the outer products of all pieces of
// all layers: a block takes a tile of channels x channels of one piece and a share of its positions, reads the
// two operands where they lie in x (the second is the first, moved), and never forms a patch. A second launch
// sums x at each offset for the bias. A third gathers: each element of each covariance adds up the pieces that
// hold its pair of offsets, and their shares, in a fixed order.
//
// Floor: x is read once from memory (N*C*H*W*sizeof) and again from L2 for each piece and tile; 13 C^2 N H W
// multiply-adds for a 3x3 convolution of stride 1, in float32 (float64 for float64), where im2col spends 81.
#include <algorithm>
#include <map>
#include <vector>

#include "covariance_pieces.h"
#include "covariances.h"
#include "device.h"
#include "tables.h"

namespace kfac2::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kChunk = 32;                    // positions held in shared memory
constexpr int kPad = 4;                       // keeps rows of shared memory 16-byte aligned and off one bank
constexpr int64_t kSharePositions = 1 << 13;  // worth a share of their own
constexpr int64_t kMaxShares = 16;
constexpr int64_t kBlocksWanted = 4096;  // fixed, so that results do not depend on the device
constexpr int64_t kMaxKernel = 64;       // offsets of an axis are kept as bits

// Positions of a piece, and the offsets it is added to.
struct PieceEntry {
  int64_t first_item;  // within one group of a layer
  int64_t partial;     // where its sums begin, in numbers, within one group
  int64_t shares;
  int first[kSpatialRank], count[kSpatialRank], step[kSpatialRank], shift[kSpatialRank];
  int difference[kSpatialRank];
  uint64_t offsets[kSpatialRank];  // bit o1
  bool symmetric;
};

struct LayerEntry {
  int64_t first_item;  // block of the products' launch
  RowSource source;
  void* covariances;        // [groups, d, d]
  int64_t partial;          // where its sums begin in the workspace, in bytes
  int64_t bias_partial;     // likewise, of the sums for the bias: [groups, offsets, C]
  int pieces, piece_count;  // in the table of pieces
  int tile;                 // 16 or 32 channels
  int tiles;                // along one side
  int64_t group_items, group_numbers;
};

// Ranges of work of the second and third launch, by layer.
struct RangeEntry {
  int64_t first_item;
};

struct Plan {
  std::vector<LayerEntry> layers;
  std::vector<PieceEntry> pieces;
  std::vector<RangeEntry> bias_ranges, output_ranges;
  int64_t items = 0, bias_items = 0, outputs = 0, bytes = 0;
  bool possible = true;
};

std::vector<int64_t> shape_key(const RowSource& source) {
  std::vector<int64_t> key = {source.batch, source.channels_per_group(), source.window.groups};
  const Window& window = source.window;
  for (int axis = 0; axis < kSpatialRank; ++axis) {
    key.insert(key.end(), {source.extent[axis], window.kernel[axis], window.stride[axis], window.pad_low[axis],
                           window.pad_high[axis], window.dilation[axis]});
  }
  return key;
}

// Adds the pieces of a layer's shape to the table; fills in what they mean for the layer.
void add_pieces(LayerEntry& layer, std::vector<PieceEntry>& table) {
  const RowSource& source = layer.source;
  std::vector<AxisPiece> axes[kSpatialRank];
  for (int axis = 0; axis < kSpatialRank; ++axis) axes[axis] = axis_pieces(source, axis);
  layer.pieces = static_cast<int>(table.size());
  layer.tile = source.channels_per_group() <= 16 ? 16 : 32;
  layer.tiles = static_cast<int>(ceil_div(source.channels_per_group(), layer.tile));
  const int64_t side = int64_t{layer.tile} * layer.tiles;
  layer.group_items = layer.group_numbers = 0;
  for (const Piece& piece : combine(axes)) {
    PieceEntry entry{layer.group_items, layer.group_numbers, 1, {}, {}, {}, {}, {}, {}, piece.symmetric};
    int64_t positions = source.batch;
    for (int axis = 0; axis < kSpatialRank; ++axis) {
      const AxisPiece& part = *piece.axes[axis];
      positions *= part.count;
      entry.first[axis] = static_cast<int>(part.first);
      entry.count[axis] = static_cast<int>(part.count);
      entry.step[axis] = static_cast<int>(part.step);
      entry.shift[axis] = static_cast<int>(part.shift);
      entry.difference[axis] = static_cast<int>(part.difference);
      for (const int64_t offset : part.offsets) entry.offsets[axis] |= uint64_t{1} << offset;
    }
    // Shares only where the tiles alone would not fill a device: each has sums of its own in the workspace.
    const int64_t blocks = int64_t{layer.tiles} * layer.tiles * source.window.groups;
    const int64_t wanted = std::min(kMaxShares, ceil_div(kBlocksWanted, blocks));
    entry.shares = std::max<int64_t>(1, std::min(positions / kSharePositions, wanted));
    layer.group_items += entry.shares * layer.tiles * layer.tiles;
    layer.group_numbers += entry.shares * side * side;
    table.push_back(entry);
  }
  layer.piece_count = static_cast<int>(table.size()) - layer.pieces;
}

Plan make_plan(const CovariancesParams& params) {
  Plan plan;
  std::map<std::vector<int64_t>, size_t> seen;  // layers of one shape share their pieces
  for (int64_t i = 0; i < params.layers; ++i) {
    const RowSource& source = params.sources[i];
    const Window& window = source.window;
    for (int axis = 0; axis < kSpatialRank; ++axis) plan.possible = plan.possible && window.kernel[axis] <= kMaxKernel;
    if (!plan.possible) return plan;
    LayerEntry layer{};
    const auto [found, is_new] = seen.emplace(shape_key(source), plan.layers.size());
    if (!is_new) layer = plan.layers[found->second];
    layer.source = source;
    if (is_new) add_pieces(layer, plan.pieces);
    layer.covariances = params.covariances[i];
    layer.first_item = plan.items;
    layer.partial = plan.bytes;
    plan.items += window.groups * layer.group_items;
    plan.bytes += ceil_div(window.groups * layer.group_numbers * source.sum_bytes(), 16) * 16;
    layer.bias_partial = plan.bytes;
    plan.bias_ranges.push_back({plan.bias_items});
    if (window.bias != 0) {
      const int64_t sums = window.offsets() * source.channels;
      plan.bias_items += sums;
      plan.bytes += ceil_div(sums * source.sum_bytes(), 16) * 16;
    }
    plan.output_ranges.push_back({plan.outputs});
    plan.outputs += ceil_div(window.groups * source.row_length() * source.row_length(), kThreads);
    plan.layers.push_back(layer);
  }
  return plan;
}

// Where position `index` of a piece (sample slowest, W fastest) lies in x, channels left out.
__device__ int64_t offset_of(const RowSource& source, const PieceEntry& piece, int64_t index) {
  int64_t offset = 0;
  for (int axis = kSpatialRank - 1; axis >= 0; --axis) {
    offset += (piece.first[axis] + index % piece.count[axis] * piece.step[axis]) * source.spatial_stride[axis];
    index /= piece.count[axis];
  }
  return offset + index * source.batch_stride;
}

template <typename Sum, int kTile>
struct SharedTile {
  static constexpr int kLanes = kTile / 4 * (kTile / 4);  // threads of 4 x 4 sums each
  static constexpr int kSlices = kThreads / kLanes;       // which share the positions
  union {
    struct {
      Sum left[kChunk][kTile + kPad];
      Sum right[kChunk][kTile + kPad];
    };
    Sum slices[kSlices][kTile * kTile];
  };
  int64_t offset[kChunk];
};

// Channels first_channel.. of the chunk's positions; 0 where there are none.
template <typename T, int kTile>
__device__ void load_channels(SumType<T> (*to)[kTile + kPad], const T* x, const int64_t* offset, int positions,
                              int64_t first_channel, int64_t channels, int64_t channel_stride) {
  const bool channels_last = channel_stride == 1;  // neighbouring threads read neighbouring memory
  for (int i = threadIdx.x; i < kTile * kChunk; i += kThreads) {
    const int c = channels_last ? i % kTile : i / kChunk, k = channels_last ? i / kTile : i % kChunk;
    const bool inside = k < positions && first_channel + c < channels;
    to[k][c] = inside ? to_sum_type(x[offset[k] + (first_channel + c) * channel_stride]) : SumType<T>(0);
  }
}

// One tile of one piece over the positions [begin, end), into `out`, whose rows are `side` numbers long.
template <typename T, int kTile>
__device__ void add_tile(const LayerEntry& layer, const PieceEntry& piece, const T* x, int64_t begin, int64_t end,
                         int row_tile, int col_tile, SumType<T>* out, SharedTile<SumType<T>, kTile>& shared) {
  using Sum = SumType<T>;
  using Shared = SharedTile<Sum, kTile>;
  const RowSource& source = layer.source;
  const int64_t channels = source.channels_per_group(), stride = source.channel_stride;
  int64_t shift = 0;
  for (int axis = 0; axis < kSpatialRank; ++axis) shift += piece.shift[axis] * source.spatial_stride[axis];
  const int lane = threadIdx.x % Shared::kLanes, slice = threadIdx.x / Shared::kLanes;
  const int row = lane / (kTile / 4) * 4, col = lane % (kTile / 4) * 4;
  Sum sums[4][4] = {};
  for (int64_t chunk = begin; chunk < end; chunk += kChunk) {
    const int positions = static_cast<int>(std::min<int64_t>(kChunk, end - chunk));
    if (static_cast<int>(threadIdx.x) < positions)
      shared.offset[threadIdx.x] = offset_of(source, piece, chunk + threadIdx.x);
    __syncthreads();  // the offsets are there, and the last chunk is done with
    load_channels<T, kTile>(shared.left, x, shared.offset, positions, row_tile * kTile, channels, stride);
    load_channels<T, kTile>(shared.right, x + shift, shared.offset, positions, col_tile * kTile, channels, stride);
    __syncthreads();
#pragma unroll 2
    for (int k = slice; k < kChunk; k += Shared::kSlices) {
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) sums[i][j] += shared.left[k][row + i] * shared.right[k][col + j];
    }
  }
  __syncthreads();  // before the slices' sums overwrite the last chunk
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) shared.slices[slice][(row + i) * kTile + col + j] = sums[i][j];
  __syncthreads();
  const int64_t side = int64_t{kTile} * layer.tiles;
  for (int entry = threadIdx.x; entry < kTile * kTile; entry += kThreads) {
    Sum sum = 0;
    for (int s = 0; s < Shared::kSlices; ++s) sum += shared.slices[s][entry];
    out[(row_tile * kTile + entry / kTile) * side + col_tile * kTile + entry % kTile] = sum;
  }
}

template <typename T>
__device__ void run_item(const LayerEntry& layer, const PieceEntry* pieces, int64_t item, unsigned char* workspace,
                         unsigned char* shared) {
  using Sum = SumType<T>;
  const RowSource& source = layer.source;
  const int64_t group = item / layer.group_items;
  const PieceEntry& piece = pieces[entry_of(pieces, layer.piece_count, item % layer.group_items)];
  const int64_t local = item % layer.group_items - piece.first_item;
  const int64_t share = local / (layer.tiles * layer.tiles);
  const int row_tile = static_cast<int>(local / layer.tiles % layer.tiles),
            col_tile = static_cast<int>(local % layer.tiles);
  if (piece.symmetric && row_tile > col_tile) return;  // the whole block: what lies under the diagonal is not read
  const int64_t positions = source.batch * piece.count[0] * piece.count[1] * piece.count[2];
  const int64_t begin = positions * share / piece.shares, end = positions * (share + 1) / piece.shares;
  const int64_t side = int64_t{layer.tile} * layer.tiles;
  Sum* out = reinterpret_cast<Sum*>(workspace + layer.partial) + group * layer.group_numbers + piece.partial +
             share * side * side;
  const T* x = static_cast<const T*>(source.data) + group * source.channels_per_group() * source.channel_stride;
  if (layer.tile == 16) {
    add_tile<T, 16>(layer, piece, x, begin, end, row_tile, col_tile, out,
                    *reinterpret_cast<SharedTile<Sum, 16>*>(shared));
  } else {
    add_tile<T, 32>(layer, piece, x, begin, end, row_tile, col_tile, out,
                    *reinterpret_cast<SharedTile<Sum, 32>*>(shared));
  }
}

// Calls function<T>(...) for the element type of a source.
#define KFAC2_BY_TYPE(element_type, function, ...)                       \
  switch (element_type) {                                                \
    case ElementType::kFloat32: function<float>(__VA_ARGS__); break;     \
    case ElementType::kFloat64: function<double>(__VA_ARGS__); break;    \
    case ElementType::kFloat16: function<Half>(__VA_ARGS__); break;      \
    case ElementType::kBFloat16: function<BFloat16>(__VA_ARGS__); break; \
  }

// One kernel for layers summed in float and one for those in double, which needs twice the registers; a call
// with both kinds launches both, and each passes over the blocks of the other.
__global__ void __launch_bounds__(kThreads)
    products_kernel(const LayerEntry* layers, int count, const PieceEntry* pieces, unsigned char* workspace) {
  KFAC2_SHARED(unsigned char, shared);
  const LayerEntry& layer = layers[entry_of(layers, count, blockIdx.x)];
  const int64_t item = blockIdx.x - layer.first_item;
  pieces += layer.pieces;
  switch (layer.source.element_type) {
    case ElementType::kFloat32: run_item<float>(layer, pieces, item, workspace, &shared); break;
    case ElementType::kFloat16: run_item<Half>(layer, pieces, item, workspace, &shared); break;
    case ElementType::kBFloat16: run_item<BFloat16>(layer, pieces, item, workspace, &shared); break;
    case ElementType::kFloat64: break;
  }
}

__global__ void __launch_bounds__(kThreads, 2)
    double_products_kernel(const LayerEntry* layers, int count, const PieceEntry* pieces, unsigned char* workspace) {
  KFAC2_SHARED(unsigned char, shared);
  const LayerEntry& layer = layers[entry_of(layers, count, blockIdx.x)];
  if (layer.source.element_type != ElementType::kFloat64) return;
  run_item<double>(layer, pieces + layer.pieces, blockIdx.x - layer.first_item, workspace, &shared);
}

// The sum of x at one offset of every place, for one channel: [groups, offsets, C] items of a layer.
template <typename T>
__device__ void sum_offset(const LayerEntry& layer, int64_t item, unsigned char* workspace, unsigned char* shared) {
  using Sum = SumType<T>;
  const RowSource& source = layer.source;
  const int64_t channels = source.channels_per_group(), offsets = source.window.offsets();
  const int64_t channel = item / (channels * offsets) * channels + item % channels;
  int64_t offset = item / channels % offsets;
  int64_t count[kSpatialRank], first = channel * source.channel_stride, step[kSpatialRank], places = source.batch;
  for (int axis = kSpatialRank - 1; axis >= 0; --axis) {
    const OffsetRange range = offset_range(source, axis, offset % source.window.kernel[axis]);
    offset /= source.window.kernel[axis];
    count[axis] = range.count;
    step[axis] = range.step * source.spatial_stride[axis];
    first += range.first * source.spatial_stride[axis];
    places *= range.count;
  }
  const T* x = static_cast<const T*>(source.data) + first;
  Sum sum = 0;
  for (int64_t i = threadIdx.x; i < places; i += kThreads) {
    const int64_t line = i / count[2], plane = line / count[1];
    sum += to_sum_type(x[plane / count[0] * source.batch_stride + plane % count[0] * step[0] +
                         line % count[1] * step[1] + i % count[2] * step[2]]);
  }
  Sum* sums = reinterpret_cast<Sum*>(shared);
  sums[threadIdx.x] = sum;
  for (int distance = kThreads / 2; distance > 0; distance /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < distance) sums[threadIdx.x] += sums[threadIdx.x + distance];
  }
  if (threadIdx.x == 0) reinterpret_cast<Sum*>(workspace + layer.bias_partial)[item] = sums[0];
}

__global__ void __launch_bounds__(kThreads)
    bias_kernel(const LayerEntry* layers, const RangeEntry* ranges, int count, unsigned char* workspace) {
  KFAC2_SHARED(unsigned char, shared);
  const int i = entry_of(ranges, count, blockIdx.x);
  const int64_t item = blockIdx.x - ranges[i].first_item;
  KFAC2_BY_TYPE(layers[i].source.element_type, sum_offset, layers[i], item, workspace, &shared)
}

// Row or column of a covariance, as channel and kernel offset.
struct RowIndex {
  int64_t channel;
  int offset[kSpatialRank];
};

__device__ RowIndex row_index(const Window& window, int64_t row) {
  RowIndex index;
  index.channel = row / window.offsets();
  int64_t offset = row % window.offsets();
  for (int axis = kSpatialRank - 1; axis >= 0; --axis) {
    index.offset[axis] = static_cast<int>(offset % window.kernel[axis]);
    offset /= window.kernel[axis];
  }
  return index;
}

// Whether (row, column) stands for itself, or for the transposed element: pieces hold differences that lead with
// a positive number, and without difference the half above the diagonal.
__device__ bool is_transposed(const RowIndex& row, const RowIndex& column) {
  for (int axis = 0; axis < kSpatialRank; ++axis) {
    if (row.offset[axis] != column.offset[axis]) return row.offset[axis] > column.offset[axis];
  }
  return row.channel > column.channel;
}

__device__ bool holds(const PieceEntry& piece, const RowIndex& row, const RowIndex& column) {
  bool held = true;
  for (int axis = 0; axis < kSpatialRank; ++axis) {
    held = held && column.offset[axis] - row.offset[axis] == piece.difference[axis] &&
           (piece.offsets[axis] >> row.offset[axis] & 1) != 0;
  }
  return held;
}

template <typename T>
__device__ void gather_element(const LayerEntry& layer, const PieceEntry* pieces, int64_t item,
                               const unsigned char* workspace) {
  using Sum = SumType<T>;
  const RowSource& source = layer.source;
  const Window& window = source.window;
  const int64_t d = source.row_length(), group = item / (d * d);
  if (group >= window.groups) return;
  int64_t r = item / d % d, c = item % d;
  Sum sum = 0;
  if (window.bias != 0 && (r == d - 1 || c == d - 1)) {
    const Sum ones = static_cast<Sum>(window.bias);
    if (r == c) {
      sum = ones * ones * static_cast<Sum>(source.batch * source.grid_places());
    } else {
      const int64_t row = r < c ? r : c, channels = source.channels_per_group();
      const int64_t place = (group * window.offsets() + row % window.offsets()) * channels + row / window.offsets();
      sum = ones * reinterpret_cast<const Sum*>(workspace + layer.bias_partial)[place];
    }
  } else {
    RowIndex row = row_index(window, r), column = row_index(window, c);
    if (is_transposed(row, column)) {
      const RowIndex other = row;
      row = column;
      column = other;
    }
    const int64_t side = int64_t{layer.tile} * layer.tiles;
    const Sum* partial = reinterpret_cast<const Sum*>(workspace + layer.partial) + group * layer.group_numbers;
    for (int p = 0; p < layer.piece_count; ++p) {
      const PieceEntry& piece = pieces[p];
      if (!holds(piece, row, column)) continue;
      const Sum* products = partial + piece.partial + row.channel * side + column.channel;
      for (int64_t share = 0; share < piece.shares; ++share) sum += products[share * side * side];
    }
  }
  static_cast<Sum*>(layer.covariances)[item] = sum;
}

__global__ void __launch_bounds__(kThreads) gather_kernel(const LayerEntry* layers, const RangeEntry* ranges, int count,
                                                          const PieceEntry* pieces, const unsigned char* workspace) {
  const int i = entry_of(ranges, count, blockIdx.x);
  const int64_t item = (blockIdx.x - ranges[i].first_item) * kThreads + threadIdx.x;
  KFAC2_BY_TYPE(layers[i].source.element_type, gather_element, layers[i], pieces + layers[i].pieces, item, workspace)
}

}  // namespace

int64_t covariances_workspace(const CovariancesParams& params) {
  const Plan plan = make_plan(params);
  Tables tables;
  tables.add(plan.layers), tables.add(plan.pieces), tables.add(plan.bias_ranges), tables.add(plan.output_ranges);
  return tables.size() + plan.bytes;
}

int covariances(const CovariancesParams& params, void* workspace, Stream stream) {
  const Plan plan = make_plan(params);
  if (!plan.possible) return cudaErrorInvalidValue;
  Tables tables;
  const int64_t layers_at = tables.add(plan.layers), pieces_at = tables.add(plan.pieces);
  const int64_t bias_at = tables.add(plan.bias_ranges), outputs_at = tables.add(plan.output_ranges);
  cudaError_t status = tables.copy_to(workspace, stream);
  if (status != cudaSuccess) return status;
  const LayerEntry* layers = table_at<LayerEntry>(workspace, layers_at);
  const PieceEntry* pieces = table_at<PieceEntry>(workspace, pieces_at);
  const RangeEntry* bias_ranges = table_at<RangeEntry>(workspace, bias_at);
  const RangeEntry* output_ranges = table_at<RangeEntry>(workspace, outputs_at);
  unsigned char* sums = static_cast<unsigned char*>(workspace) + tables.size();
  const int count = static_cast<int>(plan.layers.size());
  const int64_t doubles = std::count_if(plan.layers.begin(), plan.layers.end(), [](const LayerEntry& layer) {
    return layer.source.element_type == ElementType::kFloat64;
  });
  const dim3 threads(kThreads), blocks(static_cast<unsigned>(plan.items));
  if (doubles < count) {
    status =
        launch(products_kernel, blocks, threads, sizeof(SharedTile<float, 32>), stream, layers, count, pieces, sums);
  }
  if (status == cudaSuccess && doubles > 0) {
    status = launch(double_products_kernel, blocks, threads, sizeof(SharedTile<double, 32>), stream, layers, count,
                    pieces, sums);
  }
  if (status != cudaSuccess) return status;
  status = launch(bias_kernel, dim3(static_cast<unsigned>(plan.bias_items)), threads, kThreads * sizeof(double), stream,
                  layers, bias_ranges, count, sums);
  if (status != cudaSuccess) return status;
  return launch(gather_kernel, dim3(static_cast<unsigned>(plan.outputs)), threads, 0, stream, layers, output_ranges,
                count, pieces, static_cast<const unsigned char*>(sums));
}

}  // namespace kfac2::cuda

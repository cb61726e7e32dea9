// The pieces of include/covariance_pieces.h on a device. One launch forms the outer products of all pieces of
// all layers: a block takes a tile of channels x channels of one piece and a share of its positions, reads the
// two operands where they lie in x (the second is the first, moved), and never forms a patch; for the bias it also
// sums the first. A second launch gathers: each element of each covariance adds up the pieces that hold its pair of
// offsets, and their shares, in a fixed order.
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

struct PieceEntry {
  int64_t first_item;  // within one group of a layer
  int64_t partial;     // where its sums begin, in numbers, within one group
  int64_t shares;      // each with the sums of all products, then with a bias those of x
  Piece piece;
};

struct LayerEntry {
  int64_t first_item;    // block of the products' launch
  int64_t first_output;  // block of the gathering launch
  RowSource source;
  void* covariances;     // [groups, d, d]
  const void* previous;  // likewise, or null
  double scale;
  int64_t partial;          // where its sums begin in the workspace, in bytes
  int pieces, piece_count;  // in the table of pieces
  int tile;                 // 16 or 32 channels
  int tiles;                // along one side
  int64_t group_items, group_numbers;

  KFAC2_HOST_DEVICE int64_t side() const { return int64_t{tile} * tiles; }
  // The sums that one share of a piece makes.
  KFAC2_HOST_DEVICE int64_t numbers() const { return side() * (side() + (source.window.bias != 0 ? 1 : 0)); }
};

std::vector<int64_t> shape_key(const RowSource& source) {
  const Window& window = source.window;
  std::vector<int64_t> key = {source.batch, source.channels_per_group(), window.groups, window.bias};
  for (int axis = 0; axis < kSpatialRank; ++axis) {
    key.insert(key.end(), {source.extent[axis], window.kernel[axis], window.stride[axis], window.pad_low[axis],
                           window.pad_high[axis], window.dilation[axis]});
  }
  return key;
}

// Adds the pieces of a layer's shape to the table; fills in what they mean for the layer.
void add_pieces(LayerEntry& layer, std::vector<PieceEntry>& table) {
  const RowSource& source = layer.source;
  layer.pieces = static_cast<int>(table.size());
  layer.tile = source.channels_per_group() <= 16 ? 16 : 32;
  layer.tiles = static_cast<int>(ceil_div(source.channels_per_group(), layer.tile));
  // Shares only where the tiles alone would not fill a device: each has sums of its own in the workspace.
  const int64_t blocks = int64_t{layer.tiles} * layer.tiles * source.window.groups;
  const int64_t wanted = std::min(kMaxShares, ceil_div(kBlocksWanted, blocks));
  for (const Piece& piece : pieces_of(source)) {
    const int64_t positions = source.batch * piece.positions();
    const int64_t shares = std::max<int64_t>(1, std::min(positions / kSharePositions, wanted));
    table.push_back({layer.group_items, layer.group_numbers, shares, piece});
    layer.group_items += shares * layer.tiles * layer.tiles;
    layer.group_numbers += shares * layer.numbers();
  }
  layer.piece_count = static_cast<int>(table.size()) - layer.pieces;
}

// The offset in x of position `index` of a piece, numbered sample slowest, W fastest, and of its first channel.
__device__ int64_t offset_of(const RowSource& source, const Piece& piece, int64_t index) {
  int64_t offset = 0;
  for (int axis = kSpatialRank - 1; axis >= 0; --axis) {
    const AxisPiece& part = piece.axes[axis];
    offset += (part.first + index % part.count * part.step) * source.spatial_stride[axis];
    index /= part.count;
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
  Sum ones[kThreads];  // sums of x: of a channel, over a part of the positions
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

// One tile of one piece over the positions [begin, end), into `out`: rows of layer.side() numbers. Tiles on the
// diagonal of a symmetric piece sum x, too, for the bias: behind the last row.
template <typename T, int kTile>
__device__ void add_tile(const LayerEntry& layer, const Piece& piece, const T* x, int64_t begin, int64_t end,
                         int row_tile, int col_tile, SumType<T>* out, SharedTile<SumType<T>, kTile>& shared) {
  using Sum = SumType<T>;
  using Shared = SharedTile<Sum, kTile>;
  const RowSource& source = layer.source;
  const int64_t channels = source.channels_per_group(), stride = source.channel_stride;
  int64_t shift = 0;
  for (int axis = 0; axis < kSpatialRank; ++axis) shift += piece.axes[axis].shift * source.spatial_stride[axis];
  const int lane = threadIdx.x % Shared::kLanes, slice = threadIdx.x / Shared::kLanes;
  const int row = lane / (kTile / 4) * 4, col = lane % (kTile / 4) * 4;
  const bool takes_ones = piece.symmetric && row_tile == col_tile && source.window.bias != 0;
  Sum sums[4][4] = {}, ones = 0;
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
    if (!takes_ones) continue;  // the same for all threads of the block
#pragma unroll 1
    for (int k = threadIdx.x / kTile; k < kChunk; k += kThreads / kTile) ones += shared.left[k][threadIdx.x % kTile];
  }
  __syncthreads();  // before the slices' sums overwrite the last chunk
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) shared.slices[slice][(row + i) * kTile + col + j] = sums[i][j];
  shared.ones[threadIdx.x] = ones;
  __syncthreads();
  const int64_t side = layer.side();
  for (int entry = threadIdx.x; entry < kTile * kTile; entry += kThreads) {
    Sum sum = 0;
    for (int s = 0; s < Shared::kSlices; ++s) sum += shared.slices[s][entry];
    out[(row_tile * kTile + entry / kTile) * side + col_tile * kTile + entry % kTile] = sum;
  }
  if (!takes_ones || threadIdx.x >= kTile) return;  // no barrier follows
  for (int part = kTile; part < kThreads; part += kTile) ones += shared.ones[threadIdx.x + part];
  out[side * side + row_tile * kTile + threadIdx.x] = ones;
}

template <typename T>
__device__ void run_item(const LayerEntry& layer, const PieceEntry* pieces, int64_t item, unsigned char* workspace,
                         unsigned char* shared) {
  using Sum = SumType<T>;
  const RowSource& source = layer.source;
  const int64_t group = item / layer.group_items;
  const PieceEntry& entry = pieces[entry_of(pieces, layer.piece_count, item % layer.group_items)];
  const Piece& piece = entry.piece;
  const int64_t local = item % layer.group_items - entry.first_item;
  const int64_t share = local / (layer.tiles * layer.tiles);
  const int row_tile = static_cast<int>(local / layer.tiles % layer.tiles),
            col_tile = static_cast<int>(local % layer.tiles);
  if (piece.symmetric && row_tile > col_tile) return;  // the whole block: what lies under the diagonal is not read
  const int64_t positions = source.batch * piece.positions();
  const int64_t begin = positions * share / entry.shares, end = positions * (share + 1) / entry.shares;
  Sum* out = reinterpret_cast<Sum*>(workspace + layer.partial) + group * layer.group_numbers + entry.partial +
             share * layer.numbers();
  const T* x = static_cast<const T*>(source.data) + group * source.channels_per_group() * source.channel_stride;
  if (layer.tile == 16) {
    add_tile<T, 16>(layer, piece, x, begin, end, row_tile, col_tile, out,
                    *reinterpret_cast<SharedTile<Sum, 16>*>(shared));
  } else {
    add_tile<T, 32>(layer, piece, x, begin, end, row_tile, col_tile, out,
                    *reinterpret_cast<SharedTile<Sum, 32>*>(shared));
  }
}

// Blocks that share a multiprocessor: as many as registers for 4 x 4 sums allow without a spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kFloatBlocks = 4;
#else
constexpr int kFloatBlocks = 3;
#endif

// One kernel for layers summed in float and one for those in double, which needs twice the registers; a call
// with both kinds launches both, and each passes over the blocks of the other.
template <typename Sum>
__global__ void __launch_bounds__(kThreads, sizeof(Sum) == sizeof(double) ? 2 : kFloatBlocks)
    products_kernel(const LayerEntry* layers, int count, const PieceEntry* pieces, unsigned char* workspace) {
  KFAC2_SHARED(unsigned char, shared);
  const LayerEntry& layer = layers[entry_of(layers, count, blockIdx.x)];
  with_type(layer.source.element_type, layer.source.data, [&](const auto* x) {
    using T = ElementOf<decltype(x)>;
    if constexpr (std::is_same_v<SumType<T>, Sum>)
      run_item<T>(layer, pieces + layer.pieces, blockIdx.x - layer.first_item, workspace, &shared);
  });
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

// Tells whether the products hold the transposed element in place of (row, column): pieces have differences that lead
// with a positive number, and those without difference the half above the diagonal.
__device__ bool is_transposed(const RowIndex& row, const RowIndex& column) {
  for (int axis = 0; axis < kSpatialRank; ++axis) {
    if (row.offset[axis] != column.offset[axis]) return row.offset[axis] > column.offset[axis];
  }
  return row.channel > column.channel;
}

__device__ bool holds(const Piece& piece, const RowIndex& row, const RowIndex& column) {
  bool held = true;
  for (int axis = 0; axis < kSpatialRank; ++axis)
    held = held && piece.axes[axis].holds(row.offset[axis], column.offset[axis]);
  return held;
}

template <typename Sum>
__device__ void gather_element(const LayerEntry& layer, const PieceEntry* pieces, int64_t item, double kept,
                               const unsigned char* workspace) {
  const RowSource& source = layer.source;
  const Window& window = source.window;
  const int64_t d = source.row_length(), group = item / (d * d);
  if (group >= window.groups) return;
  const int64_t r = item / d % d, c = item % d;
  const auto write = [&](Sum sum) {
    sum *= static_cast<Sum>(layer.scale);
    if (layer.previous != nullptr) sum += static_cast<Sum>(kept) * static_cast<const Sum*>(layer.previous)[item];
    static_cast<Sum*>(layer.covariances)[item] = sum;
  };
  const bool with_ones = window.bias != 0 && (r == d - 1 || c == d - 1);
  if (with_ones && r == c) {
    write(static_cast<Sum>(source.batch * source.grid_places()));
    return;
  }
  RowIndex row = row_index(window, with_ones && r > c ? c : r), column = with_ones ? row : row_index(window, c);
  if (is_transposed(row, column)) {
    const RowIndex other = row;
    row = column;
    column = other;
  }
  const int64_t side = layer.side(),
                place = with_ones ? side * side + row.channel : row.channel * side + column.channel;
  const Sum* partial = reinterpret_cast<const Sum*>(workspace + layer.partial) + group * layer.group_numbers + place;
  Sum sum = 0;
  for (int p = 0; p < layer.piece_count; ++p) {
    if (!holds(pieces[p].piece, row, column)) continue;
    for (int64_t share = 0; share < pieces[p].shares; ++share)
      sum += partial[pieces[p].partial + share * layer.numbers()];
  }
  write(sum);
}

__global__ void __launch_bounds__(kThreads) gather_kernel(const LayerEntry* layers, int count, const PieceEntry* pieces,
                                                          double kept, const unsigned char* workspace) {
  const LayerEntry& layer = layers[entry_of(count, blockIdx.x, [layers](int i) { return layers[i].first_output; })];
  const int64_t item = (blockIdx.x - layer.first_output) * kThreads + threadIdx.x;
  if (layer.source.element_type == ElementType::kFloat64) {
    gather_element<double>(layer, pieces + layer.pieces, item, kept, workspace);
  } else {
    gather_element<float>(layer, pieces + layer.pieces, item, kept, workspace);
  }
}

class Covariances : public TableLaunch {
 public:
  explicit Covariances(const CovariancesParams& params) : count_(static_cast<int>(params.layers)), kept_(params.kept) {
    std::vector<LayerEntry> layers;
    std::vector<PieceEntry> pieces;
    std::map<std::vector<int64_t>, size_t> seen;  // layers of one shape share their pieces
    for (int64_t i = 0; i < params.layers; ++i) {
      const RowSource& source = params.sources[i];
      LayerEntry layer{};
      const auto [found, is_new] = seen.emplace(shape_key(source), layers.size());
      if (!is_new) layer = layers[found->second];
      layer.source = source;
      if (is_new) add_pieces(layer, pieces);
      layer.covariances = params.covariances[i];
      layer.previous = params.previous_of(i);
      layer.scale = params.scale_of(i);
      layer.first_item = items_;
      layer.first_output = outputs_;
      layer.partial = scratch_bytes_;
      const int64_t groups = source.window.groups, d = source.row_length();
      items_ += groups * layer.group_items;
      outputs_ += ceil_div(groups * d * d, kThreads);
      scratch_bytes_ += ceil_div(groups * layer.group_numbers * source.sum_bytes(), 16) * 16;
      (source.element_type == ElementType::kFloat64 ? any_double_ : any_float_) = true;
      layers.push_back(layer);
    }
    layers_ = add(layers);
    pieces_ = add(pieces);
  }

 private:
  cudaError_t start(unsigned char* workspace, cudaStream_t stream) const override {
    cudaError_t status = any_float_ ? form_products<float>(workspace, stream) : cudaSuccess;
    if (status == cudaSuccess && any_double_) status = form_products<double>(workspace, stream);
    if (status != cudaSuccess) return status;
    return launch(gather_kernel, dim3(static_cast<unsigned>(outputs_)), dim3(kThreads), 0, stream,
                  at(workspace, layers_), count_, at(workspace, pieces_), kept_,
                  static_cast<const unsigned char*>(scratch(workspace)));
  }

  template <typename Sum>
  cudaError_t form_products(unsigned char* workspace, cudaStream_t stream) const {
    return launch(products_kernel<Sum>, dim3(static_cast<unsigned>(items_)), dim3(kThreads),
                  sizeof(SharedTile<Sum, 32>), stream, at(workspace, layers_), count_, at(workspace, pieces_),
                  scratch(workspace));
  }

  int count_;
  double kept_;
  int64_t items_ = 0, outputs_ = 0;
  bool any_float_ = false, any_double_ = false;
  TableAt<LayerEntry> layers_;
  TableAt<PieceEntry> pieces_;
};

}  // namespace

std::unique_ptr<Launch> covariances(const CovariancesParams& params) { return std::make_unique<Covariances>(params); }

}  // namespace kfac2::cuda

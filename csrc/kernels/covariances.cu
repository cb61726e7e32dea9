// The pieces of include/covariance_pieces.h on a device. One launch for each type and tile size forms the outer
// products of all pieces of all layers: a block takes a tile of channels x channels of one piece and a share of its
// positions, reads the two operands where they lie in x (the second is the first, moved), and never forms a patch; for
// the bias it also sums the first. A second launch gathers: each element of each covariance adds up the pieces that
// hold its pair of offsets, and their shares, in a fixed order.
//
// Floor: x is read once from memory (N*C*H*W*sizeof) and again from L2 for each piece and tile; 13 C^2 N H W
// multiply-adds for a 3x3 convolution of stride 1, in float32 (float64 for float64), where im2col spends 81.
#include <algorithm>
#include <map>
#include <utility>
#include <vector>

#include "covariance_tile.h"
#include "covariances.h"
#include "tables.h"

namespace kfac2::cuda {
namespace {

constexpr int64_t kSharePositions = 1 << 11;  // worth a share of their own
constexpr int64_t kMaxShares = 16;
constexpr int64_t kBlocksWanted = 4096;  // fixed, so that results do not depend on the device

struct PieceEntry {
  int64_t first_item;  // within one group of a layer
  int64_t partial;     // where its sums begin, in numbers, within one group
  int64_t shares;      // each with the sums of all products, then with a bias those of x
  Piece piece;
};

struct LayerEntry {
  int64_t first_item;    // block of the products' launch of its kind
  int64_t first_output;  // block of the gathering launch
  RowSource source;
  void* covariances;     // [groups, triangle of d]
  const void* previous;  // likewise, or null
  double scale;
  int64_t partial;          // where its sums begin in the workspace, in bytes
  int pieces, piece_count;  // in the table of pieces
  int tile;                 // 16 or 32 channels
  int tiles;                // along one side
  int64_t group_items, group_numbers;

  std::pair<ElementType, int> kind() const { return {source.element_type, tile}; }
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

// Blocks that share a multiprocessor: as many as registers allow without a spill.
template <typename T, int kTile>
constexpr int kBlocks = sizeof(T) == sizeof(double) ? 2
                        : kTile == 16               ? 5
                                                    : 4;

// The layers of one type and tile size. All kinds in one kernel would need the registers of the largest, and more.
template <typename T, int kTile>
__global__ void __launch_bounds__(kThreads, (kBlocks<T, kTile>))
    products_kernel(const LayerEntry* layers, int count, const PieceEntry* all_pieces, unsigned char* workspace) {
  using Sum = SumType<T>;
  using Shared = SharedTile<Sum, kTile>;
  KFAC2_SHARED(Shared, shared);
  const LayerEntry& layer = layers[entry_of(layers, count, blockIdx.x)];
  const PieceEntry* pieces = all_pieces + layer.pieces;
  const RowSource& source = layer.source;
  const int64_t item = blockIdx.x - layer.first_item, group = item / layer.group_items;
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
  if (source.channel_stride == 1) {
    add_tile<T, kTile, true>(source, piece, x, begin, end, row_tile, col_tile, layer.side(), out, shared);
  } else {
    add_tile<T, kTile, false>(source, piece, x, begin, end, row_tile, col_tile, layer.side(), out, shared);
  }
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
  const Triangle triangle{source.row_length()};
  const int64_t last = triangle.size - 1, group = item / triangle.numbers();
  if (group >= window.groups) return;
  int64_t r, c;
  triangle.element(item % triangle.numbers(), &r, &c);
  const auto write = [&](Sum sum) {
    sum *= static_cast<Sum>(layer.scale);
    if (layer.previous != nullptr) sum += static_cast<Sum>(kept) * static_cast<const Sum*>(layer.previous)[item];
    static_cast<Sum*>(layer.covariances)[item] = sum;
  };
  const bool with_ones = window.bias != 0 && c == last;
  if (with_ones && r == c) {
    write(static_cast<Sum>(source.batch * source.grid_places()));
    return;
  }
  RowIndex row = row_index(window, r), column = with_ones ? row : row_index(window, c);
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

// Layers of one type and tile size, which follow each other in the table.
struct LayerClass {
  int first, count;
  int64_t items;
};

class Covariances : public TableLaunch {
 public:
  explicit Covariances(const CovariancesParams& params) : kept_(params.kept) {
    std::vector<PieceEntry> pieces;
    std::map<std::vector<int64_t>, size_t> seen;  // layers of one shape share their pieces
    for (int64_t i = 0; i < params.layers; ++i) {
      const RowSource& source = params.sources[i];
      LayerEntry layer{};
      const auto [found, is_new] = seen.emplace(shape_key(source), entries_.size());
      if (!is_new) layer = entries_[found->second];
      layer.source = source;
      if (is_new) add_pieces(layer, pieces);
      layer.covariances = params.covariances[i];
      layer.previous = params.previous_of(i);
      layer.scale = params.scale_of(i);
      entries_.push_back(layer);
    }
    std::stable_sort(entries_.begin(), entries_.end(),
                     [](const LayerEntry& a, const LayerEntry& b) { return a.kind() < b.kind(); });
    for (LayerEntry& layer : entries_) place(layer);
    layers_ = add(entries_);
    pieces_ = add(pieces);
  }

 private:
  // Gives a layer its blocks and its part of the workspace, behind those before it.
  void place(LayerEntry& layer) {
    const int number = static_cast<int>(&layer - entries_.data());
    if (number == 0 || layer.kind() != entries_[number - 1].kind()) classes_.push_back({number, 0, 0});
    LayerClass& its = classes_.back();
    layer.first_item = its.items;
    layer.first_output = outputs_;
    layer.partial = scratch_bytes_;
    const int64_t groups = layer.source.window.groups;
    its.count += 1;
    its.items += groups * layer.group_items;
    outputs_ += ceil_div(groups * Triangle{layer.source.row_length()}.numbers(), kThreads);
    scratch_bytes_ += ceil_div(groups * layer.group_numbers * layer.source.sum_bytes(), 16) * 16;
  }

  cudaError_t start(unsigned char* workspace, cudaStream_t stream) const override {
    cudaError_t status = cudaSuccess;
    for (const LayerClass& its : classes_) {
      if (status != cudaSuccess) return status;
      const LayerEntry& first = entries_[its.first];
      with_type(first.source.element_type, first.source.data, [&](const auto* x) {
        using T = ElementOf<decltype(x)>;
        status = first.tile == 16 ? form_products<T, 16>(its, workspace, stream)
                                  : form_products<T, 32>(its, workspace, stream);
      });
    }
    if (status != cudaSuccess) return status;
    return launch(gather_kernel, dim3(static_cast<unsigned>(outputs_)), dim3(kThreads), 0, stream,
                  at(workspace, layers_), static_cast<int>(entries_.size()), at(workspace, pieces_), kept_,
                  static_cast<const unsigned char*>(scratch(workspace)));
  }

  template <typename T, int kTile>
  cudaError_t form_products(const LayerClass& its, unsigned char* workspace, cudaStream_t stream) const {
    return launch(products_kernel<T, kTile>, dim3(static_cast<unsigned>(its.items)), dim3(kThreads),
                  sizeof(SharedTile<SumType<T>, kTile>), stream, at(workspace, layers_) + its.first, its.count,
                  at(workspace, pieces_), scratch(workspace));
  }

  double kept_;
  int64_t outputs_ = 0;
  std::vector<LayerEntry> entries_;
  std::vector<LayerClass> classes_;
  TableAt<LayerEntry> layers_;
  TableAt<PieceEntry> pieces_;
};

}  // namespace

std::unique_ptr<Launch> covariances(const CovariancesParams& params) { return std::make_unique<Covariances>(params); }

}  // namespace kfac2::cuda

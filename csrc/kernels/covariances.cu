// The pieces of include/covariance_pieces.h on a device. One launch for each type and tile size forms the outer
// products of all pieces of all layers: a block takes a tile of channels x channels of one piece and a share of its
// positions, reads the two operands where they lie in x (the second is the first, moved), and never forms a patch; for
// the bias it also sums the first. Where pieces have several shares, a second launch adds these up; a last one gathers:
// each element of each covariance adds up the pieces that hold its pair of offsets. All orders are fixed.
//
// Floor: x is read once from memory (N*C*H*W*sizeof) and again from L2 for each piece and tile; 13 C^2 N H W
// multiply-adds for a 3x3 convolution of stride 1, in float32 (float64 for float64), where im2col spends 81.
#include <algorithm>
#include <vector>

#include "covariance_gather.h"
#include "covariance_tables.h"
#include "covariance_tile.h"
#include "covariances.h"
#include "tables.h"

namespace kfac2::cuda {
namespace {

// Blocks that share a multiprocessor: as many as registers allow without a spill.
template <typename T, int kTile>
constexpr int kBlocks = sizeof(T) == sizeof(double) || kTile == 64 ? 3 : 5;

// No layer of doubles has a tile of 64 channels.
template <typename T>
constexpr int kWidest = sizeof(T) == sizeof(double) ? 32 : 64;

// The layers of one type and tile size. All kinds in one kernel would need the registers of the largest, and more.
template <typename T, int kTile>
__global__ void __launch_bounds__(kThreads, kBlocks<T, kTile>)
    products_kernel(const LayerEntry* layers, int count, const PieceEntry* all_pieces, unsigned char* workspace) {
  using Sum = SumType<T>;
  using Shared = SharedTile<Sum, kTile>;
  KFAC2_SHARED(Shared, shared);
  const LayerEntry& layer = layers[entry_of(layers, count, blockIdx.x)];
  const Cut& cut = layer.cut;
  const PieceEntry* pieces = all_pieces + cut.pieces;
  const RowSource& source = layer.source;
  const int64_t item = blockIdx.x - layer.first_item, group = item / cut.group_items;
  const PieceEntry& entry = pieces[entry_of(pieces, cut.piece_count, item % cut.group_items)];
  const Piece& piece = entry.piece;
  const int local = static_cast<int>(item % cut.group_items - entry.first_item);
  const int share = local / (cut.tiles * cut.tiles);
  const int row_tile = local / cut.tiles % cut.tiles, col_tile = local % cut.tiles;
  if (piece.symmetric && row_tile > col_tile) return;  // the whole block: what lies under the diagonal is not read
  const int64_t begin = share * cut.share_positions,
                end = std::min(begin + cut.share_positions, source.batch * piece.positions());
  Sum* out = reinterpret_cast<Sum*>(workspace + layer.partial) +
             (group * cut.group_shares + entry.first_share + share) * layer.numbers();
  const T* x = static_cast<const T*>(source.data) + group * source.channels_per_group() * source.channel_stride;
  if (source.channel_stride == 1) {
    add_tile<T, kTile, true>(source, piece, x, begin, end, row_tile, col_tile, cut.side(), out, shared);
  } else {
    add_tile<T, kTile, false>(source, piece, x, begin, end, row_tile, col_tile, cut.side(), out, shared);
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
    for (int64_t i = 0; i < params.layers; ++i) {
      LayerEntry layer{};
      layer.source = params.sources[i];
      layer.covariances = params.covariances[i];
      layer.previous = params.previous_of(i);
      layer.scale = params.scale_of(i);
      layer.cut.tile = tile_of(layer.source);
      layer.cut.tiles = static_cast<int>(ceil_div(layer.source.channels_per_group(), layer.cut.tile));
      entries_.push_back(layer);
    }
    std::stable_sort(entries_.begin(), entries_.end(),
                     [](const LayerEntry& a, const LayerEntry& b) { return a.kind() < b.kind(); });
    std::vector<PieceEntry> pieces;
    std::vector<int> held;
    const int count = static_cast<int>(entries_.size());
    for (int first = 0, next; first < count; first = next) {
      for (next = first + 1; next < count && entries_[next].kind() == entries_[first].kind();) ++next;
      cut_layers(&entries_[first], next - first, pieces, held);
      classes_.push_back({first, next - first, 0});
      for (int i = first; i < next; ++i) place(entries_[i], classes_.back());
    }
    layers_ = add(entries_);
    pieces_ = add(pieces);
    held_ = add(held);
  }

 private:
  // Gives a layer its blocks and its part of the workspace, behind those before it.
  void place(LayerEntry& layer, LayerClass& its) {
    layer.first_item = its.items;
    layer.first_sum = sums_;
    layer.first_output = outputs_;
    layer.partial = scratch_bytes_;
    const int64_t groups = layer.source.window.groups;
    its.items += groups * layer.cut.group_items;
    sums_ += groups * layer.cut.group_sums;
    outputs_ += ceil_div(groups * Triangle{layer.source.row_length()}.numbers(), kThreads);
    scratch_bytes_ += ceil_div(groups * layer.cut.group_shares * layer.numbers() * layer.source.sum_bytes(), 16) * 16;
  }

  cudaError_t start(unsigned char* workspace, cudaStream_t stream) const override {
    cudaError_t status = cudaSuccess;
    for (const LayerClass& its : classes_) {
      if (status != cudaSuccess) return status;
      const LayerEntry& first = entries_[its.first];
      with_type(first.source.element_type, first.source.data, [&](const auto* x) {
        using T = ElementOf<decltype(x)>;
        status = first.cut.tile == 16   ? form_products<T, 16>(its, workspace, stream)
                 : first.cut.tile == 32 ? form_products<T, 32>(its, workspace, stream)
                                        : form_products<T, kWidest<T>>(its, workspace, stream);
      });
    }
    if (status != cudaSuccess) return status;
    if (sums_ > 0) {
      status = launch(sum_shares_kernel, dim3(static_cast<unsigned>(sums_)), dim3(kSumThreads),
                      sizeof(SliceSums<double>), stream, at(workspace, layers_), static_cast<int>(entries_.size()),
                      at(workspace, pieces_), scratch(workspace));
    }
    if (status != cudaSuccess) return status;
    return launch(gather_kernel, dim3(static_cast<unsigned>(outputs_)), dim3(kThreads), 0, stream,
                  at(workspace, layers_), static_cast<int>(entries_.size()), at(workspace, held_), kept_,
                  static_cast<const unsigned char*>(scratch(workspace)));
  }

  template <typename T, int kTile>
  cudaError_t form_products(const LayerClass& its, unsigned char* workspace, cudaStream_t stream) const {
    return launch(products_kernel<T, kTile>, dim3(static_cast<unsigned>(its.items)), dim3(kThreads),
                  sizeof(SharedTile<SumType<T>, kTile>), stream, at(workspace, layers_) + its.first, its.count,
                  at(workspace, pieces_), scratch(workspace));
  }

  double kept_;
  int64_t sums_ = 0, outputs_ = 0;
  std::vector<LayerEntry> entries_;
  std::vector<LayerClass> classes_;
  TableAt<LayerEntry> layers_;
  TableAt<PieceEntry> pieces_;
  TableAt<int> held_;
};

}  // namespace

std::unique_ptr<Launch> covariances(const CovariancesParams& params) { return std::make_unique<Covariances>(params); }

}  // namespace kfac2::cuda

// What the kernels of covariances.cu know of every layer: its pieces, and how their positions are shared among blocks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "covariance_pieces.h"
#include "covariance_tile.h"
#include "integers.h"

namespace kfac2::cuda {

// Layers of one type and tile size, which are one launch of products, are shared out together: so that they make about
// as many blocks as are wanted (4 waves of 64 channels on 132 multiprocessors that hold 3 each, 6 of fewer channels,
// of which 5 are held), and blocks of fewer positions only where these are as few as a block's begin and end are worth.
// A few blocks more than whole waves would let most multiprocessors wait: large pieces come first, small ones fill up.
// All numbers are fixed, so that results depend on the shapes of a call and not on the device. Beyond the first share
// of each piece there are at most as many tiles of sums as blocks: 26 MB in float32, 35 in float64, bias included.
constexpr int64_t blocks_wanted(int tile) { return tile == 64 ? 1584 : 4096; }
constexpr int64_t least_positions(int tile) { return tile == 64 ? 128 : 256; }
constexpr int64_t kPositionStep = 32;  // a share is a multiple of it: of whole chunks

constexpr int kColumns = 32;  // that one block of the summing launch adds up, each over all shares of a piece

struct PieceEntry {
  int64_t first_item;   // block of the products, within one group of a layer
  int64_t first_share;  // the number of its first share, within one group
  int shares;           // each with the sums of all products, then with a bias those of x
  int first_sum;        // block of the summing launch, within one group
  Piece piece;
};

// What all layers of one shape, type and tile size have in common.
struct Cut {
  int pieces, piece_count;  // in the table of pieces
  int held;                 // its begin in the table of shares by pairs of offsets: see add_held
  int tile;                 // 16, 32 or 64 channels
  int tiles;                // along one side
  int64_t share_positions;  // of each share but a piece's last
  int64_t group_items, group_shares, group_sums;

  KFAC2_HOST_DEVICE int64_t side() const { return int64_t{tile} * tiles; }
  // That are multiplied for a piece: what lies under the diagonal of a symmetric one is not.
  int64_t tiles_of(const Piece& piece) const { return piece.symmetric ? tiles * (tiles + 1) / 2 : tiles * tiles; }
};

struct LayerEntry {
  int64_t first_item;    // block of the products' launch of its kind
  int64_t first_sum;     // block of the summing launch
  int64_t first_output;  // block of the gathering launch
  RowSource source;
  void* covariances;     // [groups, triangle of d]
  const void* previous;  // likewise, or null
  double scale;
  int64_t partial;  // where its sums begin in the workspace, in bytes
  Cut cut;

  std::pair<ElementType, int> kind() const { return {source.element_type, cut.tile}; }
  // The sums that one share of a piece makes, at most: those of x are of symmetric pieces.
  KFAC2_HOST_DEVICE int64_t numbers() const { return cut.side() * (cut.side() + (source.window.bias != 0 ? 1 : 0)); }
  KFAC2_HOST_DEVICE int64_t numbers_of(const Piece& piece) const {
    return piece.symmetric ? numbers() : cut.side() * cut.side();
  }
};

// Channels of a tile: as many as there are sums for in the registers, but where most of a tile would be empty. 32 by 32
// products take about 4/3 of the time in tiles of 32 channels.
inline int tile_of(const RowSource& source) {
  const int64_t channels = source.channels_per_group();
  const int64_t in_halves = ceil_div(channels, 32) * 32, in_wholes = ceil_div(channels, 64) * 64;
  if (channels <= 16) return 16;
  const bool is_double = source.element_type == ElementType::kFloat64;
  return is_double || channels <= 32 || 3 * in_wholes * in_wholes > 4 * in_halves * in_halves ? 32 : 64;
}

inline std::vector<int64_t> shape_key(const RowSource& source) {
  const Window& window = source.window;
  std::vector<int64_t> key = {source.batch, source.channels_per_group(), window.groups, window.bias};
  for (int axis = 0; axis < kSpatialRank; ++axis) {
    key.insert(key.end(), {source.extent[axis], window.kernel[axis], window.stride[axis], window.pad_low[axis],
                           window.pad_high[axis], window.dilation[axis]});
  }
  return key;
}

// Lists for each pair of kernel offsets (o1, o2) the first share of each piece that holds it, in the order of the
// pieces: at held[o1 * offsets + o2] and the number behind it stand where the list begins and ends, counted from
// `held`. So an element's thread finds its few pieces without a look at all of them.
inline void add_held(LayerEntry& layer, const std::vector<PieceEntry>& pieces, std::vector<int>& held) {
  const Window& window = layer.source.window;
  const auto flat = [&](int64_t z, int64_t y, int64_t x) { return (z * window.kernel[1] + y) * window.kernel[2] + x; };
  std::vector<std::pair<int64_t, int>> found;  // pair, first share
  for (int p = layer.cut.pieces; p < layer.cut.pieces + layer.cut.piece_count; ++p) {
    const AxisPiece* axes = pieces[p].piece.axes;
    const int64_t difference = flat(axes[0].difference, axes[1].difference, axes[2].difference);
    for (int z = axes[0].offset_first; z <= axes[0].offset_last; z += axes[0].offset_step)
      for (int y = axes[1].offset_first; y <= axes[1].offset_last; y += axes[1].offset_step)
        for (int x = axes[2].offset_first; x <= axes[2].offset_last; x += axes[2].offset_step)
          found.emplace_back(flat(z, y, x) * (window.offsets() + 1) + difference,
                             static_cast<int>(pieces[p].first_share));
  }
  std::stable_sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  const int64_t pairs = window.offsets() * window.offsets();
  layer.cut.held = static_cast<int>(held.size());
  auto next = found.begin();
  for (int64_t pair = 0; pair <= pairs; ++pair) {
    while (next != found.end() && next->first < pair) ++next;
    held.push_back(static_cast<int>(pairs + 1 + (next - found.begin())));
  }
  for (const auto& [pair, first_share] : found) held.push_back(first_share);
}

// Cuts the positions of a layer's pieces into shares.
inline void add_shares(LayerEntry& layer, int64_t share_positions, std::vector<PieceEntry>& pieces) {
  Cut& cut = layer.cut;
  cut.share_positions = share_positions;
  for (int p = cut.pieces; p < cut.pieces + cut.piece_count; ++p) {
    PieceEntry& entry = pieces[p];
    // At least one, since there may be no samples.
    entry.shares =
        static_cast<int>(std::max<int64_t>(1, ceil_div(layer.source.batch * entry.piece.positions(), share_positions)));
    entry.first_item = cut.group_items;
    entry.first_share = cut.group_shares;
    entry.first_sum = static_cast<int>(cut.group_sums);
    cut.group_items += int64_t{entry.shares} * cut.tiles * cut.tiles;
    cut.group_shares += entry.shares;
    if (entry.shares > 1) cut.group_sums += ceil_div(layer.numbers_of(entry.piece), kColumns);
  }
}

// Cuts the layers of one type and tile size: adds the pieces of each of their shapes to the tables.
inline void cut_layers(LayerEntry* layers, int count, std::vector<PieceEntry>& pieces, std::vector<int>& held) {
  std::map<std::vector<int64_t>, LayerEntry*> seen;  // layers of one shape share their pieces
  std::vector<LayerEntry*> like;
  int64_t work = 0;  // positions, counted for each tile
  for (LayerEntry* layer = layers; layer < layers + count; ++layer) {
    const auto [found, is_new] = seen.emplace(shape_key(layer->source), layer);
    like.push_back(found->second);
    Cut& cut = layer->cut;
    if (is_new) {
      cut.pieces = static_cast<int>(pieces.size());
      for (const Piece& piece : pieces_of(layer->source)) pieces.push_back({0, 0, 0, 0, piece});
      cut.piece_count = static_cast<int>(pieces.size()) - cut.pieces;
      std::stable_sort(pieces.begin() + cut.pieces, pieces.end(), [](const PieceEntry& a, const PieceEntry& b) {
        return a.piece.positions() > b.piece.positions();
      });
    } else {
      cut = like.back()->cut;
    }
    const int64_t samples = layer->source.window.groups * layer->source.batch;
    for (int p = cut.pieces; p < cut.pieces + cut.piece_count; ++p)
      work += cut.tiles_of(pieces[p].piece) * samples * pieces[p].piece.positions();
  }
  const int tile = layers->cut.tile;
  const int64_t of_block = ceil_div(ceil_div(work, blocks_wanted(tile)), kPositionStep) * kPositionStep;
  const int64_t share_positions = std::max(least_positions(tile), of_block);
  for (int i = 0; i < count; ++i) {
    if (like[i] != &layers[i]) {
      layers[i].cut = like[i]->cut;
    } else {
      add_shares(layers[i], share_positions, pieces);
      add_held(layers[i], pieces, held);
    }
  }
}

}  // namespace kfac2::cuda

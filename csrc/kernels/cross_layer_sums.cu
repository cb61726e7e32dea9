// Every pair of maps in one launch. Maps are sorted into classes of one grid; a block takes a tile of up to 64 x 64
// pairs (32 x 32 in double) of two classes, which meet on one grid, and a share of its places (samples included).
// Shares are so long that all blocks have about the same work. No map is copied. A second launch adds the shares in a
// fixed order, so the result is the same each time.
//
// Floor: each map is read once from memory (bytes = N * sum of T_i * sizeof) and, by the tiles that need it,
// about B / 64 times from L2; N * T_ij multiply-adds for each pair. ResNet-110 at batch 128: 25 MB, 0.2 GFMA.
#include <algorithm>
#include <vector>

#include "cross_layer_sums.h"
#include "cross_layer_tile.h"
#include "device.h"
#include "tables.h"

namespace kfac2::cuda {
namespace {

constexpr int64_t kBlocksWanted = 768;  // twice what an H100 runs at once; fixed, as results depend on it
constexpr int64_t kLeastPlaces = 128;   // worth a share of its own
constexpr int kFinishEntries = 32;      // of a tile, to a block of finish_kernel
constexpr int kFinishGroups = kThreads / kFinishEntries;

std::vector<std::pair<int, int>> even_parts(int first, int count, int most) {
  const int parts = static_cast<int>(ceil_div(count, most));
  std::vector<std::pair<int, int>> result;
  for (int part = 0; part < parts; ++part) {
    const int begin = count * part / parts, end = count * (part + 1) / parts;
    result.emplace_back(first + begin, end - begin);
  }
  return result;
}

// Where each place of a meeting lies in the maps of a side that are brought onto its grid. All divisions are here: they
// need registers and time that the products want.
__global__ void __launch_bounds__(kThreads) places_kernel(const Tile* tiles, int tile_count, int64_t* places) {
  const auto first_of = [tiles](int i) { return tiles[i].first_places; };
  const Tile& tile = tiles[entry_of_warp(tile_count, blockIdx.x, first_of)];
  const int64_t index = (int64_t{blockIdx.x} - tile.first_places) * kThreads + threadIdx.x;
  if (index >= tile.places) return;
  for (const MapSide* side : {&tile.rows, &tile.cols})
    if (!side->met) places[side->first_place + index] = place_in(side->grid, tile.meeting, index);
}

// Blocks that share a multiprocessor: as many as registers allow without a spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kBlocks = 2;
#else
constexpr int kBlocks = 3;
#endif

// Of one share of a tile, at [(i * kSide + j) * lanes + lane]: the sums over the share's places of rows[i] cols[j] of
// that lane. While the products of a chunk are formed, the next one is on its way.
template <typename T, bool kArea>
__global__ void __launch_bounds__(kThreads, kArea ? 2 : kBlocks)
    cross_layer_sums_kernel(const MapEntry* maps, const Tile* tiles, int tile_count, const int64_t* places,
                            T* partial) {
  KFAC2_SHARED(SharedMaps<T>, shared);
  const Tile& tile = tiles[entry_of_warp(tiles, tile_count, blockIdx.x)];
  const int64_t share = blockIdx.x - tile.first_item;
  const int chunk = tile.vectors * Vector<T>::kLanes, vectors = tile.vectors, slices = tile.slices;
  const int64_t chunks = ceil_div(tile.places, chunk);
  const int64_t begin = chunks * share / tile.shares * chunk, end = chunks * (share + 1) / tile.shares * chunk;
  const int lanes = tile.lanes(), slice = threadIdx.x / lanes, lane = threadIdx.x - slice * lanes;
  const int row_lanes = tile.rows.lanes, col_lanes = tile.cols.lanes, distance = map_distance(vectors);
  const int own_rows = lane / col_lanes * distance;
  const int own_cols = (lane % col_lanes + (tile.diagonal ? 0 : row_lanes * kSide<T>)) * distance;
  T sums[kSide<T>][kSide<T>] = {};
  Loader<T, kArea> loader;
  loader.begin(tile, maps);
  loader.find(tile, begin, places);
  loader.keep(shared.places[0]);
  loader.find(tile, begin + chunk, places);
  __syncthreads();
  if (begin < end) loader.load(tile, begin, shared.places[0]);
  loader.store(shared.buffers[0]);
  loader.keep(shared.places[1]);
  __syncthreads();
  int now = 0;  // the buffer of the chunk; its places are not needed any more
  for (int64_t first = begin; first < end; first += chunk, now ^= 1) {
    const bool is_last = first + chunk >= end;
    if (!is_last) {
      loader.load(tile, first + chunk, shared.places[now ^ 1]);
      loader.find(tile, first + 2 * chunk, places);
    }
    if (slice < slices) {
      const Vector<T>* buffer = shared.buffers[now];
      multiply(buffer + own_rows, buffer + own_cols, row_lanes * distance, col_lanes * distance, slice, vectors, slices,
               sums);
    }
    if (!is_last) {
      loader.store(shared.buffers[now ^ 1]);
      loader.keep(shared.places[now]);
    }
    __syncthreads();  // the chunk is done with, and the next one is there
  }
  // Slices are added up half of the rows at a time, for which the buffers have room.
  T* out = partial + tile.first_sum + share * kSide<T> * kSide<T> * lanes;
  const int entries = kSide<T> / 2 * kSide<T> * lanes;
#pragma unroll
  for (int half = 0; half < 2; ++half, out += entries) {
    if (slice < slices) {
#pragma unroll
      for (int i = 0; i < kSide<T> / 2; ++i)
        for (int j = 0; j < kSide<T>; ++j)
          shared.slices[slice * entries + (i * kSide<T> + j) * lanes + lane] = sums[half * kSide<T> / 2 + i][j];
    }
    __syncthreads();
    for (int entry = threadIdx.x; entry < entries; entry += kThreads) {
      T sum = 0;
#pragma unroll 4
      for (int s = 0; s < slices; ++s) sum += shared.slices[s * entries + entry];
      out[entry] = sum;
    }
    __syncthreads();  // the first half has been read
  }
}

// Adds the shares up, scales, averages with what was there, and writes both halves of the matrix. Some threads share
// the shares of an entry.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const MapEntry* maps, const Tile* tiles, int tile_count, const T* partial, const T* previous,
                  double kept, double scale, int64_t count, T* sums) {
  KFAC2_SHARED(double, shared);
  double* of_groups = &shared;
  const auto first_finish = [tiles](int i) { return tiles[i].first_finish; };
  const Tile& tile = tiles[entry_of_warp(tile_count, blockIdx.x, first_finish)];
  const int lanes = tile.lanes(), entries = kSide<T> * kSide<T> * lanes, shares = tile.shares;
  const int place = threadIdx.x % kFinishEntries, group = threadIdx.x / kFinishEntries;
  const int entry = (blockIdx.x - tile.first_finish) * kFinishEntries + place;
  double sum = 0;
  if (entry < entries) {
    const T* from = partial + tile.first_sum + entry;
#pragma unroll 8
    for (int share = group; share < shares; share += kFinishGroups)
      sum += static_cast<double>(from[static_cast<int64_t>(share) * entries]);
  }
  of_groups[threadIdx.x] = sum;
  __syncthreads();
  const int own = entry / lanes, lane = entry % lanes;
  const int i = lane / tile.cols.lanes + own / kSide<T> * tile.rows.lanes;
  const int j = lane % tile.cols.lanes + own % kSide<T> * tile.cols.lanes;
  if (group > 0 || entry >= entries || i >= tile.rows.count || j >= tile.cols.count || (tile.diagonal && j < i)) return;
  for (int other = 1; other < kFinishGroups; ++other) sum += of_groups[other * kFinishEntries + place];
  const int64_t row = maps[tile.rows.first + i].number, col = maps[tile.cols.first + j].number;
  sum *= scale;
  if (previous != nullptr) sum += kept * static_cast<double>(previous[row * count + col]);
  sums[row * count + col] = static_cast<T>(sum);
  sums[col * count + row] = static_cast<T>(sum);
}

class CrossLayerSums : public TableLaunch {
 public:
  explicit CrossLayerSums(const CrossLayerSumsParams& params) : params_(params) {
    if (params.is_double) {
      make_tables<double>();
    } else {
      make_tables<float>();
    }
  }

 private:
  // A part of a class of maps, as a side of tiles.
  template <typename T>
  MapSide side_of(const GridClass& of, int first, int count, const MapEntry* maps) const {
    MapSide side{first, count, static_cast<int>(ceil_div(count, kSide<T>)), false, true, 0, of.grid};
    for (int i = 0; i < count; ++i) side.aligned &= reinterpret_cast<uintptr_t>(maps[first + i].data) % 16 == 0;
    return side;
  }

  template <typename T>
  Tile tile_of(const MapSide& rows, const MapSide& cols, bool diagonal) const {
    Tile tile{};
    tile.rows = rows;
    tile.cols = cols;
    tile.diagonal = diagonal;
    tile.meeting = meet(rows.grid, cols.grid);
    for (MapSide* side : {&tile.rows, &tile.cols}) {
      side->met = tile.meeting.is(side->grid);
      side->aligned &= side->met;
    }
    const bool empty = rows.grid.places() == 0 || cols.grid.places() == 0;
    tile.places = empty ? 0 : params_.batch * tile.meeting.grid.places();
    const int maps = (rows.lanes + (diagonal ? 0 : cols.lanes)) * kSide<T>;  // in a buffer
    const int all = kThreads * kLoads / maps;
    const int most = tile.rows.met && tile.cols.met ? all : std::min(all, kTableVectors);
    tile.slices = std::min(kThreads / tile.lanes(), most);
    tile.vectors = tile.slices * (most / tile.slices);
    return tile;
  }

  template <typename T>
  void make_tables() {
    const auto classes = grid_classes(params_.count, [&](int64_t i) -> const Grid& { return params_.maps[i].grid; });
    std::vector<MapEntry> maps;
    std::vector<MapSide> sides;
    for (const GridClass& each : classes) {
      const int first = static_cast<int>(maps.size());
      for (const int64_t member : each.members) maps.push_back({params_.maps[member].data, member});
      for (const auto& [begin, count] : even_parts(first, static_cast<int>(each.members.size()), kMostLanes * kSide<T>))
        sides.push_back(side_of<T>(each, begin, count, maps.data()));
    }
    std::vector<Tile> tiles;
    for (size_t p = 0; p < sides.size(); ++p)
      for (size_t q = p; q < sides.size(); ++q) tiles.push_back(tile_of<T>(sides[p], sides[q], p == q));
    share_out<T>(tiles);
    tile_count_ = static_cast<int>(tiles.size());
    maps_ = add(maps);
    tiles_ = add(tiles);
    scratch_bytes_ = places_ * static_cast<int64_t>(sizeof(int64_t)) + sums_ * static_cast<int64_t>(sizeof(T));
  }

  // Shares of about as many multiplications each: a vector of places takes a thread as long in every tile, and there
  // are `slices` at a time.
  template <typename T>
  void share_out(std::vector<Tile>& tiles) {
    const auto work = [](const Tile& tile) { return ceil_div(tile.places, tile.slices * Vector<T>::kLanes); };
    int64_t all = 0;
    for (const Tile& tile : tiles) all += work(tile);
    for (Tile& tile : tiles) {
      const int64_t wanted = all == 0 ? 1 : ceil_div(kBlocksWanted * work(tile), all);
      tile.shares = static_cast<int>(std::max<int64_t>(1, std::min(wanted, tile.places / kLeastPlaces)));
      const int entries = kSide<T> * kSide<T> * tile.lanes();
      tile.first_item = items_;
      tile.first_finish = finishes_;
      tile.first_places = place_items_;
      const int64_t before = places_;
      for (MapSide* side : {&tile.rows, &tile.cols}) {
        if (side->met || params_.downsample == Downsample::kArea) continue;
        side->first_place = places_;
        places_ += tile.places;
      }
      if (places_ > before) place_items_ += static_cast<int>(ceil_div(tile.places, kThreads));
      tile.first_sum = sums_;
      items_ += tile.shares;
      finishes_ += static_cast<int>(ceil_div(entries, kFinishEntries));
      sums_ += int64_t{entries} * tile.shares;
    }
  }

  cudaError_t start(unsigned char* workspace, cudaStream_t stream) const override {
    return params_.is_double ? start_as<double>(workspace, stream) : start_as<float>(workspace, stream);
  }

  template <typename T>
  cudaError_t start_as(unsigned char* workspace, cudaStream_t stream) const {
    const MapEntry* maps = at(workspace, maps_);
    const Tile* tiles = at(workspace, tiles_);
    int64_t* places = reinterpret_cast<int64_t*>(scratch(workspace));
    T* partial = reinterpret_cast<T*>(places + places_);
    if (place_items_ > 0) {
      const cudaError_t status = launch(places_kernel, dim3(static_cast<unsigned>(place_items_)), dim3(kThreads), 0,
                                        stream, tiles, tile_count_, places);
      if (status != cudaSuccess) return status;
    }
    const auto kernel =
        params_.downsample == Downsample::kArea ? cross_layer_sums_kernel<T, true> : cross_layer_sums_kernel<T, false>;
    const cudaError_t status =
        launch(kernel, dim3(static_cast<unsigned>(items_)), dim3(kThreads), sizeof(SharedMaps<T>), stream, maps, tiles,
               tile_count_, static_cast<const int64_t*>(places), partial);
    if (status != cudaSuccess) return status;
    return launch(finish_kernel<T>, dim3(static_cast<unsigned>(finishes_)), dim3(kThreads), kThreads * sizeof(double),
                  stream, maps, tiles, tile_count_, static_cast<const T*>(partial),
                  static_cast<const T*>(params_.previous), params_.kept, params_.scale, params_.count,
                  static_cast<T*>(params_.sums));
  }

  CrossLayerSumsParams params_;
  int tile_count_ = 0, items_ = 0, finishes_ = 0, place_items_ = 0;
  int64_t places_ = 0, sums_ = 0;  // of all tables of places, and of all shares
  TableAt<MapEntry> maps_;
  TableAt<Tile> tiles_;
};

}  // namespace

std::unique_ptr<Launch> cross_layer_sums(const CrossLayerSumsParams& params) {
  return std::make_unique<CrossLayerSums>(params);
}

}  // namespace kfac2::cuda

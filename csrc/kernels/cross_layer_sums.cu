// Every pair of maps in one launch. Maps are sorted into classes of one grid; a block takes a tile of up to
// 32 x 32 pairs of two classes, which meet on one grid, and a share of its places (samples included). Indices
// of the downsampling are computed once for each place of the tile, not for each map; no map is copied. A
// second, small launch adds the shares in a fixed order, so the result is the same each time.
//
// Floor: each map is read once from memory (bytes = N * sum of T_i * sizeof) and, by the tiles that need it,
// about B / 32 times from L2; N * T_ij multiply-adds for each pair. ResNet-110 at batch 128: 25 MB, 0.2 GFMA.
#include <algorithm>
#include <vector>

#include "cross_layer_sums.h"
#include "device.h"
#include "tables.h"

namespace kfac2::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 32;                // maps on either side of a tile; 2 x 2 pairs for each thread
constexpr int kChunk = 64;               // places of the meeting grid held in shared memory
constexpr int64_t kBlocksWanted = 1024;  // enough to fill any device; fixed, so that results do not depend on it
constexpr int64_t kLeastPlaces = 512;    // worth a share of its own

struct Tile {
  int row_first, row_count;  // into the table of maps
  int col_first, col_count;
  Grid row_grid, col_grid;
  Meeting meeting;
  int64_t places;  // N * places of the meeting grid
  bool diagonal;   // rows and columns are the same maps
};

struct MapEntry {
  const void* data;
  int64_t number;  // row and column of the result
};

std::vector<std::pair<int, int>> even_parts(int first, int count) {
  const int parts = static_cast<int>(ceil_div(count, kTile));
  std::vector<std::pair<int, int>> result;
  for (int part = 0; part < parts; ++part) {
    const int begin = count * part / parts, end = count * (part + 1) / parts;
    result.emplace_back(first + begin, end - begin);
  }
  return result;
}

template <typename T>
struct SharedTile {
  T rows[kTile][kChunk + 1];
  T cols[kTile][kChunk + 1];
  int64_t row_place[kChunk];  // where a place lies in a map of the row class, or -1 behind the end
  int64_t col_place[kChunk];
};

__device__ int64_t place_in(const Grid& grid, const Meeting& meeting, int64_t n, int64_t t) {
  return n * grid.places() + nearest_index(grid, meeting, t);
}

// The numbers of up to kTile maps at the chunk's places.
template <typename T, bool kArea>
__device__ void load_maps(T (*to)[kChunk + 1], const MapEntry* maps, int count, const int64_t* place_of,
                          const Grid& grid, const Meeting& meeting, int64_t begin) {
  const int64_t meeting_places = meeting.grid.places();
  for (int i = threadIdx.x; i < kTile * kChunk; i += kThreads) {
    const int m = i / kChunk, k = i % kChunk;
    T value = 0;
    if (m < count && place_of[k] >= 0) {
      const T* map = static_cast<const T*>(maps[m].data);
      if constexpr (kArea) {
        const int64_t n = (begin + k) / meeting_places, t = (begin + k) % meeting_places;
        value = area_mean(map + n * grid.places(), grid, meeting, t);
      } else {
        value = map[place_of[k]];
      }
    }
    to[m][k] = value;
  }
}

// partial[share][tile][i][j] = sum over the share's places of rows[i] cols[j]
// Area means need more registers; without the bound on blocks the compiler would spill them.
template <typename T, bool kArea>
__global__ void __launch_bounds__(kThreads, kArea ? 2 : 4)
    cross_layer_sums_kernel(const MapEntry* maps, const Tile* tiles, int tile_count, int64_t shares, T* partial) {
  KFAC2_SHARED(SharedTile<T>, shared);
  const Tile& tile = tiles[blockIdx.x % tile_count];
  const int64_t share = blockIdx.x / tile_count;
  const int64_t begin = tile.places * share / shares, end = tile.places * (share + 1) / shares;
  const int64_t meeting_places = tile.meeting.grid.places();
  const int row = threadIdx.x / 16, col = threadIdx.x % 16;
  T sums[2][2] = {{0, 0}, {0, 0}};
  for (int64_t chunk = begin; chunk < end; chunk += kChunk) {
    if (threadIdx.x < 2 * kChunk) {
      const int k = threadIdx.x % kChunk;
      const bool for_rows = threadIdx.x < kChunk;
      const int64_t n = (chunk + k) / meeting_places, t = (chunk + k) % meeting_places;
      const Grid& grid = for_rows ? tile.row_grid : tile.col_grid;
      (for_rows ? shared.row_place : shared.col_place)[k] = chunk + k < end ? place_in(grid, tile.meeting, n, t) : -1;
    }
    __syncthreads();  // the places are there, and the last chunk is done with
    load_maps<T, kArea>(shared.rows, maps + tile.row_first, tile.row_count, shared.row_place, tile.row_grid,
                        tile.meeting, chunk);
    load_maps<T, kArea>(shared.cols, maps + tile.col_first, tile.col_count, shared.col_place, tile.col_grid,
                        tile.meeting, chunk);
    __syncthreads();
    for (int k = 0; k < kChunk; ++k) {
      const T a0 = shared.rows[row][k], a1 = shared.rows[row + 16][k];
      const T b0 = shared.cols[col][k], b1 = shared.cols[col + 16][k];
      sums[0][0] += a0 * b0, sums[0][1] += a0 * b1;
      sums[1][0] += a1 * b0, sums[1][1] += a1 * b1;
    }
  }
  T* out = partial + static_cast<int64_t>(blockIdx.x) * kTile * kTile;
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 2; ++j) out[(row + 16 * i) * kTile + col + 16 * j] = sums[i][j];
}

// Adds the shares up, scales, averages with what was there, and writes both halves of the matrix.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const MapEntry* maps, const Tile* tiles, int tile_count, int64_t shares, const T* partial,
                  const T* previous, double kept, double scale, int64_t count, T* sums) {
  const Tile& tile = tiles[blockIdx.x];
  for (int entry = threadIdx.x; entry < kTile * kTile; entry += kThreads) {
    const int i = entry / kTile, j = entry % kTile;
    if (i >= tile.row_count || j >= tile.col_count || (tile.diagonal && j < i)) continue;
    double sum = 0;
    for (int64_t share = 0; share < shares; ++share) {
      sum += static_cast<double>(partial[(share * tile_count + blockIdx.x) * kTile * kTile + entry]);
    }
    const int64_t row = maps[tile.row_first + i].number, col = maps[tile.col_first + j].number;
    sum *= scale;
    if (previous != nullptr) sum += kept * static_cast<double>(previous[row * count + col]);
    sums[row * count + col] = static_cast<T>(sum);
    sums[col * count + row] = static_cast<T>(sum);
  }
}

class CrossLayerSums : public TableLaunch {
 public:
  explicit CrossLayerSums(const CrossLayerSumsParams& params) : params_(params) {
    const auto classes = grid_classes(params.count, [&](int64_t i) -> const Grid& { return params.maps[i].grid; });
    struct Part {
      size_t grid_class;
      int first, count;
    };
    std::vector<Part> parts;
    std::vector<MapEntry> maps;
    for (size_t c = 0; c < classes.size(); ++c) {
      const int first = static_cast<int>(maps.size());
      for (const int64_t member : classes[c].members) maps.push_back({params.maps[member].data, member});
      for (const auto& [begin, count] : even_parts(first, static_cast<int>(classes[c].members.size()))) {
        parts.push_back({c, begin, count});
      }
    }
    std::vector<Tile> tiles;
    int64_t most_places = 0;
    for (size_t p = 0; p < parts.size(); ++p) {
      for (size_t q = p; q < parts.size(); ++q) {
        const Grid &rows = classes[parts[p].grid_class].grid, &cols = classes[parts[q].grid_class].grid;
        const Meeting meeting = meet(rows, cols);
        const bool empty = rows.places() == 0 || cols.places() == 0;
        const int64_t places = empty ? 0 : params.batch * meeting.grid.places();
        tiles.push_back(
            {parts[p].first, parts[p].count, parts[q].first, parts[q].count, rows, cols, meeting, places, p == q});
        most_places = std::max(most_places, places);
      }
    }
    tile_count_ = static_cast<int>(tiles.size());
    shares_ = std::max<int64_t>(1, std::min(ceil_div(kBlocksWanted, tile_count_), most_places / kLeastPlaces));
    maps_ = add(maps);
    tiles_ = add(tiles);
    const int64_t bytes = params.is_double ? sizeof(double) : sizeof(float);
    scratch_bytes_ = shares_ * tile_count_ * kTile * kTile * bytes;
  }

 private:
  cudaError_t start(unsigned char* workspace, cudaStream_t stream) const override {
    return params_.is_double ? start_as<double>(workspace, stream) : start_as<float>(workspace, stream);
  }

  template <typename T>
  cudaError_t start_as(unsigned char* workspace, cudaStream_t stream) const {
    const MapEntry* maps = at(workspace, maps_);
    const Tile* tiles = at(workspace, tiles_);
    T* partial = reinterpret_cast<T*>(scratch(workspace));
    const dim3 grid(static_cast<unsigned>(tile_count_ * shares_));
    const auto kernel =
        params_.downsample == Downsample::kArea ? cross_layer_sums_kernel<T, true> : cross_layer_sums_kernel<T, false>;
    const cudaError_t status =
        launch(kernel, grid, dim3(kThreads), sizeof(SharedTile<T>), stream, maps, tiles, tile_count_, shares_, partial);
    if (status != cudaSuccess) return status;
    return launch(finish_kernel<T>, dim3(tile_count_), dim3(kThreads), 0, stream, maps, tiles, tile_count_, shares_,
                  static_cast<const T*>(partial), static_cast<const T*>(params_.previous), params_.kept, params_.scale,
                  params_.count, static_cast<T*>(params_.sums));
  }

  CrossLayerSumsParams params_;
  int tile_count_ = 0;
  int64_t shares_ = 1;
  TableAt<MapEntry> maps_;
  TableAt<Tile> tiles_;
};

}  // namespace

std::unique_ptr<Launch> cross_layer_sums(const CrossLayerSumsParams& params) {
  return std::make_unique<CrossLayerSums>(params);
}

}  // namespace kfac2::cuda

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
  int64_t first_item;        // of the finishing launch: the tile's number
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

struct Plan {
  std::vector<MapEntry> maps;
  std::vector<Tile> tiles;
  int64_t shares;
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

Plan make_plan(const CrossLayerSumsParams& params) {
  const auto classes = grid_classes(params.count, [&](int64_t i) -> const Grid& { return params.maps[i].grid; });
  Plan plan;
  struct Part {
    size_t grid_class;
    int first, count;
  };
  std::vector<Part> parts;
  for (size_t c = 0; c < classes.size(); ++c) {
    const int first = static_cast<int>(plan.maps.size());
    for (const int64_t member : classes[c].members) plan.maps.push_back({params.maps[member].data, member});
    for (const auto& [begin, count] : even_parts(first, static_cast<int>(classes[c].members.size()))) {
      parts.push_back({c, begin, count});
    }
  }
  int64_t most_places = 0;
  for (size_t p = 0; p < parts.size(); ++p) {
    for (size_t q = p; q < parts.size(); ++q) {
      const Grid &rows = classes[parts[p].grid_class].grid, &cols = classes[parts[q].grid_class].grid;
      const Meeting meeting = meet(rows, cols);
      const bool empty = rows.places() == 0 || cols.places() == 0;
      const int64_t places = empty ? 0 : params.batch * meeting.grid.places();
      plan.tiles.push_back({static_cast<int64_t>(plan.tiles.size()), parts[p].first, parts[p].count, parts[q].first,
                            parts[q].count, rows, cols, meeting, places, p == q});
      most_places = std::max(most_places, places);
    }
  }
  const int64_t wanted = ceil_div(kBlocksWanted, static_cast<int64_t>(plan.tiles.size()));
  plan.shares = std::max<int64_t>(1, std::min(wanted, most_places / kLeastPlaces));
  return plan;
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

template <typename T>
cudaError_t launch_both(const CrossLayerSumsParams& params, const Plan& plan, const Tables& tables, int64_t maps_at,
                        int64_t tiles_at, void* workspace, cudaStream_t stream) {
  const MapEntry* maps = table_at<MapEntry>(workspace, maps_at);
  const Tile* tiles = table_at<Tile>(workspace, tiles_at);
  T* partial = reinterpret_cast<T*>(static_cast<unsigned char*>(workspace) + tables.size());
  const int tile_count = static_cast<int>(plan.tiles.size());
  const dim3 grid(static_cast<unsigned>(tile_count * plan.shares));
  const auto kernel =
      params.downsample == Downsample::kArea ? cross_layer_sums_kernel<T, true> : cross_layer_sums_kernel<T, false>;
  const cudaError_t status = launch(kernel, grid, dim3(kThreads), sizeof(SharedTile<T>), stream, maps, tiles,
                                    tile_count, plan.shares, partial);
  if (status != cudaSuccess) return status;
  return launch(finish_kernel<T>, dim3(tile_count), dim3(kThreads), 0, stream, maps, tiles, tile_count, plan.shares,
                static_cast<const T*>(partial), static_cast<const T*>(params.previous), params.kept, params.scale,
                params.count, static_cast<T*>(params.sums));
}

}  // namespace

int64_t cross_layer_sums_workspace(const CrossLayerSumsParams& params) {
  const Plan plan = make_plan(params);
  Tables tables;
  tables.add(plan.maps);
  tables.add(plan.tiles);
  const int64_t partial = plan.shares * static_cast<int64_t>(plan.tiles.size()) * kTile * kTile;
  return tables.size() + partial * static_cast<int64_t>(params.is_double ? sizeof(double) : sizeof(float));
}

int cross_layer_sums(const CrossLayerSumsParams& params, void* workspace, Stream stream) {
  const Plan plan = make_plan(params);
  Tables tables;
  const int64_t maps_at = tables.add(plan.maps), tiles_at = tables.add(plan.tiles);
  const cudaError_t copied = tables.copy_to(workspace, stream);
  if (copied != cudaSuccess) return copied;
  const auto launcher = params.is_double ? launch_both<double> : launch_both<float>;
  return launcher(params, plan, tables, maps_at, tiles_at, workspace, stream);
}

}  // namespace kfac2::cuda

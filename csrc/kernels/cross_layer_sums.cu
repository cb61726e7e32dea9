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
constexpr int kTile = 32;   // maps on either side of a tile; 4 x 4 pairs for each thread
constexpr int kChunk = 64;  // places of the meeting grid held in shared memory
constexpr int kPad = 4;     // keeps rows of shared memory 16-byte aligned and off one bank
constexpr int kLanes = kTile / 4 * (kTile / 4);
constexpr int kSlices = kThreads / kLanes;  // which share the places of a chunk
constexpr int64_t kBlocksWanted = 1024;     // enough to fill any device; fixed, so that results do not depend on it
constexpr int64_t kLeastPlaces = 512;       // worth a share of its own

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
  union {
    struct {
      T rows[kChunk][kTile + kPad];
      T cols[kChunk][kTile + kPad];
    };
    T slices[kSlices][kTile * kTile];
  };
  // Of two chunks: where a place lies in a map of the class, or -1 behind the end.
  int64_t row_place[2][kChunk];
  int64_t col_place[2][kChunk];
};

__device__ int64_t place_in(const Grid& grid, const Meeting& meeting, int64_t n, int64_t t) {
  return n * grid.places() + nearest_index(grid, meeting, t);
}

// A thread has one place of a chunk and every fourth map; a warp has 8 neighbouring places, 32 bytes of memory, of 4
// maps, which shared memory has in different banks.
__device__ int own_place() { return static_cast<int>(threadIdx.x % 8 + threadIdx.x / 32 * 8); }
__device__ int own_map(int number) { return static_cast<int>(threadIdx.x / 8 % 4) + 4 * number; }

// The numbers of up to kTile maps at the chunk's places, read from memory to registers, all loads before the first is
// waited for, and from there to shared memory.
template <typename T>
struct Side {
  T numbers[kTile / 4];

  __device__ void load(const MapEntry* maps, int count, const int64_t* place_of) {
    const int64_t place = place_of[own_place()];
#pragma unroll
    for (int number = 0; number < kTile / 4; ++number) {
      const int m = own_map(number);
      numbers[number] = m < count && place >= 0 ? static_cast<const T*>(maps[m].data)[place] : T(0);
    }
  }

  __device__ void store(T (*to)[kTile + kPad]) const {
#pragma unroll
    for (int number = 0; number < kTile / 4; ++number) to[own_place()][own_map(number)] = numbers[number];
  }
};

// Means of up to kTile maps over what the chunk's places cover: many loads for each number, so straight to shared
// memory.
template <typename T>
__device__ void store_means(T (*to)[kTile + kPad], const MapEntry* maps, int count, const Grid& grid,
                            const Meeting& meeting, int64_t begin, int64_t end) {
  const int64_t index = begin + own_place(), places = meeting.grid.places();
#pragma unroll 1
  for (int number = 0; number < kTile / 4; ++number) {
    const int m = own_map(number);
    T mean = 0;
    if (m < count && index < end) {
      const T* map = static_cast<const T*>(maps[m].data);
      mean = area_mean(map + index / places * grid.places(), grid, meeting, index % places);
    }
    to[own_place()][m] = mean;
  }
}

// Blocks that share a multiprocessor: as many as registers allow without a spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kFloatBlocks = 2;
#else
constexpr int kFloatBlocks = 3;
#endif

// partial[share][tile][i][j] = sum over the share's places of rows[i] cols[j]. While the products of a chunk are
// formed, the next one is on its way.
template <typename T, bool kArea>
__global__ void __launch_bounds__(kThreads, kArea || sizeof(T) == sizeof(double) ? 2 : kFloatBlocks)
    cross_layer_sums_kernel(const MapEntry* maps, const Tile* tiles, int tile_count, int64_t shares, T* partial) {
  KFAC2_SHARED(SharedTile<T>, shared);
  const Tile& tile = tiles[blockIdx.x % tile_count];
  const int64_t share = blockIdx.x / tile_count;
  const int64_t begin = tile.places * share / shares, end = tile.places * (share + 1) / shares;
  const auto find = [&](int64_t first, int buffer) {
    if (kArea || threadIdx.x >= 2 * kChunk) return;
    const int k = threadIdx.x % kChunk;
    const bool for_rows = threadIdx.x < kChunk;
    const Grid& grid = for_rows ? tile.row_grid : tile.col_grid;
    int64_t place = -1;
    if (first + k < end) {
      const int64_t index = first + k, places = tile.meeting.grid.places();
      // On the grid of the meeting a place has the same number, and nothing is divided, which takes long.
      place = tile.meeting.is(grid) ? index : place_in(grid, tile.meeting, index / places, index % places);
    }
    (for_rows ? shared.row_place : shared.col_place)[buffer][k] = place;
  };
  const MapEntry *row_maps = maps + tile.row_first, *col_maps = maps + tile.col_first;
  Side<T> rows, cols;
  const auto load = [&](int buffer) {
    if constexpr (!kArea) {
      rows.load(row_maps, tile.row_count, shared.row_place[buffer]);
      cols.load(col_maps, tile.col_count, shared.col_place[buffer]);
    }
  };
  const auto store = [&](int64_t first) {
    if constexpr (kArea) {
      store_means(shared.rows, row_maps, tile.row_count, tile.row_grid, tile.meeting, first, end);
      store_means(shared.cols, col_maps, tile.col_count, tile.col_grid, tile.meeting, first, end);
    } else {
      rows.store(shared.rows);
      cols.store(shared.cols);
    }
  };
  const int lane = threadIdx.x % kLanes, slice = threadIdx.x / kLanes;
  const int row = lane / (kTile / 4) * 4, col = lane % (kTile / 4) * 4;
  T sums[4][4] = {};
  find(begin, 0);
  __syncthreads();
  load(0);
  int next = 1;  // the buffer of the next chunk's places
  for (int64_t chunk = begin; chunk < end; chunk += kChunk, next ^= 1) {
    store(chunk);
    find(chunk + kChunk, next);
    __syncthreads();  // the chunk is there, and where the next one lies
    load(next);
#pragma unroll 2
    for (int k = slice; k < kChunk; k += kSlices)
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) sums[i][j] += shared.rows[k][row + i] * shared.cols[k][col + j];
    __syncthreads();  // the chunk is done with
  }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) shared.slices[slice][(row + i) * kTile + col + j] = sums[i][j];
  __syncthreads();
  T* out = partial + static_cast<int64_t>(blockIdx.x) * kTile * kTile;
  for (int entry = threadIdx.x; entry < kTile * kTile; entry += kThreads) {
    T sum = 0;
    for (int s = 0; s < kSlices; ++s) sum += shared.slices[s][entry];
    out[entry] = sum;
  }
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

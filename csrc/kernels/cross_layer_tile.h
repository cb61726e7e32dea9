// What a thread block of cross_layer_sums does with its share of a tile of pairs: chunks of maps to shared memory, each
// while the one before is multiplied.
#pragma once

#include <cstdint>

#include "cross_layer_sums.h"
#include "device.h"

namespace kfac2::cuda {

constexpr int kThreads = 128;
constexpr int kMostLanes = 8;      // threads along either side of a tile
constexpr int kTableVectors = 16;  // of a map in a chunk, at most, where its places are in a table
constexpr int kLoads = 4;          // vectors of a chunk that a thread loads before it waits for the first

// Maps on either side of what a thread multiplies: kSide x kSide sums in registers.
template <typename T>
constexpr int kSide = sizeof(T) == sizeof(float) ? 8 : 4;

// One side of a tile.
struct MapSide {
  int first, count;     // of its maps, into their table
  int lanes;            // threads along it
  bool met;             // its grid is that of the meeting: places have the same numbers there
  bool aligned;         // and are read as vectors
  int64_t first_place;  // in the table of places, where it is another one
  Grid grid;
};

struct Tile {
  int64_t places;       // N * places of the meeting grid
  int64_t first_sum;    // of its shares, among those of all tiles
  int first_item;       // of cross_layer_sums_kernel: one for each share
  int first_places;     // of places_kernel
  int first_finish;     // of finish_kernel
  int shares;           // of its places
  int slices, vectors;  // of a chunk: groups of threads, vectors of each map
  bool diagonal;        // rows and columns are the same maps
  MapSide rows, cols;
  Meeting meeting;

  KFAC2_HOST_DEVICE int lanes() const { return rows.lanes * cols.lanes; }
};

struct MapEntry {
  const void* data;
  int64_t number;  // row and column of the result
};

// Vectors from one map to the next in shared memory: odd, so that neighbouring maps lie in different banks.
KFAC2_HOST_DEVICE constexpr int map_distance(int vectors) { return (vectors + 1) | 1; }

// Vectors of both sides: as many as all threads load, and what lies between the maps.
constexpr int kBufferVectors = kThreads * kLoads + 2 * kMostLanes * kSide<float> * 2;
constexpr int kMostPlaces = kThreads / 2;  // of a chunk
static_assert(kTableVectors * 4 <= kMostPlaces, "a vector has at most four places");

template <typename T>
struct SharedMaps {
  union {
    Vector<T> buffers[2][kBufferVectors];
    T slices[kSide<T> / 2 * kSide<T> * kThreads];
  };
  // Of two chunks: where a place lies in a map of either side, or -1 behind the end.
  int64_t places[2][2][kMostPlaces];
};

__device__ int64_t place_in(const Grid& grid, const Meeting& meeting, int64_t index) {
  const int64_t places = meeting.grid.places();
  return index / places * grid.places() + nearest_index(grid, meeting, index % places);
}

template <typename T>
__device__ T mean_in(const T* map, const Grid& grid, const Meeting& meeting, int64_t index) {
  const int64_t places = meeting.grid.places();
  return area_mean(map + index / places * grid.places(), grid, meeting, index % places);
}

// What a thread loads of each chunk: the same vector of the same maps.
template <typename T, bool kArea>
struct Loader {
  static constexpr int kLanes = Vector<T>::kLanes;
  Vector<T> numbers[kLoads];
  const T* maps[kLoads];           // at the first place of the vector in the first chunk; or null
  int vector[kLoads], to[kLoads];  // of a chunk; in a buffer
  int64_t place;                   // of maps that are brought onto another grid, of the chunk behind the next one

  __device__ void begin(const Tile& tile, const MapEntry* entries) {
    const int rows = tile.rows.count, all = rows + (tile.diagonal ? 0 : tile.cols.count);
    const int distance = map_distance(tile.vectors);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int unit = threadIdx.x + i * kThreads, map = unit / tile.vectors;
      vector[i] = unit - map * tile.vectors;
      maps[i] = nullptr;
      if (map >= all) continue;
      maps[i] = static_cast<const T*>(entries[map < rows ? tile.rows.first + map : tile.cols.first + map - rows].data);
      to[i] = (map < rows ? map : tile.rows.lanes * kSide<T> + map - rows) * distance + vector[i];
    }
  }

  // Threads of either half bring the places of a side.
  __device__ void find(const Tile& tile, int64_t first, const int64_t* places) {
    const int k = threadIdx.x % (kThreads / 2);
    const MapSide& side = threadIdx.x < kThreads / 2 ? tile.rows : tile.cols;
    const bool wanted = !kArea && !side.met && k < tile.vectors * kLanes && first + k < tile.places;
    place = wanted ? places[side.first_place + first + k] : 0;
  }

  __device__ void keep(int64_t (*found)[kMostPlaces]) const {
    found[threadIdx.x / (kThreads / 2)][threadIdx.x % (kThreads / 2)] = place;
  }

  __device__ void load(const Tile& tile, int64_t first, const int64_t (*found)[kMostPlaces]) {
    const int cols_begin = tile.rows.lanes * kSide<T> * map_distance(tile.vectors);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (maps[i] == nullptr) continue;
      const bool in_cols = to[i] >= cols_begin;
      const MapSide& side = in_cols ? tile.cols : tile.rows;
      const int64_t index = first + vector[i] * kLanes;
      if (side.aligned && index + kLanes <= tile.places) {
        numbers[i] = *aligned<const Vector<T>>(maps[i] + index);
        continue;
      }
#pragma unroll
      for (int k = 0; k < kLanes; ++k) {
        numbers[i].lane[k] = 0;
        if (index + k >= tile.places) continue;
        if constexpr (kArea) {
          numbers[i].lane[k] = mean_in(maps[i], side.grid, tile.meeting, index + k);
        } else {
          numbers[i].lane[k] = maps[i][side.met ? index + k : found[in_cols][vector[i] * kLanes + k]];
        }
      }
    }
  }

  __device__ void store(Vector<T>* buffer) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      if (maps[i] != nullptr) buffer[to[i]] = numbers[i];
  }
};

// Half a vector is multiplied at once: with whole ones a thread would need more registers than there are.
template <typename T>
struct alignas(8) HalfVector {
  static constexpr int kLanes = 8 / sizeof(T);
  T lane[kLanes];
};

// sums[i][j] += the products of a thread's maps over its slice of a chunk. `rows` and `cols` are its first maps', the
// next ones `row_step` and `col_step` vectors behind.
template <typename T>
__device__ void multiply(const Vector<T>* rows, const Vector<T>* cols, int row_step, int col_step, int begin, int end,
                         int step, T (*sums)[kSide<T>]) {
#pragma unroll 1
  for (int k = begin; k < end; k += step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      HalfVector<T> left[kSide<T>];
#pragma unroll
      for (int i = 0; i < kSide<T>; ++i)
        left[i] = reinterpret_cast<const HalfVector<T>*>(rows + k + i * row_step)[half];
#pragma unroll
      for (int j = 0; j < kSide<T>; ++j) {
        const HalfVector<T> right = reinterpret_cast<const HalfVector<T>*>(cols + k + j * col_step)[half];
#pragma unroll
        for (int i = 0; i < kSide<T>; ++i)
          for (int d = 0; d < HalfVector<T>::kLanes; ++d) sums[i][j] += left[i].lane[d] * right.lane[d];
      }
    }
  }
}

}  // namespace kfac2::cuda

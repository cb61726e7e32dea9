// Grids of maps, and where two of them meet.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

#include "host_device.h"

namespace kfac2 {

constexpr int kMaxGridRank = 4;

enum class Downsample { kNearest, kArea };

struct Grid {
  int rank;
  int64_t extent[kMaxGridRank];  // the first `rank` are set

  KFAC2_HOST_DEVICE int64_t places() const {
    int64_t product = 1;
    for (int axis = 0; axis < rank; ++axis) product *= extent[axis];
    return product;
  }
};

// Two grids meet on the smaller extent of each axis; with different ranks, on one place.
struct Meeting {
  bool one_place;
  Grid grid;

  KFAC2_HOST_DEVICE bool is(const Grid& other) const {
    bool same = !one_place;
    for (int axis = 0; same && axis < grid.rank; ++axis) same = grid.extent[axis] == other.extent[axis];
    return same;
  }
};

inline Meeting meet(const Grid& a, const Grid& b) {
  Meeting meeting{a.rank != b.rank, {a.rank == b.rank ? a.rank : 0, {}}};
  for (int axis = 0; axis < meeting.grid.rank; ++axis) {
    meeting.grid.extent[axis] = a.extent[axis] < b.extent[axis] ? a.extent[axis] : b.extent[axis];
  }
  return meeting;
}

// The places of the larger axis that are brought onto place t of the smaller one.
struct Span {
  int64_t begin, end;
};

KFAC2_HOST_DEVICE inline Span span_of(int64_t t, int64_t smaller, int64_t larger, Downsample downsample) {
  const int64_t begin = t * larger / smaller;
  if (downsample == Downsample::kNearest) return {begin, begin + 1};
  return {begin, ((t + 1) * larger + smaller - 1) / smaller};  // adaptive average pooling
}

// The loops below run over kMaxGridRank axes, used or not, so that a compiler can unroll them and keep what they
// index in registers.

// The element of a map (one sample) that nearest-neighbour downsampling takes for a place of the meeting grid.
KFAC2_HOST_DEVICE inline int64_t nearest_index(const Grid& grid, const Meeting& meeting, int64_t place) {
  int64_t index = 0, stride = 1;
  for (int axis = kMaxGridRank - 1; axis >= 0; --axis) {
    if (axis >= grid.rank) continue;
    const int64_t smaller = meeting.one_place ? 1 : meeting.grid.extent[axis];
    index += place % smaller * grid.extent[axis] / smaller * stride;
    place /= smaller;
    stride *= grid.extent[axis];
  }
  return index;
}

// The mean of the box of a map (one sample) that area downsampling takes for a place of the meeting grid.
template <typename T>
KFAC2_HOST_DEVICE T area_mean(const T* map, const Grid& grid, const Meeting& meeting, int64_t place) {
  int64_t begin = 0, count = 1, stride = 1;
  int64_t sizes[kMaxGridRank], strides[kMaxGridRank];
  for (int axis = kMaxGridRank - 1; axis >= 0; --axis) {
    sizes[axis] = 1;
    strides[axis] = 0;
    if (axis >= grid.rank) continue;
    const int64_t smaller = meeting.one_place ? 1 : meeting.grid.extent[axis];
    const Span span = span_of(place % smaller, smaller, grid.extent[axis], Downsample::kArea);
    place /= smaller;
    begin += span.begin * stride;
    sizes[axis] = span.end - span.begin;
    strides[axis] = stride;
    stride *= grid.extent[axis];
    count *= sizes[axis];
  }
  T sum = 0;
  for (int64_t i = 0; i < sizes[0]; ++i)
    for (int64_t j = 0; j < sizes[1]; ++j)
      for (int64_t k = 0; k < sizes[2]; ++k)
        for (int64_t l = 0; l < sizes[3]; ++l)
          sum += map[begin + i * strides[0] + j * strides[1] + k * strides[2] + l * strides[3]];
  return sum / static_cast<T>(count);
}

// Maps of one grid, by their numbers.
struct GridClass {
  Grid grid;
  std::vector<int64_t> members;
};

// Sorts maps into classes; `grid_of(i)` is the grid of map i.
template <typename GridOf>
std::vector<GridClass> grid_classes(int64_t count, const GridOf& grid_of) {
  std::vector<GridClass> classes;
  std::map<std::vector<int64_t>, std::size_t> seen;
  for (int64_t i = 0; i < count; ++i) {
    const Grid& grid = grid_of(i);
    const std::vector<int64_t> key(grid.extent, grid.extent + grid.rank);
    const auto [found, is_new] = seen.emplace(key, classes.size());
    if (is_new) classes.push_back({grid, {}});
    classes[found->second].members.push_back(i);
  }
  return classes;
}

}  // namespace kfac2

// cross_layer_sums: kept * previous + scale * (sum over samples and places of s_i s_j), for every pair of maps.
#pragma once

#include <cstdint>

#include "grids.h"
#include "op.h"

namespace kfac2 {

struct GridMap {
  const void* data;  // [N, *grid], contiguous
  Grid grid;
};

struct CrossLayerSumsParams {
  const GridMap* maps;   // [count]
  void* sums;            // [count, count], of the maps' type
  const void* previous;  // [count, count], or null
  double kept;
  double scale;
  int64_t count;  // B
  int64_t batch;  // N
  bool is_double;
  Downsample downsample;
};

namespace cpu {
std::unique_ptr<Work> cross_layer_sums(const CrossLayerSumsParams& params);
}
namespace cuda {
std::unique_ptr<Launch> cross_layer_sums(const CrossLayerSumsParams& params);
}

}  // namespace kfac2

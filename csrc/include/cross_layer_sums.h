// cross_layer_sums: kept * previous + scale * (sum over samples and places of s_i s_j), for every pair of maps.
#pragma once

#include <cstdint>

#include "cuda_launchers.h"
#include "grids.h"

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

// As in covariances.h: tasks in any order on any thread, then one merge.
class CrossLayerSums {
 public:
  explicit CrossLayerSums(const CrossLayerSumsParams& params);
  ~CrossLayerSums();
  CrossLayerSums(const CrossLayerSums&) = delete;
  CrossLayerSums& operator=(const CrossLayerSums&) = delete;

  int64_t tasks() const;
  void run_task(int64_t task);
  void merge();

 private:
  struct State;
  State* state_;
};

}  // namespace cpu

namespace cuda {

int64_t cross_layer_sums_workspace(const CrossLayerSumsParams& params);
int cross_layer_sums(const CrossLayerSumsParams& params, void* workspace, Stream stream);

}  // namespace cuda
}  // namespace kfac2

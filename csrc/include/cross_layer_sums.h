// cross_layer_sums: sum over samples and places of s_i s_j, for every pair of maps.
#pragma once

#include <cstdint>

namespace kfac2 {

constexpr int kMaxGridRank = 4;

enum class Downsample { kNearest, kArea };

struct GridMap {
  const void* data;  // [N, *grid], contiguous
  int rank;
  int64_t extent[kMaxGridRank];  // the first `rank` are set

  int64_t places() const {
    int64_t product = 1;
    for (int axis = 0; axis < rank; ++axis) product *= extent[axis];
    return product;
  }
};

struct CrossLayerSumsParams {
  const GridMap* maps;  // [count]
  void* sums;           // [count, count], of the maps' type
  int64_t count;        // B
  int64_t batch;        // N
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
}  // namespace kfac2

// layer_maps: the scalar s = 1^T row of every row of every source (eq. 5-7 summed over features). A layer of several
// groups gives one source for each, RowSource::group.
#pragma once

#include "op.h"
#include "window.h"

namespace kfac2 {

struct LayerMapsParams {
  const RowSource* sources;  // [count], each of one group
  void* const* maps;         // [count] -> [N, *grid], float64 for a float64 source, else float32
  int64_t count;
};

namespace cpu {
std::unique_ptr<Work> layer_maps(const LayerMapsParams& params);
}
namespace cuda {
// Places under one patch, gaps of a dilation counted: they must fit into shared memory.
constexpr int64_t kMaxPatchSpan = 4096;

std::unique_ptr<Launch> layer_maps(const LayerMapsParams& params);
}  // namespace cuda

}  // namespace kfac2

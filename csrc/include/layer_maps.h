// layer_maps: the scalar s = 1^T row of every row of every layer (eq. 5-7 summed over features).
#pragma once

#include "cuda_launchers.h"
#include "window.h"

namespace kfac2 {

struct LayerMapsParams {
  const RowSource* sources;  // [layers]
  void* const* maps;         // [layers] -> [groups, N, *grid], float64 for float64 sources, else float32
  int64_t layers;
};

namespace cpu {

// Work is cut into slots; slot k takes the k-th share of the samples of every layer, so that slots
// weigh the same however the layers differ. Slots write disjoint memory.
int64_t layer_maps_slots(const LayerMapsParams& params);
void layer_maps(const LayerMapsParams& params, int64_t slot_begin, int64_t slot_end);

}  // namespace cpu

namespace cuda {

// Places under one patch, gaps of a dilation counted: they must fit into shared memory.
constexpr int64_t kMaxPatchSpan = 4096;

int64_t layer_maps_workspace(const LayerMapsParams& params);
int layer_maps(const LayerMapsParams& params, void* workspace, Stream stream);

}  // namespace cuda
}  // namespace kfac2

#include "layer_maps.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "row_source.h"

namespace kfac2 {
namespace {

using torch::stable::Tensor;

std::vector<Tensor> layer_maps_cpu(const std::vector<Tensor>& tensors, const std::vector<int64_t>& windows) {
  const std::vector<RowSource> sources = row_sources("layer_maps", tensors, windows);
  std::vector<Tensor> maps;  // [groups, N, *grid] each
  std::vector<void*> pointers;
  for (size_t i = 0; i < tensors.size(); ++i) {
    std::vector<int64_t> shape = {sources[i].window.groups, sources[i].batch};
    for (int64_t axis = 2 + kSpatialRank - tensors[i].dim(); axis < kSpatialRank; ++axis) {
      shape.push_back(sources[i].grid(static_cast<int>(axis)));
    }
    maps.push_back(torch::stable::new_empty(tensors[i], shape, sum_type(sources[i])));
    pointers.push_back(maps.back().mutable_data_ptr());
  }
  const LayerMapsParams params{sources.data(), pointers.data(), static_cast<int64_t>(sources.size())};
  torch::stable::parallel_for(0, cpu::layer_maps_slots(params), 1,
                              [&](int64_t begin, int64_t end) { cpu::layer_maps(params, begin, end); });
  return maps;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kfac2, CPU, m) { m.impl("layer_maps", TORCH_BOX(&layer_maps_cpu)); }

}  // namespace kfac2

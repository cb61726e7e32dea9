#include "layer_maps.h"

#include "bind.h"
#include "row_source.h"

namespace kfac2 {
namespace {

using torch::stable::Tensor;

constexpr const char* kOp = "layer_maps";

// [N, *grid] for each group of each layer
std::vector<Tensor> layer_maps(const std::vector<Tensor>& tensors, const std::vector<int64_t>& windows) {
  const std::vector<RowSource> layers = row_sources(kOp, tensors, windows);
  std::vector<RowSource> sources;
  std::vector<Tensor> maps;
  std::vector<void*> pointers;
  for (size_t i = 0; i < tensors.size(); ++i) {
    check(!tensors[i].is_cuda() || layers[i].patch_span() <= cuda::kMaxPatchSpan, kOp,
          "expected patches that span at most ", cuda::kMaxPatchSpan, " places on CUDA, got ", layers[i].patch_span());
    std::vector<int64_t> shape = {layers[i].batch};
    for (int64_t axis = 2 + kSpatialRank - tensors[i].dim(); axis < kSpatialRank; ++axis)
      shape.push_back(layers[i].grid(static_cast<int>(axis)));
    for (int64_t q = 0; q < layers[i].window.groups; ++q) {
      sources.push_back(layers[i].group(q));
      maps.push_back(allocate(tensors[i], shape, sum_type(layers[i])));
      pointers.push_back(maps.back().mutable_data_ptr());
    }
  }
  const LayerMapsParams params{sources.data(), pointers.data(), static_cast<int64_t>(sources.size())};
  KFAC2_RUN(layer_maps, tensors[0], params);
  return maps;
}

}  // namespace

KFAC2_BIND(layer_maps)

}  // namespace kfac2

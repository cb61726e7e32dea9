#include "layer_maps.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "allocate.h"
#include "row_source.h"
#ifdef KFAC2_WITH_CUDA
#include "on_device.h"
#endif

namespace kfac2 {
namespace {

using torch::stable::Tensor;

constexpr const char* kOp = "layer_maps";

// A layer of several groups as so many layers of one: each gives a map of its own.
std::vector<RowSource> split_groups(const std::vector<RowSource>& sources) {
  std::vector<RowSource> split;
  for (const RowSource& source : sources) {
    RowSource group = source;
    group.channels = source.channels_per_group();
    group.window.groups = 1;
    for (int64_t q = 0; q < source.window.groups; ++q) {
      group.data = static_cast<const unsigned char*>(source.data) +
                   q * group.channels * source.channel_stride * element_bytes(source.element_type);
      split.push_back(group);
    }
  }
  return split;
}

// Checked inputs, and the outputs made for them: [N, *grid] for each group of each layer.
struct Call {
  std::vector<RowSource> sources;
  std::vector<Tensor> maps;
  std::vector<void*> pointers;

  Call(const std::vector<Tensor>& tensors, const std::vector<int64_t>& windows) {
    const std::vector<RowSource> layers = row_sources(kOp, tensors, windows);
    for (size_t i = 0; i < tensors.size(); ++i) {
      std::vector<int64_t> shape = {layers[i].batch};
      for (int64_t axis = 2 + kSpatialRank - tensors[i].dim(); axis < kSpatialRank; ++axis) {
        shape.push_back(layers[i].grid(static_cast<int>(axis)));
      }
      for (int64_t q = 0; q < layers[i].window.groups; ++q) {
        maps.push_back(allocate(tensors[i], shape, sum_type(layers[i])));
        pointers.push_back(maps.back().mutable_data_ptr());
      }
    }
    sources = split_groups(layers);
  }

  LayerMapsParams params() const { return {sources.data(), pointers.data(), static_cast<int64_t>(sources.size())}; }
};

std::vector<Tensor> layer_maps_cpu(const std::vector<Tensor>& tensors, const std::vector<int64_t>& windows) {
  const Call call(tensors, windows);
  const LayerMapsParams params = call.params();
  torch::stable::parallel_for(0, cpu::layer_maps_slots(params), 1,
                              [&](int64_t begin, int64_t end) { cpu::layer_maps(params, begin, end); });
  return call.maps;
}

#ifdef KFAC2_WITH_CUDA
std::vector<Tensor> layer_maps_cuda(const std::vector<Tensor>& tensors, const std::vector<int64_t>& windows) {
  const Call call(tensors, windows);
  for (const RowSource& source : call.sources) {
    check(source.patch_span() <= cuda::kMaxPatchSpan, kOp, "expected patches that span at most ", cuda::kMaxPatchSpan,
          " places on CUDA, got ", source.patch_span());
  }
  const LayerMapsParams params = call.params();
  run_on_device(kOp, tensors[0], cuda::layer_maps_workspace(params),
                [&](void* workspace, cuda::Stream stream) { return cuda::layer_maps(params, workspace, stream); });
  return call.maps;
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kfac2, CPU, m) { m.impl("layer_maps", TORCH_BOX(&layer_maps_cpu)); }
#ifdef KFAC2_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(kfac2, CUDA, m) { m.impl("layer_maps", TORCH_BOX(&layer_maps_cuda)); }
#endif

}  // namespace kfac2

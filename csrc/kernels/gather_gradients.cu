// Floor: every gradient read once, the matrices written once.
#include <cmath>

#include "gather_gradients.h"
#include "part_items.h"

namespace kfac2::cuda {
namespace {

__global__ void none_bad_kernel(int32_t* first_bad, int32_t none_bad) { *first_bad = none_bad; }

template <typename Sum>
__global__ void __launch_bounds__(kPartThreads)
    gather_kernel(const PartEntry* entries, int count, Sum* matrices, int32_t* first_bad) {
  const PartEntry& entry = entries[entry_of(entries, count, blockIdx.x)];
  const GradientPart part = entry.part;
  const bool belongs = part.belongs();
  bool finite = true;
  with_type(part.element_type, part.data, [&](const auto* data) {
    for_each_element(
        part, blockIdx.x - entry.first_item, [&](int64_t offset, int64_t) { return to_sum_type(data[offset]); },
        [&](int64_t, int64_t place, auto value) {
          finite &= static_cast<bool>(std::isfinite(value));
          if (belongs) matrices[place] = static_cast<Sum>(value);
        });
  });
  if (!finite) atomicMin(first_bad, static_cast<int>(part.number));
}

class GatherGradients : public PartLaunch {
 public:
  explicit GatherGradients(const GatherGradientsParams& params)
      : PartLaunch(params.parts, params.count), params_(params) {}

 private:
  cudaError_t start(unsigned char* workspace, cudaStream_t stream) const override {
    const cudaError_t status =
        launch(none_bad_kernel, dim3(1), dim3(1), 0, stream, params_.first_bad, static_cast<int32_t>(params_.none_bad));
    if (status != cudaSuccess) return status;
    return params_.is_double ? gather<double>(workspace, stream) : gather<float>(workspace, stream);
  }

  template <typename Sum>
  cudaError_t gather(const unsigned char* workspace, cudaStream_t stream) const {
    return launch_items(gather_kernel<Sum>, workspace, stream, static_cast<Sum*>(params_.matrices), params_.first_bad);
  }

  GatherGradientsParams params_;
};

}  // namespace

std::unique_ptr<Launch> gather_gradients(const GatherGradientsParams& params) {
  return std::make_unique<GatherGradients>(params);
}

}  // namespace kfac2::cuda

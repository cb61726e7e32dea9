// Floor: every gradient read once, the matrices written once; four elements at a time where rows allow.
#include "gather_gradients.h"
#include "part_items.h"

namespace kfac2::cuda {
namespace {

__global__ void none_bad_kernel(int32_t* first_bad, int32_t none_bad) { *first_bad = none_bad; }

// From a gradient to its matrix; a gradient of none is only looked at.
template <typename T, typename Sum>
struct Gathering {
  const T* data;
  Sum* matrices;    // or null
  SumType<T> zero;  // times each number: a NaN where one is not finite

  template <int kCount>
  __device__ Numbers<T, kCount> read(int64_t offset, int64_t) const {
    return *aligned<const Numbers<T, kCount>>(data + offset);
  }

  template <int kCount>
  __device__ void write(int64_t, int64_t place, const Numbers<T, kCount>& numbers) {
    Numbers<Sum, kCount> result;
    for (int i = 0; i < kCount; ++i) {
      const SumType<T> value = to_sum_type(numbers.lane[i]);
      zero += value * 0;
      result.lane[i] = static_cast<Sum>(value);
    }
    if (matrices != nullptr) *aligned<Numbers<Sum, kCount>>(matrices + place) = result;
  }
};

template <typename Sum>
__global__ void __launch_bounds__(kPartThreads)
    gather_kernel(const PartEntry* entries, int count, Sum* matrices, int32_t* first_bad) {
  const PartEntry& entry = entries[entry_of_warp(entries, count, blockIdx.x)];
  const GradientPart& part = entry.part;
  const int64_t item = static_cast<int64_t>(blockIdx.x) - entry.first_item, number = part.number;
  bool finite = true;
  with_type(part.element_type, part.data, [&](const auto* data) {
    Gathering<ElementOf<decltype(data)>, Sum> move{data, part.belongs() ? matrices : nullptr, 0};
    move_item(entry, item, move);
    finite = move.zero == 0;
  });
  if (!finite) atomicMin(first_bad, static_cast<int>(number));
}

class GatherGradients : public PartLaunch {
 public:
  explicit GatherGradients(const GatherGradientsParams& params)
      : PartLaunch(params.parts, params.count, params.matrices), params_(params) {}

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

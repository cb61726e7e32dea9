// Floor: directions read once, gradients written once.
#include "part_items.h"
#include "write_gradients.h"

namespace kfac2::cuda {
namespace {

template <typename Sum>
__global__ void __launch_bounds__(kPartThreads)
    write_kernel(const PartEntry* entries, int count, const Sum* directions, const double* shifts,
                 const double* factors, const float* found, const double* usable) {
  const PartEntry& entry = entries[entry_of(entries, count, blockIdx.x)];
  const GradientPart part = entry.part;
  const bool skipped = *found != 0, kept = !part.belongs() || usable[part.layer] == 0;
  const double factor = part.belongs() ? factors[part.layer] : 1.0;
  if (kept && !skipped && factor == 1) return;  // there is no barrier
  const Sum shift = kept ? Sum(0) : static_cast<Sum>(shifts[part.layer]), scale = static_cast<Sum>(factor);
  const int64_t item = blockIdx.x - entry.first_item;
  with_type(part.element_type, part.data, [&](auto* data) {
    using T = ElementOf<decltype(data)>;
    const auto store = [&](int64_t offset, auto value) {
      data[offset] = from_sum_type<T>(static_cast<SumType<T>>(value));
    };
    if (kept && !skipped) {
      for_each_element(
          part, item, [&](int64_t offset, int64_t) { return to_sum_type(data[offset]); },
          [&](int64_t offset, int64_t, auto value) { store(offset, factor * value); });
    } else {
      for_each_element(
          part, item, [&](int64_t, int64_t place) { return skipped ? Sum(0) : directions[place]; },
          [&](int64_t offset, int64_t, Sum value) { store(offset, skipped ? Sum(0) : scale * (value + shift)); });
    }
  });
}

class WriteGradients : public PartLaunch {
 public:
  explicit WriteGradients(const WriteGradientsParams& params)
      : PartLaunch(params.parts, params.count), params_(params) {}

 private:
  cudaError_t start(unsigned char* workspace, cudaStream_t stream) const override {
    return params_.is_double ? write<double>(workspace, stream) : write<float>(workspace, stream);
  }

  template <typename Sum>
  cudaError_t write(const unsigned char* workspace, cudaStream_t stream) const {
    return launch_items(write_kernel<Sum>, workspace, stream, static_cast<const Sum*>(params_.directions),
                        params_.shifts, params_.factors, params_.found, params_.usable);
  }

  WriteGradientsParams params_;
};

}  // namespace

std::unique_ptr<Launch> write_gradients(const WriteGradientsParams& params) {
  return std::make_unique<WriteGradients>(params);
}

}  // namespace kfac2::cuda

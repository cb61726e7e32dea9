// Floor: directions read once, gradients written once; four elements at a time where rows allow.
#include "part_items.h"
#include "write_gradients.h"

namespace kfac2::cuda {
namespace {

// From the matrices to a gradient; 0 where the step is skipped, and nothing is read then.
template <typename T, typename Sum>
struct Writing {
  T* data;
  const Sum* directions;
  Sum shift, scale;
  bool skipped;

  template <int kCount>
  __device__ Numbers<Sum, kCount> read(int64_t, int64_t place) const {
    return skipped ? Numbers<Sum, kCount>{} : *aligned<const Numbers<Sum, kCount>>(directions + place);
  }

  template <int kCount>
  __device__ void write(int64_t offset, int64_t, const Numbers<Sum, kCount>& numbers) {
    Numbers<T, kCount> result;
    for (int i = 0; i < kCount; ++i) {
      const Sum value = skipped ? Sum(0) : scale * (numbers.lane[i] + shift);
      result.lane[i] = from_sum_type<T>(static_cast<SumType<T>>(value));
    }
    *aligned<Numbers<T, kCount>>(data + offset) = result;
  }
};

// A gradient that stays, by a factor.
template <typename T>
struct Scaling {
  T* data;
  double factor;

  template <int kCount>
  __device__ Numbers<T, kCount> read(int64_t offset, int64_t) const {
    return *aligned<const Numbers<T, kCount>>(data + offset);
  }

  template <int kCount>
  __device__ void write(int64_t offset, int64_t, Numbers<T, kCount> numbers) {
    for (int i = 0; i < kCount; ++i)
      numbers.lane[i] = from_sum_type<T>(static_cast<SumType<T>>(factor * to_sum_type(numbers.lane[i])));
    *aligned<Numbers<T, kCount>>(data + offset) = numbers;
  }
};

template <typename Sum>
__global__ void __launch_bounds__(kPartThreads)
    write_kernel(const PartEntry* entries, int count, const Sum* directions, const double* shifts,
                 const double* factors, const float* found, const double* usable) {
  const PartEntry& entry = entries[entry_of_warp(entries, count, blockIdx.x)];
  const GradientPart& part = entry.part;
  const bool skipped = *found != 0, kept = !part.belongs() || usable[part.layer] == 0;
  const double factor = part.belongs() ? factors[part.layer] : 1.0;
  if (kept && !skipped && factor == 1) return;  // there is no barrier
  const Sum shift = kept ? Sum(0) : static_cast<Sum>(shifts[part.layer]);
  const int64_t item = static_cast<int64_t>(blockIdx.x) - entry.first_item;
  with_type(part.element_type, part.data, [&](auto* data) {
    using T = ElementOf<decltype(data)>;
    if (kept && !skipped) {
      Scaling<T> move{data, factor};
      move_item(entry, item, move);
    } else {
      Writing<T, Sum> move{data, directions, shift, static_cast<Sum>(factor), skipped};
      move_item(entry, item, move);
    }
  });
}

class WriteGradients : public PartLaunch {
 public:
  explicit WriteGradients(const WriteGradientsParams& params)
      : PartLaunch(params.parts, params.count, params.directions), params_(params) {}

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

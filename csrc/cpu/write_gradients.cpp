// Floor: directions read once, gradients written once.
#include "write_gradients.h"

#include "part_runs.h"
#include "shares.h"
#include "simd.h"

namespace kfac2::cpu {
namespace {

template <typename T, typename Sum>
KFAC2_INLINE void write_numbers(T* to, int64_t stride, const Sum* direction, Sum shift, Sum scale, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    to[i * stride] = from_sum_type<T>(static_cast<SumType<T>>(scale * (direction[i] + shift)));
}

KFAC2_CLONES void write(float* to, const float* direction, float shift, float scale, int64_t count) {
  write_numbers(to, 1, direction, shift, scale, count);
}
KFAC2_CLONES void write(double* to, const double* direction, double shift, double scale, int64_t count) {
  write_numbers(to, 1, direction, shift, scale, count);
}

template <typename T, typename Sum>
void write(T* to, const Sum* direction, Sum shift, Sum scale, int64_t count) {
  write_numbers(to, 1, direction, shift, scale, count);
}

template <typename T, typename Sum>
void write_part(const GradientPart& part, T* data, const Sum* directions, Sum shift, Sum scale) {
  for_each_run(part, [&](int64_t offset, int64_t place, int64_t count, int64_t stride) {
    const Sum* from = directions + part.offset + place;
    if (stride == 1) {
      write(data + offset, from, shift, scale, count);
    } else {
      write_numbers(data + offset, stride, from, shift, scale, count);
    }
  });
}

// A part by a factor; 0 whatever it holds where that is 0.
template <typename T>
void scale_part(const GradientPart& part, T* data, double factor) {
  for_each_run(part, [&](int64_t offset, int64_t, int64_t count, int64_t stride) {
    for (int64_t i = 0; i < count; ++i) {
      T& number = data[offset + i * stride];
      number = factor == 0 ? T{} : from_sum_type<T>(static_cast<SumType<T>>(factor * to_sum_type(number)));
    }
  });
}

class WriteGradients : public Work {
 public:
  explicit WriteGradients(const WriteGradientsParams& params)
      : params_(params), first_part_(shares(params.count, [&](int64_t i) { return params.parts[i].elements(); })) {}

  int64_t tasks() const override { return static_cast<int64_t>(first_part_.size()) - 1; }

  void run_task(int64_t task) override {
    for (int64_t i = first_part_[task]; i < first_part_[task + 1]; ++i) {
      const GradientPart& part = params_.parts[i];
      const bool skipped = *params_.found != 0, kept = !part.belongs() || params_.usable[part.layer] == 0;
      const double scale = skipped ? 0 : part.belongs() ? params_.factors[part.layer] : 1;
      if (kept && scale == 1) continue;
      with_type(part.element_type, part.data, [&](auto* data) {
        if (kept || skipped) return scale_part(part, data, scale);
        const double shift = params_.shifts[part.layer];
        if (params_.is_double) {
          write_part(part, data, static_cast<const double*>(params_.directions), shift, scale);
        } else {
          write_part(part, data, static_cast<const float*>(params_.directions), static_cast<float>(shift),
                     static_cast<float>(scale));
        }
      });
    }
  }

 private:
  WriteGradientsParams params_;
  std::vector<int64_t> first_part_;  // of each task, and their number
};

}  // namespace

std::unique_ptr<Work> write_gradients(const WriteGradientsParams& params) {
  return std::make_unique<WriteGradients>(params);
}

}  // namespace kfac2::cpu

// Floor: every gradient read once, the matrices written once.
#include "gather_gradients.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "part_runs.h"
#include "shares.h"
#include "simd.h"

namespace kfac2::cpu {
namespace {

template <typename T>
bool is_finite(T value) {
  return std::abs(value) <= std::numeric_limits<T>::max();
}

// Copies numbers, or only looks at them; returns whether all are finite.
template <typename T, typename Sum>
KFAC2_INLINE bool copy_numbers(const T* from, int64_t stride, Sum* to, int64_t count) {
  bool finite = true;
#pragma omp simd reduction(& : finite)
  for (int64_t i = 0; i < count; ++i) {
    const SumType<T> value = to_sum_type(from[i * stride]);
    finite &= is_finite(value);
    if (to != nullptr) to[i] = static_cast<Sum>(value);
  }
  return finite;
}

KFAC2_CLONES bool copy(const float* from, float* to, int64_t count) { return copy_numbers(from, 1, to, count); }
KFAC2_CLONES bool copy(const double* from, double* to, int64_t count) { return copy_numbers(from, 1, to, count); }

template <typename T, typename Sum>
bool copy(const T* from, Sum* to, int64_t count) {
  return copy_numbers(from, 1, to, count);
}

template <typename T, typename Sum>
bool gather(const GradientPart& part, const T* data, Sum* matrices) {
  bool finite = true;
  for_each_run(part, [&](int64_t offset, int64_t place, int64_t count, int64_t stride) {
    Sum* to = part.belongs() ? matrices + part.offset + place : nullptr;
    finite &= stride == 1 ? copy(data + offset, to, count) : copy_numbers(data + offset, stride, to, count);
  });
  return finite;
}

class GatherGradients : public Work {
 public:
  explicit GatherGradients(const GatherGradientsParams& params)
      : params_(params),
        first_part_(shares(params.count, [&](int64_t i) { return params.parts[i].elements(); })),
        first_bad_(first_part_.size() - 1, params.none_bad) {}

  int64_t tasks() const override { return static_cast<int64_t>(first_bad_.size()); }

  void run_task(int64_t task) override {
    for (int64_t i = first_part_[task]; i < first_part_[task + 1]; ++i) {
      const GradientPart& part = params_.parts[i];
      with_type(part.element_type, part.data, [&](const auto* data) {
        const bool finite = params_.is_double ? gather(part, data, static_cast<double*>(params_.matrices))
                                              : gather(part, data, static_cast<float*>(params_.matrices));
        if (!finite) first_bad_[task] = std::min(first_bad_[task], part.number);
      });
    }
  }

  int64_t merges() const override { return 1; }

  void run_merge(int64_t) override {
    *params_.first_bad = static_cast<int32_t>(
        first_bad_.empty() ? params_.none_bad : *std::min_element(first_bad_.begin(), first_bad_.end()));
  }

 private:
  GatherGradientsParams params_;
  std::vector<int64_t> first_part_;  // of each task, and their number
  std::vector<int64_t> first_bad_;   // by task
};

}  // namespace

std::unique_ptr<Work> gather_gradients(const GatherGradientsParams& params) {
  return std::make_unique<GatherGradients>(params);
}

}  // namespace kfac2::cpu

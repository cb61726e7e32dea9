// Floor: gradients and directions read once.
#include "shift_and_scale.h"

#include <algorithm>
#include <cmath>

#include "shares.h"
#include "simd.h"

namespace kfac2::cpu {
namespace {

constexpr int64_t kRun = 4096;  // elements summed in their own type, before double takes over

// Sum of a, and a . b.
template <typename T>
KFAC2_INLINE void add_products(const T* a, const T* b, int64_t count, double* sum, double* dot) {
  for (int64_t begin = 0; begin < count; begin += kRun) {
    const int64_t end = std::min(begin + kRun, count);
    T run_sum = 0, run_dot = 0;
#pragma omp simd reduction(+ : run_sum, run_dot)
    for (int64_t i = begin; i < end; ++i) {
      run_sum += a[i];
      run_dot += a[i] * b[i];
    }
    *sum += run_sum;
    *dot += run_dot;
  }
}

KFAC2_CLONES void products(const float* a, const float* b, int64_t count, double* sum, double* dot) {
  add_products(a, b, count, sum, dot);
}
KFAC2_CLONES void products(const double* a, const double* b, int64_t count, double* sum, double* dot) {
  add_products(a, b, count, sum, dot);
}

KFAC2_CLONES double dot_of(const double* a, const double* b, int64_t count) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

bool is_finite(double value, bool is_double) {
  return std::isfinite(value) && (is_double || std::isfinite(static_cast<float>(value)));
}

class ShiftAndScale : public Work {
 public:
  explicit ShiftAndScale(const ShiftAndScaleParams& params)
      : params_(params),
        first_layer_(shares(params.layers, [&](int64_t i) { return params.spans[2 * i + 1] - params.spans[2 * i]; })),
        sums_(params.layers),
        dots_(params.layers) {}

  int64_t tasks() const override { return static_cast<int64_t>(first_layer_.size()) - 1; }

  void run_task(int64_t task) override {
    for (int64_t i = first_layer_[task]; i < first_layer_[task + 1]; ++i) {
      const int64_t begin = params_.spans[2 * i], count = params_.spans[2 * i + 1] - begin;
      const auto run = [&](const auto* gradients, const auto* directions) {
        products(gradients + begin, directions + begin, count, &sums_[i], &dots_[i]);
      };
      if (params_.is_double) {
        run(static_cast<const double*>(params_.gradients), static_cast<const double*>(params_.directions));
      } else {
        run(static_cast<const float*>(params_.gradients), static_cast<const float*>(params_.directions));
      }
    }
  }

  int64_t merges() const override { return 1; }

  void run_merge(int64_t) override {
    const int64_t layers = params_.layers;
    std::vector<double> y(layers);
    for (int64_t i = 0; i < layers; ++i) y[i] = params_.in_coarse[i] != 0 && params_.usable[i] != 0 ? sums_[i] : 0;
    double total = 0;
    bool finite = *params_.first_bad >= params_.none_bad;
    for (int64_t i = 0; i < layers; ++i) {
      const bool shifted = params_.coarse_inverse != nullptr && params_.in_coarse[i] != 0 && params_.usable[i] != 0;
      const double c =
          shifted ? params_.coarse_weight * dot_of(params_.coarse_inverse + i * layers, y.data(), layers) : 0;
      params_.shifts[i] = c;
      finite &= is_finite(c, params_.is_double);
      const double rate = params_.rates[i] * (params_.device_rates == nullptr ? 1 : params_.device_rates[i]);
      if (params_.usable[i] != 0) total += rate * rate * std::abs(dots_[i] + c * sums_[i]);
    }
    finite &= std::isfinite(total);
    params_.scale[0] = std::isinf(params_.kl_clip) ? 1 : std::min(1.0, std::sqrt(params_.kl_clip / total));
    params_.scale[1] = total;
    *params_.found = finite ? 0 : 1;
    if (!finite && params_.skipped[0]++ == 0) params_.skipped[1] = *params_.first_bad;
  }

 private:
  ShiftAndScaleParams params_;
  std::vector<int64_t> first_layer_;  // of each task, and their number
  std::vector<double> sums_, dots_;   // y_i, v_i . grad_i
};

}  // namespace

std::unique_ptr<Work> shift_and_scale(const ShiftAndScaleParams& params) {
  return std::make_unique<ShiftAndScale>(params);
}

}  // namespace kfac2::cpu

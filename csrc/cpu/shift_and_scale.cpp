// Floor: gradients and directions read once.
#include "shift_and_scale.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "shares.h"
#include "simd.h"

namespace kfac2::cpu {
namespace {

constexpr int64_t kRun = 4096;  // elements summed in their own type before double takes over, and still in the cache
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Sum of a, and a . b.
template <typename T>
KFAC2_INLINE void add_products(const T* a, const T* b, int64_t count, double* sum, double* dot) {
  T run_sum = 0, run_dot = 0;
#pragma omp simd reduction(+ : run_sum, run_dot)
  for (int64_t i = 0; i < count; ++i) {
    run_sum += a[i];
    run_dot += a[i] * b[i];
  }
  *sum += run_sum;
  *dot += run_dot;
}

template <typename T>
KFAC2_INLINE void find_extremes(const T* a, int64_t count, double* lowest, double* highest) {
  T low = a[0], high = a[0];
#pragma omp simd reduction(min : low) reduction(max : high)
  for (int64_t i = 0; i < count; ++i) {
    low = a[i] < low ? a[i] : low;
    high = a[i] > high ? a[i] : high;
  }
  *lowest = std::min(*lowest, static_cast<double>(low));
  *highest = std::max(*highest, static_cast<double>(high));
}

KFAC2_CLONES void products(const float* a, const float* b, int64_t count, double* sum, double* dot) {
  add_products(a, b, count, sum, dot);
}
KFAC2_CLONES void products(const double* a, const double* b, int64_t count, double* sum, double* dot) {
  add_products(a, b, count, sum, dot);
}

KFAC2_CLONES void extremes(const float* a, int64_t count, double* lowest, double* highest) {
  find_extremes(a, count, lowest, highest);
}
KFAC2_CLONES void extremes(const double* a, int64_t count, double* lowest, double* highest) {
  find_extremes(a, count, lowest, highest);
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

// Of a layer. What it writes is v_i, or where it has no inverse its gradient.
struct Sums {
  double gradient = 0, dot = 0;                     // y_i, v_i . grad_i
  double written = 0, square = 0;                   // the sum of what it writes, and its squared norm
  double lowest = kInfinity, highest = -kInfinity;  // of v_i
};

class ShiftAndScale : public Work {
 public:
  explicit ShiftAndScale(const ShiftAndScaleParams& params)
      : params_(params),
        first_layer_(shares(params.layers, [&](int64_t i) { return end_of(i) - begin_of(i); })),
        sums_(params.layers) {}

  int64_t tasks() const override { return static_cast<int64_t>(first_layer_.size()) - 1; }

  void run_task(int64_t task) override {
    for (int64_t i = first_layer_[task]; i < first_layer_[task + 1]; ++i) {
      if (params_.is_double) {
        add_layer(i, static_cast<const double*>(params_.gradients), static_cast<const double*>(params_.directions));
      } else {
        add_layer(i, static_cast<const float*>(params_.gradients), static_cast<const float*>(params_.directions));
      }
    }
  }

  int64_t merges() const override { return 1; }

  void run_merge(int64_t) override {
    std::vector<double> y(params_.layers);
    for (int64_t i = 0; i < params_.layers; ++i) y[i] = params_.in_coarse[i] != 0 && usable(i) ? sums_[i].gradient : 0;
    double total = 0;
    bool finite = *params_.first_bad >= params_.none_bad;
    for (int64_t i = 0; i < params_.layers; ++i) {
      const double c = params_.shifts[i] = shift_of(i, y);
      finite &= is_finite(c, params_.is_double);
      const double rate = params_.rates[i] * (params_.device_rates == nullptr ? 1 : params_.device_rates[i]);
      if (usable(i)) total += rate * rate * std::abs(sums_[i].dot + c * sums_[i].gradient);
    }
    finite &= std::isfinite(total);
    const double nu = std::isinf(params_.kl_clip) ? 1 : std::min(1.0, std::sqrt(params_.kl_clip / total));
    params_.scale[0] = nu;
    params_.scale[1] = total;
    for (int64_t i = 0; i < params_.layers; ++i) finite &= scale_layer(i, usable(i) ? nu : 1);
    *params_.found = finite ? 0 : 1;
    if (!finite && params_.skipped[0]++ == 0) params_.skipped[1] = *params_.first_bad;
  }

 private:
  int64_t begin_of(int64_t i) const { return params_.spans[3 * i]; }
  int64_t end_of(int64_t i) const { return params_.spans[3 * i + 1]; }
  int64_t size_of(int64_t i) const { return params_.spans[3 * i + 2]; }
  bool usable(int64_t i) const { return params_.usable[i] != 0; }
  bool may_overflow(int64_t i) const {
    return params_.largest != nullptr && params_.largest[i] < kInfinity && usable(i) && size_of(i) > 0;
  }

  template <typename T>
  void add_layer(int64_t i, const T* gradients, const T* directions) {
    Sums& sums = sums_[i];
    for (int64_t begin = begin_of(i); begin < end_of(i); begin += kRun) {
      const int64_t count = std::min(kRun, end_of(i) - begin);
      const T *gradient = gradients + begin, *direction = directions + begin;
      products(gradient, direction, count, &sums.gradient, &sums.dot);
      if (params_.limits != nullptr) {
        const T* written = usable(i) ? direction : gradient;
        products(written, written, count, &sums.written, &sums.square);
      }
      if (may_overflow(i)) extremes(direction, count, &sums.lowest, &sums.highest);
    }
  }

  double shift_of(int64_t i, const std::vector<double>& y) const {
    if (params_.coarse_inverse == nullptr || params_.in_coarse[i] == 0 || !usable(i)) return 0;
    return params_.coarse_weight * dot_of(params_.coarse_inverse + i * params_.layers, y.data(), params_.layers);
  }

  // The factor of a layer that the clip scales by nu; false where what it makes of the layer is not finite.
  bool scale_layer(int64_t i, double nu) {
    const Sums& sums = sums_[i];
    const double c = params_.shifts[i];
    double factor = nu;
    bool finite = true;
    if (params_.limits != nullptr) {
      const double square = sums.square + c * (2 * sums.written + c * static_cast<double>(size_of(i)));
      const double norm = params_.norms[i] = nu * std::sqrt(std::max(square, 0.0)), limit = params_.limits[i];
      if (limit < norm) factor *= limit / norm;
      finite = std::isfinite(norm) || std::isinf(limit);
    }
    params_.factors[i] = factor;
    if (!may_overflow(i)) return finite;
    return finite && factor * std::max(std::abs(sums.lowest + c), std::abs(sums.highest + c)) <= params_.largest[i];
  }

  ShiftAndScaleParams params_;
  std::vector<int64_t> first_layer_;  // of each task, and their number
  std::vector<Sums> sums_;
};

}  // namespace

std::unique_ptr<Work> shift_and_scale(const ShiftAndScaleParams& params) {
  return std::make_unique<ShiftAndScale>(params);
}

}  // namespace kfac2::cpu

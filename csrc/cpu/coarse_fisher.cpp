// Floor: 4 B^2 numbers read and 2 B^2 written, all in cache, and about 8 B^2 operations: microseconds.
#include "coarse_fisher.h"

#include <algorithm>
#include <vector>

#include "simd.h"

namespace kfac2::cpu {
namespace {

// One row of averages: X_qr for all r. `scale` is that of q.
template <typename T>
KFAC2_INLINE void average_row(const T* raw, const T* previous, AverageFactors factors, double scale,
                              const double* scales, T* averages, int64_t count) {
  if (previous == nullptr) {
#pragma omp simd
    for (int64_t r = 0; r < count; ++r) averages[r] = static_cast<T>(scale * scales[r] * static_cast<double>(raw[r]));
  } else {
#pragma omp simd
    for (int64_t r = 0; r < count; ++r) {
      const double taken = factors.taken * (scale * scales[r]) * static_cast<double>(raw[r]);
      averages[r] = static_cast<T>(factors.kept * static_cast<double>(previous[r]) + taken);
    }
  }
}

template <typename T>
KFAC2_INLINE void multiply_row(const T* a, const T* b, T* products, int64_t count) {
#pragma omp simd
  for (int64_t r = 0; r < count; ++r) products[r] = a[r] * b[r];
}

#define KFAC2_ROWS(T)                                                                              \
  KFAC2_CLONES void average(const T* raw, const T* previous, AverageFactors factors, double scale, \
                            const double* scales, T* averages, int64_t count) {                    \
    average_row<T>(raw, previous, factors, scale, scales, averages, count);                        \
  }                                                                                                \
  KFAC2_CLONES void multiply(const T* a, const T* b, T* products, int64_t count) {                 \
    multiply_row<T>(a, b, products, count);                                                        \
  }
KFAC2_ROWS(float)
KFAC2_ROWS(double)
#undef KFAC2_ROWS

template <typename T>
void average_sums(const PairSums& sums, double kept, int64_t blocks) {
  const std::vector<double> ones(sums.scales == nullptr ? blocks : 0, 1.0);
  const double* scales = sums.scales == nullptr ? ones.data() : sums.scales;
  const AverageFactors factors = average_factors(sums, kept);
  for (int64_t q = 0; q < blocks; ++q) {
    const T* previous = sums.previous == nullptr ? nullptr : static_cast<const T*>(sums.previous) + q * blocks;
    average(static_cast<const T*>(sums.raw) + q * blocks, previous, factors, scales[q], scales,
            static_cast<T*>(sums.averages) + q * blocks, blocks);
  }
}

class CoarseFisher : public Work {
 public:
  explicit CoarseFisher(const CoarseFisherParams& params) : params_(params) {}
  int64_t tasks() const override { return 1; }
  void run_task(int64_t) override { params_.is_double ? run<double>() : run<float>(); }

 private:
  template <typename T>
  void run() const {
    const int64_t blocks = params_.blocks;
    average_sums<T>(params_.inputs, params_.kept, blocks);
    average_sums<T>(params_.grads, params_.kept, blocks);
    const T *A = static_cast<const T*>(params_.inputs.averages), *G = static_cast<const T*>(params_.grads.averages);
    T* fisher = static_cast<T*>(params_.fisher);
    if (one_block_each()) return multiply(A, G, fisher, blocks * blocks);
    add_blocks(A, G, fisher);
  }

  bool one_block_each() const {
    if (params_.blocks != params_.layers) return false;
    for (int64_t q = 0; q < params_.blocks; ++q)
      if (params_.layer_of_block[q] != q) return false;
    return true;
  }

  // An entry and its mirror image get their products in the same order, so that F is as symmetric as the sums are.
  template <typename T>
  void add_blocks(const T* A, const T* G, T* fisher) const {
    const int64_t blocks = params_.blocks, layers = params_.layers;
    std::vector<double> sums(layers * layers);
    for (int64_t q = 0; q < blocks; ++q) {
      const int64_t i = params_.layer_of_block[q];
      for (int64_t r = q; r < blocks; ++r) {
        const int64_t j = params_.layer_of_block[r], above = q * blocks + r, below = r * blocks + q;
        sums[i * layers + j] += static_cast<double>(A[above]) * static_cast<double>(G[above]);
        if (r > q) sums[j * layers + i] += static_cast<double>(A[below]) * static_cast<double>(G[below]);
      }
    }
    for (int64_t entry = 0; entry < layers * layers; ++entry) fisher[entry] = static_cast<T>(sums[entry]);
  }

  CoarseFisherParams params_;
};

}  // namespace

std::unique_ptr<Work> coarse_fisher(const CoarseFisherParams& params) { return std::make_unique<CoarseFisher>(params); }

}  // namespace kfac2::cpu

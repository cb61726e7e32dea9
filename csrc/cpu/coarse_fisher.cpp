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

// Averages the sums of one kind, row by row.
template <typename T>
class Averages {
 public:
  Averages(const PairSums& sums, double kept, int64_t blocks)
      : sums_(sums), blocks_(blocks), factors_(average_factors(sums, kept)), ones_(sums.scales ? 0 : blocks, 1.0) {}

  const T* row(int64_t q) const {
    const T* previous = static_cast<const T*>(sums_.previous);
    const double* scales = sums_.scales == nullptr ? ones_.data() : sums_.scales;
    T* averages = static_cast<T*>(sums_.averages) + q * blocks_;
    average(static_cast<const T*>(sums_.raw) + q * blocks_, previous == nullptr ? nullptr : previous + q * blocks_,
            factors_, scales[q], scales, averages, blocks_);
    return averages;
  }

 private:
  PairSums sums_;
  int64_t blocks_;
  AverageFactors factors_;
  std::vector<double> ones_;
};

class CoarseFisher : public Work {
 public:
  explicit CoarseFisher(const CoarseFisherParams& params) : params_(params) {}
  int64_t tasks() const override { return 1; }
  void run_task(int64_t) override { params_.is_double ? run<double>() : run<float>(); }

 private:
  template <typename T>
  void run() const {
    const int64_t blocks = params_.blocks;
    const Averages<T> inputs(params_.inputs, params_.kept, blocks), grads(params_.grads, params_.kept, blocks);
    const bool each = one_block_each();
    for (int64_t q = 0; q < blocks; ++q) {
      const T *A = inputs.row(q), *G = grads.row(q);
      if (each) multiply(A, G, static_cast<T*>(params_.fisher) + q * blocks, blocks);
    }
    if (!each) add_blocks<T>();
  }

  bool one_block_each() const {
    if (params_.blocks != params_.layers) return false;
    for (int64_t q = 0; q < params_.blocks; ++q)
      if (params_.layer_of_block[q] != q) return false;
    return true;
  }

  // An entry and its mirror image get their products in the same order, so that F is as symmetric as the sums are.
  template <typename T>
  void add_blocks() const {
    const int64_t blocks = params_.blocks, layers = params_.layers;
    const T *A = static_cast<const T*>(params_.inputs.averages), *G = static_cast<const T*>(params_.grads.averages);
    T* fisher = static_cast<T*>(params_.fisher);
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

#include "coarse_fisher.h"

#include <algorithm>

#include "simd.h"

namespace kfac2::cpu {
namespace {

template <typename T>
KFAC2_INLINE void multiply_numbers(const T* a, const T* b, T* product, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) product[i] = a[i] * b[i];
}

KFAC2_CLONES void multiply(const float* a, const float* b, float* product, int64_t count) {
  multiply_numbers(a, b, product, count);
}
KFAC2_CLONES void multiply(const double* a, const double* b, double* product, int64_t count) {
  multiply_numbers(a, b, product, count);
}

bool one_block_each(const CoarseFisherParams& params) {
  if (params.blocks != params.layers) return false;
  for (int64_t q = 0; q < params.blocks; ++q)
    if (params.layer_of_block[q] != q) return false;
  return true;
}

template <typename T>
void add_blocks(const CoarseFisherParams& params) {
  const T* input_sums = static_cast<const T*>(params.input_sums);
  const T* grad_sums = static_cast<const T*>(params.grad_sums);
  T* fisher = static_cast<T*>(params.fisher);
  if (one_block_each(params)) return multiply(input_sums, grad_sums, fisher, params.layers * params.layers);
  std::fill_n(fisher, params.layers * params.layers, T(0));
  for (int64_t q = 0; q < params.blocks; ++q) {
    T* row = fisher + params.layer_of_block[q] * params.layers;
    for (int64_t r = 0; r < params.blocks; ++r) {
      const int64_t entry = q * params.blocks + r;
      row[params.layer_of_block[r]] += input_sums[entry] * grad_sums[entry];
    }
  }
}

}  // namespace

void coarse_fisher(const CoarseFisherParams& params) {
  if (params.is_double) {
    add_blocks<double>(params);
  } else {
    add_blocks<float>(params);
  }
}

}  // namespace kfac2::cpu

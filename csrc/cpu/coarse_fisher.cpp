#include "coarse_fisher.h"

#include <algorithm>

namespace kfac2::cpu {
namespace {

template <typename T>
void add_blocks(const CoarseFisherParams& params) {
  const T* input_sums = static_cast<const T*>(params.input_sums);
  const T* grad_sums = static_cast<const T*>(params.grad_sums);
  T* fisher = static_cast<T*>(params.fisher);
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

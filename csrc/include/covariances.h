// covariances: kept * previous + scale * (sum over samples and places of row row^T), for every layer and group, each
// symmetric matrix as a triangle.
#pragma once

#include "op.h"
#include "triangle.h"
#include "window.h"

namespace kfac2 {

struct CovariancesParams {
  const RowSource* sources;  // [layers]
  void* const* covariances;  // [layers] -> [groups, triangle of d], float64 for float64 sources, else float32
  int64_t layers;
  const void* const* previous = nullptr;  // [layers] -> like the covariances, or null; null: of no layer
  double kept = 1;
  const double* scales = nullptr;  // [layers]; null: 1
  const void* previous_of(int64_t layer) const { return previous == nullptr ? nullptr : previous[layer]; }
  double scale_of(int64_t layer) const { return scales == nullptr ? 1 : scales[layer]; }
};

namespace cpu {
std::unique_ptr<Work> covariances(const CovariancesParams& params);
}
namespace cuda {
std::unique_ptr<Launch> covariances(const CovariancesParams& params);
}

}  // namespace kfac2

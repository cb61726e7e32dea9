// covariances: sum over samples and places of row row^T, for every layer and group.
#pragma once

#include "op.h"
#include "window.h"

namespace kfac2 {

struct CovariancesParams {
  const RowSource* sources;  // [layers]
  void* const* covariances;  // [layers] -> [groups, d, d], float64 for float64 sources, else float32
  int64_t layers;
};

namespace cpu {
std::unique_ptr<Work> covariances(const CovariancesParams& params);
}
namespace cuda {
std::unique_ptr<Launch> covariances(const CovariancesParams& params);
}

}  // namespace kfac2

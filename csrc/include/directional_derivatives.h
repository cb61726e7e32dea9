// directional_derivatives: s[k, n] = sum over groups and places of g^T D_k a, for every layer: the derivative of a
// sample's log-likelihood in directions of the weight matrices.
#pragma once

#include "op.h"
#include "window.h"

namespace kfac2 {

struct DirectionalLayer {
  RowSource inputs;        // rows a of length d_in
  RowSource grads;         // rows g of length d_out: single places, as many as the inputs' grid has along each axis
  const void* directions;  // [K, groups, d_out, d_in], of the type that both are summed in
  double* derivatives;     // [K, N]
  int64_t count;           // K

  KFAC2_HOST_DEVICE int64_t groups() const { return inputs.window.groups; }
  KFAC2_HOST_DEVICE int64_t d_in() const { return inputs.row_length(); }
  KFAC2_HOST_DEVICE int64_t d_out() const { return grads.channels_per_group(); }
  KFAC2_HOST_DEVICE bool is_double() const { return inputs.element_type == ElementType::kFloat64; }
};

struct DirectionalDerivativesParams {
  const DirectionalLayer* layers;  // [count]
  int64_t count;
};

namespace cpu {
std::unique_ptr<Work> directional_derivatives(const DirectionalDerivativesParams& params);
}
namespace cuda {
std::unique_ptr<Launch> directional_derivatives(const DirectionalDerivativesParams& params);
}

}  // namespace kfac2

// shift_and_scale: what is left to do once G^-1 grad A^-1 is known, v_i <- f_i (v_i + omega c_i) for every layer:
//   c = (F_coarse + lambda_c I)^-1 y, y_i the sum of grad_i (eq. 6, 10),
//   nu = min(1, sqrt(kappa / sum_i eta_i^2 |(v_i + omega c_i) . grad_i|)),
//   f_i = nu min(1, limit_i / (nu |v_i + omega c_i|)).
// A layer without an inverse keeps its gradient, f_i = min(1, limit_i / |grad_i|) of it.
#pragma once

#include <cstdint>

#include "op.h"

namespace kfac2 {

struct ShiftAndScaleParams {
  const void* gradients;         // the matrices of all layers, float or double
  const void* directions;        // G^-1 grad A^-1, in the same places
  const int64_t* spans;          // [layers, 3], on the host: begin and end of each layer among the matrices, and how
                                 // many numbers it has; the others are zeros that pad its rows
  const double* rates;           // [layers], on the host: eta_i
  const double* device_rates;    // [layers] or null: factors of the rates
  const double* in_coarse;       // [layers], on the host: 0 or 1
  const double* usable;          // [layers]: 0 for a layer that has no inverse, which keeps its gradient
  const double* coarse_inverse;  // [layers, layers], or null: no second level
  const double* limits;          // [layers], infinity where there is none; or null: no norm is limited, nor computed
  const double* largest;         // [layers], on the host: the largest number that the layer's gradients hold, infinity
                                 // where it need not be looked for; or null
  const int32_t* first_bad;      // of gather_gradients
  int64_t none_bad;              // of gather_gradients
  double coarse_weight;          // omega
  double kl_clip;                // kappa; infinity: no clip
  int64_t layers;
  double* shifts;    // [layers]: omega c_i
  double* scale;     // [2]: nu, and the sum under the root
  float* found;      // one number: 1 where anything is not finite, or would not be once it is written, else 0
  double* factors;   // [layers]: f_i
  double* norms;     // [layers] with limits: nu |v_i + omega c_i|, or |grad_i| without an inverse
  int64_t* skipped;  // [2]: counts the times that something was found; first_bad of the first time
  bool is_double;
};

namespace cpu {
std::unique_ptr<Work> shift_and_scale(const ShiftAndScaleParams& params);
}
namespace cuda {
std::unique_ptr<Launch> shift_and_scale(const ShiftAndScaleParams& params);
}

}  // namespace kfac2

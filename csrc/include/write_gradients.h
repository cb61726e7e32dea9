// write_gradients: f_i (v_i + omega c_i) back into every parameter's gradient.
#pragma once

#include <cstdint>

#include "gradient_part.h"
#include "op.h"

namespace kfac2 {

struct WriteGradientsParams {
  const GradientPart* parts;  // [count]; a part that belongs to no layer keeps its gradient
  const void* directions;     // the matrices of all layers, float or double
  const double* shifts;       // [layers]: omega c_i
  const double* factors;      // [layers]: f_i
  const float* found;         // not 0: every gradient becomes 0, of layers or not
  const double* usable;       // [layers]: 0 for a layer that keeps its gradient, f_i of it
  int64_t count;
  bool is_double;
};

namespace cpu {
std::unique_ptr<Work> write_gradients(const WriteGradientsParams& params);
}
namespace cuda {
std::unique_ptr<Launch> write_gradients(const WriteGradientsParams& params);
}

}  // namespace kfac2

// gather_gradients: copies every parameter's gradient to its place among the gradient matrices, and finds the first
// that holds a NaN or an infinity.
#pragma once

#include <cstdint>

#include "gradient_part.h"
#include "op.h"

namespace kfac2 {

struct GatherGradientsParams {
  const GradientPart* parts;  // [count]
  void* matrices;             // float or double
  int32_t* first_bad;         // one number: the least of the parts that are not finite, or none_bad
  int64_t count;
  int64_t none_bad;  // above all numbers
  bool is_double;
};

namespace cpu {
std::unique_ptr<Work> gather_gradients(const GatherGradientsParams& params);
}
namespace cuda {
std::unique_ptr<Launch> gather_gradients(const GatherGradientsParams& params);
}

}  // namespace kfac2

#include "gather_gradients.h"

#include "bind.h"
#include "gradient_parts.h"

namespace kfac2 {
namespace {

using torch::stable::Tensor;

constexpr const char* kOp = "gather_gradients";

// first_bad: [1]
Tensor gather_gradients(const std::vector<Tensor>& gradients, const Tensor& layout, int64_t layers, int64_t none_bad,
                        const Tensor& matrices) {
  const std::vector<GradientPart> parts = gradient_parts(kOp, gradients, layout, matrices, layers);
  const Tensor first_bad = allocate(matrices, {1}, torch::headeronly::ScalarType::Int);
  const GatherGradientsParams params{parts.data(),
                                     matrices.data_ptr(),
                                     static_cast<int32_t*>(first_bad.data_ptr()),
                                     static_cast<int64_t>(parts.size()),
                                     none_bad,
                                     is_double(matrices)};
  KFAC2_RUN(gather_gradients, matrices, params);
  return first_bad;
}

}  // namespace

KFAC2_BIND(gather_gradients)

}  // namespace kfac2

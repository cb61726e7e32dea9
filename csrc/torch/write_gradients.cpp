#include "write_gradients.h"

#include "bind.h"
#include "gradient_parts.h"

namespace kfac2 {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "write_gradients";

// shifts, factors, usable: [layers]; found: [1]
void write_gradients(const std::vector<Tensor>& gradients, const Tensor& layout, const Tensor& directions,
                     const Tensor& shifts, const Tensor& factors, const Tensor& found, const Tensor& usable) {
  const std::vector<GradientPart> parts = gradient_parts(kOp, gradients, layout, directions, shifts.numel());
  for (const Tensor* numbers : {&shifts, &factors, &usable}) {
    check(is_double(*numbers) && numbers->is_contiguous() && same_device(*numbers, directions), kOp,
          "expected shifts, factors and usable to be float64, contiguous, on the device of the directions");
  }
  check(found.scalar_type() == ScalarType::Float && found.numel() == 1 && same_device(found, directions), kOp,
        "expected found to be one float32 number on the device of the directions, got shape ", shape_of(found));
  for (const Tensor* numbers : {&factors, &usable}) {
    check(numbers->numel() == shifts.numel(), kOp, "expected factors and usable of shape ", shape_of(shifts), ", got ",
          shape_of(*numbers));
  }
  const WriteGradientsParams params{parts.data(),
                                    directions.const_data_ptr(),
                                    static_cast<const double*>(shifts.const_data_ptr()),
                                    static_cast<const double*>(factors.const_data_ptr()),
                                    static_cast<const float*>(found.const_data_ptr()),
                                    static_cast<const double*>(usable.const_data_ptr()),
                                    static_cast<int64_t>(parts.size()),
                                    is_double(directions)};
  KFAC2_RUN(write_gradients, directions, params);
}

}  // namespace

KFAC2_BIND(write_gradients)

}  // namespace kfac2

#include "gradient_parts.h"

#include "check.h"

namespace kfac2 {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kLayoutNumbers = 4;

bool is_expanded(const Tensor& tensor) {
  for (int64_t d = 0; d < tensor.dim(); ++d)
    if (tensor.size(d) > 1 && tensor.stride(d) == 0) return true;
  return false;
}

}  // namespace

std::vector<GradientPart> gradient_parts(const char* op, const std::vector<Tensor>& gradients, const Tensor& layout,
                                         const Tensor& matrices, int64_t layers) {
  const int64_t count = static_cast<int64_t>(gradients.size());
  check(!layout.is_cuda() && layout.is_contiguous() && layout.scalar_type() == ScalarType::Long && layout.dim() == 2 &&
            layout.size(0) == count && layout.size(1) == kLayoutNumbers,
        op, "expected layout to be int64 on the CPU, contiguous, of shape [", count, ", ", kLayoutNumbers, "], got ",
        shape_of(layout));
  check(is_float_or_double(matrices) && matrices.dim() == 1 && matrices.is_contiguous(), op,
        "expected the matrices in one contiguous dimension of float32 or float64, got ", shape_of(matrices));
  const int64_t* numbers = static_cast<const int64_t*>(layout.const_data_ptr());
  std::vector<GradientPart> parts;
  for (int64_t i = 0; i < count; ++i, numbers += kLayoutNumbers) {
    const Tensor& gradient = gradients[i];
    GradientPart part;
    part.data = gradient.data_ptr();
    part.element_type = element_type(op, gradient, i);
    const auto size_of = [&](int64_t d) { return gradient.size(d); };
    const auto stride_of = [&](int64_t d) { return gradient.stride(d); };
    check(part.read_axes(gradient.dim(), size_of, stride_of), op, "expected gradient ", i, " to have at most ",
          kColumnAxes, " axes of strides that do not merge, behind the first; got shape ", shape_of(gradient));
    check(part.elements() <= kMaxPartElements, op, "expected gradient ", i, " to have at most ", kMaxPartElements,
          " elements, got ", shape_of(gradient));
    check(same_device(gradient, matrices), op, "expected gradient ", i, " on the device of the matrices");
    part.offset = numbers[0];
    part.row_length = numbers[1];
    part.layer = numbers[2];
    part.number = numbers[3];
    check(part.offset < 0 || (part.columns <= part.row_length && part.layer >= 0 && part.layer < layers &&
                              part.offset + (part.rows - 1) * part.row_length + part.columns <= matrices.numel()),
          op, "expected gradient ", i, " of shape ", shape_of(gradient), " to lie in ", matrices.numel(),
          " elements of ", layers, " layers; got offset ", part.offset, ", row length ", part.row_length, ", layer ",
          part.layer);
    check(part.offset < 0 || !is_expanded(gradient), op, "expected gradient ", i,
          " to have memory for each of its elements, got an expanded one of shape ", shape_of(gradient));
    parts.push_back(part);
  }
  return parts;
}

}  // namespace kfac2

#include "fold_products.h"

#include <optional>

#include "bind.h"

namespace kfac2 {
namespace {

using torch::stable::Tensor;

constexpr const char* kOp = "fold_products";

// Panel p: [rows, whole - p * rows] of one dtype, float32 or float64; the last one has as many rows as columns.
void check_panels(const std::vector<Tensor>& panels) {
  const int64_t count = static_cast<int64_t>(panels.size());
  check(count >= 1 && count <= kMaxPanels, kOp, "expected 1 to ", kMaxPanels, " panels, got ", count);
  check(is_float_or_double(panels[0]), kOp, "expected panels of dtype float32 or float64, got another dtype");
  for (int64_t p = 0; p < count; ++p) {
    const Tensor& panel = panels[p];
    const bool is_matrix = panel.dim() == 2 && panels[0].dim() == 2;
    const int64_t columns = is_matrix ? panels[0].size(1) - p * panels[0].size(0) : 0, rows = !is_matrix ? 0
                                                                                              : p + 1 < count
                                                                                                  ? panels[0].size(0)
                                                                                                  : columns;
    check(is_matrix && columns > 0 && panel.size(0) == rows && panel.size(1) == columns && rows <= panels[0].size(0),
          kOp,
          "expected panels of rows of a square matrix from the diagonal on, all but the last with as many rows as "
          "panel 0, panel ",
          p, " has shape ", shape_of(panel));
    check(panel.scalar_type() == panels[0].scalar_type(), kOp,
          "expected all panels to have the dtype of panel 0, panel ", p, " has another");
    check(same_device(panel, panels[0]), kOp, "expected panel ", p, " on the device of panel 0");
  }
}

// last: [whole], like the panels
void check_last(const Tensor& last, const Tensor& panel) {
  check(last.dim() == 1 && last.size(0) == panel.size(1) && last.scalar_type() == panel.scalar_type(), kOp,
        "expected last with ", panel.size(1), " numbers in the dtype of the panels, got ", shape_of(last),
        last.scalar_type() == panel.scalar_type() ? "" : " of another dtype");
  check(same_device(last, panel), kOp, "expected last on the device of the panels");
}

// previous: like the result
void check_previous(const Tensor& previous, const Tensor& result) {
  check(shape_vector(previous) == shape_vector(result) && previous.scalar_type() == result.scalar_type(), kOp,
        "expected previous with the shape and dtype of the result, ", shape_of(result), ", got ", shape_of(previous),
        previous.scalar_type() == result.scalar_type() ? "" : " of another dtype");
  check(same_device(previous, result), kOp, "expected previous on the device of the panels");
}

// [1, height, width]
Tensor fold_products(const std::vector<Tensor>& panels, const std::optional<Tensor>& last, double corner,
                     const std::optional<Tensor>& previous, double kept, double scale) {
  check_panels(panels);
  const int64_t whole = panels[0].size(1);
  if (last) check_last(*last, panels[0]);
  const Triangle triangle{whole + last.has_value()};
  const Tensor result = allocate(panels[0], {1, triangle.height(), triangle.width()}, panels[0].scalar_type());
  if (previous) check_previous(*previous, result);
  std::vector<Tensor> contiguous;  // keeps alive what the pointers point to
  const auto pointer_to = [&contiguous](const Tensor& tensor) {
    contiguous.push_back(as_contiguous(tensor));
    return contiguous.back().const_data_ptr();
  };
  std::vector<const void*> pointers;
  for (const Tensor& panel : panels) pointers.push_back(pointer_to(panel));
  const FoldProductsParams params{pointers.data(),
                                  static_cast<int64_t>(pointers.size()),
                                  panels[0].size(0),
                                  whole,
                                  last ? pointer_to(*last) : nullptr,
                                  corner,
                                  previous ? pointer_to(*previous) : nullptr,
                                  result.data_ptr(),
                                  kept,
                                  scale,
                                  is_double(panels[0])};
  KFAC2_RUN(fold_products, panels[0], params);
  return result;
}

}  // namespace

KFAC2_BIND(fold_products)

}  // namespace kfac2

#include "fold_products.h"

#include "bind.h"
#include "previous.h"

namespace kfac2 {
namespace {

using torch::stable::Tensor;

constexpr const char* kOp = "fold_products";

// One list of tensors holds the panels of all products: those of this one begin at `first`.
struct PanelsOf {
  const std::vector<Tensor>& all;
  size_t first;
  int64_t count;

  const Tensor& operator[](int64_t p) const { return all[first + static_cast<size_t>(p)]; }
};

// Panel p: [rows, whole - p * rows] of one dtype, float32 or float64; the last one has as many rows as columns.
void check_panels(const PanelsOf& panels, size_t product) {
  const Tensor& head = panels[0];
  check(is_float_or_double(head), kOp, "expected panels of dtype float32 or float64, those of product ", product,
        " have another dtype");
  for (int64_t p = 0; p < panels.count; ++p) {
    const Tensor& panel = panels[p];
    const bool is_matrix = panel.dim() == 2 && head.dim() == 2;
    const int64_t columns = is_matrix ? head.size(1) - p * head.size(0) : 0;
    const int64_t rows = is_matrix && p + 1 < panels.count ? head.size(0) : columns;
    check(is_matrix && columns > 0 && panel.size(0) == rows && panel.size(1) == columns && rows <= head.size(0), kOp,
          "expected panels of rows of a square matrix from the diagonal on, all but the last with as many rows as "
          "panel 0, panel ",
          p, " of product ", product, " has shape ", shape_of(panel));
    check(panel.scalar_type() == head.scalar_type(), kOp,
          "expected all panels of a product to have the dtype of panel 0, panel ", p, " of product ", product,
          " has another");
    check(same_device(panel, panels.all[0]), kOp, "expected panel ", p, " of product ", product,
          " on the device of the first panel");
  }
}

// last: [whole], like the panels; none where it has no elements
const void* pointer_to_last(const Tensor& last, size_t product, const Tensor& panel, std::vector<Tensor>& contiguous) {
  if (last.numel() == 0) return nullptr;
  check(last.dim() == 1 && last.size(0) == panel.size(1) && last.scalar_type() == panel.scalar_type(), kOp,
        "expected last ", product, " with ", panel.size(1), " numbers in the dtype of its panels, got ", shape_of(last),
        last.scalar_type() == panel.scalar_type() ? "" : " of another dtype");
  check(same_device(last, panel), kOp, "expected last ", product, " on the device of its panels");
  contiguous.push_back(as_contiguous(last));
  return contiguous.back().const_data_ptr();
}

PanelProduct product_of(const PanelsOf& panels, std::vector<Tensor>& contiguous) {
  PanelProduct product{};
  for (int64_t p = 0; p < panels.count; ++p) {
    contiguous.push_back(as_contiguous(panels[p]));
    product.panels[p] = contiguous.back().const_data_ptr();
  }
  product.whole = static_cast<uint32_t>(panels[0].size(1));
  product.rows = static_cast<uint32_t>(panels[0].size(0));
  product.is_double = is_double(panels[0]);
  return product;
}

template <typename Entry>
void check_length(const char* name, const std::vector<Entry>& list, size_t products) {
  check(list.empty() || list.size() == products, kOp, "expected as many ", name, " as counts, ", products,
        ", or none, got ", list.size());
}

// [1, height, width] for each product; counts: its panels; all other lists: of each product, or none at all
std::vector<Tensor> fold_products(const std::vector<Tensor>& panels, const std::vector<int64_t>& counts,
                                  const std::vector<Tensor>& last, const std::vector<double>& corners,
                                  const std::vector<Tensor>& previous, double kept, const std::vector<double>& scales) {
  check(!counts.empty(), kOp, "expected at least one product, got none");
  check_length("last", last, counts.size());
  check_length("corners", corners, counts.size());
  check_length("previous", previous, counts.size());
  check_length("scales", scales, counts.size());
  size_t first = 0;
  std::vector<Tensor> results, contiguous;  // the latter keeps alive what the pointers point to
  std::vector<PanelProduct> products;
  for (size_t i = 0; i < counts.size(); ++i) {
    check(counts[i] >= 1 && counts[i] <= kMaxPanels, kOp, "expected 1 to ", kMaxPanels, " panels in product ", i,
          ", got ", counts[i]);
    check(first + static_cast<size_t>(counts[i]) <= panels.size(), kOp, "expected as many panels as all counts, got ",
          panels.size());
    const PanelsOf own{panels, first, counts[i]};
    check_panels(own, i);
    PanelProduct product = product_of(own, contiguous);
    product.last = last.empty() ? nullptr : pointer_to_last(last[i], i, own[0], contiguous);
    product.corner = corners.empty() ? 0 : corners[i];
    product.scale = scales.empty() ? 1 : scales[i];
    const Triangle triangle{product.size()};
    results.push_back(allocate(own[0], {1, triangle.height(), triangle.width()}, own[0].scalar_type()));
    product.result = results.back().mutable_data_ptr();
    product.previous =
        previous.empty() ? nullptr : pointer_to_previous(kOp, previous[i], i, results.back(), contiguous);
    products.push_back(product);
    first += static_cast<size_t>(counts[i]);
  }
  check(first == panels.size(), kOp, "expected as many panels as all counts, ", first, ", got ", panels.size());
  const FoldProductsParams params{products.data(), static_cast<int64_t>(products.size()), kept};
  KFAC2_RUN(fold_products, panels[0], params);
  return results;
}

}  // namespace

KFAC2_BIND(fold_products)

}  // namespace kfac2

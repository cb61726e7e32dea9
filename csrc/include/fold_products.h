// fold_products: kept * previous + scale * X of each layer as a triangle, where the symmetric X is a library's product,
// cut into panels: rows of its upper triangle, from the diagonal on. A last row, of sums that were formed beside, may
// follow it.
#pragma once

#include "op.h"
#include "triangle.h"

namespace kfac2 {

constexpr int kMaxPanels = 8;

// One layer. Columns of `whole` matrices come before the last one of X, if it has one.
struct PanelProduct {
  const void* panels[kMaxPanels];  // panel p -> [rows of it, whole - p * rows]: from its first row and column on
  uint32_t whole, rows;            // of each panel but the last, which may have fewer; no matrix has 2^32
  const void* last;                // [whole], or null: there is no last row
  double corner;                   // the last number of the last row
  const void* previous;            // [triangle of the size], or null
  void* result;                    // [triangle of the size]
  double scale;
  bool is_double;

  KFAC2_HOST_DEVICE int64_t size() const { return int64_t{whole} + (last != nullptr); }

  // The element of X, row <= column.
  template <typename T>
  KFAC2_HOST_DEVICE T at(int64_t row, int64_t column) const {
    if (column == whole) return row == whole ? static_cast<T>(corner) : static_cast<const T*>(last)[row];
    const uint32_t panel = static_cast<uint32_t>(row) / rows, first = panel * rows;
    const int64_t own_row = static_cast<uint32_t>(row) - first;
    return static_cast<const T*>(panels[panel])[own_row * (whole - first) + (column - first)];
  }
};

struct FoldProductsParams {
  const PanelProduct* products;  // [count]
  int64_t count;
  double kept;
};

namespace cpu {
std::unique_ptr<Work> fold_products(const FoldProductsParams& params);
}
namespace cuda {
std::unique_ptr<Launch> fold_products(const FoldProductsParams& params);
}

}  // namespace kfac2

// fold_products: kept * previous + scale * X as a triangle, where the symmetric X is a library's product, cut into
// panels: rows of its upper triangle, from the diagonal on. A last row, of sums that were formed beside, may follow it.
#pragma once

#include "op.h"
#include "triangle.h"

namespace kfac2 {

constexpr int kMaxPanels = 8;

// The upper triangle of X: columns of `whole` matrices come before its last one, if it has one.
template <typename T>
struct Panels {
  const T* data[kMaxPanels];  // panel p -> [rows of it, whole - p * rows]: from its first row and column on
  uint32_t whole, rows;       // of each panel but the last, which may have fewer; no matrix has 2^32
  const T* last;              // [whole], or null: there is no last row
  T corner;                   // the last number of the last row

  KFAC2_HOST_DEVICE int64_t size() const { return int64_t{whole} + (last != nullptr); }

  // row <= column
  KFAC2_HOST_DEVICE T at(int64_t row, int64_t column) const {
    if (column == whole) return row == whole ? corner : last[row];
    const uint32_t panel = static_cast<uint32_t>(row) / rows, first = panel * rows;
    return data[panel][int64_t{static_cast<uint32_t>(row) - first} * (whole - first) + (column - first)];
  }
};

struct FoldProductsParams {
  const void* const* panels;  // [panel_count] -> see Panels
  int64_t panel_count, rows, whole;
  const void* last;  // [whole], or null
  double corner;
  const void* previous;  // [triangle of the size], or null
  void* result;          // [triangle of the size]
  double kept, scale;
  bool is_double;

  int64_t size() const { return whole + (last != nullptr); }

  template <typename T>
  Panels<T> matrix() const {
    Panels<T> matrix{};
    for (int64_t p = 0; p < panel_count; ++p) matrix.data[p] = static_cast<const T*>(panels[p]);
    matrix.whole = static_cast<uint32_t>(whole);
    matrix.rows = static_cast<uint32_t>(rows);
    matrix.last = static_cast<const T*>(last);
    matrix.corner = static_cast<T>(corner);
    return matrix;
  }
};

namespace cpu {
std::unique_ptr<Work> fold_products(const FoldProductsParams& params);
}
namespace cuda {
std::unique_ptr<Launch> fold_products(const FoldProductsParams& params);
}

}  // namespace kfac2

// Drawn symmetric matrices cut into panels, for the tests of fold_products.
#pragma once

#include <limits>

#include "drawn.h"
#include "fold_products.h"

namespace kfac2::tests {

template <typename T>
struct DrawnProducts {
  int64_t whole, rows;
  bool has_last, is_added;
  std::vector<T> matrix;               // [size, size], symmetric
  std::vector<std::vector<T>> panels;  // NaNs below the diagonal
  std::vector<const void*> pointers;
  std::vector<T> last, previous, result;

  DrawnProducts(Random& random, int64_t largest)
      : whole(draw(random, 1, largest)), has_last(draw(random, 0, 1) == 0), is_added(draw(random, 0, 1) == 0) {
    const int64_t d = size(), count = draw(random, 1, std::min<int64_t>(kMaxPanels, whole));
    rows = (whole + count - 1) / count;
    matrix = drawn_numbers<T>(random, d * d);
    for (int64_t i = 0; i < d; ++i)
      for (int64_t j = 0; j < i; ++j) matrix[i * d + j] = matrix[j * d + i];
    for (int64_t first = 0; first < whole; first += rows) {
      panels.emplace_back();
      for (int64_t i = first; i < std::min(first + rows, whole); ++i)
        for (int64_t j = first; j < whole; ++j)
          panels.back().push_back(j < i ? std::numeric_limits<T>::quiet_NaN() : matrix[i * d + j]);
      pointers.push_back(nullptr);
    }
    for (size_t p = 0; p < panels.size(); ++p) pointers[p] = panels[p].data();
    last.assign(matrix.end() - d, matrix.end() - 1);
    previous = drawn_numbers<T>(random, Triangle{d}.numbers());
    result.assign(previous.size(), T(-1));
  }

  int64_t size() const { return whole + has_last; }

  FoldProductsParams params() {
    return {pointers.data(),
            static_cast<int64_t>(pointers.size()),
            rows,
            whole,
            has_last ? last.data() : nullptr,
            static_cast<double>(matrix.back()),
            is_added ? previous.data() : nullptr,
            result.data(),
            0.7,
            0.3,
            sizeof(T) == sizeof(double)};
  }

  std::vector<double> expected() const {
    const Triangle triangle{size()};
    std::vector<double> triangles(triangle.numbers());
    for (int64_t i = 0; i < size(); ++i) {
      for (int64_t j = i; j < size(); ++j) {
        const int64_t at = triangle.index(i, j);
        triangles[at] = 0.3 * matrix[i * size() + j] + (is_added ? 0.7 * previous[at] : 0.0);
      }
    }
    return triangles;
  }
};

}  // namespace kfac2::tests

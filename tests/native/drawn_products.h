// Drawn symmetric matrices cut into panels, for the tests of fold_products.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "drawn.h"
#include "fold_products.h"

namespace kfac2::tests {

constexpr double kKept = 0.7;

template <typename T>
struct DrawnProduct {
  int64_t whole, rows;
  bool has_last, is_added;
  double scale;
  std::vector<T> matrix;               // [size, size], symmetric
  std::vector<std::vector<T>> panels;  // NaNs below the diagonal
  std::vector<T> last, previous, result;

  DrawnProduct(Random& random, int64_t largest)
      : whole(draw(random, 1, largest)),
        has_last(draw(random, 0, 1) == 0),
        is_added(draw(random, 0, 1) == 0),
        scale(0.1 * static_cast<double>(draw(random, 1, 9))) {
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
    }
    last.assign(matrix.end() - d, matrix.end() - 1);
    previous = drawn_numbers<T>(random, Triangle{d}.numbers());
    result.assign(previous.size(), T(-1));
  }

  int64_t size() const { return whole + has_last; }

  // With its result.
  PanelProduct product() {
    PanelProduct product{};
    for (size_t p = 0; p < panels.size(); ++p) product.panels[p] = panels[p].data();
    product.whole = static_cast<uint32_t>(whole);
    product.rows = static_cast<uint32_t>(rows);
    product.last = has_last ? last.data() : nullptr;
    product.corner = static_cast<double>(matrix.back());
    product.previous = is_added ? previous.data() : nullptr;
    product.result = result.data();
    product.scale = scale;
    product.is_double = sizeof(T) == sizeof(double);
    return product;
  }

  std::vector<double> expected() const {
    const Triangle triangle{size()};
    std::vector<double> triangles(triangle.numbers());
    for (int64_t i = 0; i < size(); ++i) {
      for (int64_t j = i; j < size(); ++j) {
        const int64_t at = triangle.index(i, j);
        triangles[at] = scale * matrix[i * size() + j] + (is_added ? kKept * previous[at] : 0.0);
      }
    }
    return triangles;
  }
};

// Products of both types, as one call sees them.
struct DrawnProducts {
  std::vector<DrawnProduct<float>> floats;
  std::vector<DrawnProduct<double>> doubles;

  DrawnProducts(Random& random, int64_t count, int64_t largest) {
    for (int64_t i = 0; i < count; ++i) {
      if (draw(random, 0, 2) > 0) {
        floats.emplace_back(random, largest);
      } else {
        doubles.emplace_back(random, largest);
      }
    }
  }

  // In turns, as long as there are both.
  std::vector<PanelProduct> products() {
    std::vector<PanelProduct> products;
    for (size_t i = 0; i < std::max(floats.size(), doubles.size()); ++i) {
      if (i < floats.size()) products.push_back(floats[i].product());
      if (i < doubles.size()) products.push_back(doubles[i].product());
    }
    return products;
  }

  void check() const {
    for (const auto& drawn : floats) check(drawn, 1e-6);
    for (const auto& drawn : doubles) check(drawn, 1e-15);
  }

 private:
  template <typename T>
  static void check(const DrawnProduct<T>& drawn, double tolerance) {
    const std::vector<double> expected = drawn.expected();
    expect_equal("fold_products", drawn.result.data(), expected.data(), expected.size(), tolerance);
  }
};

}  // namespace kfac2::tests

// Stacks of drawn symmetric matrices for the tests of eigendecompose, and what its results must satisfy.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "drawn.h"
#include "eigendecompose.h"

namespace kfac2::tests {

enum class Kind {
  kPositive,
  kIndefinite,
  kRankOne,
  kRepeated,  // two eigenvalues
  kDiagonal,
  kZero,
  kHuge,  // squares overflow
  kTiny,  // squares underflow
  kOneElement,
  kOneLarge,  // one diagonal element far above the others
  kLowerTriangle,
  kNaN,
  kInfinite,
  kCount
};

template <typename T>
std::vector<T> drawn_matrix(Random& random, Kind kind, int64_t d) {
  std::vector<T> m(d * d);
  const auto add_outer = [&](double scale) {
    const std::vector<double> row = drawn_numbers<double>(random, d);
    for (int64_t i = 0; i < d; ++i)
      for (int64_t j = 0; j < d; ++j) m[i * d + j] += static_cast<T>(scale * row[i] * row[j]);
  };
  const bool single = sizeof(T) == sizeof(float);
  const int64_t i = draw(random, 0, d - 1), j = draw(random, 0, d - 1);
  double scale = 1;
  if (kind == Kind::kIndefinite) scale = -1;
  if (kind == Kind::kHuge) scale = single ? 1e30 : 1e200;
  if (kind == Kind::kTiny) scale = single ? 1e-30 : 1e-200;
  switch (kind) {
    case Kind::kZero: return m;
    case Kind::kOneElement: m[i * d + j] = m[j * d + i] = 3; return m;
    case Kind::kRankOne:
    case Kind::kRepeated: add_outer(1); break;
    case Kind::kDiagonal: break;
    default:
      for (int64_t k = 0; k < d; ++k) add_outer(k % 2 == 0 ? 1 : scale);
  }
  if (kind == Kind::kDiagonal || kind == Kind::kRepeated)
    for (int64_t k = 0; k < d; ++k) m[k * d + k] += static_cast<T>(kind == Kind::kRepeated ? 2 : draw(random, -3, 3));
  if (kind == Kind::kOneLarge) m[i * d + i] = 1e6;
  if (kind == Kind::kLowerTriangle)
    for (int64_t k = 0; k < d; ++k)
      for (int64_t l = k + 1; l < d; ++l) m[k * d + l] = 100;
  if (kind == Kind::kNaN) m[i * d + j] = std::numeric_limits<T>::quiet_NaN();
  if (kind == Kind::kInfinite) m[i * d + j] = -std::numeric_limits<T>::infinity();
  return m;
}

// The stacks of one call, with results in memory of exactly their size.
template <typename T>
class DrawnStacks {
 public:
  void add(Random& random, Kind kind, int64_t size, int64_t count) {
    std::vector<T> numbers;
    for (int64_t k = 0; k < count; ++k) {
      const std::vector<T> matrix = drawn_matrix<T>(random, kind, size);
      numbers.insert(numbers.end(), matrix.begin(), matrix.end());
      const bool bad = kind == Kind::kNaN || kind == Kind::kInfinite;
      expected_status_.push_back(bad ? EigenStatus::kNotFinite : EigenStatus::kGood);
    }
    matrices_.push_back(numbers);
    values_.emplace_back(count * size, T(-1));
    vectors_.emplace_back(count * size * size, T(-1));
    stacks_.push_back({static_cast<int64_t>(status_.size()), matrices_.back().data(), values_.back().data(),
                       vectors_.back().data(), count, size});
    status_.resize(status_.size() + count, -1);
  }

  // Every kind, sizes up to a largest one, also empty stacks.
  static DrawnStacks drawn(Random& random, int64_t largest) {
    DrawnStacks stacks;
    for (int kind = 0; kind < static_cast<int>(Kind::kCount); ++kind)
      stacks.add(random, static_cast<Kind>(kind), draw(random, 1, largest), draw(random, 0, 2));
    return stacks;
  }

  EigendecomposeParams params(int max_sweeps = kMaxSweeps) {
    return {stacks_.data(),
            status_.data(),
            static_cast<int64_t>(stacks_.size()),
            static_cast<int64_t>(status_.size()),
            sizeof(T) == sizeof(double),
            max_sweeps};
  }

  const std::vector<int32_t>& status() const { return status_; }

  void expect_decomposed(const char* what) const {
    for (size_t s = 0; s < stacks_.size(); ++s) {
      const int64_t d = stacks_[s].size;
      for (int64_t k = 0; k < stacks_[s].count; ++k) {
        const int64_t item = stacks_[s].first_item + k;
        const EigenStatus expected = expected_status_[item];
        expect(what, "status", status_[item] == static_cast<int32_t>(expected));
        const std::vector<T> zero(d * d);
        const T* matrix = expected == EigenStatus::kGood ? matrices_[s].data() + k * d * d : zero.data();
        expect_matrix(what, matrix, values_[s].data() + k * d, vectors_[s].data() + k * d * d, d);
      }
    }
  }

 private:
  static void expect(const char* what, const char* property, bool holds) {
    if (!holds) fail("%s: %s is wrong", what, property);
  }

  // V is orthogonal, V^T M V = diag(r), and the values are r floored at 0, ascending. In double, scaled to
  // elements of at most 1.
  static void expect_matrix(const char* what, const T* matrix, const T* values, const T* vectors, int64_t d) {
    const double tolerance = 20 * std::numeric_limits<T>::epsilon();
    double largest = 0;
    for (int64_t i = 0; i < d; ++i)
      for (int64_t j = 0; j <= i; ++j) largest = std::max(largest, std::fabs(static_cast<double>(matrix[i * d + j])));
    const double scale = largest > 0 ? 1 / largest : 1;
    std::vector<double> m(d * d), product(d * d), outside(d * d), gram(d * d), identity(d * d), r(d), w(d);
    double norm = 0;
    for (int64_t i = 0; i < d * d; ++i) {
      m[i] = scale * static_cast<double>(matrix[std::max(i / d, i % d) * d + std::min(i / d, i % d)]);
      norm += m[i] * m[i];
    }
    multiply(m.data(), false, vectors, d, product.data());
    multiply(vectors, true, product.data(), d, outside.data());
    multiply(vectors, true, vectors, d, gram.data());
    double off = 0;
    for (int64_t i = 0; i < d; ++i) {
      identity[i * d + i] = 1;
      r[i] = std::max(0.0, outside[i * d + i]);
      w[i] = scale * static_cast<double>(values[i]);
      outside[i * d + i] = 0;
      expect(what, "the order of values", values[i] >= 0 && (i == 0 || values[i] >= values[i - 1]));
    }
    for (const double element : outside) off += element * element;
    expect_equal(what, gram.data(), identity.data(), d * d, tolerance);
    expect(what, "V^T M V outside its diagonal", off <= tolerance * tolerance * norm);
    double error = 0;
    for (int64_t i = 0; i < d; ++i) error += (w[i] - r[i]) * (w[i] - r[i]);
    expect(what, "the values", error <= tolerance * tolerance * norm);
  }

  template <typename A, typename B>
  static void multiply(const A* left, bool transposed, const B* right, int64_t d, double* product) {
    std::fill_n(product, d * d, 0.0);
    for (int64_t i = 0; i < d; ++i)
      for (int64_t k = 0; k < d; ++k) {
        const double factor = static_cast<double>(left[transposed ? k * d + i : i * d + k]);
        for (int64_t j = 0; j < d; ++j) product[i * d + j] += factor * static_cast<double>(right[k * d + j]);
      }
  }

  std::vector<std::vector<T>> matrices_, values_, vectors_;
  std::vector<MatrixStack> stacks_;
  std::vector<int32_t> status_;
  std::vector<EigenStatus> expected_status_;
};

}  // namespace kfac2::tests

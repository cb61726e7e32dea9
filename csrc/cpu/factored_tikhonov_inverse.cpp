// Floor: n^3 operations for an n x n inverse (half of a product, by symmetry), at the rate of outer_products.cpp.
//
// By sweeps of blocks of rows: with L L^T the block on the diagonal, and Z = L^-1 [rows of the block], the sweep
//   M_ij <- M_ij - Z_i^T Z_j,   M_kj <- Z_k^T Z_j,   M_kk <- -Z_k^T Z_k,   Z_k = L^-1,
// leaves -M^-1 when every block had its turn. For positive definite matrices that is as accurate as Cholesky
// (Higham, Accuracy and Stability of Numerical Algorithms, 14.4), provided Z is solved for: multiplied by an
// explicit L^-1, float32 breaks down from a condition of 1e6. Only upper triangles are read and kept.
#include "factored_tikhonov_inverse.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "integers.h"
#include "outer_products.h"
#include "simd.h"

namespace kfac2::cpu {
namespace {

constexpr int64_t kBlock = 64;         // rows of one sweep
constexpr int64_t kSolvedAtOnce = 16;  // rows of Z between two products

template <typename T>
KFAC2_INLINE void add_multiple_to(T* row, T factor, const T* other, int64_t count) {
#pragma omp simd
  for (int64_t c = 0; c < count; ++c) row[c] += factor * other[c];
}

// Upper U with U^T U = the block, in place, rows `step` apart; false where it is not positive definite.
template <typename T>
KFAC2_INLINE bool factorise_rows(T* block, int64_t size, int64_t step) {
  for (int64_t j = 0; j < size; ++j) {
    T* row = block + j * step;
    if (!(row[j] > 0) || !std::isfinite(row[j])) return false;
    const T scale = 1 / std::sqrt(row[j]);
#pragma omp simd
    for (int64_t c = j; c < size; ++c) row[c] *= scale;
    for (int64_t i = j + 1; i < size; ++i) add_multiple_to(block + i * step + i, -row[i], row + i, size - i);
  }
  return true;
}

// Solves U^T Z = Z for the first `size` rows of U and Z, in place.
template <typename T>
KFAC2_INLINE void solve_rows(const T* U, T* Z, int64_t size, int64_t columns, int64_t step) {
  for (int64_t r = 0; r < size; ++r) {
    T* row = Z + r * step;
    for (int64_t s = 0; s < r; ++s) add_multiple_to(row, -U[s * step + r], Z + s * step, columns);
    const T scale = 1 / U[r * step + r];
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) row[c] *= scale;
  }
}

KFAC2_CLONES bool factorise(float* block, int64_t size, int64_t step) { return factorise_rows(block, size, step); }
KFAC2_CLONES bool factorise(double* block, int64_t size, int64_t step) { return factorise_rows(block, size, step); }
KFAC2_CLONES void solve(const float* U, float* Z, int64_t size, int64_t columns, int64_t step) {
  solve_rows(U, Z, size, columns, step);
}
KFAC2_CLONES void solve(const double* U, double* Z, int64_t size, int64_t columns, int64_t step) {
  solve_rows(U, Z, size, columns, step);
}

// The inverse of one damped factor. Padded to whole vectors with the identity, which stays apart.
template <typename T>
class Sweeps {
 public:
  explicit Sweeps(int64_t size)
      : size_(size),
        padded_(ceil_div(size, kLanes) * kLanes),
        matrix_(padded_ * padded_),
        Z_(kBlock * padded_),
        minus_Z_(kBlock * padded_) {}

  // Returns whether the damped factor is positive definite and its inverse finite.
  bool invert(const T* factor, T shift, T* inverse) {
    for (int64_t i = 0; i < size_; ++i) {
      std::copy(factor + i * size_ + i, factor + (i + 1) * size_, matrix_.data() + i * padded_ + i);
      matrix_[i * padded_ + i] += shift;
    }
    for (int64_t i = size_; i < padded_; ++i) matrix_[i * padded_ + i] = 1;
    for (int64_t begin = 0; begin < padded_; begin += kBlock) {
      if (!sweep({begin, std::min(begin + kBlock, padded_)})) return false;
    }
    return write(inverse);
  }

 private:
  static constexpr int64_t kLanes = kVectorBytes / sizeof(T);
  static_assert(kLanes % kRowMultiple == 0 && kBlock % kLanes == 0 && kSolvedAtOnce % kLanes == 0, "whole vectors");

  bool sweep(Range k) {
    take_rows(k);
    if (!factorise(minus_Z_.data(), k.size(), padded_)) return false;
    solve_for_Z(k.size());
    for (int64_t r = 0; r < k.size(); ++r)
      for (int64_t c = 0; c < padded_; ++c) minus_Z_[r * padded_ + c] = -Z_[r * padded_ + c];
    OuterProducts<T> run = product(minus_Z_.data(), Z_.data(), k.size());
    run.sums = matrix_.data();
    run.rows = run.columns = padded_;
    run.upper_only = true;
    add_outer_products(run);
    for (int64_t c = 0; c < k.begin; ++c)
      for (int64_t r = k.begin; r < k.end; ++r) matrix_[c * padded_ + r] = -matrix_[c * padded_ + r];
    for (int64_t r = k.begin; r < k.end; ++r)
      for (int64_t c = k.end; c < padded_; ++c) matrix_[r * padded_ + c] = -matrix_[r * padded_ + c];
    return true;
  }

  // Moves the rows of a block out of the matrix: to Z, the identity in place of the block, which goes to minus_Z.
  void take_rows(Range k) {
    for (int64_t c = 0; c < k.begin; ++c) {
      T* column = matrix_.data() + c * padded_ + k.begin;
      for (int64_t r = 0; r < k.size(); ++r) Z_[r * padded_ + c] = column[r];
      std::fill_n(column, k.size(), T(0));
    }
    for (int64_t r = 0; r < k.size(); ++r) {
      T *row = matrix_.data() + (k.begin + r) * padded_, *Z = Z_.data() + r * padded_;
      std::copy(row + k.begin + r, row + k.end, minus_Z_.data() + r * padded_ + r);
      std::fill(Z + k.begin, Z + k.end, T(0));
      Z[k.begin + r] = 1;
      std::copy(row + k.end, row + padded_, Z + k.end);
      std::fill(row + k.begin + r, row + padded_, T(0));
    }
  }

  // U^T Z = Z, with U in minus_Z: products for the rows solved before, few at a time for the rest.
  void solve_for_Z(int64_t rows) {
    T* U = minus_Z_.data();
    for (int64_t first = 0; first < rows; first += kSolvedAtOnce) {
      const int64_t count = std::min(kSolvedAtOnce, rows - first);
      T* Z = Z_.data() + first * padded_;
      if (first > 0) {
        OuterProducts<T> run = product(U + first, Z_.data(), first);
        run.sums = Z;
        run.rows = count;
        run.columns = padded_;
        add_outer_products(run);
      }
      solve(U + first * padded_ + first, Z, count, padded_, padded_);
      for (int64_t s = first; s < first + count; ++s)  // from here on a factor of a product that is taken off
        for (int64_t c = first + count; c < rows; ++c) U[s * padded_ + c] = -U[s * padded_ + c];
    }
  }

  OuterProducts<T> product(const T* left, const T* right, int64_t positions) const {
    OuterProducts<T> run{};
    run.left = left;
    run.right = right;
    run.sums_step = padded_;
    std::fill_n(run.count, 3, 1);
    run.count[3] = positions;
    run.step[3] = padded_;
    return run;
  }

  bool write(T* inverse) const {
    bool finite = true;
    for (int64_t i = 0; i < size_; ++i) {
      for (int64_t j = i; j < size_; ++j) {
        const T value = -matrix_[i * padded_ + j];
        finite &= std::isfinite(value);
        inverse[i * size_ + j] = inverse[j * size_ + i] = value;
      }
    }
    return finite;
  }

  int64_t size_, padded_;
  std::vector<T> matrix_, Z_, minus_Z_;
};

template <typename T>
double mean_diagonal(const void* factor, int64_t size) {
  double sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += static_cast<const T*>(factor)[i * size + i];
  return sum / static_cast<double>(size);
}

template <typename T>
bool invert(const FactorPair& pair, bool is_A, double damping) {
  const Shifts shifts =
      tikhonov_shifts(mean_diagonal<T>(pair.A, pair.d_in), mean_diagonal<T>(pair.G, pair.d_out), damping);
  Sweeps<T> sweeps(is_A ? pair.d_in : pair.d_out);
  if (is_A) return sweeps.invert(static_cast<const T*>(pair.A), static_cast<T>(shifts.A), static_cast<T*>(pair.A_inv));
  return sweeps.invert(static_cast<const T*>(pair.G), static_cast<T>(shifts.G), static_cast<T*>(pair.G_inv));
}

// One task for each factor, the largest first.
class FactoredTikhonovInverse : public Work {
 public:
  explicit FactoredTikhonovInverse(const FactoredTikhonovInverseParams& params)
      : params_(params), order_(2 * params.count), failed_(2 * params.count) {
    std::iota(order_.begin(), order_.end(), 0);
    const auto size = [&](int64_t factor) {
      const FactorPair& pair = params.pairs[factor / 2];
      return factor % 2 == 0 ? pair.d_in : pair.d_out;
    };
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return size(a) > size(b); });
  }

  int64_t tasks() const override { return 2 * params_.count; }

  void run_task(int64_t task) override {
    const int64_t factor = order_[task];
    const auto invert_as = params_.is_double ? invert<double> : invert<float>;
    failed_[factor] = !invert_as(params_.pairs[factor / 2], factor % 2 == 0, params_.damping);
  }

  int64_t merges() const override { return 1; }

  void run_merge(int64_t) override {
    for (int64_t pair = 0; pair < params_.count; ++pair)
      params_.status[pair] = failed_[2 * pair] != 0 || failed_[2 * pair + 1] != 0;
  }

 private:
  FactoredTikhonovInverseParams params_;
  std::vector<int64_t> order_;   // factors: 2 * pair for A, 2 * pair + 1 for G
  std::vector<int32_t> failed_;  // by factor
};

}  // namespace

std::unique_ptr<Work> factored_tikhonov_inverse(const FactoredTikhonovInverseParams& params) {
  return std::make_unique<FactoredTikhonovInverse>(params);
}

}  // namespace kfac2::cpu

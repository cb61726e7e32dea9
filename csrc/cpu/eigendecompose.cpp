// Floor: a sweep of a d x d matrix is d^2/2 rotations of 6d multiply-adds on rows of the matrix and of V, and copies
// rows to columns; 6 to 10 sweeps. Far more arithmetic than LAPACK's tridiagonal methods, and none of their overhead
// for each matrix: worth it while a matrix stays in the first-level cache.
#include "eigendecompose.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "simd.h"

namespace kfac2::cpu {
namespace {

template <typename T>
KFAC2_INLINE void rotate(T* x, T* y, int64_t count, Rotation<T> rotation) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) rotation.apply(x[i], y[i]);
}

template <typename T>
KFAC2_INLINE bool is_diagonal(const T* a, int64_t d) {
  for (int64_t i = 1; i < d; ++i)
    for (int64_t j = 0; j < i; ++j)
      if (!is_negligible(a[i * d + j])) return false;
  return true;
}

// Rotates rows and columns p and q of `a`; the eigenvectors of the outcome so far are the rows of v.
template <typename T>
KFAC2_INLINE void rotate_pair(T* a, T* v, int64_t d, int64_t p, int64_t q) {
  T *row_p = a + p * d, *row_q = a + q * d;
  const T a_pp = row_p[p], a_qq = row_q[q], a_pq = row_q[p];
  if (is_negligible(a_pq)) return;
  const Rotation<T> rotation = rotation_of(a_pp, a_qq, a_pq);
  rotate(row_p, row_q, d, rotation);
  rotate(v + p * d, v + q * d, d, rotation);
  row_p[p] = a_pp - rotation.tangent * a_pq;
  row_q[q] = a_qq + rotation.tangent * a_pq;
  row_p[q] = row_q[p] = 0;
  for (int64_t i = 0; i < d; ++i) {  // columns p and q are rows p and q, turned
    a[i * d + p] = row_p[i];
    a[i * d + q] = row_q[i];
  }
}

// Makes `a` diagonal; false if so many sweeps do not.
template <typename T>
KFAC2_INLINE bool diagonalise(T* a, T* v, int64_t d, int max_sweeps) {
  for (int sweep = 0; !is_diagonal(a, d); ++sweep) {
    if (sweep == max_sweeps) return false;
    for (int64_t p = 0; p + 1 < d; ++p)
      for (int64_t q = p + 1; q < d; ++q) rotate_pair(a, v, d, p, q);
  }
  return true;
}

#define KFAC2_DIAGONALISE(T)                                                \
  KFAC2_CLONES bool diagonalise_as(T* a, T* v, int64_t d, int max_sweeps) { \
    return diagonalise<T>(a, v, d, max_sweeps);                             \
  }
KFAC2_DIAGONALISE(float)
KFAC2_DIAGONALISE(double)
#undef KFAC2_DIAGONALISE

// Reads the lower triangle, scaled; returns the exponent, or what makes the matrix 0 where it is not finite.
template <typename T>
EigenStatus load(const T* matrix, int64_t d, T* a, int* exponent) {
  T largest = 0;
  for (int64_t i = 0; i < d * d; ++i) largest = std::max(largest, magnitude(matrix[i]));
  const bool finite = largest <= std::numeric_limits<T>::max();
  *exponent = exponent_of(largest);
  for (int64_t i = 0; i < d; ++i)
    for (int64_t j = 0; j <= i; ++j)
      a[i * d + j] = a[j * d + i] = finite ? std::ldexp(matrix[i * d + j], -*exponent) : T(0);
  return finite ? EigenStatus::kGood : EigenStatus::kNotFinite;
}

template <typename T>
void write_ascending(const T* a, const T* v, int64_t d, int exponent, T* values, T* vectors) {
  std::vector<int64_t> order(d);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return a[i * d + i] < a[j * d + j]; });
  for (int64_t j = 0; j < d; ++j) {
    values[j] = unscaled(a[order[j] * d + order[j]], exponent);
    for (int64_t i = 0; i < d; ++i) vectors[i * d + j] = v[order[j] * d + i];
  }
}

template <typename T>
EigenStatus decompose(const T* matrix, int64_t d, int max_sweeps, T* values, T* vectors) {
  std::vector<T> a(d * d), v(d * d);
  int exponent = 0;
  EigenStatus status = load(matrix, d, a.data(), &exponent);
  for (int64_t i = 0; i < d; ++i) v[i * d + i] = 1;
  if (!diagonalise_as(a.data(), v.data(), d, max_sweeps)) status = EigenStatus::kNotConverged;
  write_ascending(a.data(), v.data(), d, exponent, values, vectors);
  return status;
}

template <typename T>
EigenStatus decompose_item(const MatrixStack& stack, int64_t item, int max_sweeps) {
  const int64_t d = stack.size, offset = (item - stack.first_item) * d;
  return decompose(static_cast<const T*>(stack.matrices) + offset * d, d, max_sweeps,
                   static_cast<T*>(stack.values) + offset, static_cast<T*>(stack.vectors) + offset * d);
}

}  // namespace

void eigendecompose(const EigendecomposeParams& params, int64_t begin, int64_t end) {
  const auto starts_after = [](int64_t item, const MatrixStack& stack) { return item < stack.first_item; };
  for (int64_t item = begin; item < end; ++item) {
    // The last stack that does not start after the item: an empty one starts where the next does.
    const MatrixStack& stack =
        *(std::upper_bound(params.stacks, params.stacks + params.stack_count, item, starts_after) - 1);
    const EigenStatus status = params.is_double ? decompose_item<double>(stack, item, params.max_sweeps)
                                                : decompose_item<float>(stack, item, params.max_sweeps);
    params.status[item] = static_cast<int32_t>(status);
  }
}

}  // namespace kfac2::cpu

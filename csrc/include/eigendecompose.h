// eigendecompose: every matrix M of many stacks of symmetric matrices as V diag(w) V^T, w ascending and floored at 0,
// by Jacobi's method (Golub & Van Loan, "Matrix Computations", 8.5): plane rotations, each making one pair of
// off-diagonal elements zero, until all are negligible. What both devices share of it is here.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "cuda_launchers.h"
#include "host_device.h"

namespace kfac2 {

struct MatrixStack {
  int64_t first_item;    // the number of its first matrix: those of all stacks are counted on
  const void* matrices;  // [count, size, size], contiguous; of each matrix the lower triangle is read
  void* values;          // [count, size]
  void* vectors;         // [count, size, size], in columns
  int64_t count;
  int64_t size;  // at least 1
};

enum class EigenStatus : int32_t {
  kGood = 0,
  kNotFinite = 1,  // 0 was decomposed instead: values 0, vectors the identity
  kNotConverged = 2,
};

// Convergence is quadratic at the end: 6 to 10 sweeps are usual.
constexpr int kMaxSweeps = 30;

struct EigendecomposeParams {
  const MatrixStack* stacks;  // [stack_count]
  int32_t* status;            // [matrices], an EigenStatus for each
  int64_t stack_count;
  int64_t matrices;  // in all stacks
  bool is_double;
  int max_sweeps = kMaxSweeps;  // at most kMaxSweeps
};

// |x|, or infinity for a NaN: the largest of many numbers is finite only if all are.
template <typename T>
KFAC2_HOST_DEVICE T magnitude(T x) {
  const T size = std::fabs(x);
  return size <= std::numeric_limits<T>::max() ? size : std::numeric_limits<T>::infinity();
}

// Matrices are decomposed scaled by a power of two, which is exact, to a largest element in [1/2, 1): no square
// overflows or underflows, and an element is negligible if it is at most the machine epsilon.
template <typename T>
KFAC2_HOST_DEVICE int exponent_of(T largest) {
  int exponent = 0;
  if (largest <= std::numeric_limits<T>::max()) std::frexp(largest, &exponent);
  return exponent;
}

// A NaN, which a sound matrix never gets, is negligible: no rotation is made from one, and the emulator's poison
// cannot pass for an element.
template <typename T>
KFAC2_HOST_DEVICE bool is_negligible(T scaled) {
  return !(std::fabs(scaled) > std::numeric_limits<T>::epsilon());
}

// Turns x_p and x_q into cosine x_p - sine x_q and sine x_p + cosine x_q, for rows p and q and for columns p and q.
// The cosine is 1 - sine * half_tangent and never rounded to a number of its own: its rounding errors, one for each
// rotation, would add up in V (Rutishauser, "The Jacobi method for real symmetric matrices", 1966).
template <typename T>
struct Rotation {
  T tangent, sine;
  T half_tangent;  // of half the angle: sine / (1 + cosine)

  KFAC2_HOST_DEVICE void apply(T& x_p, T& x_q) const {
    const T old = x_p;
    x_p -= sine * (x_q + half_tangent * old);
    x_q += sine * (old - half_tangent * x_q);
  }
};

// The rotation by at most 45 degrees that makes a_pq zero; a_pp then falls by tangent * a_pq and a_qq grows by it.
// a_pq is not negligible, so that theta is at most size / epsilon and its square does not overflow.
template <typename T>
KFAC2_HOST_DEVICE Rotation<T> rotation_of(T a_pp, T a_qq, T a_pq) {
  const T theta = (a_qq - a_pp) / (2 * a_pq);
  const T positive = 1 / (std::fabs(theta) + std::sqrt(1 + theta * theta));
  const T tangent = theta < 0 ? -positive : positive;
  const T cosine = 1 / std::sqrt(1 + tangent * tangent);
  return {tangent, tangent * cosine, tangent * cosine / (1 + cosine)};
}

// What a scaled eigenvalue is returned as.
template <typename T>
KFAC2_HOST_DEVICE T unscaled(T value, int exponent) {
  return value > 0 ? std::ldexp(value, exponent) : T(0);
}

namespace cpu {

// Matrices [begin, end) of all stacks; each writes its own part of the results.
void eigendecompose(const EigendecomposeParams& params, int64_t begin, int64_t end);

}  // namespace cpu

namespace cuda {

constexpr int64_t kMaxMatrixSize = 256;

// Shared memory that a block may take: a device of any architecture from sm_80 on grants it.
constexpr int64_t kSharedLimit = 96 * 1024;

// Matrices that do not fit into the limit lie in the workspace. It is a parameter for the tests alone.
int64_t eigendecompose_workspace(const EigendecomposeParams& params, int64_t shared_limit = kSharedLimit);
int eigendecompose(const EigendecomposeParams& params, void* workspace, Stream stream,
                   int64_t shared_limit = kSharedLimit);

}  // namespace cuda
}  // namespace kfac2

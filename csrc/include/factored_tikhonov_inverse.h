// factored_tikhonov_inverse: (A + pi sqrt(lambda) I)^-1 and (G + sqrt(lambda)/pi I)^-1 for many pairs of factors,
// pi = sqrt((tr A / d_in) / (tr G / d_out)), 1 where a trace is not positive (eq. 9).
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"
#include "op.h"

namespace kfac2 {

struct FactorPair {
  const void* A;  // [d_in, d_in], contiguous, symmetric
  const void* G;  // [d_out, d_out], contiguous, symmetric
  void* A_inv;    // [d_in, d_in]
  void* G_inv;    // [d_out, d_out]
  int64_t d_in, d_out;
};

struct FactoredTikhonovInverseParams {
  const FactorPair* pairs;  // [count]
  int32_t* status;          // [count]: 0; 1 where a damped factor is not positive definite, or not finite
  int64_t count;
  double damping;  // lambda
  bool is_double;
};

// The numbers that damping adds to the diagonals of both factors.
struct Shifts {
  double A, G;
};

KFAC2_HOST_DEVICE inline Shifts tikhonov_shifts(double A_mean_diagonal, double G_mean_diagonal, double damping) {
  const bool positive = A_mean_diagonal > 0 && G_mean_diagonal > 0;
  const double pi = positive ? std::sqrt(A_mean_diagonal / G_mean_diagonal) : 1.0;
  return {std::sqrt(damping) * pi, std::sqrt(damping) / pi};
}

namespace cpu {
std::unique_ptr<Work> factored_tikhonov_inverse(const FactoredTikhonovInverseParams& params);
}
namespace cuda {
std::unique_ptr<Launch> factored_tikhonov_inverse(const FactoredTikhonovInverseParams& params);
}

}  // namespace kfac2

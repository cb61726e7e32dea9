// coarse_fisher: finishes the sums of pairs. Both kinds of raw sums are scaled and averaged (Algorithm 1),
//   X_qr = kept * previous_qr + (1 - kept) * scale_q * scale_r * raw_qr,
// and [F_coarse]_ij = sum over blocks q of layer i and r of layer j of X^A_qr * X^G_qr (eq. 7).
#pragma once

#include <cstdint>

#include "op.h"

namespace kfac2 {

// The sums of one kind: of A, or of G.
struct PairSums {
  const void* raw;       // [blocks, blocks], contiguous
  const double* scales;  // [blocks], on the host; null: all 1
  const void* previous;  // [blocks, blocks], contiguous; null: X is the scaled raw sums, whatever `kept` is
  void* averages;        // [blocks, blocks]: X
};

struct CoarseFisherParams {
  PairSums inputs, grads;
  double kept;
  const int64_t* layer_of_block;  // [blocks], each in [0, layers); on the host
  void* fisher;                   // [layers, layers], of the products of X as it is written
  int64_t blocks;                 // B
  int64_t layers;                 // L
  bool is_double;
};

// The factors of what was and of what is new.
struct AverageFactors {
  double kept, taken;
};

inline AverageFactors average_factors(const PairSums& sums, double kept) {
  return sums.previous == nullptr ? AverageFactors{0, 1} : AverageFactors{kept, 1 - kept};
}

namespace cpu {
std::unique_ptr<Work> coarse_fisher(const CoarseFisherParams& params);
}
namespace cuda {
std::unique_ptr<Launch> coarse_fisher(const CoarseFisherParams& params);
}

}  // namespace kfac2

// coarse_fisher: [F_coarse]_ij = sum over blocks q of layer i and r of layer j of A_qr * G_qr (eq. 7).
#pragma once

#include <cstdint>

#include "cuda_launchers.h"

namespace kfac2 {

struct CoarseFisherParams {
  const void* input_sums;         // [blocks, blocks], contiguous
  const void* grad_sums;          // [blocks, blocks], contiguous
  const int64_t* layer_of_block;  // [blocks], each in [0, layers)
  void* fisher;                   // [layers, layers]
  int64_t blocks;                 // B
  int64_t layers;                 // L
  bool is_double;
};

namespace cpu {

void coarse_fisher(const CoarseFisherParams& params);

}  // namespace cpu

namespace cuda {

int64_t coarse_fisher_workspace(const CoarseFisherParams& params);
int coarse_fisher(const CoarseFisherParams& params, void* workspace, Stream stream);

}  // namespace cuda
}  // namespace kfac2

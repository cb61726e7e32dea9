// Floor: 2 B^2 numbers read, L^2 written; B and L are hundreds, so the launch itself is the cost.
#include <vector>

#include "coarse_fisher.h"
#include "device.h"
#include "tables.h"

namespace kfac2::cuda {
namespace {

constexpr int kThreads = 256;

// blocks sorted by layer: those of layer i are order[first[i]] to order[first[i + 1] - 1]
struct Blocks {
  std::vector<int64_t> first, order;
};

Blocks sorted_blocks(const CoarseFisherParams& params) {
  Blocks blocks{std::vector<int64_t>(params.layers + 1), std::vector<int64_t>(params.blocks)};
  for (int64_t q = 0; q < params.blocks; ++q) ++blocks.first[params.layer_of_block[q] + 1];
  for (int64_t i = 0; i < params.layers; ++i) blocks.first[i + 1] += blocks.first[i];
  std::vector<int64_t> next = blocks.first;
  for (int64_t q = 0; q < params.blocks; ++q) blocks.order[next[params.layer_of_block[q]]++] = q;
  return blocks;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    coarse_fisher_kernel(const T* input_sums, const T* grad_sums, const int64_t* first, const int64_t* order, T* fisher,
                         int64_t blocks, int64_t layers) {
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (entry >= layers * layers) return;
  const int64_t i = entry / layers, j = entry % layers;
  T sum = 0;
  for (int64_t a = first[i]; a < first[i + 1]; ++a) {
    for (int64_t b = first[j]; b < first[j + 1]; ++b) {
      const int64_t pair = order[a] * blocks + order[b];
      sum += input_sums[pair] * grad_sums[pair];
    }
  }
  fisher[entry] = sum;
}

template <typename T>
cudaError_t launch_coarse_fisher(const CoarseFisherParams& params, const int64_t* first, const int64_t* order,
                                 cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(params.layers * params.layers, kThreads)));
  return launch(coarse_fisher_kernel<T>, grid, dim3(kThreads), 0, stream, static_cast<const T*>(params.input_sums),
                static_cast<const T*>(params.grad_sums), first, order, static_cast<T*>(params.fisher), params.blocks,
                params.layers);
}

}  // namespace

int64_t coarse_fisher_workspace(const CoarseFisherParams& params) {
  return ((params.layers + 2) / 2 + (params.blocks + 1) / 2) * 16;
}

int coarse_fisher(const CoarseFisherParams& params, void* workspace, Stream stream) {
  const Blocks blocks = sorted_blocks(params);
  Tables tables;
  const int64_t first = tables.add(blocks.first), order = tables.add(blocks.order);
  const cudaError_t copied = tables.copy_to(workspace, stream);
  if (copied != cudaSuccess) return copied;
  const auto launcher = params.is_double ? launch_coarse_fisher<double> : launch_coarse_fisher<float>;
  return launcher(params, table_at<int64_t>(workspace, first), table_at<int64_t>(workspace, order), stream);
}

}  // namespace kfac2::cuda

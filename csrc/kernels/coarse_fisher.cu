// A warp for each entry of the coarse Fisher, which averages the pairs of blocks that the entry adds up: each pair
// belongs to one entry.
//
// Floor: 4 B^2 numbers read, 2 B^2 + L^2 written; B and L are hundreds, so the launch itself is the cost.
#include <vector>

#include "coarse_fisher.h"
#include "device.h"
#include "tables.h"

namespace kfac2::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

template <typename T>
struct Kind {
  const T *raw, *previous;
  const double* scales;
  T* averages;
  AverageFactors factors;

  // Averages the pair (q, r).
  __device__ double average(int q, int r, int64_t pair) const {
    double value = factors.taken * (scales[q] * scales[r]) * static_cast<double>(raw[pair]);
    if (previous != nullptr) value += factors.kept * static_cast<double>(previous[pair]);
    averages[pair] = static_cast<T>(value);
    return static_cast<double>(averages[pair]);
  }
};

// The blocks of layer i are order[first[i]] to order[first[i + 1] - 1]. An entry and its mirror image add their
// products in the same order, so that F is as symmetric as the sums are.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    coarse_fisher_kernel(const Kind<T> inputs, const Kind<T> grads, const int* first, const int* order, T* fisher,
                         int blocks, int layers) {
  const unsigned warp = blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp, i = warp / layers, j = warp % layers;
  if (i >= static_cast<unsigned>(layers)) return;  // the same for all lanes of a warp
  const unsigned low = i < j ? i : j, high = i < j ? j : i;
  const int* rows = order + first[low];
  const int* columns = order + first[high];
  const unsigned width = first[high + 1] - first[high], pairs = (first[low + 1] - first[low]) * width;
  double sum = 0;
  for (unsigned at = threadIdx.x % kWarp; at < pairs; at += kWarp) {
    const int a = rows[at / width], b = columns[at % width], q = i < j ? a : b, r = i < j ? b : a;
    const int64_t pair = static_cast<int64_t>(q) * blocks + r;
    sum += inputs.average(q, r, pair) * grads.average(q, r, pair);
  }
  for (int distance = kWarp / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  if (threadIdx.x % kWarp == 0) fisher[static_cast<int64_t>(i) * layers + j] = static_cast<T>(sum);
}

class CoarseFisher : public TableLaunch {
 public:
  explicit CoarseFisher(const CoarseFisherParams& params) : params_(params) {
    std::vector<int> first(params.layers + 1), order(params.blocks);
    for (int64_t q = 0; q < params.blocks; ++q) ++first[params.layer_of_block[q] + 1];
    for (int64_t i = 0; i < params.layers; ++i) first[i + 1] += first[i];
    std::vector<int> next = first;
    for (int q = 0; q < params.blocks; ++q) order[next[params.layer_of_block[q]]++] = q;
    first_ = add(first);
    order_ = add(order);
    input_scales_ = add(scales_of(params.inputs));
    grad_scales_ = add(scales_of(params.grads));
  }

 private:
  std::vector<double> scales_of(const PairSums& sums) const {
    if (sums.scales == nullptr) return std::vector<double>(params_.blocks, 1.0);
    return std::vector<double>(sums.scales, sums.scales + params_.blocks);
  }

  cudaError_t start(unsigned char* workspace, cudaStream_t stream) const override {
    return params_.is_double ? start_as<double>(workspace, stream) : start_as<float>(workspace, stream);
  }

  template <typename T>
  cudaError_t start_as(unsigned char* workspace, cudaStream_t stream) const {
    const auto kind = [&](const PairSums& sums, TableAt<double> scales) {
      return Kind<T>{static_cast<const T*>(sums.raw), static_cast<const T*>(sums.previous), at(workspace, scales),
                     static_cast<T*>(sums.averages), average_factors(sums, params_.kept)};
    };
    const dim3 grid(static_cast<unsigned>(ceil_div(params_.layers * params_.layers, kThreads / kWarp)));
    return launch(coarse_fisher_kernel<T>, grid, dim3(kThreads), 0, stream, kind(params_.inputs, input_scales_),
                  kind(params_.grads, grad_scales_), at(workspace, first_), at(workspace, order_),
                  static_cast<T*>(params_.fisher), static_cast<int>(params_.blocks), static_cast<int>(params_.layers));
  }

  CoarseFisherParams params_;
  TableAt<int> first_, order_;
  TableAt<double> input_scales_, grad_scales_;
};

}  // namespace

std::unique_ptr<Launch> coarse_fisher(const CoarseFisherParams& params) {
  return std::make_unique<CoarseFisher>(params);
}

}  // namespace kfac2::cuda

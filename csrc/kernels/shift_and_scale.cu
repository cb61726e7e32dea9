// Floor: gradients and directions read once; then L^2 numbers by one thread block.
#include <cmath>

#include "device.h"
#include "shift_and_scale.h"
#include "tables.h"

namespace kfac2::cuda {
namespace {

constexpr int kThreads = 256;            // of products_kernel
constexpr int64_t kItemElements = 8192;  // of a layer, to one thread block
constexpr int kFinishThreads = 512;

// A layer, as the host knows it.
struct LayerEntry {
  int64_t begin, end;
  double rate, in_coarse;
  int64_t first_item;
};

struct Products {
  double sum, dot;  // of y_i and of v_i . grad_i
};

__device__ Products sum_of_warp(Products value) {
  for (int delta = 16; delta > 0; delta /= 2) {
    value.sum += __shfl_xor_sync(0xffffffffu, value.sum, delta);
    value.dot += __shfl_xor_sync(0xffffffffu, value.dot, delta);
  }
  return value;
}

// Both products over one item of a layer.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    products_kernel(const LayerEntry* layers, int count, const T* gradients, const T* directions, Products* partial) {
  KFAC2_SHARED(Products, shared);
  const LayerEntry& layer = layers[entry_of(layers, count, blockIdx.x)];
  const int64_t begin = layer.begin + (blockIdx.x - layer.first_item) * kItemElements;
  const int64_t end = begin + kItemElements < layer.end ? begin + kItemElements : layer.end;
  T sum = 0, dot = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    sum += gradients[i];
    dot += gradients[i] * directions[i];
  }
  const Products mine = sum_of_warp({static_cast<double>(sum), static_cast<double>(dot)});
  Products* of_warps = &shared;
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x != 0) return;  // no barrier follows
  Products total = {0, 0};
  for (int warp = 0; warp < kThreads / 32; ++warp) {
    total.sum += of_warps[warp].sum;
    total.dot += of_warps[warp].dot;
  }
  partial[blockIdx.x] = total;
}

// The parameters of finish_kernel.
struct Finish {
  const LayerEntry* layers;
  const Products* partial;
  const double *device_rates, *usable, *coarse_inverse;
  const int32_t* first_bad;
  int64_t none_bad, items;
  double coarse_weight, kl_clip;
  int count;
  bool is_double;
  double *shifts, *scale;
  float* found;
  int64_t* skipped;
};

__device__ bool is_finite(double value, bool is_double) {
  return is_double ? static_cast<bool>(std::isfinite(value))
                   : static_cast<bool>(std::isfinite(static_cast<float>(value)));
}

// Sums of a layer's items, by one warp.
__device__ Products sum_of_items(const Finish& finish, int i, int lane) {
  const int64_t end = i + 1 < finish.count ? finish.layers[i + 1].first_item : finish.items;
  Products sum = {0, 0};
  for (int64_t item = finish.layers[i].first_item + lane; item < end; item += 32) {
    sum.sum += finish.partial[item].sum;
    sum.dot += finish.partial[item].dot;
  }
  return sum_of_warp(sum);
}

__device__ void write_scale(const Finish& finish, double total, bool finite) {
  finite = finite && std::isfinite(total) && *finish.first_bad >= finish.none_bad;
  const double ratio = std::sqrt(finish.kl_clip / total);
  finish.scale[0] = std::isinf(finish.kl_clip) || ratio > 1 ? 1.0 : ratio;
  finish.scale[1] = total;
  *finish.found = finite ? 0.0f : 1.0f;
  if (!finite && finish.skipped[0]++ == 0) finish.skipped[1] = *finish.first_bad;
}

// y, then c, then nu; a warp for each layer. Shared memory holds y and v . grad of all layers, then a term of the
// sum under the root and whether it is finite for each warp.
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const Finish finish) {
  KFAC2_SHARED(Products, shared);
  constexpr int kWarps = kFinishThreads / 32;
  Products *of_layers = &shared, *of_warps = of_layers + finish.count;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = warp; i < finish.count; i += kWarps) {
    const Products sums = sum_of_items(finish, i, lane);
    if (lane == 0) of_layers[i] = sums;
  }
  __syncthreads();
  Products mine = {0, 1};  // this warp's part of the sum; 0 where anything is not finite
  for (int i = warp; i < finish.count; i += kWarps) {
    const LayerEntry& layer = finish.layers[i];
    const bool usable = finish.usable[i] != 0;
    double c = 0;
    if (finish.coarse_inverse != nullptr) {
      for (int j = lane; j < finish.count; j += 32) {
        const bool takes_part = finish.layers[j].in_coarse != 0 && finish.usable[j] != 0;
        if (takes_part) c += finish.coarse_inverse[static_cast<int64_t>(i) * finish.count + j] * of_layers[j].sum;
      }
      c = sum_of_warp({c, 0}).sum;
      c = usable && layer.in_coarse != 0 ? c * finish.coarse_weight : 0;
    }
    if (lane == 0) finish.shifts[i] = c;
    const double rate = layer.rate * (finish.device_rates == nullptr ? 1 : finish.device_rates[i]);
    if (usable) mine.sum += rate * rate * std::abs(of_layers[i].dot + c * of_layers[i].sum);
    if (!is_finite(c, finish.is_double)) mine.dot = 0;
  }
  if (lane == 0) of_warps[warp] = mine;
  __syncthreads();
  if (threadIdx.x != 0) return;  // no barrier follows
  double total = 0;
  bool finite = true;
  for (int other = 0; other < kWarps; ++other) {
    total += of_warps[other].sum;
    finite = finite && of_warps[other].dot != 0;
  }
  write_scale(finish, total, finite);
}

class ShiftAndScale : public TableLaunch {
 public:
  explicit ShiftAndScale(const ShiftAndScaleParams& params) : params_(params) {
    std::vector<LayerEntry> layers;
    for (int64_t i = 0; i < params.layers; ++i) {
      const int64_t begin = params.spans[2 * i], end = params.spans[2 * i + 1];
      layers.push_back({begin, end, params.rates[i], params.in_coarse[i], items_});
      items_ += ceil_div(end - begin, kItemElements);
    }
    layers_ = add(layers);
    scratch_bytes_ = items_ * static_cast<int64_t>(sizeof(Products));
  }

 private:
  cudaError_t start(unsigned char* workspace, cudaStream_t stream) const override {
    const LayerEntry* layers = at(workspace, layers_);
    Products* partial = reinterpret_cast<Products*>(scratch(workspace));
    const cudaError_t status = params_.is_double ? form_products<double>(layers, partial, stream)
                                                 : form_products<float>(layers, partial, stream);
    if (status != cudaSuccess) return status;
    const int count = static_cast<int>(params_.layers);
    const size_t shared_bytes = (static_cast<size_t>(count) + kFinishThreads / 32) * sizeof(Products);
    const Finish finish = {layers,
                           partial,
                           params_.device_rates,
                           params_.usable,
                           params_.coarse_inverse,
                           params_.first_bad,
                           params_.none_bad,
                           items_,
                           params_.coarse_weight,
                           params_.kl_clip,
                           count,
                           params_.is_double,
                           params_.shifts,
                           params_.scale,
                           params_.found,
                           params_.skipped};
    return launch(finish_kernel, dim3(1), dim3(kFinishThreads), shared_bytes, stream, finish);
  }

  template <typename T>
  cudaError_t form_products(const LayerEntry* layers, Products* partial, cudaStream_t stream) const {
    return launch(products_kernel<T>, dim3(static_cast<unsigned>(items_)), dim3(kThreads),
                  kThreads / 32 * sizeof(Products), stream, layers, static_cast<int>(params_.layers),
                  static_cast<const T*>(params_.gradients), static_cast<const T*>(params_.directions), partial);
  }

  ShiftAndScaleParams params_;
  int64_t items_ = 0;
  TableAt<LayerEntry> layers_;
};

}  // namespace

std::unique_ptr<Launch> shift_and_scale(const ShiftAndScaleParams& params) {
  return std::make_unique<ShiftAndScale>(params);
}

}  // namespace kfac2::cuda

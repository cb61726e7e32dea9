// Floor: gradients and directions read once; then L^2 numbers by one thread block.
#include <cmath>

#include "device.h"
#include "shift_and_scale.h"
#include "tables.h"

namespace kfac2::cuda {
namespace {

constexpr int kThreads = 256;            // of sums_kernel
constexpr int64_t kItemElements = 8192;  // of a layer, to one thread block
constexpr int kFinishThreads = 512;

// A layer, as the host knows it.
struct LayerEntry {
  int64_t begin, end, size;
  double rate, in_coarse, largest;
  int64_t first_item;
};

// Of a layer, an item or a thread. What a layer writes is v_i, or where it has no inverse its gradient.
struct Sums {
  double gradient, dot;    // y_i and v_i . grad_i
  double written, square;  // the sum of what it writes, and its squared norm
  double lowest, highest;  // of v_i
};

__device__ Sums no_sums() { return {0, 0, 0, 0, HUGE_VAL, -HUGE_VAL}; }

__device__ Sums together(const Sums& a, const Sums& b) {
  return {a.gradient + b.gradient,       a.dot + b.dot,
          a.written + b.written,         a.square + b.square,
          std::fmin(a.lowest, b.lowest), std::fmax(a.highest, b.highest)};
}

__device__ double sum_of_warp(double value) {
  for (int delta = 16; delta > 0; delta /= 2) value += __shfl_xor_sync(0xffffffffu, value, delta);
  return value;
}

__device__ Sums sum_of_warp(Sums value) {
  for (int delta = 16; delta > 0; delta /= 2) {
    value = together(
        value, {__shfl_xor_sync(0xffffffffu, value.gradient, delta), __shfl_xor_sync(0xffffffffu, value.dot, delta),
                __shfl_xor_sync(0xffffffffu, value.written, delta), __shfl_xor_sync(0xffffffffu, value.square, delta),
                __shfl_xor_sync(0xffffffffu, value.lowest, delta), __shfl_xor_sync(0xffffffffu, value.highest, delta)});
  }
  return value;
}

// What is summed over one item of a layer by one thread.
template <typename T>
__device__ Sums sum_of_thread(int64_t begin, int64_t end, const T* gradients, const T* directions, const T* written,
                              bool extremes) {
  T gradient = 0, dot = 0, sum = 0, square = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    gradient += gradients[i];
    dot += gradients[i] * directions[i];
    if (written != nullptr) {
      sum += written[i];
      square += written[i] * written[i];
    }
  }
  T lowest = HUGE_VAL, highest = -HUGE_VAL;
  for (int64_t i = extremes ? begin + threadIdx.x : end; i < end; i += kThreads) {
    lowest = std::fmin(lowest, directions[i]);
    highest = std::fmax(highest, directions[i]);
  }
  return {gradient, dot, sum, square, lowest, highest};
}

// Only with `limits` are norms summed up; extremes only where the entry says how large a number may be.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    sums_kernel(const LayerEntry* layers, int count, const T* gradients, const T* directions, const double* usable,
                const double* limits, Sums* partial) {
  KFAC2_SHARED(Sums, shared);
  const int number = entry_of(layers, count, blockIdx.x);
  const LayerEntry& layer = layers[number];
  const int64_t begin = layer.begin + (blockIdx.x - layer.first_item) * kItemElements;
  const int64_t end = begin + kItemElements < layer.end ? begin + kItemElements : layer.end;
  const T* written = limits == nullptr ? nullptr : usable[number] != 0 ? directions : gradients;
  const Sums mine = sum_of_warp(sum_of_thread(begin, end, gradients, directions, written, !std::isinf(layer.largest)));
  Sums* of_warps = &shared;
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x != 0) return;  // no barrier follows
  Sums total = no_sums();
  for (int warp = 0; warp < kThreads / 32; ++warp) total = together(total, of_warps[warp]);
  partial[blockIdx.x] = total;
}

// The parameters of finish_kernel.
struct Finish {
  const LayerEntry* layers;
  const Sums* partial;
  const double *device_rates, *usable, *coarse_inverse, *limits;
  const int32_t* first_bad;
  int64_t none_bad, items;
  double coarse_weight, kl_clip;
  int count;
  bool is_double;
  double *shifts, *scale, *factors, *norms;
  float* found;
  int64_t* skipped;
};

__device__ bool is_finite(double value, bool is_double) {
  return is_double ? static_cast<bool>(std::isfinite(value))
                   : static_cast<bool>(std::isfinite(static_cast<float>(value)));
}

// Sums of a layer's items, by one warp.
__device__ Sums sum_of_items(const Finish& finish, int i, int lane) {
  const int64_t end = i + 1 < finish.count ? finish.layers[i + 1].first_item : finish.items;
  Sums sums = no_sums();
  for (int64_t item = finish.layers[i].first_item + lane; item < end; item += 32)
    sums = together(sums, finish.partial[item]);
  return sum_of_warp(sums);
}

// omega c_i, by one warp; y holds the sums of all gradients.
__device__ double shift_of(const Finish& finish, const double* y, int i, int lane) {
  if (finish.coarse_inverse == nullptr) return 0;
  double c = 0;
  for (int j = lane; j < finish.count; j += 32) {
    const bool takes_part = finish.layers[j].in_coarse != 0 && finish.usable[j] != 0;
    if (takes_part) c += finish.coarse_inverse[static_cast<int64_t>(i) * finish.count + j] * y[j];
  }
  c = sum_of_warp(c);
  return finish.usable[i] != 0 && finish.layers[i].in_coarse != 0 ? c * finish.coarse_weight : 0;
}

// Of a warp, and in the end of all.
struct Part {
  double total;  // of the sum under the root
  bool finite;
};

// The factor of a layer that the clip scales by nu; false where what it makes of the layer is not finite.
__device__ bool scale_layer(const Finish& finish, const Sums& sums, int i, double nu) {
  const LayerEntry& layer = finish.layers[i];
  const double c = finish.shifts[i];
  double factor = nu;
  bool finite = true;
  if (finish.limits != nullptr) {
    const double size = static_cast<double>(layer.size), limit = finish.limits[i];
    const double square = sums.square + c * (2 * sums.written + c * size);
    const double norm = nu * std::sqrt(square > 0 || std::isnan(square) ? square : 0.0);
    if (limit < norm) factor *= limit / norm;
    finite = std::isfinite(norm) || std::isinf(limit);
    finish.norms[i] = norm;
  }
  finish.factors[i] = factor;
  if (std::isinf(layer.largest) || finish.usable[i] == 0 || layer.size == 0) return finite;
  return finite && factor * std::fmax(std::abs(sums.lowest + c), std::abs(sums.highest + c)) <= layer.largest;
}

// y, then c, then nu, then the factors; a warp for each layer. Shared memory holds y, then a part for each warp.
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const Finish finish) {
  KFAC2_SHARED(double, shared);
  constexpr int kWarps = kFinishThreads / 32;
  double* y = &shared;
  Part* of_warps = reinterpret_cast<Part*>(y + finish.count);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = warp; i < finish.count; i += kWarps) {
    const Sums sums = sum_of_items(finish, i, lane);
    if (lane == 0) y[i] = sums.gradient;
  }
  __syncthreads();
  Part mine = {0, true};
  for (int i = warp; i < finish.count; i += kWarps) {
    const double c = shift_of(finish, y, i, lane);
    if (lane == 0) finish.shifts[i] = c;
    const double rate = finish.layers[i].rate * (finish.device_rates == nullptr ? 1 : finish.device_rates[i]);
    const double dot = sum_of_items(finish, i, lane).dot + c * y[i];
    if (finish.usable[i] != 0) mine.total += rate * rate * std::abs(dot);
    mine.finite = mine.finite && is_finite(c, finish.is_double);
  }
  if (lane == 0) of_warps[warp] = mine;
  __syncthreads();
  double total = 0;
  for (int other = 0; other < kWarps; ++other) total += of_warps[other].total;
  const double ratio = std::sqrt(finish.kl_clip / total);
  const double nu = std::isinf(finish.kl_clip) || ratio > 1 ? 1.0 : ratio;
  for (int i = warp; i < finish.count; i += kWarps) {
    const bool measured = finish.limits != nullptr || !std::isinf(finish.layers[i].largest);
    const Sums sums = measured ? sum_of_items(finish, i, lane) : no_sums();
    if (lane == 0 && !scale_layer(finish, sums, i, finish.usable[i] != 0 ? nu : 1.0)) mine.finite = false;
  }
  __syncthreads();  // all have read the parts
  if (lane == 0) of_warps[warp] = mine;
  __syncthreads();
  if (threadIdx.x != 0) return;  // no barrier follows
  bool finite = std::isfinite(total) && *finish.first_bad >= finish.none_bad;
  for (int other = 0; other < kWarps; ++other) finite = finite && of_warps[other].finite;
  finish.scale[0] = nu;
  finish.scale[1] = total;
  *finish.found = finite ? 0.0f : 1.0f;
  if (!finite && finish.skipped[0]++ == 0) finish.skipped[1] = *finish.first_bad;
}

class ShiftAndScale : public TableLaunch {
 public:
  explicit ShiftAndScale(const ShiftAndScaleParams& params) : params_(params) {
    std::vector<LayerEntry> layers;
    for (int64_t i = 0; i < params.layers; ++i) {
      const int64_t begin = params.spans[3 * i], end = params.spans[3 * i + 1], size = params.spans[3 * i + 2];
      const double largest = params.largest == nullptr ? HUGE_VAL : params.largest[i];
      layers.push_back({begin, end, size, params.rates[i], params.in_coarse[i], largest, items_});
      items_ += ceil_div(end - begin, kItemElements);
    }
    layers_ = add(layers);
    scratch_bytes_ = items_ * static_cast<int64_t>(sizeof(Sums));
  }

 private:
  cudaError_t start(unsigned char* workspace, cudaStream_t stream) const override {
    const LayerEntry* layers = at(workspace, layers_);
    Sums* partial = reinterpret_cast<Sums*>(scratch(workspace));
    const cudaError_t status =
        params_.is_double ? form_sums<double>(layers, partial, stream) : form_sums<float>(layers, partial, stream);
    if (status != cudaSuccess) return status;
    const int count = static_cast<int>(params_.layers);
    const size_t shared_bytes = static_cast<size_t>(count) * sizeof(double) + kFinishThreads / 32 * sizeof(Part);
    const Finish finish = {layers,
                           partial,
                           params_.device_rates,
                           params_.usable,
                           params_.coarse_inverse,
                           params_.limits,
                           params_.first_bad,
                           params_.none_bad,
                           items_,
                           params_.coarse_weight,
                           params_.kl_clip,
                           count,
                           params_.is_double,
                           params_.shifts,
                           params_.scale,
                           params_.factors,
                           params_.norms,
                           params_.found,
                           params_.skipped};
    return launch(finish_kernel, dim3(1), dim3(kFinishThreads), shared_bytes, stream, finish);
  }

  template <typename T>
  cudaError_t form_sums(const LayerEntry* layers, Sums* partial, cudaStream_t stream) const {
    return launch(sums_kernel<T>, dim3(static_cast<unsigned>(items_)), dim3(kThreads), kThreads / 32 * sizeof(Sums),
                  stream, layers, static_cast<int>(params_.layers), static_cast<const T*>(params_.gradients),
                  static_cast<const T*>(params_.directions), params_.usable, params_.limits, partial);
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

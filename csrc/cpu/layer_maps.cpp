// Floor: every element of every source is read once (bytes = sum of N*C*D*H*W*sizeof). The channel sum
// of one sample stays in cache, and the box filter over it costs a k-th of the reads per axis.
#include "layer_maps.h"

#include <algorithm>
#include <vector>

#include "integers.h"
#include "scalar.h"
#include "simd.h"

namespace kfac2::cpu {
namespace {

constexpr int64_t kFewChannels = 40;  // at most, where several places are summed side by side
constexpr int kPlacesAtOnce = 8;
constexpr int64_t kLongPlane = 1024;        // places from which on several channels are added at once
constexpr int64_t kTaskElements = 1 << 18;  // worth a task of their own
constexpr int64_t kMaxTasks = 64;

// Channels last: plane[p] = sum of one run of memory. Short runs side by side, so that no sum waits for the last.
template <typename T>
KFAC2_INLINE void sum_places(const T* x, int64_t places, int64_t step, int64_t channels, SumType<T>* plane) {
  int64_t p = 0;
  for (; channels <= kFewChannels && p + kPlacesAtOnce <= places; p += kPlacesAtOnce) {
    SumType<T> sums[kPlacesAtOnce] = {};
    for (int64_t c = 0; c < channels; ++c)
      for (int i = 0; i < kPlacesAtOnce; ++i) sums[i] += to_sum_type(x[(p + i) * step + c]);
    std::copy_n(sums, kPlacesAtOnce, plane + p);
  }
  for (; p < places; ++p) {
    SumType<T> sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < channels; ++c) sum += to_sum_type(x[p * step + c]);
    plane[p] = sum;
  }
}

// plane += kChannels channels. Several at once keep as many streams from memory going: of long planes, one reaches
// three quarters of its bandwidth, eight nearly all; short planes are one stream already, and eight would halve it.
template <int kChannels, typename T>
KFAC2_INLINE void add_channels(const T* x, int64_t places, int64_t channel_stride, SumType<T>* plane) {
#pragma omp simd
  for (int64_t p = 0; p < places; ++p) {
    SumType<T> sum = plane[p];
    for (int c = 0; c < kChannels; ++c) sum += to_sum_type(x[c * channel_stride + p]);
    plane[p] = sum;
  }
}

// Places that lie `step` apart, channels `channel_stride` apart: plane[p] = sum over channels of x[c, p].
template <typename T>
KFAC2_INLINE void sum_run(const T* x, int64_t places, int64_t step, int64_t channels, int64_t channel_stride,
                          SumType<T>* plane) {
  if (channel_stride == 1) return sum_places(x, places, step, channels, plane);
  std::fill_n(plane, places, SumType<T>(0));
  int64_t c = 0;
  for (; step == 1 && places >= kLongPlane && c + 8 <= channels; c += 8)
    add_channels<8>(x + c * channel_stride, places, channel_stride, plane);
  for (; step == 1 && c < channels; ++c) add_channels<1>(x + c * channel_stride, places, channel_stride, plane);
  for (; c < channels; ++c)
    for (int64_t p = 0; p < places; ++p) plane[p] += to_sum_type(x[c * channel_stride + p * step]);
}

#define KFAC2_SUM_RUN(T)                                                                                           \
  KFAC2_CLONES void sum_run_of(const T* x, int64_t places, int64_t step, int64_t channels, int64_t channel_stride, \
                               SumType<T>* plane) {                                                                \
    sum_run<T>(x, places, step, channels, channel_stride, plane);                                                  \
  }
KFAC2_SUM_RUN(float)
KFAC2_SUM_RUN(double)
KFAC2_SUM_RUN(Half)
KFAC2_SUM_RUN(BFloat16)
#undef KFAC2_SUM_RUN

// A layer's places (batch, D, H, W) as few long runs of equal step: axes that follow each other in memory
// without a gap are merged, W and H first. With rows of a Linear layer the whole batch is one run.
struct Runs {
  int64_t count[3] = {1, 1, 1};   // runs along three outer axes
  int64_t stride[3] = {0, 0, 0};  // in x
  int64_t places;                 // in each run
  int64_t step;
};

Runs merged_runs(const RowSource& source, int64_t samples) {
  const int64_t count[4] = {samples, source.extent[0], source.extent[1], source.extent[2]};
  const int64_t stride[4] = {source.batch_stride, source.spatial_stride[0], source.spatial_stride[1],
                             source.spatial_stride[2]};
  Runs runs;
  runs.places = 1;
  runs.step = 1;
  int outer = 2;
  bool merging = true;
  for (int axis = 3; axis >= 0; --axis) {
    if (count[axis] == 1) continue;
    if (runs.places == 1 && merging) {
      runs.places = count[axis];
      runs.step = stride[axis];
    } else if (merging && stride[axis] == runs.places * runs.step) {
      runs.places *= count[axis];
    } else {
      merging = false;
      runs.count[outer] = count[axis];
      runs.stride[outer--] = stride[axis];
    }
  }
  return runs;
}

// plane[n, p] = sum over channels of x[n, c, p]; p runs over D, H, W, W fastest.
template <typename T>
void sum_channels(const RowSource& source, const T* x, int64_t samples, SumType<T>* plane) {
  const Runs runs = merged_runs(source, samples);
  for (int64_t i = 0; i < runs.count[0]; ++i)
    for (int64_t j = 0; j < runs.count[1]; ++j)
      for (int64_t k = 0; k < runs.count[2]; ++k) {
        const T* run = x + i * runs.stride[0] + j * runs.stride[1] + k * runs.stride[2];
        sum_run_of(run, runs.places, runs.step, source.channels, source.channel_stride, plane);
        plane += runs.places;
      }
}

// to[i] += from[i * step], the innermost loop of the filter.
template <typename Sum>
KFAC2_INLINE void add_every(Sum* to, const Sum* from, int64_t count, int64_t step) {
  if (step == 1) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) to[i] += from[i];
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] += from[i * step];
  }
}

KFAC2_CLONES void add(float* to, const float* from, int64_t count, int64_t step) { add_every(to, from, count, step); }
KFAC2_CLONES void add(double* to, const double* from, int64_t count, int64_t step) { add_every(to, from, count, step); }

// One axis of the box filter: [outer, extent, inner] -> [outer, grid, inner]; the sum over a patch of a
// channel sum is separable, and places outside the map (the zero padding) add nothing.
template <typename Sum>
void filter_axis(const Sum* in, Sum* out, int64_t outer, int64_t extent, int64_t inner, int64_t grid,
                 const Window& window, int axis) {
  std::fill_n(out, outer * grid * inner, Sum(0));
  const int64_t stride = window.stride[axis];
  for (int64_t o = 0; o < outer; ++o) {
    for (int64_t offset = 0; offset < window.kernel[axis]; ++offset) {
      const int64_t shift = offset * window.dilation[axis] - window.pad_low[axis];
      const int64_t first = shift >= 0 ? 0 : (-shift + stride - 1) / stride;
      const int64_t last = extent - 1 - shift < 0 ? -1 : (extent - 1 - shift) / stride;
      const int64_t places = std::min(last, grid - 1) - first + 1;
      if (places <= 0) continue;
      const Sum* from = in + (o * extent + first * stride + shift) * inner;
      Sum* to = out + (o * grid + first) * inner;
      if (inner == 1 || stride == 1) {  // one run of memory in both
        add(to, from, places * inner, inner == 1 ? stride : 1);
        continue;
      }
      for (int64_t t = 0; t < places; ++t) add(to + t * inner, from + t * stride * inner, inner, 1);
    }
  }
}

bool is_identity(const Window& window, int axis) {
  return window.kernel[axis] == 1 && window.stride[axis] == 1 && window.pad_low[axis] == 0 &&
         window.pad_high[axis] == 0;
}

bool is_identity(const Window& window) {
  return is_identity(window, 0) && is_identity(window, 1) && is_identity(window, 2);
}

// The channel sum of one sample, filtered axis by axis; returns where the result lies.
template <typename T>
const SumType<T>* filtered_plane(const RowSource& source, const T* x, std::vector<SumType<T>>& plane,
                                 std::vector<SumType<T>>& scratch) {
  plane.resize(source.places());
  sum_channels<T>(source, x, 1, plane.data());
  int64_t extent[kSpatialRank] = {source.extent[0], source.extent[1], source.extent[2]};
  for (int axis = kSpatialRank - 1; axis >= 0; --axis) {
    if (is_identity(source.window, axis)) continue;
    const int64_t grid = source.grid(axis);
    int64_t outer = 1, inner = 1;
    for (int before = 0; before < axis; ++before) outer *= extent[before];
    for (int after = axis + 1; after < kSpatialRank; ++after) inner *= extent[after];
    scratch.resize(outer * grid * inner);
    filter_axis(plane.data(), scratch.data(), outer, extent[axis], inner, grid, source.window, axis);
    plane.swap(scratch);
    extent[axis] = grid;
  }
  return plane.data();
}

template <typename T>
void add_share(const RowSource& source, const T* x, int64_t begin, int64_t end, SumType<T>* map) {
  std::vector<SumType<T>> plane, scratch;
  const int64_t places = source.grid_places();
  x += begin * source.batch_stride;
  map += begin * places;
  if (is_identity(source.window)) {
    sum_channels<T>(source, x, end - begin, map);
  } else {
    for (int64_t n = 0; n < end - begin; ++n)
      std::copy_n(filtered_plane<T>(source, x + n * source.batch_stride, plane, scratch), places, map + n * places);
  }
  const SumType<T> ones = static_cast<SumType<T>>(source.window.bias);
  for (int64_t p = 0; ones != 0 && p < (end - begin) * places; ++p) map[p] += ones;
}

// Task k takes the k-th share of the samples of every source, so that tasks weigh the same however the sources differ.
// Shares begin at a multiple of kPlacesAtOnce samples: each place is then summed as it is without shares.
class LayerMaps : public Work {
 public:
  explicit LayerMaps(const LayerMapsParams& params) : params_(params) {
    int64_t elements = 0, most = 0;
    for (int64_t i = 0; i < params.count; ++i) {
      const RowSource& source = params.sources[i];
      elements += source.batch * source.channels * source.places();
      most = std::max(most, ceil_div(source.batch, kPlacesAtOnce));
    }
    tasks_ = std::max<int64_t>(1, std::min({elements / kTaskElements, kMaxTasks, most}));
  }

  int64_t tasks() const override { return tasks_; }

  void run_task(int64_t task) override {
    for (int64_t i = 0; i < params_.count; ++i) {
      const RowSource& source = params_.sources[i];
      const int64_t begin = share(source, task), end = share(source, task + 1);
      with_type(source.element_type, source.data, [&](const auto* x) {
        using Sum = SumType<ElementOf<decltype(x)>>;
        if (begin < end) add_share(source, x, begin, end, static_cast<Sum*>(params_.maps[i]));
      });
    }
  }

 private:
  int64_t share(const RowSource& source, int64_t task) const {
    return std::min(source.batch, ceil_div(source.batch, kPlacesAtOnce) * task / tasks_ * kPlacesAtOnce);
  }

  LayerMapsParams params_;
  int64_t tasks_;
};

}  // namespace

std::unique_ptr<Work> layer_maps(const LayerMapsParams& params) { return std::make_unique<LayerMaps>(params); }

}  // namespace kfac2::cpu

// Floor: every element of every source is read once (bytes = sum of N*C*D*H*W*sizeof). The channel sum
// of one sample stays in cache, and the box filter over it costs a k-th of the reads per axis.
#include "layer_maps.h"

#include <algorithm>
#include <vector>

#include "scalar.h"

namespace kfac2::cpu {
namespace {

// plane[p] = sum over the group's channels of x[c, p]; p runs over D, H, W, W fastest.
template <typename T>
void sum_channels(const RowSource& source, const T* x, int64_t channels, SumType<T>* plane) {
  const int64_t height = source.extent[1], width = source.extent[2];
  const int64_t step = source.spatial_stride[2];
  for (int64_t line = 0; line < source.extent[0] * height; ++line) {
    const T* start = x + (line / height) * source.spatial_stride[0] + (line % height) * source.spatial_stride[1];
    SumType<T>* out = plane + line * width;
    if (source.channel_stride == 1) {  // channels last: one run of memory for each place
      for (int64_t w = 0; w < width; ++w) {
        SumType<T> sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < channels; ++c) sum += to_sum_type(start[w * step + c]);
        out[w] = sum;
      }
    } else {
      std::fill_n(out, width, SumType<T>(0));
      for (int64_t c = 0; c < channels; ++c) {
        const T* run = start + c * source.channel_stride;
        if (step == 1) {
#pragma omp simd
          for (int64_t w = 0; w < width; ++w) out[w] += to_sum_type(run[w]);
        } else {
          for (int64_t w = 0; w < width; ++w) out[w] += to_sum_type(run[w * step]);
        }
      }
    }
  }
}

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
      for (int64_t t = first; t <= std::min(last, grid - 1); ++t) {
        const Sum* from = in + (o * extent + t * stride + shift) * inner;
        Sum* to = out + (o * grid + t) * inner;
#pragma omp simd
        for (int64_t i = 0; i < inner; ++i) to[i] += from[i];
      }
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
  sum_channels<T>(source, x, source.channels_per_group(), plane.data());
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
void layer_share(const RowSource& source, void* maps, int64_t sample_begin, int64_t sample_end) {
  using Sum = SumType<T>;
  std::vector<Sum> plane, scratch;
  const bool identity = is_identity(source.window);
  const Sum ones = static_cast<Sum>(source.window.bias);
  const int64_t channels = source.channels_per_group();
  const int64_t places = source.grid_places();
  for (int64_t q = 0; q < source.window.groups; ++q) {
    const T* group = static_cast<const T*>(source.data) + q * channels * source.channel_stride;
    for (int64_t n = sample_begin; n < sample_end; ++n) {
      const T* x = group + n * source.batch_stride;
      Sum* map = static_cast<Sum*>(maps) + (q * source.batch + n) * places;
      if (identity) {
        sum_channels<T>(source, x, channels, map);
      } else {
        std::copy_n(filtered_plane<T>(source, x, plane, scratch), places, map);
      }
      for (int64_t p = 0; p < places; ++p) map[p] += ones;
    }
  }
}

}  // namespace

int64_t layer_maps_slots(const LayerMapsParams& params) {
  int64_t slots = 0;
  for (int64_t i = 0; i < params.layers; ++i) slots = std::max(slots, params.sources[i].batch);
  return slots;
}

void layer_maps(const LayerMapsParams& params, int64_t slot_begin, int64_t slot_end) {
  const int64_t slots = layer_maps_slots(params);
  for (int64_t i = 0; i < params.layers; ++i) {
    const RowSource& source = params.sources[i];
    const int64_t begin = source.batch * slot_begin / slots, end = source.batch * slot_end / slots;
    switch (source.element_type) {
      case ElementType::kFloat32: layer_share<float>(source, params.maps[i], begin, end); break;
      case ElementType::kFloat64: layer_share<double>(source, params.maps[i], begin, end); break;
      case ElementType::kFloat16: layer_share<Half>(source, params.maps[i], begin, end); break;
      case ElementType::kBFloat16: layer_share<BFloat16>(source, params.maps[i], begin, end); break;
    }
  }
}

}  // namespace kfac2::cpu

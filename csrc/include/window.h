// The rows of a layer, described without any framework: which numbers they are and where they lie.
//
// A layer's rows come from one tensor x of shape [N, C, D, H, W]; lower ranks have leading spatial
// extents of 1, and a Linear layer is the 1x1x1 convolution. Sizes and strides are in elements.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "scalar.h"

namespace kfac2 {

constexpr int kSpatialRank = 3;

// The geometry by which a convolution reads its input, axis by axis (D, H, W).
struct Window {
  int64_t kernel[kSpatialRank];
  int64_t stride[kSpatialRank];
  int64_t pad_low[kSpatialRank];
  int64_t pad_high[kSpatialRank];
  int64_t dilation[kSpatialRank];
  int64_t groups;
  int64_t bias;  // ones appended to each row: 0, 1, or the number of groups summed into one map

  // Places of the output map along one axis (may be <= 0: nothing fits).
  KFAC2_HOST_DEVICE int64_t grid(int axis, int64_t extent) const {
    const int64_t span = dilation[axis] * (kernel[axis] - 1) + 1;
    const int64_t room = extent + pad_low[axis] + pad_high[axis] - span;
    return room < 0 ? 0 : room / stride[axis] + 1;
  }
  KFAC2_HOST_DEVICE int64_t offsets() const { return kernel[0] * kernel[1] * kernel[2]; }
};

struct RowSource {
  const void* data;
  ElementType element_type;
  int64_t batch;                 // N
  int64_t channels;              // C, all groups together
  int64_t extent[kSpatialRank];  // D, H, W
  int64_t batch_stride;
  int64_t channel_stride;
  int64_t spatial_stride[kSpatialRank];
  Window window;

  KFAC2_HOST_DEVICE int64_t places() const { return extent[0] * extent[1] * extent[2]; }
  KFAC2_HOST_DEVICE int64_t grid(int axis) const { return window.grid(axis, extent[axis]); }
  KFAC2_HOST_DEVICE int64_t grid_places() const { return grid(0) * grid(1) * grid(2); }
  KFAC2_HOST_DEVICE int64_t channels_per_group() const { return channels / window.groups; }
  // Bytes of the numbers that its elements are summed in.
  KFAC2_HOST_DEVICE int64_t sum_bytes() const {
    return element_type == ElementType::kFloat64 ? sizeof(double) : sizeof(float);
  }
  // Places of the map under one patch, gaps of a dilation counted.
  KFAC2_HOST_DEVICE int64_t patch_span() const {
    int64_t places = 1;
    for (int axis = 0; axis < kSpatialRank; ++axis) {
      const int64_t span = window.dilation[axis] * (window.kernel[axis] - 1) + 1;
      places *= span < extent[axis] ? span : extent[axis];
    }
    return places;
  }
  // One group alone.
  RowSource group(int64_t q) const {
    RowSource part = *this;
    part.channels = channels_per_group();
    part.window.groups = 1;
    part.data =
        static_cast<const unsigned char*>(data) + q * part.channels * channel_stride * element_bytes(element_type);
    return part;
  }
  // Length of a row (d_in of one Kronecker block).
  KFAC2_HOST_DEVICE int64_t row_length() const {
    return channels_per_group() * window.offsets() + (window.bias != 0 ? 1 : 0);
  }
};

}  // namespace kfac2

// A part is the gradient of one parameter: the memory it lies in, and its place among the gradient matrices.
//
// The matrices of all layers, [blocks, d_out, d_in] each with the bias in the last column, share one tensor. A weight
// fills all columns but the bias's, a bias one column.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "scalar.h"

namespace kfac2 {

constexpr int kColumnAxes = 4;
constexpr int64_t kMaxPartElements = (int64_t{1} << 31) - 1;  // 32-bit numbers count them on a device

struct GradientPart {
  void* data;
  ElementType element_type;
  int64_t rows;
  int64_t columns;              // product of extent[]
  int64_t row_stride;           // strides and extents in elements
  int64_t extent[kColumnAxes];  // of the axes that make up the columns, slowest first
  int64_t stride[kColumnAxes];
  int64_t offset;      // of its first element among the matrices; < 0: it belongs to none
  int64_t row_length;  // of its matrix
  int64_t layer;       // < 0: it belongs to none
  int64_t number;      // of its parameter, the same in every step

  KFAC2_HOST_DEVICE bool belongs() const { return offset >= 0; }
  KFAC2_HOST_DEVICE int64_t elements() const { return rows * columns; }
  KFAC2_HOST_DEVICE bool columns_contiguous() const {
    return stride[kColumnAxes - 1] == 1 && extent[kColumnAxes - 1] == columns;
  }
  // The distance of a column from the first of its row.
  KFAC2_HOST_DEVICE int64_t column_offset(uint32_t column) const {
    int64_t sum = 0;
    for (int axis = kColumnAxes - 1; axis > 0 && column != 0; --axis) {
      const uint32_t slower = column / static_cast<uint32_t>(extent[axis]);
      sum += (column - slower * static_cast<uint32_t>(extent[axis])) * stride[axis];
      column = slower;
    }
    return sum + column * stride[0];
  }

  // Takes the axes of a tensor, of size_of(d) and stride_of(d): rows along the first, the others merged where their
  // strides allow. Returns false where more than kColumnAxes of them are left.
  template <typename SizeOf, typename StrideOf>
  bool read_axes(int64_t rank, const SizeOf& size_of, const StrideOf& stride_of) {
    rows = rank == 0 ? 1 : size_of(0);
    row_stride = rank == 0 ? 1 : stride_of(0);
    columns = 1;
    int axis = kColumnAxes - 1;  // filled from the fastest
    for (int i = 0; i < kColumnAxes; ++i) extent[i] = 1, stride[i] = i == axis ? 1 : 0;
    bool open = false;
    for (int64_t d = rank - 1; d > 0; --d) {
      const int64_t size = size_of(d), step = stride_of(d);
      columns *= size;
      if (size == 1) continue;
      if (open && step == stride[axis] * extent[axis]) {
        extent[axis] *= size;
        continue;
      }
      if (open && --axis < 0) return false;
      extent[axis] = size;
      stride[axis] = step;
      open = true;
    }
    return true;
  }
};

}  // namespace kfac2

// A symmetric matrix as half as many numbers: one of its triangles, folded into a rectangle (kfac2/triangles.py). The
// half of the rows that comes first holds them from the diagonal on. Below its own diagonal the lower right triangle
// fits, by columns, and where the size is even, one column to the side of it.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace kfac2 {

struct Triangle {
  int64_t size;

  KFAC2_HOST_DEVICE int64_t height() const { return (size + 1) / 2; }
  KFAC2_HOST_DEVICE int64_t width() const { return size + shift(); }
  KFAC2_HOST_DEVICE int64_t numbers() const { return height() * width(); }

  // Where an element lies, or its mirror image.
  KFAC2_HOST_DEVICE int64_t index(int64_t row, int64_t column) const {
    const int64_t low = row < column ? row : column, high = row < column ? column : row;
    return low < height() ? low * width() + shift() + high : (high - size + height()) * width() + low - height();
  }

  // Whether a place of a line of the rectangle is in the half of the rows that comes first; else it is below its
  // diagonal.
  KFAC2_HOST_DEVICE bool is_upper(int64_t line, int64_t place) const { return place - shift() >= line; }

  // The element that lies there; row <= column.
  KFAC2_HOST_DEVICE void element(int64_t line, int64_t place, int64_t* row, int64_t* column) const {
    const bool upper = is_upper(line, place);
    *row = upper ? line : place + height();
    *column = upper ? place - shift() : line + size - height();
  }

 private:
  KFAC2_HOST_DEVICE int64_t shift() const { return 1 - size % 2; }
};

}  // namespace kfac2

// The elements of a gradient in the order of its matrix, in runs that are as long as its strides allow.
#pragma once

#include <cstdint>

#include "gradient_part.h"

namespace kfac2::cpu {

// Calls run(of the gradient, of the matrix, count, stride in the gradient) with offsets of the first element.
template <typename Run>
void for_each_run(const GradientPart& part, const Run& run) {
  const bool contiguous = part.columns_contiguous();
  if (contiguous && part.row_stride == part.columns && (!part.belongs() || part.row_length == part.columns))
    return run(int64_t{0}, int64_t{0}, part.elements(), int64_t{1});
  const int64_t *extent = part.extent, *stride = part.stride;
  for (int64_t r = 0; r < part.rows; ++r) {
    int64_t column = r * part.row_length;
    for (int64_t a = 0; a < extent[0]; ++a)
      for (int64_t b = 0; b < extent[1]; ++b)
        for (int64_t c = 0; c < extent[2]; ++c, column += extent[3])
          run(r * part.row_stride + a * stride[0] + b * stride[1] + c * stride[2], column, extent[3], stride[3]);
  }
}

}  // namespace kfac2::cpu

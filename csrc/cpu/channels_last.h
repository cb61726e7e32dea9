// A line of places with its channels next to each other, in the type of sums.
#pragma once

#include <algorithm>
#include <cstdint>

#include "scalar.h"

namespace kfac2::cpu {

// Places `step` apart, whose channels are `channel_stride` apart, as [place, channel]: rows of `pitch` numbers, what is
// behind the channels filled with zeros.
template <typename T>
void to_channels_last(const T* line, int64_t places, int64_t step, int64_t channels, int64_t channel_stride,
                      int64_t pitch, SumType<T>* out) {
  if (channel_stride == 1) {  // channels last already: whole rows
    for (int64_t w = 0; w < places; ++w) {
      const T* row = line + w * step;
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) out[w * pitch + c] = to_sum_type(row[c]);
      std::fill(out + w * pitch + channels, out + (w + 1) * pitch, SumType<T>(0));
    }
    return;
  }
  constexpr int64_t kTile = 16;  // places whose cache lines stay in L1 while the channels pass
  for (int64_t w0 = 0; w0 < places; w0 += kTile) {
    const int64_t w1 = std::min(places, w0 + kTile);
    for (int64_t c = 0; c < channels; ++c) {
      const T* channel = line + c * channel_stride;
      for (int64_t w = w0; w < w1; ++w) out[w * pitch + c] = to_sum_type(channel[w * step]);
    }
    for (int64_t w = w0; w < w1; ++w) std::fill(out + w * pitch + channels, out + (w + 1) * pitch, SumType<T>(0));
  }
}

}  // namespace kfac2::cpu

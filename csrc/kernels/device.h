// Small things that several kernels use.
#pragma once

#include <cstddef>
#include <cstdint>

#include "compat.h"
#include "integers.h"
#include "scalar.h"
#include "window.h"

namespace kfac2::cuda {

// 16 bytes of a type, loaded at once.
template <typename T>
struct alignas(16) Vector {
  static constexpr int kLanes = 16 / sizeof(T);
  T lane[kLanes];
};

// The last of `count` entries whose first item, which grows, is not above `item`.
template <typename FirstItem>
__device__ int entry_of(int count, int64_t item, const FirstItem& first_item) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (first_item(middle) <= item) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

template <typename Entry>
__device__ int entry_of(const Entry* entries, int count, int64_t item) {
  return entry_of(count, item, [entries](int i) { return entries[i].first_item; });
}

}  // namespace kfac2::cuda

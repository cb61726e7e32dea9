// Small things that several kernels use.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

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

// Where numbers are that are moved at once. A device wants them aligned to their size; the emulation stops where they
// are not, which the processor under it would not mind.
template <typename Numbers, typename T>
__device__ Numbers* aligned(T* data) {
#ifdef KFAC2_EMULATE
  emulation::expect_aligned(data, alignof(Numbers), {__FILE__, __LINE__});
#endif
  return reinterpret_cast<Numbers*>(data);
}

// Loads what no thread of the launch writes. Said plainly, since a pointer that a table holds could lead to shared
// memory for all that a compiler knows, and what is written in between could lie there.
template <typename T>
__device__ Vector<T> load(const Vector<T>* data) {
#ifdef KFAC2_EMULATE
  return *data;
#else
  const uint4 bits = __ldg(reinterpret_cast<const uint4*>(data));
  Vector<T> numbers;
  std::memcpy(&numbers, &bits, sizeof numbers);
  return numbers;
#endif
}

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

// The same by a warp, all of whose threads must call: 32 entries are looked at at once, where one after the other would
// be a chain of loads in front of all else.
template <typename FirstItem>
__device__ int entry_of_warp(int count, int64_t item, const FirstItem& first_item) {
  constexpr int kLanes = 32;  // of a warp; `warpSize` is no constant to nvcc, which would divide by it
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  int low = 0;
  while (count > 1) {
    const int step = (count + kLanes - 1) / kLanes;
    const int at = lane * step;
    const int found = __popc(__ballot_sync(0xffffffffu, at < count && first_item(low + at) <= item)) - 1;
    low += found * step;
    count = std::min(step, count - found * step);
  }
  return low;
}

template <typename Entry>
__device__ int entry_of_warp(const Entry* entries, int count, int64_t item) {
  return entry_of_warp(count, item, [entries](int i) { return entries[i].first_item; });
}

}  // namespace kfac2::cuda

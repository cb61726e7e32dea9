// Small things that several kernels use.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

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

// Entry of a table that work item `item` belongs to: the last whose first item is not above it.
template <typename Entry>
__device__ int entry_of(const Entry* entries, int count, int64_t item) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (entries[middle].first_item <= item) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Tables of a launch, side by side in the workspace: one copy from the host brings them all. The copy is staged
// before the call returns, so the host's memory may go.
class Tables {
 public:
  // Returns the offset of the table in bytes.
  template <typename Entry>
  int64_t add(const std::vector<Entry>& entries) {
    const int64_t offset = static_cast<int64_t>(bytes_.size());
    bytes_.resize(offset + ceil_div(static_cast<int64_t>(entries.size() * sizeof(Entry)), 16) * 16);
    if (!entries.empty()) std::memcpy(bytes_.data() + offset, entries.data(), entries.size() * sizeof(Entry));
    return offset;
  }

  int64_t size() const { return static_cast<int64_t>(bytes_.size()); }

  cudaError_t copy_to(void* workspace, cudaStream_t stream) const {
    if (bytes_.empty()) return cudaSuccess;
    return cudaMemcpyAsync(workspace, bytes_.data(), bytes_.size(), cudaMemcpyHostToDevice, stream);
  }

 private:
  std::vector<unsigned char> bytes_;
};

template <typename Entry>
const Entry* table_at(const void* workspace, int64_t offset) {
  return reinterpret_cast<const Entry*>(static_cast<const unsigned char*>(workspace) + offset);
}

}  // namespace kfac2::cuda

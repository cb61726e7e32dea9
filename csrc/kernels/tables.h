// Tables of a launch: what the host knows of every layer, brought to the device.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "compat.h"
#include "integers.h"

namespace kfac2::cuda {

// Tables side by side in the workspace. They travel as parameters of kernels: a copy from the host's pageable
// memory would wait for the stream, and a CUDA graph would read that memory again when it is long gone.
class Tables {
 public:
  // Returns the offset of the table in bytes.
  template <typename Entry>
  int64_t add(const std::vector<Entry>& entries) {
    static_assert(alignof(Entry) <= 16, "tables are aligned to 16 bytes");
    const int64_t offset = size();
    bytes_.resize(offset + ceil_div(static_cast<int64_t>(entries.size() * sizeof(Entry)), 16) * 16);
    if (!entries.empty()) std::memcpy(bytes_.data() + offset, entries.data(), entries.size() * sizeof(Entry));
    return offset;
  }

  int64_t size() const { return static_cast<int64_t>(bytes_.size()); }

  // One launch for each 30 KB.
  cudaError_t copy_to(void* workspace, cudaStream_t stream) const;

 private:
  std::vector<unsigned char> bytes_;
};

template <typename Entry>
const Entry* table_at(const void* workspace, int64_t offset) {
  return reinterpret_cast<const Entry*>(static_cast<const unsigned char*>(workspace) + offset);
}

}  // namespace kfac2::cuda

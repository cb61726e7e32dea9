// Tables of a launch: what the host knows of every layer, brought to the device.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "compat.h"
#include "integers.h"
#include "op.h"

namespace kfac2::cuda {

// A place in the workspace, in bytes.
template <typename Entry>
struct TableAt {
  int64_t offset = 0;
};

// A launch whose workspace begins with its tables, side by side. They travel as parameters of kernels: a copy from the
// host's pageable memory would wait for the stream, and a CUDA graph would read that memory again when it is long gone.
class TableLaunch : public Launch {
 public:
  int64_t workspace() const final { return table_bytes() + scratch_bytes_; }

  int run(void* workspace, Stream stream) const final {
    if (!possible_) return cudaErrorInvalidValue;
    const cudaError_t copied = copy_tables(workspace, stream);
    return copied != cudaSuccess ? copied : start(static_cast<unsigned char*>(workspace), stream);
  }

 protected:
  // Starts the kernels; the tables are there.
  virtual cudaError_t start(unsigned char* workspace, cudaStream_t stream) const = 0;

  template <typename Entry>
  TableAt<Entry> add(const std::vector<Entry>& entries) {
    static_assert(alignof(Entry) <= 16, "tables are aligned to 16 bytes");
    const int64_t offset = table_bytes(), bytes = static_cast<int64_t>(entries.size() * sizeof(Entry));
    tables_.resize(offset + ceil_div(bytes, 16) * 16);
    if (bytes > 0) std::memcpy(tables_.data() + offset, entries.data(), bytes);
    return {offset};
  }

  template <typename Entry>
  static const Entry* at(const unsigned char* workspace, TableAt<Entry> table) {
    return reinterpret_cast<const Entry*>(workspace + table.offset);
  }

  // The memory behind the tables, of scratch_bytes_.
  unsigned char* scratch(unsigned char* workspace) const { return workspace + table_bytes(); }

  int64_t scratch_bytes_ = 0;
  bool possible_ = true;  // else nothing is started

 private:
  int64_t table_bytes() const { return static_cast<int64_t>(tables_.size()); }
  cudaError_t copy_tables(void* workspace, cudaStream_t stream) const;  // one launch for each 30 KB

  std::vector<unsigned char> tables_;
};

}  // namespace kfac2::cuda

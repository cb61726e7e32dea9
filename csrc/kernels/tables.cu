#include <algorithm>

#include "tables.h"

namespace kfac2::cuda {
namespace {

constexpr int kThreads = 64;  // few, since the different words that a warp takes from a parameter come one by one

// Bytes that the parameters of a kernel hold: 4 KB anywhere, nearly 32 KB from CUDA 12.1 on.
constexpr int64_t kFew = 3840, kMany = 30720;

template <int64_t kBytes>
struct Chunk {
  uint4 parts[kBytes / sizeof(uint4)];
};

template <int64_t kBytes>
__global__ void __launch_bounds__(kThreads)
    write_kernel(const KFAC2_GRID_CONSTANT Chunk<kBytes> chunk, uint4* to, int count) {
  const int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (i < count) to[i] = chunk.parts[i];
}

template <int64_t kBytes>
cudaError_t write(const unsigned char* from, int64_t bytes, void* to, cudaStream_t stream) {
  Chunk<kBytes> chunk;
  std::memcpy(chunk.parts, from, static_cast<size_t>(bytes));
  const int count = static_cast<int>(bytes / static_cast<int64_t>(sizeof(uint4)));
  return launch(write_kernel<kBytes>, dim3(static_cast<unsigned>(ceil_div(count, kThreads))), dim3(kThreads), 0, stream,
                chunk, static_cast<uint4*>(to), count);
}

}  // namespace

cudaError_t TableLaunch::copy_tables(void* workspace, cudaStream_t stream) const {
  cudaError_t status = cudaSuccess;
  for (int64_t offset = 0; offset < table_bytes() && status == cudaSuccess; offset += kMany) {
    const int64_t bytes = std::min(kMany, table_bytes() - offset);
    const auto writer = bytes <= kFew ? write<kFew> : write<kMany>;
    status = writer(tables_.data() + offset, bytes, static_cast<unsigned char*>(workspace) + offset, stream);
  }
  return status;
}

}  // namespace kfac2::cuda

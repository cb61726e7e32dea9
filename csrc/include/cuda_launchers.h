// What every CUDA launcher shares. No CUDA header: a CPU-only build reads this, too.
#pragma once

#include <cstdint>

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace kfac2::cuda {

using Stream = CUstream_st*;

// A launcher takes device memory of `<op>_workspace(params)` bytes, 16-byte aligned, which it may use until the
// stream has passed; it returns a cudaError_t, 0 for success. Its name is what error_text gives.
const char* error_text(int status);

}  // namespace kfac2::cuda

#include "compat.h"
#include "op.h"

namespace kfac2::cuda {

const char* error_text(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

}  // namespace kfac2::cuda

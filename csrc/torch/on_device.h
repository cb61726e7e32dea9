// Running a CUDA launcher for tensors: their device, torch's current stream, workspace from torch's allocator.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "allocate.h"
#include "check.h"
#include "cuda_launchers.h"

namespace kfac2 {

// launcher(workspace, stream) returns a cudaError_t. The workspace goes back to the allocator at once: torch gives
// it out again only on the same stream, behind the launch.
template <typename Launcher>
void run_on_device(const char* op, const torch::stable::Tensor& like, int64_t workspace_bytes,
                   const Launcher& launcher) {
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  torch::stable::Tensor workspace = allocate(like, {workspace_bytes}, torch::headeronly::ScalarType::Byte);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const int status = launcher(workspace.mutable_data_ptr(), static_cast<cuda::Stream>(stream));
  check(status == 0, op, "the CUDA launch failed: ", status == 0 ? "" : cuda::error_text(status));
}

}  // namespace kfac2

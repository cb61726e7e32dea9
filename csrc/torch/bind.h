// From a checked call to its result: threads on a CPU, or device, stream and workspace on CUDA.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "allocate.h"
#include "check.h"
#include "op.h"

namespace kfac2 {

// Each of torch's threads takes the next number as it becomes free. Which thread runs it must not matter.
template <typename Run>
void run_on_threads(int64_t count, const Run& run) {
  const int64_t threads = count > 1 ? std::min<int64_t>(count, torch::stable::get_num_threads()) : 1;
  if (threads == 1) {
    for (int64_t number = 0; number < count; ++number) run(number);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t number = next++; number < count; number = next++) run(number);
  });
}

inline void run_on_cpu(cpu::Work& work) {
  run_on_threads(work.tasks(), [&](int64_t task) { work.run_task(task); });
  run_on_threads(work.merges(), [&](int64_t merge) { work.run_merge(merge); });
}

#ifdef KFAC2_WITH_CUDA
// On torch's current stream of the device of `like`. The workspace goes back to torch's allocator at once, which gives
// it out again only on the same stream, behind the launch.
inline void run_on_cuda(const char* op, const torch::stable::Tensor& like, const cuda::Launch& launch) {
  void* stream = nullptr;
#ifndef KFAC2_EMULATE
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
#endif
  torch::stable::Tensor workspace = allocate(like, {launch.workspace()}, torch::headeronly::ScalarType::Byte);
  const int status = launch.run(workspace.mutable_data_ptr(), static_cast<cuda::Stream>(stream));
  check(status == 0, op, "the CUDA launch failed: ", status == 0 ? "" : cuda::error_text(status));
}
#endif

}  // namespace kfac2

// KFAC2_RUN(op, like, params) runs an op on the device of the tensor `like`; KFAC2_BIND(op) registers the function `op`
// as the implementation for every device of this build, KFAC2_BIND_CUDA(op) for CUDA alone. With KFAC2_EMULATE the CUDA
// kernels run on the memory of a CPU (tests/emulation): they are what there is of an op.
#define KFAC2_BIND_TO(device, op) \
  STABLE_TORCH_LIBRARY_IMPL(kfac2, device, m) { m.impl(#op, TORCH_BOX(&op)); }
#if defined(KFAC2_EMULATE)
#define KFAC2_RUN(op, like, params) run_on_cuda(#op, like, *cuda::op(params))
#define KFAC2_BIND(op) KFAC2_BIND_TO(CPU, op)
#define KFAC2_BIND_CUDA(op) KFAC2_BIND_TO(CPU, op)
#elif defined(KFAC2_WITH_CUDA)
#define KFAC2_RUN(op, like, params) \
  ((like).is_cuda() ? run_on_cuda(#op, like, *cuda::op(params)) : run_on_cpu(*cpu::op(params)))
#define KFAC2_BIND(op) KFAC2_BIND_TO(CPU, op) KFAC2_BIND_TO(CUDA, op)
#define KFAC2_BIND_CUDA(op) KFAC2_BIND_TO(CUDA, op)
#else
#define KFAC2_RUN(op, like, params) run_on_cpu(*cpu::op(params))
#define KFAC2_BIND(op) KFAC2_BIND_TO(CPU, op)
#endif

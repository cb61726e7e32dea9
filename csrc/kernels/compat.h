// The only header through which kernels see CUDA: one source for nvcc and, with KFAC2_EMULATE, for the
// emulator that runs it on a CPU (tests/emulation).
#pragma once

#include <cstddef>
#include <utility>

#ifdef KFAC2_EMULATE
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>
#endif

// In front of a parameter that a kernel only reads: it stays where it is, however it is indexed.
#ifdef KFAC2_EMULATE
#define KFAC2_GRID_CONSTANT
#else
#define KFAC2_GRID_CONSTANT __grid_constant__
#endif

// Declares `Type& name` on the dynamic shared memory of the block, as a statement in a kernel. All such names of
// a kernel are the same memory. A type with a comma in it needs an alias.
#ifdef KFAC2_EMULATE
#define KFAC2_SHARED(Type, name) Type& name = ::kfac2::emulation::shared_memory<Type>()
#else
#define KFAC2_SHARED(Type, name)                                              \
  extern __shared__ __align__(16) unsigned char kfac2_shared_memory[];        \
  static_assert(alignof(Type) <= 16, "shared memory is aligned to 16 bytes"); \
  Type& name = *reinterpret_cast<Type*>(kfac2_shared_memory)
#endif

namespace kfac2::cuda {

#ifdef KFAC2_EMULATE

template <typename... P, typename... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, A&&... args) {
  static_assert(sizeof...(P) == sizeof...(A), "one argument for each parameter of the kernel");
  return emulation::launch(kernel, grid, block, shared_bytes, std::forward<A>(args)...);
}

#else

// More than this must be asked for (CUDA C++ Programming Guide, "Shared Memory").
constexpr size_t kSharedBytesWithoutAsking = 48 * 1024;

template <typename... P, typename... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, A&&... args) {
  static_assert(sizeof...(P) == sizeof...(A), "one argument for each parameter of the kernel");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  cudaError_t status = cudaSuccess;
  if (shared_bytes > kSharedBytesWithoutAsking) {
    status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(shared_bytes));
  }
  if (status == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    status = cudaLaunchKernelEx(&config, kernel, std::forward<A>(args)...);
  }
  const cudaError_t last = cudaGetLastError();  // also clears it: the caller has it from here
  return status != cudaSuccess ? status : last;
}

#endif

}  // namespace kfac2::cuda

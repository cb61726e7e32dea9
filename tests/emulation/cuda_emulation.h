// Runs CUDA kernels on a CPU to find their faults: each thread of a block is a fiber that runs until it waits at a
// barrier or a shuffle. Blocks run one after the other, on the host thread that launches. What hardware leaves
// undefined is reported (barriers and shuffles that some threads never reach) or poisoned with 0xFF, a NaN (shared
// memory before its first write, values from lanes outside the mask). AddressSanitizer sees every access.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct __align__(16) float4 {
  float x, y, z, w;
};

struct __align__(16) double2 {
  double x, y;
};

struct __align__(16) uint4 {
  unsigned x, y, z, w;
};

struct __align__(16) int4 {
  int x, y, z, w;
};

inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

typedef struct CUstream_st* cudaStream_t;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9
};

// A launch returns its error and leaves none behind.
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error);

enum cudaMemcpyKind {
  cudaMemcpyHostToHost = 0,
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost = 2,
  cudaMemcpyDeviceToDevice = 3
};

// Host and device memory are one here, and a stream does everything at once.
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t = nullptr) {
  if (bytes > 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return cudaMemcpyAsync(to, from, bytes, kind);
}

inline cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = std::malloc(bytes);
  return *memory != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
}

inline cudaError_t cudaFree(void* memory) {
  std::free(memory);
  return cudaSuccess;
}

inline cudaError_t cudaMemset(void* memory, int value, size_t bytes) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

constexpr int warpSize = 32;

namespace kfac2::emulation {

// A kernel did what CUDA leaves undefined.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// In which order the threads of a block run between barriers, and the blocks of a grid.
enum class Order { kForward, kReverse, kShuffled };
constexpr Order kOrders[] = {Order::kForward, Order::kReverse, Order::kShuffled};

// Of all launches from now on; each launch starts again from the seed.
void set_order(Order order, uint64_t seed = 0);
Order order();

// Where a thread waits.
struct Site {
  const char* file;
  int line;
};

enum class WarpOperation { kSync, kBallot, kShuffle, kShuffleDown, kShuffleXor };

// What one lane brings to an operation of its warp.
struct LaneRequest {
  WarpOperation operation;
  unsigned mask;
  unsigned argument;  // lane, delta or lane mask of a shuffle
  int width;          // of the segments of a shuffle
  size_t value_bytes;
  uint64_t value;  // the bits of the value; of a ballot, the predicate
  Site site;
};

void barrier(Site site);

// A load or a store of so many bytes at once, which a device refuses elsewhere.
void expect_aligned(const void* data, size_t bytes, Site site);

// Waits for the other lanes of the mask; returns what the operation gives this lane.
uint64_t exchange(const LaneRequest& request);

constexpr size_t kSharedAlignment = 16;

// The shared memory of the running block, which must hold so many bytes.
void* shared_bytes(size_t bytes);

template <typename T>
T& shared_memory() {
  static_assert(alignof(T) <= kSharedAlignment, "shared memory is aligned to 16 bytes");
  return *static_cast<T*>(shared_bytes(sizeof(T)));
}

struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
  size_t parameter_bytes;
  void (*run_thread)(const void* call);
  const void* call;
};

// Launches that ran, since the program began.
int64_t launches();

// Whether launches from now on are checked and counted, but do nothing.
void set_counting_only(bool only);

// Throws Error if the kernel is at fault; returns the error of a launch that a device would refuse.
cudaError_t run(const Launch& launch);

template <typename... P>
constexpr size_t parameter_bytes() {
  size_t bytes = 0;
  ((bytes = (bytes + alignof(P) - 1) / alignof(P) * alignof(P) + sizeof(P)), ...);
  return bytes;
}

template <typename... P, typename... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, A&&... args) {
  static_assert((std::is_trivially_copyable_v<P> && ...), "parameters of kernels are copied as bytes");
  static_assert((!std::is_reference_v<P> && ...), "a device cannot follow a reference to the host");
  using Call = std::pair<void (*)(P...), std::tuple<P...>>;
  const Call call(kernel, std::tuple<P...>(static_cast<P>(std::forward<A>(args))...));
  const auto run_thread = [](const void* opaque) {
    const Call& call = *static_cast<const Call*>(opaque);
    std::apply(call.first, call.second);
  };
  return run({grid, block, shared_bytes, parameter_bytes<P...>(), run_thread, &call});
}

template <typename T>
T shuffle(WarpOperation operation, unsigned mask, T value, unsigned argument, int width, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "numbers of 4 or 8 bytes");
  LaneRequest request{operation, mask, argument, width, sizeof(T), 0, site};
  std::memcpy(&request.value, &value, sizeof(T));
  const uint64_t bits = exchange(request);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// Written by the scheduler whenever it changes to another thread.
struct Indices {
  uint3 thread, block;
  dim3 block_extent, grid_extent;
};
extern Indices indices;

}  // namespace kfac2::emulation

// Kernels may only read these.
inline constexpr const uint3& threadIdx = kfac2::emulation::indices.thread;
inline constexpr const uint3& blockIdx = kfac2::emulation::indices.block;
inline constexpr const dim3& blockDim = kfac2::emulation::indices.block_extent;
inline constexpr const dim3& gridDim = kfac2::emulation::indices.grid_extent;

#define __syncthreads() ::kfac2::emulation::barrier({__FILE__, __LINE__})

// The last two arguments of these are the place of the caller.
inline void __syncwarp(unsigned mask = 0xffffffffu, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  using namespace kfac2::emulation;
  exchange({WarpOperation::kSync, mask, 0, warpSize, 0, 0, {file, line}});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, const char* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
  using namespace kfac2::emulation;
  const uint64_t value = predicate != 0;
  return static_cast<unsigned>(exchange({WarpOperation::kBallot, mask, 0, warpSize, 0, value, {file, line}}));
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize, const char* file = __builtin_FILE(),
              int line = __builtin_LINE()) {
  using namespace kfac2::emulation;
  return shuffle(WarpOperation::kShuffle, mask, value, static_cast<unsigned>(lane), width, {file, line});
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, const char* file = __builtin_FILE(),
                   int line = __builtin_LINE()) {
  using namespace kfac2::emulation;
  return shuffle(WarpOperation::kShuffleDown, mask, value, delta, width, {file, line});
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  using namespace kfac2::emulation;
  return shuffle(WarpOperation::kShuffleXor, mask, value, static_cast<unsigned>(lane_mask), width, {file, line});
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

template <typename T>
T rsqrt(T value) {
  return 1 / std::sqrt(value);
}

// Plain code is atomic here: threads change only where they wait.
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  const unsigned old = *address;
  *address = old + value;
  return old;
}

inline int atomicAdd(int* address, int value) {
  const int old = *address;
  *address = static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(value));
  return old;
}

inline int atomicMin(int* address, int value) {
  const int old = *address;
  if (value < old) *address = value;
  return old;
}

inline void __threadfence() {}

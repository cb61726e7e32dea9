// Tests of the emulator itself: right kernels give right results in every order of threads, and each planted fault
// is found.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "device.h"

namespace {

using kfac2::cuda::launch;
using kfac2::emulation::Error;
using kfac2::emulation::Order;
using kfac2::emulation::set_order;

constexpr unsigned kFull = 0xffffffffu;
constexpr Order kOrders[] = {Order::kForward, Order::kReverse, Order::kShuffled};
constexpr size_t kMaxShared = 227 * 1024;
const cudaStream_t kStream = nullptr;

int checks = 0, failures = 0;

void check(bool holds, const char* what) {
  ++checks;
  if (holds) return;
  ++failures;
  std::printf("FAILED: %s\n", what);
}

// The message of the fault that `run` throws, or nothing.
template <typename Run>
std::string fault_of(const Run& run) {
  try {
    run();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

void check_fault(const std::string& fault, const char* expected, const char* what) {
  check(fault.find(expected) != std::string::npos, what);
  if (fault.find(expected) == std::string::npos) std::printf("  it says \"%s\"\n", fault.c_str());
}

// ---- Barriers and shared memory ----

// One sum for each block. Planted fault: no barrier between the write and the first read.
template <bool kMissingBarrier>
__global__ void __launch_bounds__(1024)
    sum_blocks(const float* __restrict__ values, float* __restrict__ sums, int64_t count) {
  KFAC2_SHARED(float, first);
  float* partial = &first;
  const int64_t entry = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  partial[threadIdx.x] = entry < count ? __ldg(values + entry) : 0.0f;
  if (!kMissingBarrier) __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = partial[0];
}

template <bool kMissingBarrier>
bool sums_are_right(Order order, uint64_t seed) {
  constexpr unsigned kBlocks = 5, kThreads = 128;
  const int64_t count = kBlocks * kThreads - 7;
  std::vector<float> values(count), sums(kBlocks, -1), expected(kBlocks, 0);
  for (int64_t i = 0; i < count; ++i) expected[i / kThreads] += values[i] = static_cast<float>(i % 19 - 4);
  set_order(order, seed);
  const cudaError_t status = launch(sum_blocks<kMissingBarrier>, dim3(kBlocks), dim3(kThreads),
                                    kThreads * sizeof(float), kStream, values.data(), sums.data(), count);
  return status == cudaSuccess && sums == expected;
}

void test_reduction() {
  bool planted_is_found = false;
  for (const Order order : kOrders) {
    for (uint64_t seed = 0; seed < 3; ++seed) {
      check(sums_are_right<false>(order, seed), "sums of blocks");
      planted_is_found |= !sums_are_right<true>(order, seed);
    }
  }
  check(planted_is_found, "a missing barrier gives a wrong result");
}

struct Place {
  unsigned thread[3], block[3];
};

__global__ void write_places(Place* places) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  __syncthreads();  // the indices follow the thread
  places[block * blockDim.x * blockDim.y * blockDim.z + thread] = {{threadIdx.x, threadIdx.y, threadIdx.z},
                                                                   {blockIdx.x, blockIdx.y, blockIdx.z}};
}

void test_indices() {
  const dim3 grid(2, 3, 2), block(3, 4, 5);
  for (const Order order : kOrders) {
    set_order(order, 7);
    std::vector<Place> places(12 * 60, Place{{99, 99, 99}, {99, 99, 99}});
    check(launch(write_places, grid, block, 0, kStream, places.data()) == cudaSuccess, "launch in three dimensions");
    bool right = true;
    for (unsigned i = 0; i < places.size(); ++i) {
      const Place& place = places[i];
      right &= place.thread[0] + 3 * (place.thread[1] + 4 * place.thread[2]) == i % 60 && place.thread[0] < 3;
      right &= place.block[0] + 2 * (place.block[1] + 3 * place.block[2]) == i / 60 && place.block[0] < 2;
    }
    check(right, "indices in three dimensions");
  }
}

// Each thread takes a number; which one tells the order.
__global__ void take_numbers(int* next, int* numbers) {
  numbers[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(next, 1);
}

std::vector<int> numbers_in(Order order, uint64_t seed) {
  std::vector<int> numbers(12);
  int next = 0;
  set_order(order, seed);
  launch(take_numbers, dim3(3), dim3(4), 0, kStream, &next, numbers.data());
  return numbers;
}

void test_orders() {
  check(numbers_in(Order::kForward, 0) == std::vector<int>({0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}), "forward");
  check(numbers_in(Order::kReverse, 0) == std::vector<int>({11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0}), "reverse");
  check(numbers_in(Order::kShuffled, 1) == numbers_in(Order::kShuffled, 1), "a seed gives one order");
  check(numbers_in(Order::kShuffled, 1) != numbers_in(Order::kShuffled, 2), "seeds give different orders");
  set_order(Order::kForward);
}

enum class Skip { kByBranch, kByReturn, kByOtherBarrier, kByShuffle };

__global__ void skip_barrier(Skip skip) {
  const bool second_half = threadIdx.x >= blockDim.x / 2;
  if (skip == Skip::kByReturn && second_half) return;
  if (skip == Skip::kByBranch && second_half) {
    // nothing: these threads come to the end of the kernel
  } else if (skip == Skip::kByOtherBarrier && second_half) {
    __syncthreads();
  } else if (skip == Skip::kByShuffle && threadIdx.x == 0) {
    __shfl_sync(kFull, 1, 0);
  } else {
    __syncthreads();
  }
}

std::string fault_of_skip(Skip skip) {
  return fault_of([&] { launch(skip_barrier, dim3(2), dim3(256), 0, kStream, skip); });
}

void test_divergence() {
  for (const Order order : kOrders) {
    set_order(order, 3);
    for (const Skip skip : {Skip::kByBranch, Skip::kByReturn}) {
      const std::string fault = fault_of_skip(skip);
      check_fault(fault, "barrier at test_emulator.cpp:", "a skipped barrier is named");
      check_fault(fault, "reached by 128 of 256 threads; 128 threads have ended", "a skipped barrier is counted");
    }
    const std::string two = fault_of_skip(Skip::kByOtherBarrier);
    const size_t first = two.find("reached by 128 of 256 threads");
    check(first != std::string::npos && two.find("reached by 128 of 256 threads", first + 1) != std::string::npos,
          "two barriers are both reported");
    const std::string mixed = fault_of_skip(Skip::kByShuffle);
    check_fault(mixed, "reached by 255 of 256 threads", "a barrier against a shuffle");
    check_fault(mixed, "with mask 0xffffffff reached by 1 of 32 lanes of warp 0", "a shuffle against a barrier");
    check(sums_are_right<false>(order, 3), "a launch after failed ones");
  }
}

__global__ void read_before_writing(float* out, unsigned* aligned) {
  KFAC2_SHARED(float, first);
  out[threadIdx.x] = (&first)[threadIdx.x];
  (&first)[threadIdx.x] = 1;  // the next block must not see it
  *aligned = reinterpret_cast<uintptr_t>(&first) % 16 == 0;
}

struct Large {
  double2 pairs[8];
};

__global__ void want_large(double* out) {
  KFAC2_SHARED(Large, large);
  large.pairs[threadIdx.x].x = threadIdx.x;
  if (threadIdx.x == 7) *out = large.pairs[7].x;
}

void test_shared_memory() {
  std::vector<float> out(33);
  unsigned aligned = 0;
  check(launch(read_before_writing, dim3(2), dim3(33), 33 * sizeof(float), kStream, out.data(), &aligned) ==
                cudaSuccess &&
            aligned == 1,
        "shared memory is aligned");
  bool poisoned = true;
  for (const float value : out) poisoned &= std::isnan(value);
  check(poisoned, "shared memory is poisoned for each block");
  double last = 0;
  check(launch(want_large, dim3(1), dim3(8), sizeof(Large), kStream, &last) == cudaSuccess && last == 7,
        "shared memory as a struct");
  check_fault(fault_of([&] { launch(want_large, dim3(1), dim3(8), sizeof(Large) - 1, kStream, &last); }),
              "larger than the launch's shared memory", "a struct larger than the shared memory");
}

// ---- Warps ----

template <typename T>
__global__ void shuffle_segments(T* out, int width) {
  const int lane = static_cast<int>(threadIdx.x % warpSize);
  const T value = static_cast<T>(threadIdx.x + 100);
  T* mine = out + threadIdx.x * 4;
  // In a row and with nothing between, so that a lane which runs ahead would disturb another one.
  mine[0] = __shfl_down_sync(kFull, value, 3, width);
  mine[1] = __shfl_sync(kFull, value, lane + 1, width);
  mine[2] = __shfl_xor_sync(kFull, value, width / 2, width);
  mine[3] = __shfl_xor_sync(kFull, mine[2], width / 2, width);
}

template <typename T>
void test_segments(int width) {
  constexpr int kThreads = 64;
  for (const Order order : kOrders) {
    set_order(order, 11);
    std::vector<T> out(kThreads * 4);
    launch(shuffle_segments<T>, dim3(1), dim3(kThreads), 0, kStream, out.data(), width);
    bool right = true;
    for (int thread = 0; thread < kThreads; ++thread) {
      const int within = thread % width, start = thread - within;
      const T* got = out.data() + thread * 4;
      right &= got[0] == static_cast<T>(100 + (within + 3 < width ? thread + 3 : thread));
      right &= got[1] == static_cast<T>(100 + start + (within + 1) % width);
      right &= got[2] == static_cast<T>(100 + (thread ^ (width / 2)));
      right &= got[3] == static_cast<T>(100 + thread);
    }
    check(right, "shuffles in segments");
  }
}

// A lane may read an earlier segment by xor, but gets its own value for a later one.
__global__ void cross_segments(int* out) {
  out[threadIdx.x] = __shfl_xor_sync(kFull, static_cast<int>(threadIdx.x), 8, 8);
}

__global__ void add_all(double* sums) {
  double sum = threadIdx.x + 0.5;
  for (int distance = warpSize / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(kFull, sum, distance);
  sums[threadIdx.x] = sum;
}

// The halves of a warp come at different times and different numbers of times.
__global__ void half_warps(int* out, unsigned* ballots) {
  const int lane = static_cast<int>(threadIdx.x);
  int sum = lane;
  if (lane < 16) {
    for (int distance = 8; distance > 0; distance /= 2) sum += __shfl_xor_sync(0x0000ffffu, sum, distance);
  } else {
    for (int turn = 0; turn < 3; ++turn) sum = __shfl_down_sync(0xffff0000u, sum, 1);
  }
  __syncwarp();
  out[lane] = sum;
  ballots[lane] = __ballot_sync(kFull, lane % 3 == 0);
}

void test_warps() {
  for (const int width : {32, 16, 8}) {
    test_segments<int>(width);
    test_segments<unsigned>(width);
    test_segments<float>(width);
    test_segments<double>(width);
    test_segments<long long>(width);
  }
  for (const Order order : kOrders) {
    set_order(order, 5);
    std::vector<int> crossed(32), halves(32);
    std::vector<double> sums(64);
    std::vector<unsigned> ballots(32);
    launch(cross_segments, dim3(1), dim3(32), 0, kStream, crossed.data());
    launch(add_all, dim3(1), dim3(64), 0, kStream, sums.data());
    launch(half_warps, dim3(1), dim3(32), 0, kStream, halves.data(), ballots.data());
    bool right = true;
    for (int lane = 0; lane < 32; ++lane) {
      right &= crossed[lane] == (lane & 8 ? lane - 8 : lane);
      right &= sums[lane] == 31 * 16 + 16 && sums[lane + 32] == 31 * 16 + 16 + 32 * 32;
      right &= halves[lane] == (lane < 16 ? 120 : std::min(lane + 3, 31));
      right &= ballots[lane] == 0x49249249u;
    }
    check(right, "sums by xor, half warps, ballot");
  }
}

__global__ void lose_lane(int* out) {
  if (threadIdx.x == 37) return;
  *out = __shfl_xor_sync(kFull, 1, 1);
}

__global__ void shuffle_in_mask(unsigned mask, int width, float* out) {
  out[threadIdx.x] = __shfl_down_sync(mask, 1.0f, 1, width);
}

__global__ void mix_operations(int* out) {
  if (threadIdx.x % 2 == 0) {
    *out = __shfl_sync(kFull, 1, 0);
  } else {
    *out = __shfl_xor_sync(kFull, 1, 1);
  }
}

// Each lane names the other, but with masks that differ.
__global__ void load_vector(const float* numbers) {
  (void)*kfac2::cuda::aligned<const kfac2::cuda::Vector<float>>(numbers);
}

__global__ void disagree(int* out) { *out = __shfl_sync(threadIdx.x == 0 ? 3u : 7u, 1, 0); }

void test_warp_faults() {
  int out = 0;
  std::vector<float> floats(32);
  for (const Order order : kOrders) {
    set_order(order, 2);
    const std::string lost = fault_of([&] { launch(lose_lane, dim3(1), dim3(64), 0, kStream, &out); });
    check_fault(lost, "__shfl_xor_sync at test_emulator.cpp:", "a missing lane is named");
    check_fault(lost, "with mask 0xffffffff reached by 31 of 32 lanes of warp 1; 33 threads have ended",
                "a missing lane is counted");
    check_fault(
        fault_of([&] { launch(shuffle_in_mask, dim3(1), dim3(32), 0, kStream, 0xfffffff7u, 32, floats.data()); }),
        "lane 3 is not in its own mask", "a caller outside its mask");
    check_fault(fault_of([&] { launch(shuffle_in_mask, dim3(1), dim3(32), 0, kStream, kFull, 12, floats.data()); }),
                "width 12 is not a power of two", "a wrong width");
    check_fault(fault_of([&] { launch(mix_operations, dim3(1), dim3(32), 0, kStream, &out); }), "in another operation",
                "different shuffles that meet");
    check_fault(fault_of([&] { launch(disagree, dim3(1), dim3(2), 0, kStream, &out); }),
                "with mask 0x00000003 reached by 1 of 2 lanes of warp 0", "masks that differ");
    check_fault(fault_of([&] { launch(load_vector, dim3(1), dim3(1), 0, kStream, floats.data() + 1); }),
                "16 bytes are moved at once that are not aligned", "an address that is not aligned");
    // A warp of 20 lanes: the value of lane 20, which is not there, is undefined.
    launch(shuffle_in_mask, dim3(1), dim3(20), 0, kStream, kFull, 32, floats.data());
    check(floats[18] == 1 && std::isnan(floats[19]), "an undefined lane is poisoned");
  }
}

// ---- Launches ----

__global__ void count_threads(unsigned* count) { atomicAdd(count, 1u); }

template <size_t kBytes>
struct Parameter {
  char bytes[kBytes];
};

template <size_t kBytes>
__global__ void take_parameter(unsigned* count, Parameter<kBytes> parameter) {
  atomicAdd(count, parameter.bytes[kBytes - 1] == 3 ? 1u : 1000u);
}

unsigned counted(dim3 grid, dim3 block, size_t shared_bytes, cudaError_t expected) {
  unsigned count = 0;
  check(launch(count_threads, grid, block, shared_bytes, kStream, &count) == expected, "status of a launch");
  return count;
}

template <size_t kBytes>
unsigned counted_with_parameter(cudaError_t expected) {
  unsigned count = 0;
  Parameter<kBytes> parameter{};
  parameter.bytes[kBytes - 1] = 3;
  check(launch(take_parameter<kBytes>, dim3(1), dim3(64), 0, kStream, &count, parameter) == expected,
        "status of a launch with a large parameter");
  return count;
}

void test_limits() {
  check(counted(dim3(2, 2, 2), dim3(1024), kMaxShared, cudaSuccess) == 8192, "the largest block");
  check(counted(dim3(70000), dim3(1), 0, cudaSuccess) == 70000, "many blocks");
  unsigned refused = 0;
  refused += counted(dim3(1), dim3(1025), 0, cudaErrorInvalidConfiguration);
  refused += counted(dim3(1), dim3(32, 33), 0, cudaErrorInvalidConfiguration);
  refused += counted(dim3(1), dim3(1, 1, 65), 0, cudaErrorInvalidConfiguration);
  refused += counted(dim3(1), dim3(1024, 1024, 64), 0, cudaErrorInvalidConfiguration);
  refused += counted(dim3(1), dim3(0), 0, cudaErrorInvalidConfiguration);
  refused += counted(dim3(1, 65536), dim3(1), 0, cudaErrorInvalidConfiguration);
  refused += counted(dim3(1, 1, 65536), dim3(1), 0, cudaErrorInvalidConfiguration);
  refused += counted(dim3(0x80000000u), dim3(1), 0, cudaErrorInvalidConfiguration);
  refused += counted(dim3(1), dim3(1), kMaxShared + 1, cudaErrorInvalidValue);
  refused += counted(dim3(0), dim3(32), 0, cudaSuccess);
  refused += counted(dim3(4, 0), dim3(32), 0, cudaSuccess);
  refused += counted(dim3(4, 4, 0), dim3(32), 0, cudaSuccess);
  check(refused == 0, "refused and empty launches run nothing");
  constexpr size_t kMaxParameter = 32764 - sizeof(unsigned*);
  check(counted_with_parameter<kMaxParameter>(cudaSuccess) == 64, "the largest parameter");
  check(counted_with_parameter<kMaxParameter + 1>(cudaErrorInvalidValue) == 0, "a parameter too large");
}

__global__ void throw_exception() {
  __syncthreads();
  if (threadIdx.x == 5) throw 1;
  __syncthreads();
}

__global__ void launch_again(unsigned* count) { launch(count_threads, dim3(1), dim3(1), 0, kStream, count); }

void test_exceptions() {
  check_fault(fault_of([] { launch(throw_exception, dim3(1), dim3(64), 0, kStream); }), "threw an exception",
              "an exception in a kernel");
  unsigned count = 0;
  check_fault(fault_of([&] { launch(launch_again, dim3(1), dim3(1), 0, kStream, &count); }), "another one runs",
              "a launch in a kernel");
}

__global__ void ten_barriers(float* out) {
  KFAC2_SHARED(float, first);
  float* values = &first;
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  for (int turn = 0; turn < 5; ++turn) {
    __syncthreads();
    const float next = values[(threadIdx.x + 1) % blockDim.x];
    __syncthreads();
    values[threadIdx.x] = next;
  }
  out[threadIdx.x] = values[threadIdx.x];
}

double milliseconds_for_ten_barriers() {
  constexpr unsigned kBlocks = 50;
  std::vector<float> out(256);
  const auto begin = std::chrono::steady_clock::now();
  launch(ten_barriers, dim3(kBlocks), dim3(256), 256 * sizeof(float), kStream, out.data());
  const std::chrono::duration<double, std::milli> spent = std::chrono::steady_clock::now() - begin;
  check(out[0] == 5 && out[255] == 4, "ten barriers");
  return spent.count() / kBlocks;
}

// ---- Faults that AddressSanitizer finds, in a process of their own ----

__global__ void write_shared(unsigned index) {
  KFAC2_SHARED(float, first);
  __syncthreads();
  (&first)[index + threadIdx.x] = 1;
  __syncthreads();
}

__global__ void write_global(float* values, unsigned shift) {
  __syncthreads();
  values[shift + threadIdx.x] = 1;
}

constexpr unsigned kChildThreads = 65;  // not a multiple of what AddressSanitizer counts in

int run_child(const std::string& which) {
  const unsigned shift = which == "right-bounds" ? 0 : 1;
  std::vector<float> values(kChildThreads);
  if (which != "out-of-bounds-global")
    launch(write_shared, dim3(2), dim3(kChildThreads), kChildThreads * sizeof(float), kStream, shift);
  if (which != "out-of-bounds-shared")
    launch(write_global, dim3(2), dim3(kChildThreads), 0, kStream, values.data(), shift);
  return 0;
}

#ifdef __SANITIZE_ADDRESS__

struct ChildResult {
  int status;
  std::string errors;
};

ChildResult result_of_child(const char* which) {
  const std::string self = std::filesystem::read_symlink("/proc/self/exe").string();
  FILE* pipe = popen(("'" + self + "' " + which + " 2>&1 >/dev/null").c_str(), "r");
  if (pipe == nullptr) return {-1, ""};
  std::string errors;
  char part[4096];
  for (size_t read; (read = std::fread(part, 1, sizeof part, pipe)) > 0;) errors.append(part, read);
  return {pclose(pipe), errors};
}

void test_bounds() {
  check(result_of_child("right-bounds").status == 0, "no fault where there is none");
  for (const char* which : {"out-of-bounds-shared", "out-of-bounds-global"}) {
    const ChildResult result = result_of_child(which);
    check(result.status != 0, which);
    check_fault(result.errors, "heap-buffer-overflow", which);
  }
}

#else

void test_bounds() { std::printf("Skipped the indices out of bounds: built without AddressSanitizer.\n"); }

#endif

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) return run_child(arguments[1]);
  test_reduction();
  test_indices();
  test_orders();
  test_divergence();
  test_shared_memory();
  test_warps();
  test_warp_faults();
  set_order(Order::kForward);
  test_limits();
  test_exceptions();
  test_bounds();
  const double milliseconds = milliseconds_for_ten_barriers();
  std::printf("Emulator: %d of %d checks passed; %.2f ms for a block of 256 threads with 10 barriers.\n",
              checks - failures, checks, milliseconds);
  return failures == 0 ? 0 : 1;
}

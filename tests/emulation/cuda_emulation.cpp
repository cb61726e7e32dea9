#include "cuda_emulation.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace kfac2::emulation {

Indices indices;

namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxBlockDepth = 64;
constexpr unsigned kMaxGridX = 0x7fffffff;
constexpr unsigned kMaxGridYZ = 65535;
constexpr size_t kMaxSharedBytes = 227 * 1024;
constexpr size_t kMaxParameterBytes = 32764;

constexpr unsigned kLanes = warpSize;
constexpr size_t kGuardBytes = 4096;  // below the stack: running over it stops the program
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackBytes = 256 * 1024;  // red zones make frames larger
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif
constexpr size_t kMaxReportedWaits = 8;

enum class State { kRunnable, kAtBarrier, kInWarp, kEnded, kAtFault };

// One thread of a block. Its fiber outlives the block: it waits for the next one to run.
struct Fiber {
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  ucontext_t context;
  unsigned char* memory;  // the guard page, then the stack
  void* fake_stack = nullptr;
  State state = State::kEnded;
  uint3 index{};
  unsigned number = 0;  // in the block
  Site barrier{};
  LaneRequest request{};
  uint64_t result = 0;

  unsigned lane() const { return number % kLanes; }
  unsigned warp() const { return number / kLanes; }
  unsigned char* stack() const { return memory + kGuardBytes; }
};

// The emulated device. Never destroyed, since a kernel may end the program while it stands on a stack from here.
struct Device {
  Order order = Order::kForward;
  uint64_t seed = 0;

  const Launch* launch = nullptr;  // the running one
  std::vector<std::unique_ptr<Fiber>> fibers;
  unsigned threads = 0;  // of the block: the first fibers
  Fiber* current = nullptr;
  unsigned char* shared = nullptr;
  char fault[512] = "";  // an array, as a stuck fiber never destroys its objects

  ucontext_t scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
};

Device& device() {
  static Device& only = *new Device;
  return only;
}

// ---- Changing between fibers ----

void resume(Fiber& fiber) {
  Device& at = device();
  at.current = &fiber;
  indices.thread = fiber.index;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&at.scheduler_fake_stack, fiber.stack(), kStackBytes);
#endif
  swapcontext(&at.scheduler, &fiber.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(at.scheduler_fake_stack, nullptr, nullptr);
#endif
  at.current = nullptr;
}

void suspend(Fiber& fiber, State state) {
  Device& at = device();
  fiber.state = state;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&fiber.fake_stack, at.scheduler_stack, at.scheduler_stack_bytes);
#endif
  swapcontext(&fiber.context, &at.scheduler);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &at.scheduler_stack, &at.scheduler_stack_bytes);
#endif
}

void set_fault(const char* message) { std::snprintf(device().fault, sizeof device().fault, "%s", message); }

// An exception stays in its fiber: no other stack can unwind it.
void run_thread() {
  const Launch& launch = *device().launch;
  try {
    launch.run_thread(launch.call);
  } catch (const std::exception& exception) {
    set_fault(exception.what());
  } catch (...) {
    set_fault("the kernel threw an exception");
  }
}

void fiber_main() {
  Fiber& fiber = *device().current;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &device().scheduler_stack, &device().scheduler_stack_bytes);
#endif
  for (;;) {
    run_thread();
    suspend(fiber, State::kEnded);
  }
}

Fiber::Fiber() {
  void* pages = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (pages == MAP_FAILED) throw std::bad_alloc();
  memory = static_cast<unsigned char*>(pages);
  mprotect(memory, kGuardBytes, PROT_NONE);
  getcontext(&context);
  context.uc_stack.ss_sp = stack();
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  // AddressSanitizer would otherwise forget the red zones of this stack, slowly, at every change.
  context.uc_stack.ss_size = 0;
}

Fiber::~Fiber() {
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(stack(), kStackBytes);  // of frames that never returned
#endif
  munmap(memory, kGuardBytes + kStackBytes);
}

// ---- Faults ----

std::string text_of(const Site& site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

const char* name_of(WarpOperation operation) {
  switch (operation) {
    case WarpOperation::kSync: return "__syncwarp";
    case WarpOperation::kBallot: return "__ballot_sync";
    case WarpOperation::kShuffle: return "__shfl_sync";
    case WarpOperation::kShuffleDown: return "__shfl_down_sync";
    case WarpOperation::kShuffleXor: return "__shfl_xor_sync";
  }
  return "";
}

// Lanes of the mask that the block has. The others need not come, like threads that have ended on a device.
unsigned lanes_of(const Device& at, unsigned warp, unsigned mask) {
  const unsigned lanes = std::min(kLanes, at.threads - warp * kLanes);
  return lanes == kLanes ? mask : mask & ((1u << lanes) - 1);
}

// Ends the running thread; the scheduler throws the message. Keeps no object that would need destroying.
[[noreturn]] void fail(const Site& site, const char* format, unsigned value) {
  Device& at = device();
  char message[256];
  std::snprintf(message, sizeof message, format, value);
  const char* slash = std::strrchr(site.file, '/');
  std::snprintf(at.fault, sizeof at.fault, "%s:%d: %s", slash ? slash + 1 : site.file, site.line, message);
  for (;;) suspend(*at.current, State::kAtFault);
}

struct Wait {
  std::string place, among;
  unsigned threads = 0;
};

Wait wait_of(const Device& at, const Fiber& fiber) {
  if (fiber.state == State::kAtBarrier) {
    return {"barrier at " + text_of(fiber.barrier), std::to_string(at.threads) + " threads"};
  }
  char mask[16];
  std::snprintf(mask, sizeof mask, "0x%08x", fiber.request.mask);
  const int lanes = __builtin_popcount(lanes_of(at, fiber.warp(), fiber.request.mask));
  return {std::string(name_of(fiber.request.operation)) + " at " + text_of(fiber.request.site) + " with mask " + mask,
          std::to_string(lanes) + " lanes of warp " + std::to_string(fiber.warp())};
}

// "barrier at layer_maps.cu:57 reached by 128 of 256 threads; 128 threads have ended"
std::string describe_waits(const Device& at) {
  std::map<std::string, Wait> waits;
  unsigned ended = 0;
  for (unsigned thread = 0; thread < at.threads; ++thread) {
    const Fiber& fiber = *at.fibers[thread];
    if (fiber.state == State::kEnded) {
      ++ended;
      continue;
    }
    Wait wait = wait_of(at, fiber);
    Wait& known = waits[wait.place + wait.among];
    if (known.threads == 0) known = wait;
    ++known.threads;
  }
  std::string text;
  size_t reported = 0;
  for (const auto& entry : waits) {
    if (++reported > kMaxReportedWaits) return text + "; and others";
    const Wait& wait = entry.second;
    if (!text.empty()) text += "; ";
    text += wait.place + " reached by " + std::to_string(wait.threads) + " of " + wait.among;
  }
  if (ended > 0) text += "; " + std::to_string(ended) + " threads have ended";
  return text;
}

// Fibers that are stuck in the kernel are given up, with their stacks.
[[noreturn]] void abandon_block(Device& at, const std::string& message) {
  const auto stuck = [](const std::unique_ptr<Fiber>& fiber) { return fiber->state != State::kEnded; };
  at.fibers.erase(std::remove_if(at.fibers.begin(), at.fibers.end(), stuck), at.fibers.end());
  const uint3& block = indices.block;
  throw Error(message + " (block " + std::to_string(block.x) + ", " + std::to_string(block.y) + ", " +
              std::to_string(block.z) + ")");
}

// ---- Warps ----

// The lane that a shuffle reads: the definition of shfl.sync in the PTX ISA.
unsigned source_lane(const LaneRequest& request, unsigned lane) {
  const unsigned within = static_cast<unsigned>(request.width) - 1;
  const unsigned first = lane & ~within, last = lane | within;
  const unsigned argument = request.argument & (kLanes - 1);
  switch (request.operation) {
    case WarpOperation::kShuffle: return first | (argument & within);
    case WarpOperation::kShuffleDown: return lane + argument <= last ? lane + argument : lane;
    case WarpOperation::kShuffleXor: return (lane ^ argument) <= last ? lane ^ argument : lane;
    default: return lane;
  }
}

void check_request(const LaneRequest& request, unsigned lane) {
  const int width = request.width;
  if ((request.mask >> lane & 1) == 0) fail(request.site, "lane %u is not in its own mask", lane);
  if (width < 1 || width > warpSize || (width & (width - 1)) != 0)
    fail(request.site, "width %u is not a power of two up to 32", static_cast<unsigned>(width));
}

// Whether all lanes of the caller's mask wait for it, so that they can go on.
bool warp_is_complete(const Device& at, const Fiber& caller) {
  const LaneRequest& wanted = caller.request;
  const unsigned lanes = lanes_of(at, caller.warp(), wanted.mask);
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if ((lanes >> lane & 1) == 0) continue;
    const Fiber& fiber = *at.fibers[caller.warp() * kLanes + lane];
    if (fiber.state != State::kInWarp || fiber.request.mask != wanted.mask) return false;
  }
  return true;
}

// Results are kept apart from requests, so that a lane that runs ahead to its next shuffle disturbs nothing.
void complete_warp(Device& at, const Fiber& caller) {
  const unsigned first = caller.warp() * kLanes;
  const unsigned lanes = lanes_of(at, caller.warp(), caller.request.mask);
  uint64_t ballot = 0;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if ((lanes >> lane & 1) == 0) continue;
    const LaneRequest& request = at.fibers[first + lane]->request;
    if (request.operation != caller.request.operation || request.value_bytes != caller.request.value_bytes)
      fail(request.site, "lane %u meets lanes of its mask in another operation", lane);
    ballot |= (request.value & 1) << lane;
  }
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if ((lanes >> lane & 1) == 0) continue;
    Fiber& fiber = *at.fibers[first + lane];
    const unsigned source = source_lane(fiber.request, lane);
    const bool defined = lanes >> source & 1;
    fiber.result = defined ? at.fibers[first + source]->request.value : ~uint64_t{0};
    if (fiber.request.operation == WarpOperation::kBallot) fiber.result = ballot;
    fiber.state = State::kRunnable;
  }
}

// ---- Blocks ----

bool all_at_one_barrier(const Device& at) {
  const Site& site = at.fibers[0]->barrier;
  for (unsigned thread = 0; thread < at.threads; ++thread) {
    const Fiber& fiber = *at.fibers[thread];
    if (fiber.state != State::kAtBarrier || fiber.barrier.line != site.line) return false;
    if (fiber.barrier.file != site.file && std::strcmp(fiber.barrier.file, site.file) != 0) return false;
  }
  return true;
}

void start_threads(Device& at, const dim3& block) {
  at.threads = block.x * block.y * block.z;
  while (at.fibers.size() < at.threads) at.fibers.push_back(std::make_unique<Fiber>());
  for (unsigned thread = 0; thread < at.threads; ++thread) {
    Fiber& fiber = *at.fibers[thread];
    fiber.number = thread;
    fiber.index = {thread % block.x, thread / block.x % block.y, thread / (block.x * block.y)};
    fiber.state = State::kRunnable;
  }
}

// Lets each thread that can run do so once; tells whether there was one.
bool run_round(Device& at, const std::vector<unsigned>& order) {
  bool any = false;
  for (const unsigned thread : order) {
    Fiber& fiber = *at.fibers[thread];
    if (fiber.state != State::kRunnable) continue;
    any = true;
    resume(fiber);
    if (at.fault[0] != '\0') abandon_block(at, at.fault);
  }
  return any;
}

template <typename Number>
std::vector<Number> first_order(Order order, Number count) {
  std::vector<Number> numbers(count);
  std::iota(numbers.begin(), numbers.end(), Number(0));
  if (order == Order::kReverse) std::reverse(numbers.begin(), numbers.end());
  return numbers;
}

void run_threads(Device& at, std::mt19937_64& random) {
  std::vector<unsigned> order = first_order(at.order, at.threads);
  for (;;) {
    if (at.order == Order::kShuffled) std::shuffle(order.begin(), order.end(), random);
    const bool any = run_round(at, order);
    if (all_at_one_barrier(at)) {
      for (const unsigned thread : order) at.fibers[thread]->state = State::kRunnable;
    } else if (!any) {
      break;
    }
  }
  for (const unsigned thread : order)
    if (at.fibers[thread]->state != State::kEnded) abandon_block(at, describe_waits(at));
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

void run_block(Device& at, const Launch& launch, std::mt19937_64& random) {
  // Of exactly this size, so that AddressSanitizer sees one element too many.
  void* memory = nullptr;
  if (posix_memalign(&memory, kSharedAlignment, launch.shared_bytes) != 0) throw std::bad_alloc();
  const std::unique_ptr<void, Free> owner(memory);
  std::memset(memory, 0xff, launch.shared_bytes);
  at.shared = static_cast<unsigned char*>(memory);
  start_threads(at, launch.block);
  run_threads(at, random);
}

void run_grid(Device& at, const Launch& launch) {
  const dim3& grid = launch.grid;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  std::mt19937_64 random(at.seed);
  std::vector<uint64_t> shuffled;
  if (at.order == Order::kShuffled) {
    shuffled = first_order(at.order, blocks);
    std::shuffle(shuffled.begin(), shuffled.end(), random);
  }
  for (uint64_t turn = 0; turn < blocks; ++turn) {
    uint64_t block = turn;
    if (at.order == Order::kReverse) block = blocks - 1 - turn;
    if (at.order == Order::kShuffled) block = shuffled[turn];
    indices.block = {static_cast<unsigned>(block % grid.x), static_cast<unsigned>(block / grid.x % grid.y),
                     static_cast<unsigned>(block / grid.x / grid.y)};
    run_block(at, launch, random);
  }
}

cudaError_t check_limits(const Launch& launch) {
  const dim3 &grid = launch.grid, &block = launch.block;
  if (grid.x > kMaxGridX || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ) return cudaErrorInvalidConfiguration;
  if (block.x > kMaxThreads || block.y > kMaxThreads || block.z > kMaxBlockDepth) return cudaErrorInvalidConfiguration;
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads) return cudaErrorInvalidConfiguration;
  if (launch.shared_bytes > kMaxSharedBytes || launch.parameter_bytes > kMaxParameterBytes)
    return cudaErrorInvalidValue;
  return cudaSuccess;
}

// While a launch runs; also when it is left by an exception.
class Running {
 public:
  Running(Device& at, const Launch& launch) : at_(at) {
    if (at.launch != nullptr) throw Error("a launch while another one runs");
    at.launch = &launch;
    at.fault[0] = '\0';
    indices.block_extent = launch.block;
    indices.grid_extent = launch.grid;
  }
  ~Running() {
    at_.launch = nullptr;
    at_.shared = nullptr;
  }
  Running(const Running&) = delete;
  Running& operator=(const Running&) = delete;

 private:
  Device& at_;
};

Fiber& running_thread() {
  Fiber* fiber = device().current;
  if (fiber == nullptr) throw Error("device code called outside a kernel");
  return *fiber;
}

}  // namespace

void set_order(Order order, uint64_t seed) {
  device().order = order;
  device().seed = seed;
}

Order order() { return device().order; }

void barrier(Site site) {
  Fiber& fiber = running_thread();
  fiber.barrier = site;
  suspend(fiber, State::kAtBarrier);
}

void expect_aligned(const void* data, size_t bytes, Site site) {
  if (reinterpret_cast<uintptr_t>(data) % bytes != 0)
    fail(site, "%u bytes are moved at once that are not aligned", static_cast<unsigned>(bytes));
}

uint64_t exchange(const LaneRequest& request) {
  Fiber& fiber = running_thread();
  check_request(request, fiber.lane());
  fiber.request = request;
  fiber.state = State::kInWarp;
  if (warp_is_complete(device(), fiber)) {
    complete_warp(device(), fiber);
  } else {
    suspend(fiber, State::kInWarp);
  }
  return fiber.result;
}

void* shared_bytes(size_t bytes) {
  running_thread();
  const Device& at = device();
  if (bytes > at.launch->shared_bytes) throw Error("KFAC2_SHARED of a type larger than the launch's shared memory");
  return at.shared;
}

int64_t launches_run = 0;

int64_t launches() { return launches_run; }

bool counting_only = false;

void set_counting_only(bool only) { counting_only = only; }

cudaError_t run(const Launch& launch) {
  if (launch.grid.x == 0 || launch.grid.y == 0 || launch.grid.z == 0) return cudaSuccess;
  Device& at = device();
  const cudaError_t error = check_limits(launch);
  if (error != cudaSuccess) return error;
  if (!counting_only) {
    const Running running(at, launch);
    run_grid(at, launch);
  }
  ++launches_run;
  return cudaSuccess;
}

}  // namespace kfac2::emulation

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
  }
  return "unrecognized error code";
}

// Where the kernels run: on the emulator, or, without KFAC2_EMULATE, on a CUDA device. The tests are the same.
#pragma once

#include <cstdint>

#ifdef KFAC2_EMULATE
#include "cuda_emulation.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace kfac2::tests {

#ifdef KFAC2_EMULATE
constexpr bool kOnDevice = false;
using emulation::kOrders;
using emulation::launches;
using emulation::Order;
using emulation::set_order;
#else
constexpr bool kOnDevice = true;
// A device has an order of its own.
enum class Order { kForward, kShuffled = kForward };
constexpr Order kOrders[] = {Order::kForward};
inline void set_order(Order, uint64_t) {}
int64_t launches();  // that ran, since the program began
#endif

// Whether workspaces are filled with NaNs.
bool poisoned();

}  // namespace kfac2::tests

// From tensors and flattened windows to the torch-free description in include/window.h.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "window.h"

namespace kfac2 {

// A window crosses the dispatcher as 17 integers: kernel, stride, low padding, high padding and dilation for
// the three axes each (unused leading axes: 1, 1, 0, 0, 1), then groups and bias. kfac2/window.py writes them.
constexpr int64_t kWindowNumbers = 5 * kSpatialRank + 2;

// Checks every tensor ([N, C, *spatial], floating point, at most three spatial axes) against its window.
std::vector<RowSource> row_sources(const char* op, const std::vector<torch::stable::Tensor>& tensors,
                                   const std::vector<int64_t>& windows);

// The windows of single places with the groups of these: those of output gradients.
std::vector<int64_t> windows_of_places(const std::vector<int64_t>& windows);

torch::headeronly::ScalarType sum_type(const RowSource& source);

}  // namespace kfac2

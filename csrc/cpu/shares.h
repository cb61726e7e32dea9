// Many small pieces of work dealt out as few tasks.
#pragma once

#include <cstdint>
#include <vector>

namespace kfac2::cpu {

constexpr int64_t kElementsPerTask = 1 << 15;  // fewer are not worth waking a thread for

// Runs of consecutive pieces with about kElementsPerTask elements: the first piece of each, then their number.
template <typename Elements>
std::vector<int64_t> shares(int64_t pieces, const Elements& elements_of) {
  std::vector<int64_t> first = {0};
  int64_t elements = 0;
  for (int64_t piece = 0; piece < pieces; ++piece) {
    elements += elements_of(piece);
    if (elements < kElementsPerTask && piece + 1 < pieces) continue;
    first.push_back(piece + 1);
    elements = 0;
  }
  return first;
}

}  // namespace kfac2::cpu

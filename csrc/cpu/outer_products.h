// sums += sum over positions of left right^T, channels x channels: the inner loop of covariances.cpp.
#pragma once

#include <cstdint>

namespace kfac2::cpu {

constexpr int64_t kVectorBytes = 64;

template <typename Sum>
struct OuterProducts {
  const Sum* left;   // positions of `channels` numbers, count[0] x ... x count[3] of them, step[] apart
  const Sum* right;  // the same positions, moved by a fixed distance
  Sum* sums;         // [channels, channels]
  int64_t channels;  // whole vectors of kVectorBytes
  bool upper_only;   // left == right: what lies under the diagonal may be left out
  int64_t count[4];
  int64_t step[4];
};

void add_outer_products(const OuterProducts<float>& run);
void add_outer_products(const OuterProducts<double>& run);

}  // namespace kfac2::cpu

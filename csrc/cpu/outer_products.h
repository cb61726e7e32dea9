// sums += sum over positions of left right^T, rows x columns: the inner loop of every dense product here.
#pragma once

#include <cstdint>

#include "simd.h"

namespace kfac2::cpu {

constexpr int64_t kRowMultiple = 8;

template <typename Sum>
struct OuterProducts {
  const Sum* left;   // positions of `rows` numbers, count[0] x ... x count[3] of them, step[] apart
  const Sum* right;  // as many positions of `columns` numbers, as far apart
  Sum* sums;         // [rows, columns], rows sums_step apart
  int64_t rows;      // a multiple of kRowMultiple
  int64_t columns;   // whole vectors of kVectorBytes
  int64_t sums_step;
  bool upper_only;  // what lies under the diagonal may be left out
  int64_t count[4];
  int64_t step[4];
};

void add_outer_products(const OuterProducts<float>& run);
void add_outer_products(const OuterProducts<double>& run);

}  // namespace kfac2::cpu

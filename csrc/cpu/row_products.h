// sums += g^T (a^T D), rows a of a block with a panel of columns of D: the inner loop of directional_derivatives.
#pragma once

#include <cstdint>

#include "simd.h"

namespace kfac2::cpu {

constexpr int64_t kRowsAtOnce = 8;
constexpr int64_t kPanelVectors = 2;                                   // of columns, at most
constexpr int64_t kSumLanes = kVectorBytes / int64_t{sizeof(double)};  // numbers that a sum is kept in

template <typename Sum>
struct Row {
  const Sum* input;
  const Sum* grad;
  double* sums;  // of its sample
};

// Numbers of an input row that lie next to each other, `shift` behind the row's pointer.
struct Run {
  int64_t shift, length;
};

template <typename Sum>
struct RowProducts {
  const Row<Sum>* rows;
  int64_t row_count;  // a multiple of kRowsAtOnce
  const Run* runs;
  int64_t run_count;
  const Sum* panel;                    // [numbers of all runs, columns]
  const Sum* start;                    // [columns], what the products begin with
  int64_t vectors;                     // of columns
  int64_t grad_offset[kPanelVectors];  // from a row's gradient to the numbers that meet a vector of columns
  int64_t sums_offset[kPanelVectors];  // from a row's sums to those that these products are added to
};

void add_row_products(const RowProducts<float>& work);
void add_row_products(const RowProducts<double>& work);

}  // namespace kfac2::cpu

// A tile of products (kRows rows x kVectors vectors of columns) stays in registers while all numbers of the rows pass:
// kVectors loads and kRows broadcasts for kRows * kVectors fused multiply-adds. Then it meets its gradients, and is
// added to the sums in double: no product is written to memory.
#include "row_products.h"

#include <cstring>

namespace kfac2::cpu {
namespace {

using Doubles = VectorOf<double>::type;

template <typename Vector, typename Number>
KFAC2_INLINE Vector load(const Number* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

KFAC2_INLINE Doubles widened(VectorOf<double>::type vector) { return vector; }

KFAC2_INLINE Doubles widened(VectorOf<float>::type vector) {
  typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
  Half halves[2];
  std::memcpy(halves, &vector, sizeof vector);
  return __builtin_convertvector(halves[0], Doubles) + __builtin_convertvector(halves[1], Doubles);
}

KFAC2_INLINE void add_to(double* sums, Doubles more) {
  const Doubles sum = load<Doubles>(sums) + more;
  std::memcpy(sums, &sum, sizeof sum);
}

template <typename Sum, int kRows, int kVectors>
KFAC2_INLINE void add_tile(const RowProducts<Sum>& work, const Row<Sum>* rows, int64_t first) {
  using Vector = typename VectorOf<Sum>::type;
  constexpr int64_t kLanes = kVectorBytes / sizeof(Sum);
  Vector tile[kRows][kVectors];  // in registers: all loops over it are unrolled
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) tile[r][v] = load<Vector>(work.start + (first + v) * kLanes);
  const Sum* columns = work.panel + first * kLanes;
  const int64_t step = work.vectors * kLanes;
  for (int64_t run = 0; run < work.run_count; ++run) {
    const Sum* row[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) row[r] = rows[r].input + work.runs[run].shift;
    for (int64_t i = 0; i < work.runs[run].length; ++i, columns += step) {
      Vector column[kVectors];
      std::memcpy(column, columns, sizeof column);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) tile[r][v] += row[r][i] * column[v];
    }
  }
  const bool of_one_sample = rows[0].sums == rows[kRows - 1].sums;
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    const int64_t grad_offset = work.grad_offset[first + v], sums_offset = work.sums_offset[first + v];
    Doubles all = {};
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Doubles sum = widened(tile[r][v] * load<Vector>(rows[r].grad + grad_offset));
      if (of_one_sample) {
        all += sum;
      } else {
        add_to(rows[r].sums + sums_offset, sum);
      }
    }
    if (of_one_sample) add_to(rows[0].sums + sums_offset, all);
  }
}

template <typename Sum, int kRows, int kVectors>
KFAC2_INLINE void add_all_tiles(const RowProducts<Sum>& work) {
  static_assert(kRowsAtOnce % kRows == 0 && kPanelVectors % kVectors == 0, "tiles divide rows and panels");
  for (int64_t row = 0; row < work.row_count; row += kRows) {
    int64_t first = 0;
    for (; first + kVectors <= work.vectors; first += kVectors)
      add_tile<Sum, kRows, kVectors>(work, work.rows + row, first);
    for (; first < work.vectors; ++first) add_tile<Sum, kRows, 1>(work, work.rows + row, first);
  }
}

#if KFAC2_X86_DISPATCH
KFAC2_TARGET("avx512f") void add_avx512(const RowProducts<float>& work) { add_all_tiles<float, 8, 2>(work); }
KFAC2_TARGET("avx512f") void add_avx512(const RowProducts<double>& work) { add_all_tiles<double, 8, 2>(work); }
KFAC2_TARGET("avx2,fma") void add_avx2(const RowProducts<float>& work) { add_all_tiles<float, 4, 1>(work); }
KFAC2_TARGET("avx2,fma") void add_avx2(const RowProducts<double>& work) { add_all_tiles<double, 4, 1>(work); }
#endif

template <typename Sum>
void dispatch(const RowProducts<Sum>& work) {
#if KFAC2_X86_DISPATCH
  if (has_avx512()) return add_avx512(work);
  if (has_avx2()) return add_avx2(work);
#endif
  add_all_tiles<Sum, 2, 1>(work);
}

}  // namespace

void add_row_products(const RowProducts<float>& work) { dispatch(work); }
void add_row_products(const RowProducts<double>& work) { dispatch(work); }

}  // namespace kfac2::cpu

// A tile of sums (kRows rows x kVectors vectors of columns) stays in registers while all positions
// pass: kVectors loads and kRows broadcasts for kRows * kVectors fused multiply-adds. The tile is chosen for
// each instruction set, and the instruction set when the program runs, so that a build serves older machines.
#include "outer_products.h"

#include <algorithm>
#include <cstring>

#include "simd.h"

namespace kfac2::cpu {
namespace {

template <typename Sum, int kRows, int kVectors>
KFAC2_INLINE void add_tile(const OuterProducts<Sum>& run, int64_t row, int64_t column) {
  using Vector = typename VectorOf<Sum>::type;
  constexpr int64_t kLanes = kVectorBytes / sizeof(Sum);
  Vector tile[kRows][kVectors];
  Sum* sums = run.sums + row * run.sums_step + column;
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) std::memcpy(&tile[r][v], sums + r * run.sums_step + v * kLanes, kVectorBytes);
  const Sum* left = run.left + row;
  const Sum* right = run.right + column;
  const int64_t step = run.step[3];
  for (int64_t i = 0; i < run.count[0]; ++i) {
    for (int64_t j = 0; j < run.count[1]; ++j) {
      for (int64_t k = 0; k < run.count[2]; ++k) {
        const int64_t line = i * run.step[0] + j * run.step[1] + k * run.step[2];
        const Sum *a = left + line, *b = right + line;
        for (int64_t l = 0; l < run.count[3]; ++l, a += step, b += step) {
          Vector columns[kVectors];
          std::memcpy(columns, b, sizeof columns);
          for (int r = 0; r < kRows; ++r)
            for (int v = 0; v < kVectors; ++v) tile[r][v] += a[r] * columns[v];
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) std::memcpy(sums + r * run.sums_step + v * kLanes, &tile[r][v], kVectorBytes);
}

template <typename Sum, int kRows, int kVectors>
KFAC2_INLINE void add_all_tiles(const OuterProducts<Sum>& run) {
  static_assert(kRowMultiple % kRows == 0, "tiles divide the rows");
  constexpr int64_t kLanes = kVectorBytes / sizeof(Sum);
  for (int64_t column = 0; column < run.columns;) {
    const bool wide = column + kVectors * kLanes <= run.columns;
    const int64_t end = column + (wide ? kVectors : 1) * kLanes;
    for (int64_t row = 0; row < (run.upper_only ? std::min(end, run.rows) : run.rows); row += kRows) {
      if (wide) {
        add_tile<Sum, kRows, kVectors>(run, row, column);
      } else {
        add_tile<Sum, kRows, 1>(run, row, column);
      }
    }
    column = end;
  }
}

#if KFAC2_X86_DISPATCH
KFAC2_TARGET("avx512f") void add_avx512(const OuterProducts<float>& run) { add_all_tiles<float, 8, 2>(run); }
KFAC2_TARGET("avx512f") void add_avx512(const OuterProducts<double>& run) { add_all_tiles<double, 8, 2>(run); }
KFAC2_TARGET("avx2,fma") void add_avx2(const OuterProducts<float>& run) { add_all_tiles<float, 4, 1>(run); }
KFAC2_TARGET("avx2,fma") void add_avx2(const OuterProducts<double>& run) { add_all_tiles<double, 4, 1>(run); }
#endif

template <typename Sum>
void dispatch(const OuterProducts<Sum>& run) {
#if KFAC2_X86_DISPATCH
  if (has_avx512()) return add_avx512(run);
  if (has_avx2()) return add_avx2(run);
#endif
  add_all_tiles<Sum, 2, 1>(run);
}

}  // namespace

void add_outer_products(const OuterProducts<float>& run) { dispatch(run); }
void add_outer_products(const OuterProducts<double>& run) { dispatch(run); }

}  // namespace kfac2::cpu

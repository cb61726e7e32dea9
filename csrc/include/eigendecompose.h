// eigendecompose: every matrix M of many stacks of symmetric matrices as V diag(w) V^T, w ascending and floored at 0,
// by Jacobi's method (Golub & Van Loan, "Matrix Computations", 8.5): plane rotations, each making one pair of
// off-diagonal elements zero, until all are negligible. CUDA alone: a CPU has LAPACK, which was faster from 5 x 5 on.
#pragma once

#include <cstdint>

#include "op.h"

namespace kfac2 {

struct MatrixStack {
  int64_t first_item;    // the number of its first matrix: those of all stacks are counted on
  const void* matrices;  // [count, size, size], contiguous; of each matrix the lower triangle is read
  void* values;          // [count, size]
  void* vectors;         // [count, size, size], in columns
  int64_t count;
  int64_t size;  // at least 1
};

enum class EigenStatus : int32_t {
  kGood = 0,
  kNotFinite = 1,  // 0 was decomposed instead: values 0, vectors the identity
  kNotConverged = 2,
};

// Convergence is quadratic at the end: 6 to 10 sweeps are usual.
constexpr int kMaxSweeps = 30;

constexpr int64_t kMaxMatrixSize = 256;  // also kfac2._C.eigendecompose_max_size

// Shared memory that a block may take: a device of any architecture from sm_80 on grants it.
constexpr int64_t kSharedLimit = 96 * 1024;

struct EigendecomposeParams {
  const MatrixStack* stacks;  // [stack_count]
  int32_t* status;            // [matrices], an EigenStatus for each
  int64_t stack_count;
  int64_t matrices;  // in all stacks
  bool is_double;
  // For the tests alone: fewer sweeps; matrices that do not fit into the limit lie in the workspace.
  int max_sweeps = kMaxSweeps;
  int64_t shared_limit = kSharedLimit;
};

namespace cuda {
std::unique_ptr<Launch> eigendecompose(const EigendecomposeParams& params);
}

}  // namespace kfac2

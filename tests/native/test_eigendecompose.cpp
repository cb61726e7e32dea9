// The CPU kernel of eigendecompose: what its results must satisfy, on drawn matrices, under sanitizers.
#include "drawn_matrices.h"

using namespace kfac2;
using namespace kfac2::tests;

namespace {

template <typename T>
void test_drawn(Random& random) {
  DrawnStacks<T> stacks = DrawnStacks<T>::drawn(random, 20);
  const EigendecomposeParams params = stacks.params();
  const int64_t half = params.matrices / 2;
  cpu::eigendecompose(params, half, params.matrices);
  cpu::eigendecompose(params, 0, half);
  stacks.expect_decomposed("eigendecompose");
}

// What needs more sweeps than it is given says so, and what does not is decomposed.
void test_too_few_sweeps() {
  Random random(1);
  DrawnStacks<double> stacks;
  for (const Kind kind : {Kind::kPositive, Kind::kDiagonal, Kind::kNaN}) stacks.add(random, kind, 9, 1);
  const EigendecomposeParams params = stacks.params(1);
  cpu::eigendecompose(params, 0, params.matrices);
  if (stacks.status() != std::vector<int32_t>{2, 0, 1}) {
    std::fputs("a matrix that did not converge is not reported\n", stderr);
    std::exit(1);
  }
}

}  // namespace

int main() {
  for (int seed = 0; seed < 60; ++seed) {
    Random random(seed);
    test_drawn<float>(random);
    test_drawn<double>(random);
  }
  test_too_few_sweeps();
  std::puts("the CPU kernel decomposes");
  return 0;
}

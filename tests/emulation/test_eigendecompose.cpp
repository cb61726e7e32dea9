// The CUDA kernel of eigendecompose, run thread by thread in three orders: what its results must satisfy, with the
// matrices in shared memory, in the workspace, and one in each.
#include "cuda_emulation.h"
#include "drawn_matrices.h"
#include "workspace.h"

using namespace kfac2;
using namespace kfac2::tests;

namespace {

// Shared memory for all matrices of these sizes and their V; in double for less and less of them; for nothing.
constexpr int64_t kLimits[] = {kSharedLimit, 8192, 6144, 0};

template <typename T>
void decompose(DrawnStacks<T>& stacks, int64_t shared_limit, int max_sweeps = kMaxSweeps) {
  EigendecomposeParams params = stacks.params(max_sweeps);
  params.shared_limit = shared_limit;
  run_emulated("eigendecompose", *cuda::eigendecompose(params));
}

template <typename T>
void test_drawn(Random& random, int64_t largest, int64_t shared_limit) {
  DrawnStacks<T> stacks = DrawnStacks<T>::drawn(random, largest);
  decompose(stacks, shared_limit);
  stacks.expect_decomposed("eigendecompose");
}

// Sizes of several warps, and more pairs than a warp.
void test_large(Random& random) {
  DrawnStacks<float> stacks;
  for (const int64_t size : {70, 2, 33}) stacks.add(random, Kind::kPositive, size, 1);
  decompose(stacks, 32 * 1024);
  stacks.expect_decomposed("eigendecompose");
}

// Its matrix does not fit into what a block may take.
void test_above_the_limit(Random& random) {
  DrawnStacks<double> stacks;
  stacks.add(random, Kind::kRankOne, 112, 1);
  stacks.add(random, Kind::kPositive, 5, 2);
  decompose(stacks, kSharedLimit);
  stacks.expect_decomposed("eigendecompose");
}

// One element that is not negligible, anywhere: seen by one thread alone.
void test_every_single_element(Random& random) {
  DrawnStacks<float> stacks;
  for (const int64_t size : {2, 3, 5, 6}) stacks.add(random, Kind::kOneElement, size, 40);
  decompose(stacks, kSharedLimit);
  stacks.expect_decomposed("eigendecompose");
}

int64_t launches_for(int64_t count) {
  Random random(1);
  DrawnStacks<float> stacks;
  for (int64_t i = 0; i < count; ++i) stacks.add(random, Kind::kPositive, 1 + i % 7, 1);
  const int64_t before = emulation::launches();
  decompose(stacks, kSharedLimit);
  return emulation::launches() - before;
}

void expect(bool holds, const char* message) {
  if (holds) return;
  std::fputs(message, stderr);
  std::exit(1);
}

void test_status_and_refusals() {
  Random random(2);
  DrawnStacks<double> few, none, wide;
  for (const Kind kind : {Kind::kPositive, Kind::kDiagonal, Kind::kNaN}) few.add(random, kind, 9, 1);
  decompose(few, kSharedLimit, 1);
  expect(few.status() == std::vector<int32_t>{2, 0, 1}, "a matrix that did not converge is not reported\n");
  none.add(random, Kind::kPositive, 4, 0);
  decompose(none, kSharedLimit);
  wide.add(random, Kind::kZero, kMaxMatrixSize + 1, 1);
  const auto launch = cuda::eigendecompose(wide.params());
  const Workspace workspace(launch->workspace());
  expect(launch->run(workspace.get(), nullptr) == cudaErrorInvalidValue,
         "a matrix that is too large was not refused\n");
}

}  // namespace

int main(int argc, char** argv) {
  const int seeds = argc > 1 ? std::atoi(argv[1]) : 4;
  for (int seed = 0; seed < seeds; ++seed) {
    for (const emulation::Order order : emulation::kOrders) {
      emulation::set_order(order, static_cast<unsigned>(seed));
      Random random(seed);
      test_drawn<float>(random, 20, kLimits[seed % 4]);
      test_drawn<double>(random, 20, kLimits[(seed + 1) % 4]);
      if (seed > 0) continue;
      test_every_single_element(random);
      test_large(random);
      if (order == emulation::Order::kShuffled) test_above_the_limit(random);
    }
  }
  test_status_and_refusals();
  const int64_t few = launches_for(3), many = launches_for(112);
  expect(few == many, "the number of launches grows with the number of matrices\n");
  std::printf("eigendecompose decomposes in every order; launches for 3 and for 112 matrices: %d\n",
              static_cast<int>(many));
  return 0;
}

// The CUDA kernel of eigendecompose: what its results must satisfy, with the matrices in shared memory, in the
// workspace, and one in each; on the emulator, in three orders of threads and blocks.
#include "cases.h"
#include "drawn_matrices.h"
#include "run_on_device.h"

using namespace kfac2;
using namespace kfac2::tests;

namespace {

// Shared memory for all matrices of these sizes and their V; in double for less and less of them; for nothing.
constexpr int64_t kLimits[] = {kSharedLimit, 8192, 6144, 0};

template <typename T>
void decompose(DrawnStacks<T>& stacks, int64_t shared_limit, int max_sweeps = kMaxSweeps) {
  EigendecomposeParams params = stacks.params(max_sweeps);
  params.shared_limit = shared_limit;
  run_on_device("eigendecompose", cuda::eigendecompose, params);
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
  const int64_t before = launches();
  decompose(stacks, kSharedLimit);
  return launches() - before;
}

void test_status_and_refusals() {
  Random random(2);
  DrawnStacks<double> few, none, wide;
  for (const Kind kind : {Kind::kPositive, Kind::kDiagonal, Kind::kNaN}) few.add(random, kind, 9, 1);
  decompose(few, kSharedLimit, 1);
  expect_true(few.status() == std::vector<int32_t>{2, 0, 1}, "a matrix that did not converge is not reported");
  none.add(random, Kind::kPositive, 4, 0);
  decompose(none, kSharedLimit);
  wide.add(random, Kind::kZero, kMaxMatrixSize + 1, 1);
  const auto launch = cuda::eigendecompose(wide.params());
  const Workspace workspace(launch->workspace());
  expect_true(launch->run(workspace.get(), nullptr) == cudaErrorInvalidValue,
              "a matrix that is too large was not refused");
}

void test_launches_do_not_grow() {
  const int few = static_cast<int>(launches_for(3)), many = static_cast<int>(launches_for(112));
  if (few != many || few == 0) fail("launches grow with the number of matrices, from %d to %d", few, many);
  if (!kOnDevice) std::printf("launches of eigendecompose, 3 or 112 matrices: %d\n", many);
}

void run_all(Cases& cases) {
  for (int seed = 0; seed < cases.seeds(4); ++seed) {
    for (const Order order : kOrders) {
      set_order(order, static_cast<unsigned>(seed));
      Random random(seed);
      cases.run("in float", seed, [&] { test_drawn<float>(random, 20, kLimits[seed % 4]); });
      cases.run("in double", seed, [&] { test_drawn<double>(random, 20, kLimits[(seed + 1) % 4]); });
      if (seed > 0) continue;
      cases.run("every single element", seed, [&] { test_every_single_element(random); });
      cases.run("large", seed, [&] { test_large(random); });
      if (order == Order::kShuffled) cases.run("above the limit", seed, [&] { test_above_the_limit(random); });
    }
  }
  cases.run("status and refusals", 2, test_status_and_refusals);
  cases.run("launches", 1, test_launches_do_not_grow);
}

const Registered here("eigendecompose", run_all);

}  // namespace

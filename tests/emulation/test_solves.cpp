// The CUDA kernels that invert factors against csrc/cpu; on the emulator, in three orders of threads and blocks.
#include <limits>

#include "cases.h"
#include "run_on_device.h"

using namespace kfac2;
using namespace kfac2::tests;

namespace {

// Pairs of factors, and both of their inverses.
template <typename T>
struct DrawnPairs {
  std::vector<std::vector<T>> memory;
  std::vector<FactorPair> pairs;
  std::vector<int32_t> status;

  DrawnPairs(Random& random, const std::vector<int64_t>& sizes) : status(sizes.size() / 2, -1) {
    for (size_t i = 0; i < sizes.size(); i += 2) {
      const int64_t d_in = sizes[i], d_out = sizes[i + 1];
      T* A = add(drawn_factor<T>(random, d_in));
      T* G = add(drawn_factor<T>(random, d_out));
      T* A_inv = add(std::vector<T>(d_in * d_in, T(-7)));
      pairs.push_back({A, G, A_inv, add(std::vector<T>(d_out * d_out, T(-7))), d_in, d_out});
    }
  }

  T* add(std::vector<T> numbers) {
    memory.push_back(std::move(numbers));
    return memory.back().data();
  }

  FactoredTikhonovInverseParams params(double damping) {
    return {pairs.data(), status.data(), static_cast<int64_t>(pairs.size()), damping, sizeof(T) == sizeof(double)};
  }

  void invert_on_device(double damping) {
    run_on_device("factored_tikhonov_inverse", cuda::factored_tikhonov_inverse, params(damping));
  }

  void invert_on_host(double damping) { run(*cpu::factored_tikhonov_inverse(params(damping))); }
};

template <typename T>
void expect_same_inverses(DrawnPairs<T>& got, DrawnPairs<T>& expected) {
  for (size_t i = 0; i < got.pairs.size(); ++i) {
    if (got.status[i] != expected.status[i])
      fail("status of pair %d: %d, expected %d", static_cast<int>(i), got.status[i], expected.status[i]);
    if (expected.status[i] != 0) continue;
    const FactorPair &a = got.pairs[i], &b = expected.pairs[i];
    const double tolerance = sizeof(T) == sizeof(double) ? 1e-11 : 1e-4;
    expect_equal("A_inv", static_cast<const T*>(a.A_inv), static_cast<const T*>(b.A_inv), a.d_in * a.d_in, tolerance);
    expect_equal("G_inv", static_cast<const T*>(a.G_inv), static_cast<const T*>(b.G_inv), a.d_out * a.d_out, tolerance);
  }
}

template <typename T>
void test_inverses(int seed, const std::vector<int64_t>& sizes) {
  Random random(seed), again(seed);
  DrawnPairs<T> got(random, sizes), expected(again, sizes);
  got.invert_on_device(0.01);
  expected.invert_on_host(0.01);
  expect_same_inverses(got, expected);
}

// Factors that cannot be inverted, each beside sound ones.
template <typename T>
void test_bad_factors() {
  const std::vector<int64_t> sizes = {3, 70, 70, 3, 5, 5, 70, 2, 4, 4, 3, 3};
  Random random(1), again(1);
  DrawnPairs<T> got(random, sizes), expected(again, sizes);
  for (DrawnPairs<T>* pairs : {&got, &expected}) {
    const auto A = [&](int i) { return static_cast<T*>(const_cast<void*>(pairs->pairs[i].A)); };
    A(1)[69 * 71] = T(-9);  // indefinite, in the last block
    A(2)[2 * 6] = T(-9);    // in the only block
    A(3)[1] = A(3)[70] = std::numeric_limits<T>::quiet_NaN();
    A(4)[0] = std::numeric_limits<T>::infinity();
  }
  got.invert_on_device(0.01);
  expected.invert_on_host(0.01);
  expect_same_inverses(got, expected);
  expect_true(got.status == std::vector<int32_t>{0, 1, 1, 1, 1, 0},
              "factors that cannot be inverted were not reported, or sound ones were");
}

int64_t launches_for(const std::vector<int64_t>& sizes) {
  Random random(1);
  DrawnPairs<float> pairs(random, sizes);
  const int64_t before = launches();
  pairs.invert_on_device(0.01);
  return launches() - before;
}

void test_launches_do_not_grow_with_layers() {
  std::vector<int64_t> few = {10, 70, 3, 4}, many;
  for (int i = 0; i < 56; ++i) many.insert(many.end(), few.begin(), few.end());
  const int for_few = static_cast<int>(launches_for(few)), for_many = static_cast<int>(launches_for(many));
  if (for_few != for_many || for_few == 0) fail("launches grow with the number of layers, %d to %d", for_few, for_many);
  if (!kOnDevice)
    std::printf("launches of factored_tikhonov_inverse, 2 or 112 layers, two blocks of rows at most: %d\n", for_few);
}

void run_all(Cases& cases) {
  for (const Order order : kOrders) {
    for (int seed = 0; seed < cases.seeds(3); ++seed) {
      set_order(order, static_cast<unsigned>(seed));
      Random random(100 + seed);
      std::vector<int64_t> sizes;
      for (int i = 0; i < 8; ++i) sizes.push_back(draw(random, 1, 40));
      cases.run("small in double", seed, [&] { test_inverses<double>(seed, sizes); });
      sizes.insert(sizes.end(), {64, 65, 32, 33, 130, 1});
      cases.run("in float", seed, [&] { test_inverses<float>(seed, sizes); });
      cases.run("in double", seed, [&] { test_inverses<double>(seed, {33, 70}); });
    }
    cases.run("bad factors in float", 1, test_bad_factors<float>);
    cases.run("bad factors in double", 1, test_bad_factors<double>);
  }
  cases.run("launches", 1, test_launches_do_not_grow_with_layers);
}

const Registered here("solves", run_all);

}  // namespace

// A test file that fails, beside one that passes: what run_cases.cpp says of them is tested.
#include "cases.h"

using namespace kfac2::tests;

namespace {

void fail_from_three_on(Cases& cases) {
  for (int seed = 0; seed < cases.seeds(5); ++seed)
    cases.run("draw", seed, [&] { expect_true(seed < 3, "three or more"); });
}

void pass(Cases& cases) {
  for (int seed = 0; seed < cases.seeds(5); ++seed) cases.run("draw", seed, [] {});
}

const Registered bad("bad", fail_from_three_on), good("good", pass), none("none", [](Cases&) {});

}  // namespace

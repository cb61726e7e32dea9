// directional_derivatives against csrc/cpu on drawn layers; on the emulator, in three orders of threads and blocks.
#include "cases.h"
#include "drawn_directions.h"
#include "run_on_device.h"

using namespace kfac2;
using namespace kfac2::tests;

namespace {

void test_layers(std::vector<DrawnDirections> drawn) {
  std::vector<DrawnDirections> twins = drawn;
  const std::vector<DirectionalLayer> layers = with_results(drawn), expected = with_results(twins);
  const int64_t count = static_cast<int64_t>(layers.size());
  run_on_device("directional_derivatives", cuda::directional_derivatives, {layers.data(), count});
  run(*cpu::directional_derivatives({expected.data(), count}));
  for (size_t i = 0; i < drawn.size(); ++i)
    expect_equal("directional_derivatives", drawn[i].derivatives.data(), twins[i].derivatives.data(),
                 drawn[i].derivatives.size(), drawn[i].layer.is_double() ? 1e-12 : 1e-5);
}

std::vector<DrawnDirections> drawn_layers(Random& random) {
  std::vector<DrawnDirections> drawn;
  for (int64_t i = draw(random, 1, 5); i > 0; --i) {
    switch (draw(random, 0, 3)) {
      case 0: drawn.push_back(DrawnDirections::drawn<float>(random, ElementType::kFloat32)); break;
      case 1: drawn.push_back(DrawnDirections::drawn<double>(random, ElementType::kFloat64)); break;
      case 2: drawn.push_back(DrawnDirections::drawn<Half>(random, ElementType::kFloat16)); break;
      default: drawn.push_back(DrawnDirections::drawn<BFloat16>(random, ElementType::kBFloat16)); break;
    }
  }
  return drawn;
}

// Several tiles of columns, whose edges divide neither the channels nor the directions, and of rows.
std::vector<DrawnDirections> large_layers(Random& random) {
  std::vector<DrawnDirections> drawn;
  const int64_t shapes[][6] = {{3, 5, 9, 8, 3, 70}, {70, 33, 1, 1, 1, 65}, {2, 17, 1, 40, 3, 3}};
  for (const auto& s : shapes) {
    auto inputs = std::make_shared<DrawnSource<float>>(random, ElementType::kFloat32, s[0], s[1], s[2], s[3], s[4]);
    drawn.push_back(DrawnDirections::with_inputs<float>(random, inputs, s[5]));
  }
  return drawn;
}

// Launches for so many small layers.
int64_t launches_for(int64_t count) {
  Random random(1);
  std::vector<DrawnDirections> drawn;
  for (int64_t i = 0; i < count; ++i) {
    auto inputs = std::make_shared<DrawnSource<float>>(random, ElementType::kFloat32, 2, 2, 4, 4, 3);
    drawn.push_back(DrawnDirections::with_inputs<float>(random, inputs, 3));
  }
  const std::vector<DirectionalLayer> layers = with_results(drawn);
  const int64_t before = launches();
  run_on_device("directional_derivatives", cuda::directional_derivatives, {layers.data(), count});
  return launches() - before;
}

void test_launches_do_not_grow_with_layers() {
  const int few = static_cast<int>(launches_for(3)), many = static_cast<int>(launches_for(112));
  if (few == 0 || many - few > 3)  // of tables, 30 KB each
    fail("launches grow with the number of layers, from %d to %d", few, many);
  if (!kOnDevice) std::printf("launches of directional_derivatives: %d for 3 layers, %d for 112\n", few, many);
}

void run_all(Cases& cases) {
  for (int seed = 0; seed < cases.seeds(8); ++seed) {
    for (const Order order : kOrders) {
      set_order(order, static_cast<unsigned>(seed));
      Random random(seed);
      cases.run("layers", seed, [&] { test_layers(drawn_layers(random)); });
      if (seed == 0) cases.run("large layers", seed, [&] { test_layers(large_layers(random)); });
    }
  }
  cases.run("launches", 1, test_launches_do_not_grow_with_layers);
}

const Registered here("directions", run_all);

}  // namespace

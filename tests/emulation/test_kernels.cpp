// The CUDA kernels of the statistics against csrc/cpu on drawn layers. On the emulator: compiled by g++ and run thread
// by thread, in three orders of threads and blocks, with poisoned shared memory, under sanitizers.
#include <array>
#include <memory>

#include "cases.h"
#include "drawn_products.h"
#include "drawn_sums.h"
#include "run_on_device.h"

using namespace kfac2;
using namespace kfac2::tests;

namespace {

// Layers of several types and sizes, as one call sees them.
struct DrawnLayers {
  std::vector<std::shared_ptr<void>> memory;
  std::vector<RowSource> sources;

  template <typename T>
  void add(Random& random, ElementType type, int64_t batch) {
    auto layer = std::make_shared<DrawnSource<T>>(random, type, batch);
    sources.push_back(layer->source);
    memory.push_back(layer);
  }

  DrawnLayers() = default;

  // Sizes at which kernels do what they do not do on small ones.
  static DrawnLayers large(Random& random) {
    DrawnLayers layers;
    const int64_t shapes[][5] = {
        {2, 3, 91, 101, 3},  // a map cut into tiles that do not divide it
        {1, 1, 1, 9001, 3},  // one long line, cut
        {3, 70, 4, 5, 3},    // several tiles of channels
        {20, 5, 30, 32, 1},  // positions shared among blocks
        {300, 17, 1, 1, 1},  // rows of a Linear layer
    };
    for (const auto& s : shapes) {
      auto layer = std::make_shared<DrawnSource<float>>(random, ElementType::kFloat32, s[0], s[1], s[2], s[3], s[4]);
      layers.sources.push_back(layer->source);
      layers.memory.push_back(layer);
    }
    auto wide = std::make_shared<DrawnSource<float>>(random, ElementType::kFloat32, 2, 1, 1, 80, 1);
    wide->source.window.kernel[2] = 65;  // many pieces
    wide->source.window.pad_low[2] = wide->source.window.pad_high[2] = 32;
    layers.sources.push_back(wide->source);
    layers.memory.push_back(wide);
    return layers;
  }

  // Tiles of 64 channels, some of them partly filled, in both layouts, with several shares of positions.
  static DrawnLayers wide(Random& random) {
    DrawnLayers layers;
    layers.add_wide<float>(random, ElementType::kFloat32, {5, 100, 6, 7, 2});
    layers.add_wide<float>(random, ElementType::kFloat32, {300, 50, 1, 1, 1});
    layers.add_wide<Half>(random, ElementType::kFloat16, {70, 50, 1, 3, 1});
    layers.add_wide<BFloat16>(random, ElementType::kBFloat16, {70, 50, 1, 3, 1});
    return layers;
  }

  template <typename T>
  void add_wide(Random& random, ElementType type, const std::array<int64_t, 5>& shape) {
    for (const bool channels_last : {false, true}) {
      auto layer = std::make_shared<DrawnSource<T>>(random, type, shape[0], shape[1], shape[2], shape[3], shape[4]);
      layer->lay_out(channels_last);
      sources.push_back(layer->source);
      memory.push_back(layer);
    }
  }

  // So many positions that there are as many blocks of products as are wanted, with more than the least each.
  static DrawnLayers of_many_positions(Random& random) {
    DrawnLayers layers;
    const int64_t shapes[][4] = {{1600, 1, 20, 20}, {600000, 2, 1, 1}};
    for (const auto& s : shapes) {
      auto layer = std::make_shared<DrawnSource<double>>(random, ElementType::kFloat64, s[0], s[1], s[2], s[3], 1);
      layers.sources.push_back(layer->source);
      layers.memory.push_back(layer);
    }
    return layers;
  }

  explicit DrawnLayers(Random& random) {
    const int64_t count = draw(random, 1, 5);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t batch = draw(random, 1, 6);
      switch (draw(random, 0, 3)) {
        case 0: add<float>(random, ElementType::kFloat32, batch); break;
        case 1: add<double>(random, ElementType::kFloat64, batch); break;
        case 2: add<Half>(random, ElementType::kFloat16, batch); break;
        default: add<BFloat16>(random, ElementType::kBFloat16, batch); break;
      }
    }
  }
};

// One output buffer for each layer: doubles, used as floats where the layer sums in float.
struct Outputs {
  std::vector<std::vector<double>> data;
  std::vector<void*> pointers;

  template <typename Size>
  Outputs(const std::vector<RowSource>& sources, const Size& size_of) {
    for (const RowSource& source : sources) data.emplace_back(size_of(source), -1.0);
    for (std::vector<double>& numbers : data) pointers.push_back(numbers.data());
  }
};

template <typename Size>
void expect_same(const char* what, const std::vector<RowSource>& sources, const Outputs& got, const Outputs& expected,
                 const Size& size_of) {
  for (size_t i = 0; i < sources.size(); ++i) {
    if (sources[i].element_type == ElementType::kFloat64) {
      expect_equal(what, got.data[i].data(), expected.data[i].data(), size_of(sources[i]), 1e-12);
    } else {
      expect_equal(what, static_cast<const float*>(got.pointers[i]), static_cast<const float*>(expected.pointers[i]),
                   size_of(sources[i]), 1e-5);
    }
  }
}

void test_layers(const DrawnLayers& layers) {
  const std::vector<RowSource>& sources = layers.sources;
  const int64_t count = static_cast<int64_t>(sources.size());

  const std::vector<RowSource> groups = split_groups(sources);
  const int64_t group_count = static_cast<int64_t>(groups.size());
  const auto map_size = [](const RowSource& s) { return s.batch * s.grid_places(); };
  Outputs maps(groups, map_size), expected_maps(groups, map_size);
  run_on_device("layer_maps", cuda::layer_maps, {groups.data(), maps.pointers.data(), group_count});
  run(*cpu::layer_maps({groups.data(), expected_maps.pointers.data(), group_count}));
  expect_same("layer_maps", groups, maps, expected_maps, map_size);

  const auto size = [](const RowSource& s) { return s.window.groups * Triangle{s.row_length()}.numbers(); };
  Outputs covariances(sources, size), expected(sources, size);
  run_on_device("covariances", cuda::covariances, {sources.data(), covariances.pointers.data(), count});
  run(*cpu::covariances({sources.data(), expected.pointers.data(), count}));
  expect_same("covariances", sources, covariances, expected, size);

  // What was summed before, of every other layer, and this time's sums by a number of their own.
  Outputs averages(sources, size), expected_averages(sources, size);
  std::vector<const void*> previous;
  std::vector<double> scales;
  for (int64_t i = 0; i < count; ++i) {
    previous.push_back(i % 2 == 0 ? covariances.pointers[i] : nullptr);
    scales.push_back(0.25 + static_cast<double>(i));
  }
  CovariancesParams params{sources.data(), averages.pointers.data(), count, previous.data(), 0.7, scales.data()};
  run_on_device("covariances", cuda::covariances, params);
  params.covariances = expected_averages.pointers.data();
  run(*cpu::covariances(params));
  expect_same("averages", sources, averages, expected_averages, size);
}

// Tokens, whose maps are cut into tiles: of some places, and of single ones.
void test_maps_of_tokens(Random& random) {
  for (const auto& [channels, places] : {std::pair<int64_t, int64_t>{700, 101}, {40000, 3}}) {
    DrawnSource<float> tokens(random, ElementType::kFloat32, 2, channels, 1, places, 1);
    tokens.lay_out(true);
    std::vector<float> maps(2 * places, -1.0f), expected(maps.size());
    void *pointer = maps.data(), *expected_pointer = expected.data();
    run_on_device("layer_maps", cuda::layer_maps, {&tokens.source, &pointer, 1});
    run(*cpu::layer_maps({&tokens.source, &expected_pointer, 1}));
    expect_equal("layer_maps", maps.data(), expected.data(), maps.size(), 1e-4);
  }
}

// Planes of single places, which are cut into tiles, begin where 16 bytes do or not, and are strided or padded; more of
// them than come as a parameter. One has maps much larger than its input.
template <typename T>
void test_maps_of_planes(Random& random, ElementType type) {
  struct Shape {
    int64_t batch, channels, height, width, kernel, stride, padding;
  };
  const Shape shapes[] = {{2, 64, 40, 40, 1, 1, 0}, {3, 70, 7, 7, 1, 1, 0},  {2, 9, 14, 14, 3, 1, 1},
                          {2, 33, 30, 28, 1, 2, 0}, {1, 5, 80, 96, 3, 1, 1}, {1, 4, 70, 70, 3, 2, 1},
                          {5, 3, 8, 8, 1, 1, 1},    {2, 2, 1, 1, 1, 1, 90},  {1, 300, 9, 64, 1, 1, 0},
                          {40, 2, 4, 4, 5, 1, 2},   {1, 6, 128, 33, 3, 1, 0}};
  std::vector<std::unique_ptr<DrawnSource<T>>> layers;
  std::vector<RowSource> sources;
  for (int repeat = 0; repeat < 2; ++repeat) {
    for (const Shape& shape : shapes) {
      layers.push_back(std::make_unique<DrawnSource<T>>(random, type, shape.batch, shape.channels, shape.height,
                                                        shape.width, shape.kernel));
      RowSource& source = layers.back()->source;
      for (int axis = 1; axis < kSpatialRank; ++axis) {
        source.window.stride[axis] = shape.stride;
        source.window.pad_low[axis] = source.window.pad_high[axis] = shape.padding;
      }
      sources.push_back(source);
    }
  }
  const auto map_size = [](const RowSource& s) { return s.batch * s.grid_places(); };
  for (const size_t count : {size_t{3}, sources.size()}) {
    const std::vector<RowSource> some(sources.begin(), sources.begin() + static_cast<int64_t>(count));
    Outputs maps(some, map_size), expected(some, map_size);
    const int64_t given = static_cast<int64_t>(count);
    run_on_device("layer_maps", cuda::layer_maps, {some.data(), maps.pointers.data(), given});
    run(*cpu::layer_maps({some.data(), expected.pointers.data(), given}));
    expect_same("layer_maps", some, maps, expected, map_size);
  }
}

// Of maps of several grids; `many` of them have one, more than a tile holds.
template <typename T>
void test_sums(Random& random, int64_t many = 0) {
  const double tolerance = sizeof(T) == sizeof(double) ? 1e-12 : 1e-5;
  const int64_t others = draw(random, 1, 3) == 1 ? draw(random, 33, 70) : draw(random, 1, 9), count = many + others;
  const int64_t batch = count == 3 ? 700 : draw(random, 1, 9);  // 700: places shared among blocks
  std::vector<std::vector<T>> data;
  std::vector<GridMap> maps;
  for (int64_t i = 0; i < count; ++i) {
    GridMap map{nullptr, {static_cast<int>(draw(random, 0, 2)), {}}};
    for (int axis = 0; axis < map.grid.rank; ++axis) map.grid.extent[axis] = count > 9 ? 3 : draw(random, 1, 7);
    if (i < many) map.grid = {1, {3}};
    const int64_t begin = draw(random, 0, 2) / 2;  // some are not aligned
    data.push_back(drawn_numbers<T>(random, begin + batch * map.grid.places()));
    map.data = data.back().data() + begin;
    maps.push_back(map);
  }
  std::vector<T> previous = drawn_numbers<T>(random, count * count);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < i; ++j) previous[i * count + j] = previous[j * count + i];
  std::vector<T> sums(count * count), expected(count * count);
  CrossLayerSumsParams params{maps.data(),
                              sums.data(),
                              draw(random, 0, 1) == 0 ? nullptr : previous.data(),
                              0.7,
                              0.3,
                              count,
                              batch,
                              sizeof(T) == sizeof(double),
                              draw(random, 0, 1) == 0 ? Downsample::kNearest : Downsample::kArea};
  run_on_device("cross_layer_sums", cuda::cross_layer_sums, params);
  params.sums = expected.data();
  run(*cpu::cross_layer_sums(params));
  expect_equal("cross_layer_sums", sums.data(), expected.data(), sums.size(), tolerance);

  const int64_t layers = draw(random, 1, 5);
  std::vector<int64_t> layer_of_block(count);
  for (int64_t& layer : layer_of_block) layer = draw(random, 0, layers - 1);
  std::vector<T> fisher(layers * layers), expected_fisher(layers * layers);
  DrawnSums<T> inputs(random, count), grads(random, count), expected_inputs = inputs, expected_grads = grads;
  run_on_device(
      "coarse_fisher", cuda::coarse_fisher,
      {inputs.params(), grads.params(), 0.7, layer_of_block.data(), fisher.data(), count, layers, params.is_double});
  run(*cpu::coarse_fisher({expected_inputs.params(), expected_grads.params(), 0.7, layer_of_block.data(),
                           expected_fisher.data(), count, layers, params.is_double}));
  expect_equal("averages of inputs", inputs.averages.data(), expected_inputs.averages.data(), count * count, tolerance);
  expect_equal("averages of grads", grads.averages.data(), expected_grads.averages.data(), count * count, tolerance);
  expect_equal("coarse_fisher", fisher.data(), expected_fisher.data(), fisher.size(), tolerance);
  for (int64_t i = 0; i < layers * layers; ++i)
    expect_true(fisher[i] == fisher[i % layers * layers + i / layers], "the coarse Fisher is not symmetric");
}

// One launch for as many products as parameters hold, without tables.
void test_products(Random& random, int64_t count, int64_t largest, int64_t expected_launches) {
  DrawnProducts drawn(random, count, largest);
  const std::vector<PanelProduct> products = drawn.products();
  const int64_t before = launches();
  run_on_device("fold_products", cuda::fold_products, {products.data(), count, kKept});
  if (!kOnDevice) expect_true(launches() == before + expected_launches, "fold_products has other launches");
  drawn.check();
}

// Launches of each op for so many small layers, bias and groups among them.
std::vector<int64_t> launches_for(int64_t count) {
  Random random(1);
  std::vector<std::unique_ptr<DrawnSource<float>>> layers;
  std::vector<RowSource> sources;
  std::vector<GridMap> maps;
  for (int64_t i = 0; i < count; ++i) {
    layers.push_back(std::make_unique<DrawnSource<float>>(random, ElementType::kFloat32, 2, 2, 4, 4, 3));
    sources.push_back(layers.back()->source);
    maps.push_back({layers.back()->data.data(), {1, {4}}});
  }
  const auto map_size = [](const RowSource& s) { return s.batch * s.grid_places(); };
  const auto size = [](const RowSource& s) { return s.window.groups * Triangle{s.row_length()}.numbers(); };
  Outputs map_outputs(sources, map_size), covariances(sources, size);
  std::vector<float> sums(count * count);
  std::vector<int64_t> layer_of_block(count, 0);
  float fisher = 0;
  DrawnSums<float> inputs(random, count), grads(random, count);
  std::vector<int64_t> before = {launches()};
  run_on_device("layer_maps", cuda::layer_maps, {sources.data(), map_outputs.pointers.data(), count});
  before.push_back(launches());
  run_on_device("covariances", cuda::covariances, {sources.data(), covariances.pointers.data(), count});
  before.push_back(launches());
  run_on_device("cross_layer_sums", cuda::cross_layer_sums,
                {maps.data(), sums.data(), nullptr, 0, 1, count, 2, false, Downsample::kNearest});
  before.push_back(launches());
  run_on_device("coarse_fisher", cuda::coarse_fisher,
                {inputs.params(), grads.params(), 0.5, layer_of_block.data(), &fisher, count, 1, false});
  before.push_back(launches());
  std::vector<int64_t> of_each;
  for (size_t op = 0; op + 1 < before.size(); ++op) of_each.push_back(before[op + 1] - before[op]);
  return of_each;
}

// Beside the launches of the op there is one for each 30 KB of tables.
void test_launches_do_not_grow_with_layers() {
  const std::vector<int64_t> few = launches_for(3), many = launches_for(112);
  const char* names[] = {"layer_maps", "covariances", "cross_layer_sums", "coarse_fisher"};
  const int64_t tables[] = {2, 2, 1, 1};  // so many for 112 layers, at most
  for (size_t op = 0; op < few.size(); ++op) {
    const int for_few = static_cast<int>(few[op]), for_many = static_cast<int>(many[op]);
    if (for_few == 0 || for_many - for_few >= tables[op])
      fail("launches of %s grow with the number of layers, from %d to %d", names[op], for_few, for_many);
    if (!kOnDevice) std::printf("launches of %s: %d for 3 layers, %d for 112\n", names[op], for_few, for_many);
  }
}

// What a kernel cannot do comes back as an error, before anything is launched.
void test_refusals() {
  Random random(2);
  DrawnSource<float> layer(random, ElementType::kFloat32, 1, 1, 1, 80, 3);
  std::vector<float> out(1 << 16, -1.0f);
  void* pointer = out.data();
  const int64_t before = launches();
  layer.source.extent[2] = layer.source.window.kernel[2] = 5000;  // one patch does not fit into shared memory
  const auto launch = cuda::layer_maps({&layer.source, &pointer, 1});
  const Workspace workspace(launch->workspace());
  const int maps = launch->run(workspace.get(), nullptr);
  expect_true(maps == cudaErrorInvalidValue && launches() == before && out[0] == -1.0f,
              "a kernel did not refuse what it cannot do");
}

void run_all(Cases& cases) {
  for (int seed = 0; seed < cases.seeds(8); ++seed) {
    for (const Order order : kOrders) {
      set_order(order, static_cast<unsigned>(seed));
      Random random(seed);
      cases.run("layers", seed, [&] { test_layers(DrawnLayers(random)); });
      if (seed == 0) cases.run("large layers", seed, [&] { test_layers(DrawnLayers::large(random)); });
      if (seed == 1) cases.run("wide layers", seed, [&] { test_layers(DrawnLayers::wide(random)); });
      cases.run("one product", seed, [&] { test_products(random, 1, seed < 4 ? 20 : 150, 1); });
      cases.run("products", seed, [&] { test_products(random, 5, 70, 1); });
      cases.run("sums in float", seed, [&] { test_sums<float>(random); });
      cases.run("sums in double", seed, [&] { test_sums<double>(random); });
    }
  }
  Random random(0);
  cases.run("sums of many maps", 0, [&] { test_sums<float>(random, 67); });
  cases.run("sums of many maps in double", 0, [&] { test_sums<double>(random, 131); });
  cases.run("maps of tokens", 0, [&] { test_maps_of_tokens(random); });
  cases.run("some products", 0, [&] { test_products(random, 31, 9, 1); });
  cases.run("many products", 0, [&] { test_products(random, 300, 9, 2); });
  cases.run("maps of planes", 0, [&] { test_maps_of_planes<float>(random, ElementType::kFloat32); });
  cases.run("maps of planes in double", 0, [&] { test_maps_of_planes<double>(random, ElementType::kFloat64); });
  cases.run("maps of planes in half", 0, [&] { test_maps_of_planes<Half>(random, ElementType::kFloat16); });
  cases.run("maps of planes in bfloat16", 0, [&] { test_maps_of_planes<BFloat16>(random, ElementType::kBFloat16); });
  cases.run("many positions", 0, [&] { test_layers(DrawnLayers::of_many_positions(random)); });
  cases.run("launches", 1, test_launches_do_not_grow_with_layers);
  cases.run("refusals", 2, test_refusals);
}

const Registered here("kernels", run_all);

}  // namespace

// The CUDA kernels of every step against csrc/cpu: gather, shift and scale, write; on the emulator, in three orders.
#include <cmath>
#include <limits>
#include <memory>

#include "cases.h"
#include "run_on_device.h"

using namespace kfac2;
using namespace kfac2::tests;

namespace {

// Gradients of some layers, each with its columns along two axes in either order, some with a bias; then one gradient
// that belongs to no layer.
struct DrawnStep {
  std::vector<std::shared_ptr<void>> memory;
  std::vector<size_t> bytes;  // of each gradient's memory
  std::vector<GradientPart> parts;
  std::vector<int64_t> spans;
  int64_t elements = 0;

  explicit DrawnStep(Random& random, int64_t layers, int64_t largest) {
    for (int64_t i = 0; i < layers; ++i) {
      const bool bias = draw(random, 0, 1) == 0;
      const int64_t rows = draw(random, 1, largest), a = draw(random, 1, 5), b = draw(random, 1, 9),
                    d_in = a * b + bias, row_length = d_in + draw(random, 0, 3);
      add(random, rows, a, b, elements, row_length, i);
      if (bias) add(random, rows, 1, 1, elements + d_in - 1, row_length, i);
      spans.insert(spans.end(), {elements, elements + rows * row_length, rows * d_in});
      elements += rows * row_length;
    }
    add(random, 7, 1, 3, -1, 0, -1);
  }

  void add(Random& random, int64_t rows, int64_t a, int64_t b, int64_t offset, int64_t row_length, int64_t layer) {
    switch (draw(random, 0, 3)) {
      case 0: return add_as<float>(random, ElementType::kFloat32, rows, a, b, offset, row_length, layer);
      case 1: return add_as<double>(random, ElementType::kFloat64, rows, a, b, offset, row_length, layer);
      case 2: return add_as<Half>(random, ElementType::kFloat16, rows, a, b, offset, row_length, layer);
      default: return add_as<BFloat16>(random, ElementType::kBFloat16, rows, a, b, offset, row_length, layer);
    }
  }

  template <typename T>
  void add_as(Random& random, ElementType type, int64_t rows, int64_t a, int64_t b, int64_t offset, int64_t row_length,
              int64_t layer) {
    auto numbers = std::make_shared<std::vector<T>>(drawn_numbers<T>(random, rows * a * b));
    GradientPart part{numbers->data(), type,   rows,       a * b, a * b,      {1, 1, 1, a * b},
                      {0, 0, 0, 1},    offset, row_length, layer, 2 * count()};
    if (draw(random, 0, 1) == 0) part.extent[2] = a, part.extent[3] = b, part.stride[2] = 1, part.stride[3] = a;
    bytes.push_back(numbers->size() * sizeof(T));
    memory.push_back(numbers);
    parts.push_back(part);
  }

  int64_t count() const { return static_cast<int64_t>(parts.size()); }

  // The same gradients in memory of their own.
  DrawnStep copy() const {
    DrawnStep other = *this;
    for (size_t i = 0; i < parts.size(); ++i) {
      auto block = std::make_shared<std::vector<unsigned char>>(bytes[i]);
      std::memcpy(block->data(), parts[i].data, bytes[i]);
      other.parts[i].data = block->data();
      other.memory.push_back(block);
    }
    return other;
  }
};

// The results of one device.
template <typename T>
struct Results {
  std::vector<T> matrices;
  int32_t first_bad = -1;
  std::vector<double> shifts, scale = {-1, -1}, factors, norms;
  float found = -1;
  std::vector<int64_t> skipped = {0, -1};
};

// Options of a step, with what they point to.
template <typename T>
struct Inputs {
  std::vector<T> directions;
  std::vector<double> rates, device_rates, in_coarse, usable, coarse_inverse, limits, largest;
  bool coarse, clip, on_device, limited;

  Inputs(Random& random, const DrawnStep& step)
      : directions(drawn_numbers<T>(random, step.elements)),
        coarse(draw(random, 0, 3) > 0),
        clip(draw(random, 0, 1) == 0),
        on_device(draw(random, 0, 1) == 0),
        limited(draw(random, 0, 3) > 0) {
    const int64_t layers = static_cast<int64_t>(step.spans.size()) / 3;
    for (int64_t i = 0; i < layers; ++i) {
      rates.push_back(0.1 * static_cast<double>(draw(random, 0, 3)));
      device_rates.push_back(0.5 * static_cast<double>(draw(random, 1, 3)));
      in_coarse.push_back(draw(random, 0, 4) > 0);
      usable.push_back(draw(random, 0, 4) > 0);
      const double infinity = std::numeric_limits<double>::infinity();
      limits.push_back(draw(random, 0, 3) > 0 ? 0.1 * static_cast<double>(draw(random, 1, 30)) : infinity);
      largest.push_back(draw(random, 0, 1) > 0 ? 1e4 : infinity);
    }
    coarse_inverse = drawn_numbers<double>(random, layers * layers);
  }

  ShiftAndScaleParams params(const DrawnStep& step, Results<T>& results) const {
    const int64_t layers = static_cast<int64_t>(rates.size());
    results.shifts.assign(layers, -1.0);
    results.factors.assign(layers, -1.0);
    results.norms.assign(layers, -1.0);
    return {results.matrices.data(),
            directions.data(),
            step.spans.data(),
            rates.data(),
            on_device ? device_rates.data() : nullptr,
            in_coarse.data(),
            usable.data(),
            coarse ? coarse_inverse.data() : nullptr,
            limited ? limits.data() : nullptr,
            largest.data(),
            &results.first_bad,
            2 * step.count(),
            0.7,
            clip ? 1e-3 : std::numeric_limits<double>::infinity(),
            layers,
            results.shifts.data(),
            results.scale.data(),
            &results.found,
            results.factors.data(),
            results.norms.data(),
            results.skipped.data(),
            sizeof(T) == sizeof(double)};
  }
};

template <typename T>
void step_on_device(const DrawnStep& step, const Inputs<T>& inputs, Results<T>& results) {
  constexpr bool is_double = sizeof(T) == sizeof(double);
  const GatherGradientsParams gather{step.parts.data(), results.matrices.data(), &results.first_bad,
                                     step.count(),      2 * step.count(),        is_double};
  run_on_device("gather_gradients", cuda::gather_gradients, gather);
  run_on_device("shift_and_scale", cuda::shift_and_scale, inputs.params(step, results));
  const WriteGradientsParams write{
      step.parts.data(), inputs.directions.data(), results.shifts.data(), results.factors.data(),
      &results.found,    inputs.usable.data(),     step.count(),          is_double};
  run_on_device("write_gradients", cuda::write_gradients, write);
}

template <typename T>
void step_on_host(const DrawnStep& step, const Inputs<T>& inputs, Results<T>& results) {
  constexpr bool is_double = sizeof(T) == sizeof(double);
  run(*cpu::gather_gradients(
      {step.parts.data(), results.matrices.data(), &results.first_bad, step.count(), 2 * step.count(), is_double}));
  run(*cpu::shift_and_scale(inputs.params(step, results)));
  run(*cpu::write_gradients({step.parts.data(), inputs.directions.data(), results.shifts.data(), results.factors.data(),
                             &results.found, inputs.usable.data(), step.count(), is_double}));
}

void expect_same(bool same, const char* what) {
  if (!same) fail("%s differs", what);
}

void expect_same_gradients(const DrawnStep& got, const DrawnStep& expected) {
  for (size_t i = 0; i < got.parts.size(); ++i) {
    const int64_t count = got.parts[i].elements();
    with_type(got.parts[i].element_type, got.parts[i].data, [&](const auto* ours) {
      using Element = std::remove_const_t<std::remove_pointer_t<decltype(ours)>>;
      const auto* theirs = static_cast<const Element*>(expected.parts[i].data);
      std::vector<double> a(count), b(count);
      for (int64_t j = 0; j < count; ++j) a[j] = to_sum_type(ours[j]), b[j] = to_sum_type(theirs[j]);
      expect_equal("write_gradients", a.data(), b.data(), count, sizeof(Element) == 2 ? 1e-2 : 1e-5);
    });
  }
}

template <typename T>
void test_step(int seed, int64_t layers, int64_t largest, const char* poison) {
  Random random(seed);
  const DrawnStep got(random, layers, largest);
  Inputs<T> inputs(random, got);
  const bool overflows = poison != nullptr && poison[0] == 'd';  // a direction that float16, say, does not hold
  if (overflows) {
    inputs.usable[0] = inputs.rates[0] = 1;
    inputs.limited = inputs.clip = false;
    inputs.largest[0] = 1e4;
    inputs.directions[got.spans[1] - 1] = T(-5e4);
  }
  const double tolerance = sizeof(T) == sizeof(double) ? 1e-12 : 1e-4;
  if (poison != nullptr && !overflows) {
    const GradientPart& part = got.parts[poison[0] == 'l' ? 0 : got.count() - 1];
    with_type(part.element_type, part.data, [](auto* data) {
      data[0] = from_sum_type<std::remove_pointer_t<decltype(data)>>(
          std::numeric_limits<SumType<std::remove_pointer_t<decltype(data)>>>::infinity());
    });
  }
  const DrawnStep expected = got.copy();
  Results<T> ours, theirs;
  ours.matrices.assign(got.elements, T(-1));
  theirs.matrices.assign(got.elements, T(-1));
  step_on_device(got, inputs, ours);
  step_on_host(expected, inputs, theirs);
  expect_same(ours.matrices.size() == theirs.matrices.size() &&
                  std::memcmp(ours.matrices.data(), theirs.matrices.data(), ours.matrices.size() * sizeof(T)) == 0,
              "a gathered matrix");
  expect_same(ours.first_bad == theirs.first_bad, "the first gradient that is not finite");
  expect_same(ours.found == theirs.found && ours.found == (poison != nullptr ? 1.0f : 0.0f), "what was found");
  expect_same(ours.skipped == theirs.skipped && ours.skipped[0] == (poison != nullptr ? 1 : 0), "what was skipped");
  if (poison == nullptr) {
    expect_equal("shifts", ours.shifts.data(), theirs.shifts.data(), layers, tolerance);
    expect_equal("scale", ours.scale.data(), theirs.scale.data(), 2, tolerance);
    expect_equal("factors", ours.factors.data(), theirs.factors.data(), layers, tolerance);
    expect_equal("norms", ours.norms.data(), theirs.norms.data(), layers, tolerance);
  }
  expect_same_gradients(got, expected);
}

int64_t launches_for(int64_t layers) {
  Random random(3);
  const DrawnStep step(random, layers, 3);
  const Inputs<float> inputs(random, step);
  Results<float> results;
  results.matrices.assign(step.elements, 0.0f);
  const int64_t before = launches();
  step_on_device(step, inputs, results);
  return launches() - before;
}

void test_launches_do_not_grow_with_layers() {
  const int few = static_cast<int>(launches_for(3)), many = static_cast<int>(launches_for(112));
  if (few == 0 || many > few + 2)  // of tables: one more for each 30 KB of them, twice
    fail("launches grow with the number of layers, from %d to %d", few, many);
  if (!kOnDevice) std::printf("launches of a step beside its products: %d for 3 layers, %d for 112\n", few, many);
}

template <typename T>
void run(Cases& cases, int seed, int64_t layers, int64_t largest, const char* poison = nullptr) {
  const std::string name = std::string(sizeof(T) == sizeof(double) ? "in double" : "in float") +
                           (poison == nullptr ? "" : std::string(", not finite: ") + poison);
  cases.run(name.c_str(), seed, [&] { test_step<T>(seed, layers, largest, poison); });
}

void run_all(Cases& cases) {
  for (const Order order : kOrders) {
    set_order(order, 1);
    for (int seed = 0; seed < cases.seeds(4); ++seed) {
      run<float>(cases, seed, 1 + 5 * seed, 9);
      run<double>(cases, seed, 1 + 5 * seed, 9);
    }
    run<float>(cases, 9, 3, 400);  // several items of a gradient, and of a layer
    run<float>(cases, 10, 40, 3);  // more layers than warps
    run<float>(cases, 11, 4, 5, "layer");
    run<double>(cases, 12, 4, 5, "other");
    run<float>(cases, 13, 4, 5, "direction");
    run<double>(cases, 14, 40, 5, "direction");
  }
  cases.run("launches", 3, test_launches_do_not_grow_with_layers);
}

const Registered here("step", run_all);

}  // namespace

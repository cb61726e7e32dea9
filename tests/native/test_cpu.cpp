// The CPU kernels against loops written from the definitions, on drawn layers, under sanitizers.
#include <algorithm>

#include "covariances.h"
#include "cross_layer_sums.h"
#include "drawn.h"
#include "drawn_directions.h"
#include "drawn_products.h"
#include "drawn_sums.h"
#include "factored_tikhonov_inverse.h"
#include "gradient_part.h"
#include "layer_maps.h"

using namespace kfac2;
using namespace kfac2::tests;

namespace {

template <typename T>
constexpr double kTolerance = sizeof(T) == sizeof(double) ? 1e-12 : 1e-5;

template <typename T>
void test_layer(Random& random, ElementType type) {
  const DrawnSource<T> layer(random, type, draw(random, 1, 5));
  const RowSource& source = layer.source;
  const int64_t groups = source.window.groups, d = source.row_length(), places = source.grid_places();
  const Triangle triangle{d};
  std::vector<SumType<T>> maps(groups * source.batch * places), covariances(groups * triangle.numbers());
  std::vector<double> expected_maps(maps.size()), expected(covariances.size());
  for (int64_t q = 0; q < groups; ++q) {
    for (int64_t n = 0; n < source.batch; ++n) {
      for (int64_t t = 0; t < places; ++t) {
        for (int64_t i = 0; i < d; ++i) {
          const double a = row_element<T>(source, n, q, t, i);
          expected_maps[(q * source.batch + n) * places + t] += a;
          for (int64_t j = i; j < d; ++j)
            expected[q * triangle.numbers() + triangle.index(i, j)] += a * row_element<T>(source, n, q, t, j);
        }
      }
    }
  }
  const std::vector<RowSource> split = split_groups({source});
  std::vector<void*> map_pointers;
  for (int64_t q = 0; q < groups; ++q) map_pointers.push_back(maps.data() + q * source.batch * places);
  run(*cpu::layer_maps({split.data(), map_pointers.data(), groups}));
  expect_equal("layer_maps", maps.data(), expected_maps.data(), maps.size(), kTolerance<T>);

  void* covariance_pointer = covariances.data();
  run(*cpu::covariances({&source, &covariance_pointer, 1}));
  expect_equal("covariances", covariances.data(), expected.data(), covariances.size(), kTolerance<T>);

  const std::vector<SumType<T>> previous = drawn_numbers<SumType<T>>(random, groups * triangle.numbers());
  const void* previous_pointer = draw(random, 0, 1) == 0 ? previous.data() : nullptr;
  const double kept = 0.7, scale = 0.3;
  run(*cpu::covariances({&source, &covariance_pointer, 1, &previous_pointer, kept, &scale}));
  for (size_t i = 0; i < expected.size(); ++i) {
    expected[i] *= scale;
    if (previous_pointer != nullptr) expected[i] += kept * static_cast<double>(previous[i]);
  }
  expect_equal("averages of covariances", covariances.data(), expected.data(), covariances.size(), kTolerance<T>);
}

template <typename T>
void test_directions(Random& random, ElementType type) {
  std::vector<DrawnDirections> drawn = {DrawnDirections::drawn<T>(random, type)};
  const std::vector<DirectionalLayer> layers = with_results(drawn);
  run(*cpu::directional_derivatives({layers.data(), 1}));
  const std::vector<double> expected = drawn[0].expected<T>();
  expect_equal("directional_derivatives", drawn[0].derivatives.data(), expected.data(), expected.size(), kTolerance<T>);
}

// Layers whose samples are cut into bands, shared among tasks, and read where they lie; rows cut into chunks.
void test_large_directions(Random& random) {
  const int64_t shapes[][6] = {{6, 20, 61, 67, 3, 9}, {700, 300, 1, 1, 1, 90}, {3, 170, 5, 4, 3, 17}};
  std::vector<DrawnDirections> drawn;
  for (const auto& s : shapes) {
    auto inputs = std::make_shared<DrawnSource<float>>(random, ElementType::kFloat32, s[0], s[1], s[2], s[3], s[4]);
    drawn.push_back(DrawnDirections::with_inputs<float>(random, inputs, s[5]));
  }
  const std::vector<DirectionalLayer> layers = with_results(drawn);
  const auto work = cpu::directional_derivatives({layers.data(), static_cast<int64_t>(layers.size())});
  expect_true(work->tasks() > 3, "large layers are not shared among tasks");
  run(*work);
  for (const DrawnDirections& one : drawn) {
    const std::vector<double> expected = one.expected<float>();
    expect_equal("directional_derivatives", one.derivatives.data(), expected.data(), expected.size(), 1e-5);
  }
}

void test_fold_products(Random& random, int64_t count, int64_t largest) {
  DrawnProducts drawn(random, count, largest);
  const std::vector<PanelProduct> products = drawn.products();
  run(*cpu::fold_products({products.data(), count, kKept}));
  drawn.check();
}

template <typename T>
double at(const std::vector<T>& map, const Grid& shape, const Grid& other, int64_t n, int64_t place) {
  int64_t index = 0, stride = 1;
  if (shape.rank == other.rank) {
    for (int axis = shape.rank - 1; axis >= 0; --axis) {
      const int64_t meeting = std::min(shape.extent[axis], other.extent[axis]);
      index += place % meeting * shape.extent[axis] / meeting * stride;
      place /= meeting;
      stride *= shape.extent[axis];
    }
  }
  return static_cast<double>(map[n * shape.places() + index]);
}

template <typename T>
void test_cross_layer_sums(Random& random) {
  const int64_t count = draw(random, 1, 9), batch = draw(random, 1, 4);
  std::vector<std::vector<T>> data;
  std::vector<GridMap> maps;
  for (int64_t i = 0; i < count; ++i) {
    GridMap map{nullptr, {static_cast<int>(draw(random, 0, 3)), {}}};
    for (int axis = 0; axis < map.grid.rank; ++axis) map.grid.extent[axis] = draw(random, 1, 6);
    data.push_back(drawn_numbers<T>(random, batch * map.grid.places()));
    map.data = data.back().data();
    maps.push_back(map);
  }
  std::vector<T> sums(count * count);
  std::vector<double> expected(count * count);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < count; ++j) {
      const Grid &a = maps[i].grid, &b = maps[j].grid;
      int64_t places = 1;
      for (int axis = 0; a.rank == b.rank && axis < a.rank; ++axis) places *= std::min(a.extent[axis], b.extent[axis]);
      for (int64_t n = 0; n < batch; ++n)
        for (int64_t t = 0; t < places; ++t)
          expected[i * count + j] += at(data[i], a, b, n, t) * at(data[j], b, a, n, t);
    }
  }
  run(*cpu::cross_layer_sums(
      {maps.data(), sums.data(), nullptr, 0.0, 1.0, count, batch, sizeof(T) == sizeof(double), Downsample::kNearest}));
  expect_equal("cross_layer_sums", sums.data(), expected.data(), sums.size(), kTolerance<T>);
}

// Sums of both kinds with and without scales and averages so far, blocks of layers in any order.
template <typename T>
void test_coarse_fisher(Random& random) {
  const int64_t count = draw(random, 1, 9), layers = 3;
  const double kept = 0.7;
  std::vector<int64_t> layer_of_block(count);
  for (int64_t& layer : layer_of_block) layer = draw(random, 0, layers - 1);
  std::vector<T> fisher(layers * layers);
  std::vector<double> expected[2], expected_fisher(layers * layers);
  DrawnSums<T> kinds[2] = {DrawnSums<T>(random, count), DrawnSums<T>(random, count)};
  for (int kind = 0; kind < 2; ++kind) expected[kind] = kinds[kind].expected(kept);
  for (int64_t i = 0; i < count * count; ++i)
    expected_fisher[layer_of_block[i / count] * layers + layer_of_block[i % count]] += expected[0][i] * expected[1][i];
  run(*cpu::coarse_fisher({kinds[0].params(), kinds[1].params(), kept, layer_of_block.data(), fisher.data(), count,
                           layers, sizeof(T) == sizeof(double)}));
  for (int kind = 0; kind < 2; ++kind)
    expect_equal("coarse averages", kinds[kind].averages.data(), expected[kind].data(), count * count, kTolerance<T>);
  expect_equal("coarse_fisher", fisher.data(), expected_fisher.data(), layers * layers, kTolerance<T>);
  for (int64_t i = 0; i < layers * layers; ++i)
    if (fisher[i] != fisher[i % layers * layers + i / layers]) expect_true(false, "the coarse Fisher is not symmetric");
}

// (factor + shift I) inverse = I, for both factors of a pair.
template <typename T>
void test_inverse(Random& random, int64_t d_in, int64_t d_out) {
  const std::vector<T> A = drawn_factor<T>(random, d_in), G = drawn_factor<T>(random, d_out);
  std::vector<T> A_inv(d_in * d_in), G_inv(d_out * d_out);
  const FactorPair pair{A.data(), G.data(), A_inv.data(), G_inv.data(), d_in, d_out};
  int32_t status = -1;
  const double damping = 0.04;
  run(*cpu::factored_tikhonov_inverse({&pair, &status, 1, damping, sizeof(T) == sizeof(double)}));
  double traces[2] = {0, 0};
  for (int64_t i = 0; i < d_in; ++i) traces[0] += A[i * d_in + i];
  for (int64_t i = 0; i < d_out; ++i) traces[1] += G[i * d_out + i];
  const double pi = std::sqrt(traces[0] / static_cast<double>(d_in) / (traces[1] / static_cast<double>(d_out)));
  const auto expect_inverse = [&](const std::vector<T>& factor, const std::vector<T>& inverse, int64_t d,
                                  double shift) {
    std::vector<double> product(d * d), identity(d * d);
    for (int64_t i = 0; i < d; ++i) {
      identity[i * d + i] = 1;
      for (int64_t j = 0; j < d; ++j)
        for (int64_t l = 0; l < d; ++l)
          product[i * d + j] += (factor[i * d + l] + (i == l ? shift : 0.0)) * inverse[l * d + j];
    }
    expect_equal("factored_tikhonov_inverse", product.data(), identity.data(), d * d, 20 * kTolerance<T>);
  };
  expect_inverse(A, A_inv, d_in, std::sqrt(damping) * pi);
  expect_inverse(G, G_inv, d_out, std::sqrt(damping) / pi);
  expect_true(status == 0, "a sound pair of factors was reported");
}

bool read_axes(GradientPart& part, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  return part.read_axes(
      static_cast<int64_t>(sizes.size()), [&](int64_t d) { return sizes[d]; }, [&](int64_t d) { return strides[d]; });
}

// Axes of a tensor in any order, some without elements between them: each element is found where torch has it.
void test_axes_of_a_gradient(Random& random) {
  const int64_t rank = draw(random, 0, 5);  // four behind the rows
  std::vector<int64_t> sizes(rank), strides(rank), order(rank);
  for (int64_t d = 0; d < rank; ++d) sizes[d] = draw(random, 1, 3), order[d] = d;
  std::shuffle(order.begin(), order.end(), random);
  int64_t stride = 1;
  for (const int64_t d : order) strides[d] = stride, stride *= sizes[d] + draw(random, 0, 3) / 3;
  GradientPart part{};
  expect_true(read_axes(part, sizes, strides), "four axes or fewer do not fit into a part");
  for (int64_t element = 0; element < part.elements(); ++element) {
    int64_t rest = element, offset = 0;
    for (int64_t d = rank - 1; d >= 0; rest /= sizes[d--]) offset += rest % sizes[d] * strides[d];
    const int64_t row = element / part.columns, column = element % part.columns;
    expect_true(row * part.row_stride + part.column_offset(column) == offset, "an element of a gradient is misplaced");
  }
}

void test_too_many_axes() {
  GradientPart part{};
  expect_true(!read_axes(part, {1, 2, 2, 2, 2, 2}, {1, 1, 3, 9, 27, 81}), "five axes fit into a part");
}

}  // namespace

int main() {
  for (int seed = 0; seed < 40; ++seed) {
    Random random(seed);
    test_layer<float>(random, ElementType::kFloat32);
    test_layer<double>(random, ElementType::kFloat64);
    test_layer<Half>(random, ElementType::kFloat16);
    test_layer<BFloat16>(random, ElementType::kBFloat16);
    test_directions<float>(random, ElementType::kFloat32);
    test_directions<double>(random, ElementType::kFloat64);
    test_directions<Half>(random, ElementType::kFloat16);
    test_directions<BFloat16>(random, ElementType::kBFloat16);
    if (seed == 0) test_large_directions(random);
    test_fold_products(random, draw(random, 1, 5), seed == 0 ? 400 : 20);
    test_cross_layer_sums<float>(random);
    test_cross_layer_sums<double>(random);
    test_coarse_fisher<float>(random);
    test_coarse_fisher<double>(random);
    test_axes_of_a_gradient(random);
    test_inverse<float>(random, draw(random, 1, 20), seed == 0 ? 150 : draw(random, 1, 90));
    test_inverse<double>(random, draw(random, 1, 20), seed == 0 ? 150 : draw(random, 1, 90));
  }
  test_too_many_axes();
  std::puts("CPU kernels agree with their definitions");
  return 0;
}

// The CPU kernels against loops written from the definitions, on drawn layers, under sanitizers.
#include <algorithm>

#include "coarse_fisher.h"
#include "covariances.h"
#include "cross_layer_sums.h"
#include "drawn.h"
#include "factored_tikhonov_inverse.h"
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
  std::vector<SumType<T>> maps(groups * source.batch * places), covariances(groups * d * d);
  std::vector<double> expected_maps(maps.size()), expected(covariances.size());
  for (int64_t q = 0; q < groups; ++q) {
    for (int64_t n = 0; n < source.batch; ++n) {
      for (int64_t t = 0; t < places; ++t) {
        for (int64_t i = 0; i < d; ++i) {
          const double a = row_element<T>(source, n, q, t, i);
          expected_maps[(q * source.batch + n) * places + t] += a;
          for (int64_t j = 0; j < d; ++j) expected[(q * d + i) * d + j] += a * row_element<T>(source, n, q, t, j);
        }
      }
    }
  }
  void* map_pointer = maps.data();
  const LayerMapsParams map_params{&source, &map_pointer, 1};
  const int64_t slots = cpu::layer_maps_slots(map_params), half = slots / 2;
  cpu::layer_maps(map_params, half, slots);
  cpu::layer_maps(map_params, 0, half);
  expect_equal("layer_maps", maps.data(), expected_maps.data(), maps.size(), kTolerance<T>);

  void* covariance_pointer = covariances.data();
  cpu::Covariances work({&source, &covariance_pointer, 1});
  for (int64_t task = work.tasks() - 1; task >= 0; --task) work.run_task(task);
  for (int64_t merge = 0; merge < work.merges(); ++merge) work.run_merge(merge);
  expect_equal("covariances", covariances.data(), expected.data(), covariances.size(), kTolerance<T>);
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
  cpu::CrossLayerSums work(
      {maps.data(), sums.data(), nullptr, 0.0, 1.0, count, batch, sizeof(T) == sizeof(double), Downsample::kNearest});
  for (int64_t task = 0; task < work.tasks(); ++task) work.run_task(task);
  work.merge();
  expect_equal("cross_layer_sums", sums.data(), expected.data(), sums.size(), kTolerance<T>);

  std::vector<int64_t> layer_of_block(count);
  for (int64_t& layer : layer_of_block) layer = draw(random, 0, 2);
  std::vector<T> fisher(9);
  std::vector<double> expected_fisher(9);
  for (int64_t i = 0; i < count * count; ++i)
    expected_fisher[layer_of_block[i / count] * 3 + layer_of_block[i % count]] += expected[i] * expected[i];
  cpu::coarse_fisher(
      {sums.data(), sums.data(), layer_of_block.data(), fisher.data(), count, 3, sizeof(T) == sizeof(double)});
  expect_equal("coarse_fisher", fisher.data(), expected_fisher.data(), 9, kTolerance<T>);
}

// (factor + shift I) inverse = I, for both factors of a pair.
template <typename T>
void test_inverse(Random& random, int64_t d_in, int64_t d_out) {
  const std::vector<T> A = drawn_factor<T>(random, d_in), G = drawn_factor<T>(random, d_out);
  std::vector<T> A_inv(d_in * d_in), G_inv(d_out * d_out);
  const FactorPair pair{A.data(), G.data(), A_inv.data(), G_inv.data(), d_in, d_out};
  int32_t status = -1;
  const double damping = 0.04;
  cpu::FactoredTikhonovInverse work({&pair, &status, 1, damping, sizeof(T) == sizeof(double)});
  for (int64_t task = 0; task < work.tasks(); ++task) work.run_task(task);
  work.merge();
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
  if (status != 0) {
    std::fputs("a sound pair of factors was reported\n", stderr);
    std::exit(1);
  }
}

}  // namespace

int main() {
  for (int seed = 0; seed < 40; ++seed) {
    Random random(seed);
    test_layer<float>(random, ElementType::kFloat32);
    test_layer<double>(random, ElementType::kFloat64);
    test_layer<Half>(random, ElementType::kFloat16);
    test_layer<BFloat16>(random, ElementType::kBFloat16);
    test_cross_layer_sums<float>(random);
    test_cross_layer_sums<double>(random);
    test_inverse<float>(random, draw(random, 1, 20), seed == 0 ? 150 : draw(random, 1, 90));
    test_inverse<double>(random, draw(random, 1, 20), seed == 0 ? 150 : draw(random, 1, 90));
  }
  std::puts("CPU kernels agree with their definitions");
  return 0;
}

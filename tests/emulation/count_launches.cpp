// Counts what an op would launch, and running none of it: for networks of any size. Reads ops with their shapes from
// the standard input, see tests/test_roofline.py; prints launches and bytes of workspace of each.
#include <cstdio>
#include <iostream>
#include <limits>
#include <string>

#include "coarse_fisher.h"
#include "covariances.h"
#include "cross_layer_sums.h"
#include "cuda_emulation.h"
#include "directional_derivatives.h"
#include "eigendecompose.h"
#include "factored_tikhonov_inverse.h"
#include "fold_products.h"
#include "gather_gradients.h"
#include "layer_maps.h"
#include "shift_and_scale.h"
#include "write_gradients.h"

using namespace kfac2;

namespace {

int64_t next() {
  int64_t number = 0;
  std::cin >> number;
  return number;
}

// N C, then extent, kernel, stride and padding of three axes each, then the bias; without dilation and groups.
RowSource next_source() {
  RowSource source{};
  source.element_type = ElementType::kFloat32;
  source.batch = next();
  source.channels = next();
  Window& window = source.window;
  for (int64_t* axes : {source.extent, window.kernel, window.stride, window.pad_low})
    for (int axis = 0; axis < kSpatialRank; ++axis) axes[axis] = next();
  for (int axis = 0; axis < kSpatialRank; ++axis)
    window.pad_high[axis] = window.pad_low[axis], window.dilation[axis] = 1;
  window.groups = 1;
  window.bias = next();
  return source;
}

void count(const cuda::Launch& launch) {
  const int64_t before = emulation::launches();
  const int status = launch.run(nullptr, nullptr);
  if (status != 0) std::exit(1);
  std::printf("%lld %lld\n", static_cast<long long>(emulation::launches() - before),
              static_cast<long long>(launch.workspace()));
}

void count_parts(const std::string& op, int64_t entries) {
  std::vector<GradientPart> parts(entries);
  for (GradientPart& part : parts) part.rows = next(), part.columns = next();
  if (op == "gather_gradients")
    return count(*cuda::gather_gradients({parts.data(), nullptr, nullptr, entries, 0, false}));
  count(*cuda::write_gradients({parts.data(), nullptr, nullptr, nullptr, nullptr, nullptr, entries, false}));
}

void count_sources(const std::string& op, int64_t entries) {
  std::vector<RowSource> sources;
  std::vector<DirectionalLayer> layers;
  const std::vector<void*> results(entries);
  for (int64_t i = 0; i < entries; ++i) {
    sources.push_back(next_source());
    if (op == "directional_derivatives") layers.push_back({sources.back(), next_source(), nullptr, nullptr, 1});
  }
  if (op == "layer_maps") return count(*cuda::layer_maps({sources.data(), results.data(), entries}));
  if (op == "covariances") return count(*cuda::covariances({sources.data(), results.data(), entries}));
  count(*cuda::directional_derivatives({layers.data(), entries}));
}

// The entries are the sizes of products.
void count_fold_products(int64_t entries) {
  std::vector<PanelProduct> products(entries);
  for (PanelProduct& product : products) product.whole = product.rows = static_cast<uint32_t>(next());
  count(*cuda::fold_products({products.data(), entries, 1.0}));
}

void count_maps(int64_t entries) {
  CrossLayerSumsParams params{};
  params.count = entries;
  params.batch = next();
  std::vector<GridMap> maps(entries);
  for (GridMap& map : maps) {
    map.grid.rank = static_cast<int>(next());
    for (int axis = 0; axis < map.grid.rank; ++axis) map.grid.extent[axis] = next();
  }
  params.maps = maps.data();
  count(*cuda::cross_layer_sums(params));
}

void count_coarse_fisher(int64_t blocks) {
  CoarseFisherParams params{};
  params.blocks = params.layers = blocks;
  std::vector<int64_t> layer_of_block;
  for (int64_t i = 0; i < blocks; ++i) layer_of_block.push_back(i);
  params.layer_of_block = layer_of_block.data();
  count(*cuda::coarse_fisher(params));
}

void count_inverse(int64_t entries) {
  std::vector<FactorPair> pairs(entries);
  for (FactorPair& pair : pairs) pair.d_in = next(), pair.d_out = next();
  count(*cuda::factored_tikhonov_inverse({pairs.data(), nullptr, entries, 1.0, false}));
}

void count_eigendecompose(int64_t entries, bool is_double) {
  EigendecomposeParams params{};
  std::vector<MatrixStack> stacks(entries);
  for (MatrixStack& stack : stacks) {
    stack.first_item = params.matrices;
    stack.count = next();
    stack.size = next();
    params.matrices += stack.count;
  }
  params.stacks = stacks.data();
  params.stack_count = entries;
  params.is_double = is_double;
  count(*cuda::eigendecompose(params));
}

void count_shift_and_scale(int64_t entries) {
  std::vector<int64_t> spans;
  int64_t end = 0;
  for (int64_t i = 0; i < entries; ++i) {
    const int64_t size = next();
    spans.insert(spans.end(), {end, end + size, size});
    end += size;
  }
  const std::vector<double> ones(entries, 1.0);
  ShiftAndScaleParams params{};
  params.spans = spans.data();
  params.rates = params.in_coarse = ones.data();
  params.layers = entries;
  count(*cuda::shift_and_scale(params));
}

}  // namespace

int main() {
  emulation::set_counting_only(true);
  std::string op;
  while (std::cin >> op) {
    const int64_t entries = next();
    if (op == "gather_gradients" || op == "write_gradients") {
      count_parts(op, entries);
    } else if (op == "cross_layer_sums") {
      count_maps(entries);
    } else if (op == "fold_products") {
      count_fold_products(entries);
    } else if (op == "average_coarse_sums") {
      count_coarse_fisher(entries);
    } else if (op == "factored_tikhonov_inverse") {
      count_inverse(entries);
    } else if (op == "eigendecompose" || op == "eigendecompose_double") {
      count_eigendecompose(entries, op == "eigendecompose_double");
    } else if (op == "shift_and_scale") {
      count_shift_and_scale(entries);
    } else {
      count_sources(op, entries);
    }
  }
}

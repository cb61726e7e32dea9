// Runs an op as its binding does, on copies of what its parameters point to. Which pointers are of the device, and how
// much lies there, is what the headers of the ops say.
#pragma once

#include "coarse_fisher.h"
#include "covariances.h"
#include "cross_layer_sums.h"
#include "device_memory.h"
#include "directional_derivatives.h"
#include "eigendecompose.h"
#include "factored_tikhonov_inverse.h"
#include "fold_products.h"
#include "gather_gradients.h"
#include "layer_maps.h"
#include "shift_and_scale.h"
#include "write_gradients.h"

namespace kfac2::tests {

inline int64_t number_bytes(bool is_double) { return is_double ? sizeof(double) : sizeof(float); }

// From the first element to the last.
inline void move_rows(DeviceCopies& copies, RowSource& source) {
  int64_t last = (source.batch - 1) * source.batch_stride + (source.channels - 1) * source.channel_stride;
  for (int axis = 0; axis < kSpatialRank; ++axis) last += (source.extent[axis] - 1) * source.spatial_stride[axis];
  source.data = copies.in(source.data, (last + 1) * element_bytes(source.element_type));
}

inline LayerMapsParams moved(DeviceCopies& copies, LayerMapsParams params) {
  const RowSource* sources = params.sources;
  params.maps = copies.table(params.maps, params.count, [&](void*& map, int64_t i) {
    map = copies.out(map, sources[i].batch * sources[i].grid_places() * sources[i].sum_bytes());
  });
  params.sources = copies.table(sources, params.count, [&](RowSource& source, int64_t) { move_rows(copies, source); });
  return params;
}

inline CovariancesParams moved(DeviceCopies& copies, CovariancesParams params) {
  const RowSource* sources = params.sources;
  const auto bytes = [sources](int64_t i) {
    return sources[i].window.groups * Triangle{sources[i].row_length()}.numbers() * sources[i].sum_bytes();
  };
  params.covariances = copies.table(params.covariances, params.layers,
                                    [&](void*& matrices, int64_t i) { matrices = copies.out(matrices, bytes(i)); });
  if (params.previous != nullptr) {
    params.previous = copies.table(params.previous, params.layers,
                                   [&](const void*& matrices, int64_t i) { matrices = copies.in(matrices, bytes(i)); });
  }
  params.sources = copies.table(sources, params.layers, [&](RowSource& source, int64_t) { move_rows(copies, source); });
  return params;
}

inline FoldProductsParams moved(DeviceCopies& copies, FoldProductsParams params) {
  params.products = copies.table(params.products, params.count, [&](PanelProduct& product, int64_t) {
    const int64_t element = number_bytes(product.is_double), bytes = Triangle{product.size()}.numbers() * element;
    const int64_t whole = product.whole, rows = product.rows;
    for (int64_t first = 0; first < whole; first += rows) {
      const void*& panel = product.panels[first / rows];
      panel = copies.in(panel, std::min(rows, whole - first) * (whole - first) * element);
    }
    product.last = copies.in(product.last, whole * element);
    product.previous = copies.in(product.previous, bytes);
    product.result = copies.out(product.result, bytes);
  });
  return params;
}

inline CrossLayerSumsParams moved(DeviceCopies& copies, CrossLayerSumsParams params) {
  const int64_t bytes = number_bytes(params.is_double), pairs = params.count * params.count;
  params.maps = copies.table(params.maps, params.count, [&](GridMap& map, int64_t) {
    map.data = copies.in(map.data, params.batch * map.grid.places() * bytes);
  });
  params.sums = copies.out(params.sums, pairs * bytes);
  params.previous = copies.in(params.previous, pairs * bytes);
  return params;
}

inline CoarseFisherParams moved(DeviceCopies& copies, CoarseFisherParams params) {
  const int64_t bytes = number_bytes(params.is_double), pairs = params.blocks * params.blocks;
  for (PairSums* sums : {&params.inputs, &params.grads}) {
    sums->raw = copies.in(sums->raw, pairs * bytes);
    sums->previous = copies.in(sums->previous, pairs * bytes);
    sums->averages = copies.out(sums->averages, pairs * bytes);
  }
  params.fisher = copies.out(params.fisher, params.layers * params.layers * bytes);
  return params;
}

inline DirectionalDerivativesParams moved(DeviceCopies& copies, DirectionalDerivativesParams params) {
  params.layers = copies.table(params.layers, params.count, [&](DirectionalLayer& layer, int64_t) {
    move_rows(copies, layer.inputs);
    move_rows(copies, layer.grads);
    const int64_t numbers = layer.count * layer.groups() * layer.d_out() * layer.d_in();
    layer.directions = copies.in(layer.directions, numbers * number_bytes(layer.is_double()));
    layer.derivatives = copies.out(layer.derivatives, layer.count * layer.inputs.batch);
  });
  return params;
}

inline FactoredTikhonovInverseParams moved(DeviceCopies& copies, FactoredTikhonovInverseParams params) {
  params.pairs = copies.table(params.pairs, params.count, [&](FactorPair& pair, int64_t) {
    const int64_t A_bytes = pair.d_in * pair.d_in * number_bytes(params.is_double),
                  G_bytes = pair.d_out * pair.d_out * number_bytes(params.is_double);
    pair.A = copies.in(pair.A, A_bytes);
    pair.G = copies.in(pair.G, G_bytes);
    pair.A_inv = copies.out(pair.A_inv, A_bytes);
    pair.G_inv = copies.out(pair.G_inv, G_bytes);
  });
  params.status = copies.out(params.status, params.count);
  return params;
}

inline EigendecomposeParams moved(DeviceCopies& copies, EigendecomposeParams params) {
  params.stacks = copies.table(params.stacks, params.stack_count, [&](MatrixStack& stack, int64_t) {
    const int64_t values = stack.count * stack.size, bytes = number_bytes(params.is_double);
    stack.matrices = copies.in(stack.matrices, values * stack.size * bytes);
    stack.values = copies.out(stack.values, values * bytes);
    stack.vectors = copies.out(stack.vectors, values * stack.size * bytes);
  });
  params.status = copies.out(params.status, params.matrices);
  return params;
}

// The parts of all gradients, and how far their matrices and layers reach.
struct MovedParts {
  const GradientPart* parts;
  int64_t elements = 0, layers = 0;

  MovedParts(DeviceCopies& copies, const GradientPart* host, int64_t count) {
    parts = copies.table(host, count, [&](GradientPart& part, int64_t) {
      int64_t last = (part.rows - 1) * part.row_stride;
      for (int axis = 0; axis < kColumnAxes; ++axis) last += (part.extent[axis] - 1) * part.stride[axis];
      part.data = copies.out(part.data, (last + 1) * element_bytes(part.element_type));
      layers = std::max(layers, part.layer + 1);
      if (part.belongs()) elements = std::max(elements, part.offset + (part.rows - 1) * part.row_length + part.columns);
    });
  }
};

inline GatherGradientsParams moved(DeviceCopies& copies, GatherGradientsParams params) {
  const MovedParts there(copies, params.parts, params.count);
  params.parts = there.parts;
  params.matrices = copies.out(params.matrices, there.elements * number_bytes(params.is_double));
  params.first_bad = copies.out(params.first_bad, 1);
  return params;
}

inline ShiftAndScaleParams moved(DeviceCopies& copies, ShiftAndScaleParams params) {
  const int64_t layers = params.layers, bytes = number_bytes(params.is_double);
  int64_t elements = 0;
  for (int64_t i = 0; i < layers; ++i) elements = std::max(elements, params.spans[3 * i + 1]);
  params.gradients = copies.in(params.gradients, elements * bytes);
  params.directions = copies.in(params.directions, elements * bytes);
  params.device_rates = copies.in(params.device_rates, layers);
  params.usable = copies.in(params.usable, layers);
  params.coarse_inverse = copies.in(params.coarse_inverse, layers * layers);
  params.limits = copies.in(params.limits, layers);
  params.first_bad = copies.in(params.first_bad, 1);
  params.shifts = copies.out(params.shifts, layers);
  params.scale = copies.out(params.scale, 2);
  params.found = copies.out(params.found, 1);
  params.factors = copies.out(params.factors, layers);
  params.norms = copies.out(params.norms, layers);
  params.skipped = copies.out(params.skipped, 2);
  return params;
}

inline WriteGradientsParams moved(DeviceCopies& copies, WriteGradientsParams params) {
  const MovedParts there(copies, params.parts, params.count);
  params.parts = there.parts;
  params.directions = copies.in(params.directions, there.elements * number_bytes(params.is_double));
  params.shifts = copies.in(params.shifts, there.layers);
  params.factors = copies.in(params.factors, there.layers);
  params.found = copies.in(params.found, 1);
  params.usable = copies.in(params.usable, there.layers);
  return params;
}

// Runs a call with a workspace of exactly its size, and waits for it.
template <typename Params>
void run_on_device(const char* what, std::unique_ptr<cuda::Launch> (*op)(const Params&), const Params& params) {
  DeviceCopies copies;
  const Params there = moved(copies, params);
  const std::unique_ptr<cuda::Launch> launch = op(there);
  const Workspace workspace(launch->workspace());
  expect_success(what, launch->run(workspace.get(), nullptr));
  expect_success(what, cudaDeviceSynchronize());
  copies.bring_back();
}

}  // namespace kfac2::tests

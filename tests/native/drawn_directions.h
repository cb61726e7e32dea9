// Drawn layers with gradients and directions for the tests of directional_derivatives.
#pragma once

#include <memory>

#include "directional_derivatives.h"
#include "drawn.h"

namespace kfac2::tests {

struct DrawnDirections {
  std::vector<std::shared_ptr<void>> memory;
  DirectionalLayer layer;
  std::vector<double> derivatives;

  template <typename T>
  static DrawnDirections drawn(Random& random, ElementType type) {
    auto inputs = std::make_shared<DrawnSource<T>>(random, type, draw(random, 1, 5));
    return with_inputs<T>(random, inputs, draw(random, 1, 37));
  }

  // Of inputs with their gradients, of the same type, and K directions.
  template <typename T>
  static DrawnDirections with_inputs(Random& random, const std::shared_ptr<DrawnSource<T>>& inputs, int64_t d_out) {
    DrawnDirections drawn;
    drawn.layer.inputs = inputs->source;
    const RowSource& x = drawn.layer.inputs;
    auto grads = std::make_shared<DrawnSource<T>>(*inputs);
    RowSource& g = grads->source;
    g.channels = x.window.groups * d_out;
    for (int axis = 0; axis < kSpatialRank; ++axis) {
      g.extent[axis] = x.grid(axis);
      g.window.kernel[axis] = g.window.stride[axis] = g.window.dilation[axis] = 1;
      g.window.pad_low[axis] = g.window.pad_high[axis] = 0;
    }
    g.window.bias = 0;
    grads->lay_out(draw(random, 0, 1) == 0);
    grads->data = drawn_numbers<T>(random, g.batch * g.channels * g.places());
    g.data = grads->data.data();
    drawn.layer.grads = g;
    drawn.layer.count = draw(random, 1, 3);
    auto directions = std::make_shared<std::vector<SumType<T>>>(
        drawn_numbers<SumType<T>>(random, drawn.layer.count * x.window.groups * d_out * x.row_length()));
    drawn.layer.directions = directions->data();
    drawn.memory = {inputs, grads, directions};
    drawn.derivatives.assign(drawn.layer.count * x.batch, -1.0);
    return drawn;
  }

  // From the definition, element by element.
  template <typename T>
  std::vector<double> expected() const {
    std::vector<double> sums(derivatives.size());
    const RowSource& x = layer.inputs;
    const auto* directions = static_cast<const SumType<T>*>(layer.directions);
    for (int64_t k = 0; k < layer.count; ++k)
      for (int64_t q = 0; q < layer.groups(); ++q)
        for (int64_t n = 0; n < x.batch; ++n)
          for (int64_t t = 0; t < x.grid_places(); ++t)
            for (int64_t o = 0; o < layer.d_out(); ++o) {
              const auto* row = directions + ((k * layer.groups() + q) * layer.d_out() + o) * layer.d_in();
              double product = 0;
              for (int64_t i = 0; i < layer.d_in(); ++i) product += row[i] * row_element<T>(x, n, q, t, i);
              sums[k * x.batch + n] += product * row_element<T>(layer.grads, n, q, t, o);
            }
    return sums;
  }
};

// Where the layers' results go: set only now, since drawn layers move.
inline std::vector<DirectionalLayer> with_results(std::vector<DrawnDirections>& drawn) {
  std::vector<DirectionalLayer> layers;
  for (DrawnDirections& one : drawn) {
    one.layer.derivatives = one.derivatives.data();
    layers.push_back(one.layer);
  }
  return layers;
}

}  // namespace kfac2::tests

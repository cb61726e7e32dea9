#include "directional_derivatives.h"

#include "bind.h"
#include "row_source.h"

namespace kfac2 {
namespace {

using torch::stable::Tensor;

constexpr const char* kOp = "directional_derivatives";

void check_layer(size_t i, const DirectionalLayer& layer, const Tensor& input, const Tensor& grad,
                 const Tensor& directions) {
  const RowSource &x = layer.inputs, &g = layer.grads;
  check(x.window.bias <= 1, kOp, "expected a bias of 0 or 1 in window ", i, ", got ", x.window.bias);
  bool fits = g.batch == x.batch;
  for (int axis = 0; axis < kSpatialRank; ++axis) fits = fits && g.extent[axis] == x.grid(axis);
  check(fits, kOp, "expected gradient ", i, " to have the samples and the places of the rows of input ", i,
        ", of shape ", shape_of(input), ", got ", shape_of(grad));
  check((g.element_type == ElementType::kFloat64) == layer.is_double(), kOp, "expected gradient ", i,
        " to be summed in the same type as input ", i, ": both float64, or neither");
  check(directions.dim() == 4 && directions.size(0) >= 1 && directions.size(1) == layer.groups() &&
            directions.size(2) == layer.d_out() && directions.size(3) == layer.d_in(),
        kOp, "expected directions ", i, " of shape [K, ", layer.groups(), ", ", layer.d_out(), ", ", layer.d_in(),
        "] with K of at least 1, got ", shape_of(directions));
  check(is_float_or_double(directions) && is_double(directions) == layer.is_double(), kOp, "expected directions ", i,
        " to be ", layer.is_double() ? "float64" : "float32", ", as the rows are summed in");
  check(same_device(grad, input) && same_device(directions, input), kOp, "expected gradient and directions ", i,
        " on the device of input ", i);
}

// [K, N] for each layer
std::vector<Tensor> directional_derivatives(const std::vector<Tensor>& inputs, const std::vector<int64_t>& windows,
                                            const std::vector<Tensor>& grads, const std::vector<Tensor>& directions) {
  check(grads.size() == inputs.size() && directions.size() == inputs.size(), kOp,
        "expected as many gradients and directions as inputs, ", inputs.size(), ", got ", grads.size(), " and ",
        directions.size());
  const std::vector<RowSource> input_rows = row_sources(kOp, inputs, windows);
  const std::vector<RowSource> grad_rows = row_sources(kOp, grads, windows_of_places(windows));
  std::vector<DirectionalLayer> layers;
  std::vector<Tensor> results, contiguous;
  for (size_t i = 0; i < inputs.size(); ++i) {
    DirectionalLayer layer{input_rows[i], grad_rows[i], nullptr, nullptr, 0};
    check_layer(i, layer, inputs[i], grads[i], directions[i]);
    contiguous.push_back(as_contiguous(directions[i]));
    layer.directions = contiguous.back().const_data_ptr();
    layer.count = directions[i].size(0);
    results.push_back(allocate(inputs[i], {layer.count, inputs[i].size(0)}, torch::headeronly::ScalarType::Double));
    layer.derivatives = static_cast<double*>(results.back().mutable_data_ptr());
    layers.push_back(layer);
  }
  const DirectionalDerivativesParams params{layers.data(), static_cast<int64_t>(layers.size())};
  KFAC2_RUN(directional_derivatives, inputs[0], params);
  return results;
}

}  // namespace

KFAC2_BIND(directional_derivatives)

}  // namespace kfac2

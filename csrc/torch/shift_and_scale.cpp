#include "shift_and_scale.h"

#include <optional>
#include <tuple>

#include "bind.h"

namespace kfac2 {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr const char* kOp = "shift_and_scale";
constexpr int64_t kSpanNumbers = 3;

void check_numbers(const Tensor& tensor, const char* name, ScalarType type, int64_t count, const Tensor* on_device_of) {
  const bool in_place = on_device_of == nullptr ? !tensor.is_cuda() : same_device(tensor, *on_device_of);
  check(tensor.scalar_type() == type && tensor.is_contiguous() && tensor.numel() == count && in_place, kOp, "expected ",
        name, " to be contiguous, of ", count, type == ScalarType::Double ? " float64" : " integer", " numbers on ",
        on_device_of == nullptr ? "the CPU" : "the device of the gradients", ", got shape ", shape_of(tensor));
}

// shifts: [L], scale: [2], found: [1], factors: [L], norms: [L] with limits, else [0]
Result shift_and_scale(const Tensor& gradients, const Tensor& directions, const Tensor& spans, const Tensor& rates,
                       const std::optional<Tensor>& device_rates, const Tensor& in_coarse, const Tensor& usable,
                       const std::optional<Tensor>& coarse_inverse, const Tensor& first_bad, int64_t none_bad,
                       double coarse_weight, double kl_clip, const Tensor& skipped, const std::optional<Tensor>& limits,
                       const std::optional<Tensor>& largest) {
  const int64_t layers = rates.numel();
  check(is_float_or_double(gradients) && gradients.scalar_type() == directions.scalar_type() &&
            gradients.numel() == directions.numel() && gradients.is_contiguous() && directions.is_contiguous() &&
            same_device(gradients, directions),
        kOp, "expected gradients and directions of one size, dtype and device, contiguous, got ", shape_of(gradients),
        " and ", shape_of(directions));
  check_numbers(spans, "spans", ScalarType::Long, kSpanNumbers * layers, nullptr);
  check_numbers(rates, "rates", ScalarType::Double, layers, nullptr);
  check_numbers(in_coarse, "in_coarse", ScalarType::Double, layers, nullptr);
  check_numbers(usable, "usable", ScalarType::Double, layers, &gradients);
  if (device_rates) check_numbers(*device_rates, "device_rates", ScalarType::Double, layers, &gradients);
  if (coarse_inverse) {
    check_numbers(*coarse_inverse, "coarse_inverse", ScalarType::Double, layers * layers, &gradients);
  }
  if (limits) check_numbers(*limits, "limits", ScalarType::Double, layers, &gradients);
  if (largest) check_numbers(*largest, "largest", ScalarType::Double, layers, nullptr);
  check_numbers(first_bad, "first_bad", ScalarType::Int, 1, &gradients);
  check_numbers(skipped, "skipped", ScalarType::Long, 2, &gradients);
  const int64_t* span = static_cast<const int64_t*>(spans.const_data_ptr());
  for (int64_t i = 0; i < layers; ++i) {
    const int64_t begin = span[kSpanNumbers * i], end = span[kSpanNumbers * i + 1], size = span[kSpanNumbers * i + 2];
    check(0 <= begin && begin <= end && end <= gradients.numel() && 0 <= size && size <= end - begin, kOp,
          "expected the span of layer ", i, " within ", gradients.numel(),
          " elements, and no more numbers than it has, got ", begin, " to ", end, " and ", size);
  }
  check(kl_clip > 0, kOp, "expected kl_clip above 0, got ", kl_clip);
  const Tensor shifts = allocate(gradients, {layers}, ScalarType::Double);
  const Tensor scale = allocate(gradients, {2}, ScalarType::Double);
  const Tensor found = allocate(gradients, {1}, ScalarType::Float);
  const Tensor factors = allocate(gradients, {layers}, ScalarType::Double);
  const Tensor norms = allocate(gradients, {limits ? layers : 0}, ScalarType::Double);
  const auto doubles = [](const Tensor& tensor) { return static_cast<double*>(tensor.data_ptr()); };
  ShiftAndScaleParams params;
  params.gradients = gradients.const_data_ptr();
  params.directions = directions.const_data_ptr();
  params.spans = span;
  params.rates = doubles(rates);
  params.device_rates = device_rates ? doubles(*device_rates) : nullptr;
  params.in_coarse = doubles(in_coarse);
  params.usable = doubles(usable);
  params.coarse_inverse = coarse_inverse ? doubles(*coarse_inverse) : nullptr;
  params.limits = limits ? doubles(*limits) : nullptr;
  params.largest = largest ? doubles(*largest) : nullptr;
  params.first_bad = static_cast<const int32_t*>(first_bad.const_data_ptr());
  params.none_bad = none_bad;
  params.coarse_weight = coarse_weight;
  params.kl_clip = kl_clip;
  params.layers = layers;
  params.shifts = doubles(shifts);
  params.scale = doubles(scale);
  params.found = static_cast<float*>(found.data_ptr());
  params.factors = doubles(factors);
  params.norms = doubles(norms);
  params.skipped = static_cast<int64_t*>(skipped.data_ptr());
  params.is_double = is_double(gradients);
  KFAC2_RUN(shift_and_scale, gradients, params);
  return {shifts, scale, found, factors, norms};
}

}  // namespace

KFAC2_BIND(shift_and_scale)

}  // namespace kfac2

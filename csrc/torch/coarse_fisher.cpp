#include "coarse_fisher.h"

#include <optional>
#include <tuple>

#include "bind.h"

namespace kfac2 {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Result = std::tuple<Tensor, Tensor, Tensor>;

constexpr const char* kOp = "coarse_fisher";

// One kind of sums, checked and contiguous: raw and previous [B, B], averages likewise, scales [B] on the CPU.
struct Kind {
  Tensor raw, averages;
  std::optional<Tensor> scales, previous;

  Kind(const Tensor& like, const Tensor& raw_sums, const std::optional<Tensor>& scales_,
       const std::optional<Tensor>& previous_, int64_t blocks)
      : raw(checked(like, raw_sums, blocks)), averages(allocate(like, {blocks, blocks}, like.scalar_type())) {
    if (previous_) previous = checked(like, *previous_, blocks);
    if (!scales_) return;
    check(!scales_->is_cuda() && is_double(*scales_) && scales_->is_contiguous() && scales_->numel() == blocks, kOp,
          "expected scales to be ", blocks, " float64 numbers on the CPU, contiguous, got shape ", shape_of(*scales_));
    scales = scales_;
  }

  static Tensor checked(const Tensor& like, const Tensor& sums, int64_t blocks) {
    check(sums.dim() == 2 && sums.size(0) == blocks && sums.size(1) == blocks, kOp,
          "expected all sums of shape [B, B] with B = ", blocks, " (the length of layer_of_block), got ",
          shape_of(sums));
    check(is_float_or_double(sums) && sums.scalar_type() == like.scalar_type(), kOp,
          "expected all sums of one dtype, float32 or float64, got others");
    check(same_device(sums, like), kOp, "expected all sums on one device");
    return as_contiguous(sums);
  }

  PairSums params() const {
    return {raw.const_data_ptr(), scales ? static_cast<const double*>(scales->const_data_ptr()) : nullptr,
            previous ? previous->const_data_ptr() : nullptr, averages.data_ptr()};
  }
};

Result coarse_fisher(const Tensor& input_sums, const Tensor& grad_sums, const std::optional<Tensor>& input_scales,
                     const std::optional<Tensor>& grad_scales, const std::optional<Tensor>& previous_inputs,
                     const std::optional<Tensor>& previous_grads, double kept,
                     const std::vector<int64_t>& layer_of_block, int64_t layers) {
  const int64_t blocks = static_cast<int64_t>(layer_of_block.size());
  const Kind inputs(input_sums, input_sums, input_scales, previous_inputs, blocks);
  const Kind grads(input_sums, grad_sums, grad_scales, previous_grads, blocks);
  for (const int64_t layer : layer_of_block)
    check(layer >= 0 && layer < layers, kOp, "expected layer_of_block in [0, ", layers, "), got ", layer);
  const Tensor fisher = allocate(input_sums, {layers, layers}, input_sums.scalar_type());
  const CoarseFisherParams params{inputs.params(),   grads.params(), kept,   layer_of_block.data(),
                                  fisher.data_ptr(), blocks,         layers, is_double(input_sums)};
  KFAC2_RUN(coarse_fisher, input_sums, params);
  return {inputs.averages, grads.averages, fisher};
}

}  // namespace

KFAC2_BIND(coarse_fisher)

}  // namespace kfac2

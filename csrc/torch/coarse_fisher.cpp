#include "coarse_fisher.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "check.h"

namespace kfac2 {
namespace {

using torch::stable::Tensor;

constexpr const char* kOp = "coarse_fisher";

// input_sums, grad_sums: [B, B]; layer_of_block: B numbers in [0, layers)
void check_sums(const Tensor& input_sums, const Tensor& grad_sums, const std::vector<int64_t>& layer_of_block,
                int64_t layers) {
  const int64_t blocks = static_cast<int64_t>(layer_of_block.size());
  for (const Tensor* sums : {&input_sums, &grad_sums}) {
    check(sums->dim() == 2 && sums->size(0) == blocks && sums->size(1) == blocks, kOp,
          "expected input_sums and grad_sums of shape [B, B] with B = ", blocks,
          " (the length of layer_of_block), got ", shape_of(*sums));
    check(is_float_or_double(*sums) && sums->scalar_type() == input_sums.scalar_type(), kOp,
          "expected input_sums and grad_sums of one dtype, float32 or float64, got others");
  }
  for (const int64_t layer : layer_of_block) {
    check(layer >= 0 && layer < layers, kOp, "expected layer_of_block in [0, ", layers, "), got ", layer);
  }
}

Tensor coarse_fisher_cpu(const Tensor& input_sums, const Tensor& grad_sums, const std::vector<int64_t>& layer_of_block,
                         int64_t layers) {
  check_sums(input_sums, grad_sums, layer_of_block, layers);
  const Tensor inputs = torch::stable::contiguous(input_sums), grads = torch::stable::contiguous(grad_sums);
  Tensor fisher = torch::stable::new_empty(input_sums, {layers, layers});  // [L, L]
  cpu::coarse_fisher({inputs.const_data_ptr(), grads.const_data_ptr(), layer_of_block.data(), fisher.mutable_data_ptr(),
                      static_cast<int64_t>(layer_of_block.size()), layers, is_double(input_sums)});
  return fisher;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kfac2, CPU, m) { m.impl("coarse_fisher", TORCH_BOX(&coarse_fisher_cpu)); }

}  // namespace kfac2

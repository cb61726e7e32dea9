#include "coarse_fisher.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "allocate.h"
#include "check.h"
#ifdef KFAC2_WITH_CUDA
#include "on_device.h"
#endif

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
    check(same_device(*sums, input_sums), kOp, "expected grad_sums on the device of input_sums");
  }
  for (const int64_t layer : layer_of_block) {
    check(layer >= 0 && layer < layers, kOp, "expected layer_of_block in [0, ", layers, "), got ", layer);
  }
}

// Checked inputs, contiguous, and the output made for them: [L, L].
struct Call {
  Tensor inputs, grads, fisher;
  CoarseFisherParams params;

  Call(const Tensor& input_sums, const Tensor& grad_sums, const std::vector<int64_t>& layer_of_block, int64_t layers) {
    check_sums(input_sums, grad_sums, layer_of_block, layers);
    inputs = torch::stable::contiguous(input_sums);
    grads = torch::stable::contiguous(grad_sums);
    fisher = allocate(input_sums, {layers, layers}, input_sums.scalar_type());
    params = {inputs.const_data_ptr(),
              grads.const_data_ptr(),
              layer_of_block.data(),
              fisher.mutable_data_ptr(),
              static_cast<int64_t>(layer_of_block.size()),
              layers,
              is_double(input_sums)};
  }
};

Tensor coarse_fisher_cpu(const Tensor& input_sums, const Tensor& grad_sums, const std::vector<int64_t>& layer_of_block,
                         int64_t layers) {
  const Call call(input_sums, grad_sums, layer_of_block, layers);
  cpu::coarse_fisher(call.params);
  return call.fisher;
}

#ifdef KFAC2_WITH_CUDA
Tensor coarse_fisher_cuda(const Tensor& input_sums, const Tensor& grad_sums, const std::vector<int64_t>& layer_of_block,
                          int64_t layers) {
  const Call call(input_sums, grad_sums, layer_of_block, layers);
  run_on_device(kOp, input_sums, cuda::coarse_fisher_workspace(call.params), [&](void* workspace, cuda::Stream stream) {
    return cuda::coarse_fisher(call.params, workspace, stream);
  });
  return call.fisher;
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kfac2, CPU, m) { m.impl("coarse_fisher", TORCH_BOX(&coarse_fisher_cpu)); }
#ifdef KFAC2_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(kfac2, CUDA, m) { m.impl("coarse_fisher", TORCH_BOX(&coarse_fisher_cuda)); }
#endif

}  // namespace kfac2

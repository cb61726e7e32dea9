#include "eigendecompose.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "allocate.h"
#include "check.h"
#include "parallel.h"
#ifdef KFAC2_WITH_CUDA
#include "on_device.h"
#endif

namespace kfac2 {
namespace {

using torch::stable::Tensor;
using Decomposed = std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor>;

constexpr const char* kOp = "eigendecompose";

void check_matrices(const std::vector<Tensor>& matrices) {
  check(!matrices.empty(), kOp, "expected at least one tensor, got none");
  for (size_t i = 0; i < matrices.size(); ++i) {
    const Tensor& stack = matrices[i];
    check(is_square(stack) && stack.size(-1) > 0, kOp, "expected tensor ", i,
          " of shape [d, d] or [q, d, d] with d at least 1, got ", shape_of(stack));
    check(is_float_or_double(stack) && stack.scalar_type() == matrices[0].scalar_type(), kOp,
          "expected tensors of one dtype, float32 or float64, tensor ", i, " has another");
    check(same_device(stack, matrices[0]), kOp, "expected tensor ", i, " on the device of tensor 0");
  }
}

// Checked inputs, contiguous, and the outputs made for them: values [d] or [q, d] and vectors like the input,
// status [matrices].
struct Call {
  std::vector<Tensor> inputs, values, vectors;
  std::vector<MatrixStack> stacks;
  Tensor status;
  EigendecomposeParams params;

  explicit Call(const std::vector<Tensor>& matrices) {
    check_matrices(matrices);
    int64_t count = 0;
    for (const Tensor& stack : matrices) {
      const int64_t q = blocks_of(stack), d = stack.size(-1);
      std::vector<int64_t> shape = shape_vector(stack);
      inputs.push_back(torch::stable::contiguous(stack));
      vectors.push_back(allocate(stack, shape, stack.scalar_type()));
      shape.pop_back();
      values.push_back(allocate(stack, shape, stack.scalar_type()));
      stacks.push_back({count, inputs.back().const_data_ptr(), values.back().mutable_data_ptr(),
                        vectors.back().mutable_data_ptr(), q, d});
      count += q;
    }
    status = allocate(matrices[0], {count}, torch::headeronly::ScalarType::Int);
    params = {stacks.data(), static_cast<int32_t*>(status.mutable_data_ptr()), static_cast<int64_t>(stacks.size()),
              count, is_double(matrices[0])};
  }
};

Decomposed eigendecompose_cpu(const std::vector<Tensor>& matrices) {
  const Call call(matrices);
  run_tasks(call.params.matrices, [&](int64_t item) { cpu::eigendecompose(call.params, item, item + 1); });
  return {call.values, call.vectors, call.status};
}

#ifdef KFAC2_WITH_CUDA
Decomposed eigendecompose_cuda(const std::vector<Tensor>& matrices) {
  const Call call(matrices);
  for (const MatrixStack& stack : call.stacks)
    check(stack.size <= cuda::kMaxMatrixSize, kOp, "expected matrices of size at most ", cuda::kMaxMatrixSize,
          " on CUDA, got ", stack.size);
  run_on_device(
      kOp, matrices[0], cuda::eigendecompose_workspace(call.params),
      [&](void* workspace, cuda::Stream stream) { return cuda::eigendecompose(call.params, workspace, stream); });
  return {call.values, call.vectors, call.status};
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kfac2, CPU, m) { m.impl("eigendecompose", TORCH_BOX(&eigendecompose_cpu)); }
#ifdef KFAC2_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(kfac2, CUDA, m) { m.impl("eigendecompose", TORCH_BOX(&eigendecompose_cuda)); }
#endif

}  // namespace kfac2

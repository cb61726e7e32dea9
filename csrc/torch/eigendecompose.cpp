// On CUDA alone: a CPU has torch.linalg.eigh, which no own code beat on the sizes that networks have.
#ifdef KFAC2_WITH_CUDA
#include "eigendecompose.h"

#include <tuple>

#include "bind.h"

namespace kfac2 {
namespace {

using torch::stable::Tensor;
using Result = std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor>;

constexpr const char* kOp = "eigendecompose";

void check_matrices(const std::vector<Tensor>& matrices) {
  check(!matrices.empty(), kOp, "expected at least one tensor, got none");
  for (size_t i = 0; i < matrices.size(); ++i) {
    const Tensor& stack = matrices[i];
    check(is_square(stack) && stack.size(-1) > 0 && stack.size(-1) <= kMaxMatrixSize, kOp, "expected tensor ", i,
          " of shape [d, d] or [q, d, d] with d from 1 to ", kMaxMatrixSize, ", got ", shape_of(stack));
    check(is_float_or_double(stack) && stack.scalar_type() == matrices[0].scalar_type(), kOp,
          "expected tensors of one dtype, float32 or float64, tensor ", i, " has another");
    check(same_device(stack, matrices[0]), kOp, "expected tensor ", i, " on the device of tensor 0");
  }
}

// values: [d] or [q, d]; vectors: like the matrices; status: one for each matrix of all
Result eigendecompose(const std::vector<Tensor>& matrices) {
  check_matrices(matrices);
  std::vector<Tensor> inputs, values, vectors;
  std::vector<MatrixStack> stacks;
  int64_t count = 0;
  for (const Tensor& stack : matrices) {
    const int64_t q = blocks_of(stack), d = stack.size(-1);
    std::vector<int64_t> shape = shape_vector(stack);
    inputs.push_back(as_contiguous(stack));
    vectors.push_back(allocate(stack, shape, stack.scalar_type()));
    shape.pop_back();
    values.push_back(allocate(stack, shape, stack.scalar_type()));
    stacks.push_back({count, inputs.back().const_data_ptr(), values.back().mutable_data_ptr(),
                      vectors.back().mutable_data_ptr(), q, d});
    count += q;
  }
  const Tensor status = allocate(matrices[0], {count}, torch::headeronly::ScalarType::Int);
  const EigendecomposeParams params{stacks.data(), static_cast<int32_t*>(status.data_ptr()),
                                    static_cast<int64_t>(stacks.size()), count, is_double(matrices[0])};
  run_on_cuda(kOp, matrices[0], *cuda::eigendecompose(params));
  return {values, vectors, status};
}

}  // namespace

KFAC2_BIND_CUDA(eigendecompose)

}  // namespace kfac2
#endif

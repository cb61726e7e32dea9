#include "gather_gradients.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "allocate.h"
#include "check.h"
#include "gradient_parts.h"
#include "parallel.h"
#ifdef KFAC2_WITH_CUDA
#include "on_device.h"
#endif

namespace kfac2 {
namespace {

using torch::stable::Tensor;

constexpr const char* kOp = "gather_gradients";

// Checked inputs, and the output made for them: [1].
struct Call {
  std::vector<GradientPart> parts;
  Tensor matrices, first_bad;
  int64_t none_bad;

  Call(const std::vector<Tensor>& gradients, const Tensor& layout, int64_t layers, int64_t none_bad_,
       const Tensor& matrices_)
      : parts(gradient_parts(kOp, gradients, layout, matrices_, layers)), matrices(matrices_), none_bad(none_bad_) {
    first_bad = allocate(matrices, {1}, torch::headeronly::ScalarType::Int);
  }

  GatherGradientsParams params() const {
    return {parts.data(),
            matrices.data_ptr(),
            static_cast<int32_t*>(first_bad.data_ptr()),
            static_cast<int64_t>(parts.size()),
            none_bad,
            is_double(matrices)};
  }
};

Tensor gather_gradients_cpu(const std::vector<Tensor>& gradients, const Tensor& layout, int64_t layers,
                            int64_t none_bad, const Tensor& matrices) {
  const Call call(gradients, layout, layers, none_bad, matrices);
  cpu::GatherGradients work(call.params());
  run_tasks(work.tasks(), [&](int64_t task) { work.run_task(task); });
  work.merge();
  return call.first_bad;
}

#ifdef KFAC2_WITH_CUDA
Tensor gather_gradients_cuda(const std::vector<Tensor>& gradients, const Tensor& layout, int64_t layers,
                             int64_t none_bad, const Tensor& matrices) {
  const Call call(gradients, layout, layers, none_bad, matrices);
  const GatherGradientsParams params = call.params();
  run_on_device(kOp, matrices, cuda::gather_gradients_workspace(params), [&](void* workspace, cuda::Stream stream) {
    return cuda::gather_gradients(params, workspace, stream);
  });
  return call.first_bad;
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kfac2, CPU, m) { m.impl("gather_gradients", TORCH_BOX(&gather_gradients_cpu)); }
#ifdef KFAC2_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(kfac2, CUDA, m) { m.impl("gather_gradients", TORCH_BOX(&gather_gradients_cuda)); }
#endif

}  // namespace kfac2

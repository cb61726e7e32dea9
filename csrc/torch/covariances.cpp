#include "covariances.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "allocate.h"
#include "check.h"
#include "parallel.h"
#include "row_source.h"
#ifdef KFAC2_WITH_CUDA
#include "on_device.h"
#endif

namespace kfac2 {
namespace {

using torch::stable::Tensor;

constexpr const char* kOp = "covariances";

// Checked inputs, and the outputs made for them: [groups, d, d] for each layer.
struct Call {
  std::vector<RowSource> sources;
  std::vector<Tensor> covariances;
  std::vector<void*> pointers;

  Call(const std::vector<Tensor>& tensors, const std::vector<int64_t>& windows)
      : sources(row_sources(kOp, tensors, windows)) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      const int64_t d = sources[i].row_length();
      const std::vector<int64_t> shape = {sources[i].window.groups, d, d};
      covariances.push_back(allocate(tensors[i], shape, sum_type(sources[i])));
      pointers.push_back(covariances.back().mutable_data_ptr());
    }
  }

  CovariancesParams params() const { return {sources.data(), pointers.data(), static_cast<int64_t>(sources.size())}; }
};

std::vector<Tensor> covariances_cpu(const std::vector<Tensor>& tensors, const std::vector<int64_t>& windows) {
  const Call call(tensors, windows);
  cpu::Covariances work(call.params());
  run_tasks(work.tasks(), [&](int64_t task) { work.run_task(task); });
  run_tasks(work.merges(), [&](int64_t merge) { work.run_merge(merge); });
  return call.covariances;
}

#ifdef KFAC2_WITH_CUDA
std::vector<Tensor> covariances_cuda(const std::vector<Tensor>& tensors, const std::vector<int64_t>& windows) {
  const Call call(tensors, windows);
  for (const RowSource& source : call.sources) {
    for (const int64_t kernel : source.window.kernel) {
      check(kernel <= 64, kOp, "expected kernels of at most 64 places along an axis on CUDA, got ", kernel);
    }
  }
  const CovariancesParams params = call.params();
  run_on_device(kOp, tensors[0], cuda::covariances_workspace(params),
                [&](void* workspace, cuda::Stream stream) { return cuda::covariances(params, workspace, stream); });
  return call.covariances;
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kfac2, CPU, m) { m.impl("covariances", TORCH_BOX(&covariances_cpu)); }
#ifdef KFAC2_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(kfac2, CUDA, m) { m.impl("covariances", TORCH_BOX(&covariances_cuda)); }
#endif

}  // namespace kfac2

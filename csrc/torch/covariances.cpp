#include "covariances.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "parallel.h"
#include "row_source.h"

namespace kfac2 {
namespace {

using torch::stable::Tensor;

std::vector<Tensor> covariances_cpu(const std::vector<Tensor>& tensors, const std::vector<int64_t>& windows) {
  const std::vector<RowSource> sources = row_sources("covariances", tensors, windows);
  std::vector<Tensor> covariances;  // [groups, d, d] each
  std::vector<void*> pointers;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t d = sources[i].row_length();
    const std::vector<int64_t> shape = {sources[i].window.groups, d, d};
    covariances.push_back(torch::stable::new_empty(tensors[i], shape, sum_type(sources[i])));
    pointers.push_back(covariances.back().mutable_data_ptr());
  }
  cpu::Covariances work({sources.data(), pointers.data(), static_cast<int64_t>(sources.size())});
  run_tasks(work.tasks(), [&](int64_t task) { work.run_task(task); });
  run_tasks(work.merges(), [&](int64_t merge) { work.run_merge(merge); });
  return covariances;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kfac2, CPU, m) { m.impl("covariances", TORCH_BOX(&covariances_cpu)); }

}  // namespace kfac2

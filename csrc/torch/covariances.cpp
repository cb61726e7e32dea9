#include "covariances.h"

#include "bind.h"
#include "row_source.h"

namespace kfac2 {
namespace {

using torch::stable::Tensor;

constexpr const char* kOp = "covariances";

// [groups, d, d] for each layer
std::vector<Tensor> covariances(const std::vector<Tensor>& tensors, const std::vector<int64_t>& windows) {
  const std::vector<RowSource> sources = row_sources(kOp, tensors, windows);
  std::vector<Tensor> results;
  std::vector<void*> pointers;
  for (size_t i = 0; i < tensors.size(); ++i) {
    check(sources[i].window.bias <= 1, kOp, "expected a bias of 0 or 1 in window ", i, ", got ",
          sources[i].window.bias);
    const int64_t d = sources[i].row_length();
    results.push_back(allocate(tensors[i], {sources[i].window.groups, d, d}, sum_type(sources[i])));
    pointers.push_back(results.back().mutable_data_ptr());
  }
  const CovariancesParams params{sources.data(), pointers.data(), static_cast<int64_t>(sources.size())};
  KFAC2_RUN(covariances, tensors[0], params);
  return results;
}

}  // namespace

KFAC2_BIND(covariances)

}  // namespace kfac2

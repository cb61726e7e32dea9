#include "covariances.h"

#include "bind.h"
#include "previous.h"
#include "row_source.h"

namespace kfac2 {
namespace {

using torch::stable::Tensor;

constexpr const char* kOp = "covariances";

// [groups, height, width] of a triangle of d for each layer; previous and scales: of each layer, or none at all
std::vector<Tensor> covariances(const std::vector<Tensor>& tensors, const std::vector<int64_t>& windows,
                                const std::vector<Tensor>& previous, double kept, const std::vector<double>& scales) {
  const std::vector<RowSource> sources = row_sources(kOp, tensors, windows);
  check(previous.empty() || previous.size() == tensors.size(), kOp, "expected as many previous as tensors, ",
        tensors.size(), ", or none, got ", previous.size());
  check(scales.empty() || scales.size() == tensors.size(), kOp, "expected as many scales as tensors, ", tensors.size(),
        ", or none, got ", scales.size());
  std::vector<Tensor> results;
  std::vector<void*> pointers;
  std::vector<const void*> before;
  std::vector<Tensor> contiguous;  // keeps alive what the pointers point to
  for (size_t i = 0; i < tensors.size(); ++i) {
    check(sources[i].window.bias <= 1, kOp, "expected a bias of 0 or 1 in window ", i, ", got ",
          sources[i].window.bias);
    const Triangle triangle{sources[i].row_length()};
    const std::vector<int64_t> shape = {sources[i].window.groups, triangle.height(), triangle.width()};
    results.push_back(allocate(tensors[i], shape, sum_type(sources[i])));
    pointers.push_back(results.back().mutable_data_ptr());
    before.push_back(previous.empty() ? nullptr : pointer_to_previous(kOp, previous[i], i, results.back(), contiguous));
  }
  const CovariancesParams params{sources.data(),
                                 pointers.data(),
                                 static_cast<int64_t>(sources.size()),
                                 before.data(),
                                 kept,
                                 scales.empty() ? nullptr : scales.data()};
  KFAC2_RUN(covariances, tensors[0], params);
  return results;
}

}  // namespace

KFAC2_BIND(covariances)

}  // namespace kfac2

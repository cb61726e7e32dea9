// Floor: every gradient read once, the matrices written once.
#include <cmath>

#include "gather_gradients.h"
#include "part_items.h"

namespace kfac2::cuda {
namespace {

__global__ void none_bad_kernel(int32_t* first_bad, int32_t none_bad) { *first_bad = none_bad; }

template <typename Sum>
__global__ void __launch_bounds__(kPartThreads)
    gather_kernel(const PartEntry* entries, int count, Sum* matrices, int32_t* first_bad) {
  const PartEntry& entry = entries[entry_of(entries, count, blockIdx.x)];
  bool finite = true;
  with_type(entry.part.element_type, entry.part.data, [&](const auto* data) {
    for_each_element(entry, blockIdx.x, [&](int64_t offset, int64_t place) {
      const auto value = to_sum_type(data[offset]);
      finite &= static_cast<bool>(std::isfinite(value));
      if (entry.part.belongs()) matrices[place] = static_cast<Sum>(value);
    });
  });
  if (!finite) atomicMin(first_bad, static_cast<int>(entry.part.number));
}

template <typename Sum>
cudaError_t launch_gather(const GatherGradientsParams& params, const PartTable& table, const void* workspace,
                          cudaStream_t stream) {
  return launch(gather_kernel<Sum>, dim3(static_cast<unsigned>(table.items)), dim3(kPartThreads), 0, stream,
                table_at<PartEntry>(workspace, 0), table.count, static_cast<Sum*>(params.matrices), params.first_bad);
}

}  // namespace

int64_t gather_gradients_workspace(const GatherGradientsParams& params) {
  return PartTable(params.parts, params.count).tables.size();
}

int gather_gradients(const GatherGradientsParams& params, void* workspace, Stream stream) {
  const PartTable table(params.parts, params.count);
  cudaError_t status =
      launch(none_bad_kernel, dim3(1), dim3(1), 0, stream, params.first_bad, static_cast<int32_t>(params.none_bad));
  if (status != cudaSuccess || table.items == 0) return status;
  status = table.tables.copy_to(workspace, stream);
  if (status != cudaSuccess) return status;
  const auto launcher = params.is_double ? launch_gather<double> : launch_gather<float>;
  return launcher(params, table, workspace, stream);
}

}  // namespace kfac2::cuda

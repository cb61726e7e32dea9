// Floor: directions read once, gradients written once.
#include "part_items.h"
#include "write_gradients.h"

namespace kfac2::cuda {
namespace {

template <typename Sum>
__global__ void __launch_bounds__(kPartThreads)
    write_kernel(const PartEntry* entries, int count, const Sum* directions, const double* shifts, const double* scale,
                 const float* found, const double* usable) {
  const PartEntry& entry = entries[entry_of(entries, count, blockIdx.x)];
  const GradientPart& part = entry.part;
  const bool skipped = *found != 0, kept = !part.belongs() || usable[part.layer] == 0;
  if (kept && !skipped) return;  // there is no barrier
  const Sum shift = kept ? Sum(0) : static_cast<Sum>(shifts[part.layer]), nu = static_cast<Sum>(*scale);
  with_type(part.element_type, part.data, [&](auto* data) {
    using T = std::remove_pointer_t<decltype(data)>;
    for_each_element(entry, blockIdx.x, [&](int64_t offset, int64_t place) {
      const Sum value = skipped ? Sum(0) : nu * (directions[place] + shift);
      data[offset] = from_sum_type<T>(static_cast<SumType<T>>(value));
    });
  });
}

template <typename Sum>
cudaError_t launch_write(const WriteGradientsParams& params, const PartTable& table, const void* workspace,
                         cudaStream_t stream) {
  return launch(write_kernel<Sum>, dim3(static_cast<unsigned>(table.items)), dim3(kPartThreads), 0, stream,
                table_at<PartEntry>(workspace, 0), table.count, static_cast<const Sum*>(params.directions),
                params.shifts, params.scale, params.found, params.usable);
}

}  // namespace

int64_t write_gradients_workspace(const WriteGradientsParams& params) {
  return PartTable(params.parts, params.count).tables.size();
}

int write_gradients(const WriteGradientsParams& params, void* workspace, Stream stream) {
  const PartTable table(params.parts, params.count);
  if (table.items == 0) return cudaSuccess;
  const cudaError_t copied = table.tables.copy_to(workspace, stream);
  if (copied != cudaSuccess) return copied;
  const auto launcher = params.is_double ? launch_write<double> : launch_write<float>;
  return launcher(params, table, workspace, stream);
}

}  // namespace kfac2::cuda

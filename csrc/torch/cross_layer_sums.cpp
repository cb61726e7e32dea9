#include "cross_layer_sums.h"

#include <optional>

#include "bind.h"

namespace kfac2 {
namespace {

using torch::stable::Tensor;

constexpr const char* kOp = "cross_layer_sums";

// maps: B tensors [N, *grid] of one dtype, float32 or float64, on one device
void check_maps(const std::vector<Tensor>& maps) {
  check(!maps.empty(), kOp, "expected at least one map, got none");
  check(is_float_or_double(maps[0]), kOp, "expected maps of dtype float32 or float64, got another dtype");
  for (size_t i = 0; i < maps.size(); ++i) {
    check(maps[i].dim() >= 1 && maps[i].dim() <= 1 + kMaxGridRank, kOp, "expected map ", i,
          " of shape [N, *grid] with at most ", kMaxGridRank, " grid axes, got ", shape_of(maps[i]));
    check(maps[i].scalar_type() == maps[0].scalar_type(), kOp, "expected all maps to have the dtype of map 0, map ", i,
          " has another");
    check(maps[i].size(0) == maps[0].size(0), kOp, "expected all maps to have N = ", maps[0].size(0), ", map ", i,
          " has shape ", shape_of(maps[i]));
    check(same_device(maps[i], maps[0]), kOp, "expected map ", i, " on the device of map 0");
  }
}

// previous: [B, B], like the maps
void check_previous(const std::vector<Tensor>& maps, const std::optional<Tensor>& previous) {
  if (!previous) return;
  const int64_t count = static_cast<int64_t>(maps.size());
  check(previous->dim() == 2 && previous->size(0) == count && previous->size(1) == count, kOp,
        "expected previous of shape [B, B] with B = ", count, " (the number of maps), got ", shape_of(*previous));
  check(previous->scalar_type() == maps[0].scalar_type(), kOp, "expected previous to have the dtype of the maps");
  check(same_device(*previous, maps[0]), kOp, "expected previous on the device of the maps");
}

// [B, B]
Tensor cross_layer_sums(const std::vector<Tensor>& maps, bool area, const std::optional<Tensor>& previous, double kept,
                        double scale) {
  check_maps(maps);
  check_previous(maps, previous);
  std::vector<Tensor> contiguous;  // keeps alive what the pointers point to
  std::vector<GridMap> grid_maps;
  for (const Tensor& map : maps) {
    contiguous.push_back(as_contiguous(map));
    GridMap grid_map{contiguous.back().const_data_ptr(), {static_cast<int>(map.dim()) - 1, {}}};
    for (int axis = 0; axis < grid_map.grid.rank; ++axis) grid_map.grid.extent[axis] = map.size(axis + 1);
    grid_maps.push_back(grid_map);
  }
  if (previous) contiguous.push_back(as_contiguous(*previous));
  const int64_t count = static_cast<int64_t>(maps.size());
  const Tensor sums = allocate(maps[0], {count, count}, maps[0].scalar_type());
  const CrossLayerSumsParams params{
      grid_maps.data(), sums.data_ptr(),    previous ? contiguous.back().const_data_ptr() : nullptr, kept, scale, count,
      maps[0].size(0),  is_double(maps[0]), area ? Downsample::kArea : Downsample::kNearest};
  KFAC2_RUN(cross_layer_sums, maps[0], params);
  return sums;
}

}  // namespace

KFAC2_BIND(cross_layer_sums)

}  // namespace kfac2

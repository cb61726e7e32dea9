#include "row_source.h"

#include <iterator>

#include "check.h"

namespace kfac2 {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Window window_at(const int64_t* numbers) {
  Window window;
  int64_t* const axes[] = {window.kernel, window.stride, window.pad_low, window.pad_high, window.dilation};
  for (int64_t* const values : axes)
    for (int axis = 0; axis < kSpatialRank; ++axis) values[axis] = *numbers++;
  window.groups = *numbers++;
  window.bias = *numbers;
  return window;
}

void check_window(const char* op, const RowSource& source, const Tensor& tensor, size_t index) {
  const Window& window = source.window;
  for (int axis = 0; axis < kSpatialRank; ++axis) {
    check(window.kernel[axis] >= 1 && window.stride[axis] >= 1 && window.dilation[axis] >= 1 &&
              window.pad_low[axis] >= 0 && window.pad_high[axis] >= 0,
          op, "expected positive kernel, stride and dilation and no negative padding in window ", index);
    check(source.grid(axis) >= 1, op, "expected the kernel of window ", index,
          " to fit into its padded tensor, got a tensor of shape ", shape_of(tensor));
  }
  check(window.groups >= 1 && source.channels % window.groups == 0, op, "expected tensor ", index,
        " to have a number of channels (axis 1) divisible by groups = ", window.groups, ", got shape ",
        shape_of(tensor));
}

}  // namespace

std::vector<RowSource> row_sources(const char* op, const std::vector<Tensor>& tensors,
                                   const std::vector<int64_t>& windows) {
  check(static_cast<int64_t>(windows.size()) == kWindowNumbers * static_cast<int64_t>(tensors.size()), op, "expected ",
        kWindowNumbers, " window numbers for each of ", tensors.size(), " tensors, got ", windows.size());
  std::vector<RowSource> sources;
  for (size_t index = 0; index < tensors.size(); ++index) {
    const Tensor& tensor = tensors[index];
    check(tensor.dim() >= 2 && tensor.dim() <= 2 + kSpatialRank, op, "expected tensor ", index,
          " of shape [N, C] with at most three spatial axes, got ", shape_of(tensor));
    check(same_device(tensor, tensors[0]), op, "expected tensor ", index, " on the device of tensor 0");
    RowSource source;
    source.data = tensor.const_data_ptr();
    source.element_type = element_type(op, tensor, index);
    source.batch = tensor.size(0);
    source.channels = tensor.size(1);
    source.batch_stride = tensor.stride(0);
    source.channel_stride = tensor.stride(1);
    const int64_t absent = 2 + kSpatialRank - tensor.dim();
    for (int axis = 0; axis < kSpatialRank; ++axis) {
      const bool present = axis >= absent;
      source.extent[axis] = present ? tensor.size(2 + axis - absent) : 1;
      source.spatial_stride[axis] = present ? tensor.stride(2 + axis - absent) : 0;
    }
    source.window = window_at(windows.data() + index * kWindowNumbers);
    check_window(op, source, tensor, index);
    sources.push_back(source);
  }
  return sources;
}

std::vector<int64_t> windows_of_places(const std::vector<int64_t>& windows) {
  std::vector<int64_t> places;
  for (size_t first = 0; first + kWindowNumbers <= windows.size(); first += kWindowNumbers) {
    const int64_t groups = windows[first + kWindowNumbers - 2];
    const int64_t numbers[] = {1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, groups, 0};
    places.insert(places.end(), std::begin(numbers), std::end(numbers));
  }
  return places;
}

ScalarType sum_type(const RowSource& source) {
  return source.element_type == ElementType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

}  // namespace kfac2

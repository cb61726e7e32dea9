// Memory of tensors: the shim's own allocation costs a third of torch::stable::new_empty, which goes through the
// dispatcher.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace kfac2 {

// Contiguous, on the device of `like`, not initialised.
inline torch::stable::Tensor allocate(const torch::stable::Tensor& like, const std::vector<int64_t>& shape,
                                      torch::headeronly::ScalarType dtype) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t axis = shape.size(); axis-- > 1;) strides[axis - 1] = strides[axis] * (shape[axis] > 0 ? shape[axis] : 1);
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
                               like.get_device_index(), &handle));
  return torch::stable::Tensor(handle);
}

// The tensor itself where that is enough: torch::stable::contiguous goes through the dispatcher, too.
inline torch::stable::Tensor as_contiguous(const torch::stable::Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace kfac2

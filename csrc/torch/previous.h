// What was there before a call that adds to it.
#pragma once

#include <vector>

#include "allocate.h"
#include "check.h"

namespace kfac2 {

// Where the entry of a list lies that is shaped like the result of its layer; null where the tensor has no elements,
// which stands for none. What it points to is kept alive by `contiguous`.
inline const void* pointer_to_previous(const char* op, const torch::stable::Tensor& tensor, size_t layer,
                                       const torch::stable::Tensor& result,
                                       std::vector<torch::stable::Tensor>& contiguous) {
  if (tensor.numel() == 0) return nullptr;
  check(shape_vector(tensor) == shape_vector(result) && tensor.scalar_type() == result.scalar_type(), op,
        "expected previous ", layer, " with the shape and dtype of its result, ", shape_of(result), ", got ",
        shape_of(tensor), tensor.scalar_type() == result.scalar_type() ? "" : " of another dtype");
  check(same_device(tensor, result), op, "expected previous ", layer, " on the device of its result");
  contiguous.push_back(as_contiguous(tensor));
  return contiguous.back().const_data_ptr();
}

}  // namespace kfac2

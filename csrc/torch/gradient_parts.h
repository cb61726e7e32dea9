// Gradients as torch hands them over, read as GradientParts.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "gradient_part.h"

namespace kfac2 {

// layout: int64 on the CPU, [n, 4]: offset, row length, layer and number of each gradient; an offset of -1 where it
// belongs to no layer's matrix. Each is checked against the tensor and against `matrices`, the place of all layers'
// matrices.
std::vector<GradientPart> gradient_parts(const char* op, const std::vector<torch::stable::Tensor>& gradients,
                                         const torch::stable::Tensor& layout, const torch::stable::Tensor& matrices,
                                         int64_t layers);

}  // namespace kfac2

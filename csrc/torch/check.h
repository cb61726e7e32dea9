// One wording for what a binding refuses: "kfac2::<op>: expected <what>, got <value>".
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "scalar.h"

namespace kfac2 {

// Raised in Python as a RuntimeError, before anything is written.
template <typename... Parts>
void check(bool condition, const char* op, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << "kfac2::" << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Written out only where a message needs it.
struct ShapeOf {
  const torch::stable::Tensor& tensor;
};

inline ShapeOf shape_of(const torch::stable::Tensor& tensor) { return {tensor}; }

inline std::ostream& operator<<(std::ostream& out, const ShapeOf& shape) {
  out << '[';
  for (int64_t axis = 0; axis < shape.tensor.dim(); ++axis) out << (axis ? ", " : "") << shape.tensor.size(axis);
  return out << ']';
}

inline std::vector<int64_t> shape_vector(const torch::stable::Tensor& tensor) {
  std::vector<int64_t> shape;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) shape.push_back(tensor.size(axis));
  return shape;
}

// [d, d], or a stack of q such blocks.
inline bool is_square(const torch::stable::Tensor& tensor) {
  return (tensor.dim() == 2 || tensor.dim() == 3) && tensor.size(-1) == tensor.size(-2);
}

inline int64_t blocks_of(const torch::stable::Tensor& tensor) { return tensor.dim() == 3 ? tensor.size(0) : 1; }

inline bool same_device(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

inline bool is_float_or_double(const torch::stable::Tensor& tensor) {
  return tensor.scalar_type() == torch::headeronly::ScalarType::Float ||
         tensor.scalar_type() == torch::headeronly::ScalarType::Double;
}

inline bool is_double(const torch::stable::Tensor& tensor) {
  return tensor.scalar_type() == torch::headeronly::ScalarType::Double;
}

// As the kernels call it; `index` names the tensor in the message.
inline ElementType element_type(const char* op, const torch::stable::Tensor& tensor, size_t index) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return ElementType::kFloat32;
    case ScalarType::Double: return ElementType::kFloat64;
    case ScalarType::Half: return ElementType::kFloat16;
    case ScalarType::BFloat16: return ElementType::kBFloat16;
    default: break;
  }
  check(false, op, "expected tensor ", index, " to be float32, float64, float16 or bfloat16, got another dtype");
  return ElementType::kFloat32;
}

}  // namespace kfac2

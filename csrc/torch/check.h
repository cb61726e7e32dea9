// One wording for what a binding refuses: "kfac2::<op>: expected <what>, got <value>".
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "scalar.h"

namespace kfac2 {

// Written out only where a message needs it.
struct ShapeOf {
  const torch::stable::Tensor& tensor;
};

inline ShapeOf shape_of(const torch::stable::Tensor& tensor) { return {tensor}; }

// Not by streams: these look up a locale, and where a toolchain links the C++ library in statically, beside torch's
// own, they find the other one's and crash (g++ 13 of a machine with an H100 did so).
inline std::string text_of(const char* text) { return text; }
template <typename Integer>
std::string text_of(Integer number) {
  return std::to_string(number);
}
inline std::string text_of(const ShapeOf& shape) {
  std::string text = "[";
  for (int64_t axis = 0; axis < shape.tensor.dim(); ++axis)
    text += (axis ? ", " : "") + std::to_string(shape.tensor.size(axis));
  return text + "]";
}

// Raised in Python as a RuntimeError, before anything is written.
template <typename... Parts>
void check(bool condition, const char* op, const Parts&... parts) {
  if (condition) return;
  std::string message = std::string("kfac2::") + op + ": ";
  ((message += text_of(parts)), ...);
  throw std::runtime_error(message);
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

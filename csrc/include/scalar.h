// The scalar types that torch hands over, without torch: 16-bit floats by their bits.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "host_device.h"

namespace kfac2 {

enum class ElementType { kFloat32, kFloat64, kFloat16, kBFloat16 };

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

KFAC2_HOST_DEVICE inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

KFAC2_HOST_DEVICE inline float to_sum_type(float value) { return value; }
KFAC2_HOST_DEVICE inline double to_sum_type(double value) { return value; }
KFAC2_HOST_DEVICE inline float to_sum_type(BFloat16 value) { return from_bits(uint32_t{value.bits} << 16); }

// IEEE binary16. Moving exponent and mantissa into a float's place scales the value by 2^-112, for
// normal and subnormal numbers alike; infinities and NaNs then get the float's full exponent.
KFAC2_HOST_DEVICE inline float to_sum_type(Half value) {
  const uint32_t magnitude = uint32_t{value.bits & 0x7fffu} << 13;
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const float scaled = from_bits(magnitude) * 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &scaled, sizeof bits);
  if (magnitude >= (0x7c00u << 13)) bits = 0x7f800000u | (magnitude & 0x007fffffu);
  return from_bits(bits | sign);
}

KFAC2_HOST_DEVICE inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Back from the type of sums, rounded to the nearest, ties to even.
template <typename T>
KFAC2_HOST_DEVICE T from_sum_type(T value) {
  return value;
}

template <typename T>
KFAC2_HOST_DEVICE std::enable_if_t<std::is_same_v<T, BFloat16>, T> from_sum_type(float value) {
  const uint32_t bits = to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};  // a quiet NaN
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <typename T>
KFAC2_HOST_DEVICE std::enable_if_t<std::is_same_v<T, Half>, T> from_sum_type(float value) {
  const uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // a quiet NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // from 65,520 on it rounds to infinity
  } else if (magnitude >= 0x38800000u) {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  } else {  // a subnormal: adding 1/2 makes the float's own rounding cut where half's last bit is
    half = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  }
  return {static_cast<uint16_t>(sign | half)};
}

inline int64_t element_bytes(ElementType type) {
  switch (type) {
    case ElementType::kFloat32: return 4;
    case ElementType::kFloat64: return 8;
    default: return 2;
  }
}

template <typename T, typename Void>
using PointerTo = std::conditional_t<std::is_const_v<Void>, const T*, T*>;

// Calls `function` with `data`, a void* or const void*, as a pointer to its element type.
template <typename Void, typename Function>
KFAC2_HOST_DEVICE void with_type(ElementType type, Void* data, const Function& function) {
  switch (type) {
    case ElementType::kFloat32: return function(static_cast<PointerTo<float, Void>>(data));
    case ElementType::kFloat64: return function(static_cast<PointerTo<double, Void>>(data));
    case ElementType::kFloat16: return function(static_cast<PointerTo<Half, Void>>(data));
    case ElementType::kBFloat16: return function(static_cast<PointerTo<BFloat16, Void>>(data));
  }
}

// The type that a pointer given by `with_type` points to.
template <typename Pointer>
using ElementOf = std::remove_const_t<std::remove_pointer_t<Pointer>>;

// The type that sums of T are accumulated in and returned as.
template <typename T>
using SumType = decltype(to_sum_type(T{}));

}  // namespace kfac2

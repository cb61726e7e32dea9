// Reading the scalar types that torch hands over, without torch: 16-bit floats by their bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace kfac2 {

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

// What sums are accumulated in and returned as.
template <typename T>
using SumType = decltype(to_sum_type(T{}));

}  // namespace kfac2

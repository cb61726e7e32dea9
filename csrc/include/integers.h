// Division that rounds one way for either sign (divisors are positive), and ranges of integers.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace kfac2 {

KFAC2_HOST_DEVICE inline int64_t ceil_div(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }
KFAC2_HOST_DEVICE inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

struct Range {
  int64_t begin, end;
  KFAC2_HOST_DEVICE int64_t size() const { return end > begin ? end - begin : 0; }
  KFAC2_HOST_DEVICE Range intersect(Range other) const {
    return {begin > other.begin ? begin : other.begin, end < other.end ? end : other.end};
  }
};

}  // namespace kfac2

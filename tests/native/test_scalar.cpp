// 16-bit floats against the compiler's own, both ways, over every half and many floats.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "scalar.h"

using namespace kfac2;

namespace {

void expect(bool condition, const char* what, float value) {
  if (condition) return;
  std::fprintf(stderr, "%s of %a is wrong\n", what, static_cast<double>(value));
  std::exit(1);
}

void test_half(float value) {
  const _Float16 expected = static_cast<_Float16>(value);
  const Half got = from_sum_type<Half>(value);
  uint16_t bits;
  std::memcpy(&bits, &expected, sizeof bits);
  expect(std::isnan(value) ? std::isnan(to_sum_type(got)) : got.bits == bits, "the half", value);
}

// Among the two neighbours the nearer one, the even one of two equally near.
void test_bfloat16(float value) {
  const BFloat16 got = from_sum_type<BFloat16>(value);
  if (std::isnan(value)) return expect(std::isnan(to_sum_type(got)), "the bfloat16", value);
  const uint16_t below = static_cast<uint16_t>(to_bits(value) >> 16), above = static_cast<uint16_t>(below + 1);
  const double low = to_sum_type(BFloat16{below}), exact = value;
  const double step =
      std::isinf(to_sum_type(BFloat16{above})) ? std::copysign(0x1p120, low) : to_sum_type(BFloat16{above}) - low;
  const double past = (exact - low) / step;  // of the way to the neighbour further from 0
  const bool up = std::isfinite(value) && step != 0 && (past > 0.5 || (past == 0.5 && below % 2 == 1));
  expect(got.bits == (up ? above : below), "the bfloat16", value);
}

}  // namespace

int main() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float half = to_sum_type(Half{static_cast<uint16_t>(bits)});
    test_half(half);
    test_half(std::nextafter(half, 1e30f));
    for (const uint32_t low : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      test_half(from_bits(bits << 16 | low));
      test_bfloat16(from_bits(bits << 16 | low));
    }
  }
  std::mt19937 random(0);
  for (int i = 0; i < 1000000; ++i) {
    const uint32_t bits = static_cast<uint32_t>(random());
    test_half(from_bits(bits));
    test_half(from_bits((bits & 0x807fffffu) | (100u + bits % 60u) << 23));  // around the halves' range
    test_bfloat16(from_bits(bits));
  }
  std::puts("16-bit floats are rounded as the compiler does");
  return 0;
}

// Drawn symmetric sums of pairs for the tests of coarse_fisher.
#pragma once

#include "coarse_fisher.h"
#include "drawn.h"

namespace kfac2::tests {

template <typename T>
struct DrawnSums {
  int64_t count;
  std::vector<T> raw, previous, averages;
  std::vector<double> scales;
  bool scaled, averaged;

  DrawnSums(Random& random, int64_t blocks)
      : count(blocks),
        raw(symmetric(random, blocks)),
        previous(symmetric(random, blocks)),
        averages(blocks * blocks, T(-1)),
        scales(drawn_numbers<double>(random, blocks)),
        scaled(draw(random, 0, 2) > 0),
        averaged(draw(random, 0, 2) > 0) {}

  PairSums params() {
    return {raw.data(), scaled ? scales.data() : nullptr, averaged ? previous.data() : nullptr, averages.data()};
  }

  std::vector<double> expected(double kept) const {
    std::vector<double> result(count * count);
    for (int64_t i = 0; i < count * count; ++i) {
      result[i] = static_cast<double>(raw[i]) * (scaled ? scales[i / count] * scales[i % count] : 1.0);
      if (averaged) result[i] = kept * static_cast<double>(previous[i]) + (1 - kept) * result[i];
    }
    return result;
  }

  static std::vector<T> symmetric(Random& random, int64_t size) {
    std::vector<T> numbers = drawn_numbers<T>(random, size * size);
    for (int64_t i = 0; i < size; ++i)
      for (int64_t j = 0; j < i; ++j) numbers[i * size + j] = numbers[j * size + i];
    return numbers;
  }
};

}  // namespace kfac2::tests

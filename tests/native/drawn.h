// Drawn layers for the native tests: buffers of exactly the size that the sources may read, so that
// AddressSanitizer sees one element too many.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <stdexcept>
#include <vector>

#include "op.h"
#include "scalar.h"
#include "window.h"

namespace kfac2::tests {

using Random = std::mt19937_64;

// All that a call has to do on the CPU, in the order that is least like that of one thread.
inline void run(cpu::Work& work) {
  for (int64_t task = work.tasks() - 1; task >= 0; --task) work.run_task(task);
  for (int64_t merge = work.merges() - 1; merge >= 0; --merge) work.run_merge(merge);
}

inline int64_t draw(Random& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

template <typename T>
T number_as(double value) {
  return static_cast<T>(value);
}
template <>
inline Half number_as<Half>(double value) {
  const _Float16 half = static_cast<_Float16>(value);
  Half result;
  std::memcpy(&result, &half, sizeof result);
  return result;
}
template <>
inline BFloat16 number_as<BFloat16>(double value) {
  const float single = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &single, sizeof bits);
  return {static_cast<uint16_t>(bits >> 16)};
}

template <typename T>
std::vector<T> drawn_numbers(Random& random, int64_t count) {
  std::vector<T> numbers(count);
  std::normal_distribution<double> normal;
  for (T& number : numbers) number = number_as<T>(normal(random));
  return numbers;
}

// A covariance of few rows more than columns.
template <typename T>
std::vector<T> drawn_factor(Random& random, int64_t size) {
  const int64_t rows = size + size / 4 + 1;
  const std::vector<double> numbers = drawn_numbers<double>(random, rows * size);
  std::vector<T> factor(size * size);
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t j = 0; j < size; ++j) {
      double sum = 0;
      for (int64_t r = 0; r < rows; ++r) sum += numbers[r * size + i] * numbers[r * size + j];
      factor[i * size + j] = static_cast<T>(sum / static_cast<double>(rows));
    }
  }
  return factor;
}

inline Window drawn_window(Random& random, int64_t groups) {
  Window window;
  for (int axis = 0; axis < kSpatialRank; ++axis) {
    window.kernel[axis] = draw(random, 1, axis == 0 ? 2 : 4);
    window.stride[axis] = draw(random, 1, 3);
    window.pad_low[axis] = draw(random, 0, 2);
    window.pad_high[axis] = draw(random, 0, 2);
    window.dilation[axis] = draw(random, 1, 2);
  }
  window.groups = groups;
  window.bias = draw(random, 0, 1);
  return window;
}

// A layer with the memory it lies in.
template <typename T>
struct DrawnSource {
  std::vector<T> data;
  RowSource source;

  explicit DrawnSource(Random& random, ElementType type, int64_t batch) {
    source.element_type = type;
    source.batch = batch;
    const int64_t groups = draw(random, 1, 3);
    source.channels = groups * draw(random, 1, 19);
    source.window = drawn_window(random, groups);
    for (int axis = 0; axis < kSpatialRank; ++axis) {
      const Window& window = source.window;
      const int64_t span = window.dilation[axis] * (window.kernel[axis] - 1) + 1;
      const int64_t least = span - window.pad_low[axis] - window.pad_high[axis];
      source.extent[axis] = std::max<int64_t>(1, least) + draw(random, 0, axis == 0 ? 1 : 6);
    }
    lay_out(draw(random, 0, 1) == 0);
    data = drawn_numbers<T>(random, batch * source.channels * source.places());
    source.data = data.data();
  }

  // A convolution of one group on maps of a given size, padded to keep it.
  DrawnSource(Random& random, ElementType type, int64_t batch, int64_t channels, int64_t height, int64_t width,
              int64_t kernel) {
    source.element_type = type;
    source.batch = batch;
    source.channels = channels;
    const int64_t extents[] = {1, height, width}, kernels[] = {1, kernel, kernel};
    for (int axis = 0; axis < kSpatialRank; ++axis) {
      source.extent[axis] = extents[axis];
      source.window.kernel[axis] = kernels[axis];
      source.window.stride[axis] = source.window.dilation[axis] = 1;
      source.window.pad_low[axis] = source.window.pad_high[axis] = kernels[axis] / 2;
    }
    source.window.groups = source.window.bias = 1;
    lay_out(draw(random, 0, 1) == 0);
    data = drawn_numbers<T>(random, batch * channels * source.places());
    source.data = data.data();
  }

  void lay_out(bool channels_last) {
    const int64_t places = source.places();
    source.batch_stride = source.channels * places;
    source.channel_stride = channels_last ? 1 : places;
    int64_t stride = channels_last ? source.channels : 1;
    for (int axis = kSpatialRank - 1; axis >= 0; --axis) {
      source.spatial_stride[axis] = stride;
      stride *= source.extent[axis];
    }
  }
};

// Element i of the row of place t (flat), straight from the definition; 0 in the padding.
template <typename T>
double row_element(const RowSource& source, int64_t n, int64_t group, int64_t t, int64_t i) {
  const Window& window = source.window;
  if (i == source.channels_per_group() * window.offsets()) return static_cast<double>(window.bias);
  int64_t offset = i % window.offsets();
  const int64_t channel = group * source.channels_per_group() + i / window.offsets();
  int64_t index = n * source.batch_stride + channel * source.channel_stride;
  for (int axis = kSpatialRank - 1; axis >= 0; --axis) {
    const int64_t position = t % source.grid(axis) * window.stride[axis] +
                             offset % window.kernel[axis] * window.dilation[axis] - window.pad_low[axis];
    if (position < 0 || position >= source.extent[axis]) return 0.0;
    index += position * source.spatial_stride[axis];
    t /= source.grid(axis);
    offset /= window.kernel[axis];
  }
  return static_cast<double>(to_sum_type(static_cast<const T*>(source.data)[index]));
}

// The groups of sources, as the binding of layer_maps hands them over.
inline std::vector<RowSource> split_groups(const std::vector<RowSource>& sources) {
  std::vector<RowSource> groups;
  for (const RowSource& source : sources)
    for (int64_t q = 0; q < source.window.groups; ++q) groups.push_back(source.group(q));
  return groups;
}

// Ends a case, or a program that does not catch it.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <typename... Values>
[[noreturn]] void fail(const char* format, Values... values) {
  char message[512];
  std::snprintf(message, sizeof message, format, values...);
  throw Failure(message);
}

inline void expect_true(bool holds, const char* otherwise) {
  if (!holds) fail("%s", otherwise);
}

// Compares two arrays by the norm of their difference.
template <typename A, typename B>
void expect_equal(const char* what, const A* got, const B* expected, int64_t count, double tolerance) {
  double difference = 0, norm = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double d = static_cast<double>(got[i]) - static_cast<double>(expected[i]);
    difference += d * d;
    norm += static_cast<double>(expected[i]) * static_cast<double>(expected[i]);
  }
  if (!(difference <= tolerance * tolerance * norm)) fail("%s: squared error %g of %g", what, difference, norm);
}

}  // namespace kfac2::tests

// How directional_derivatives cuts a layer's work, and how its rows lie in memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "directional_derivatives.h"
#include "integers.h"
#include "row_products.h"

namespace kfac2::cpu {

constexpr int64_t kBlockBytes = 1 << 18;    // of rows converted at a time: part of a common L2
constexpr int64_t kBlockRows = 1 << 10;     // at most
constexpr int64_t kDepth = 160;             // numbers of a row that meet a panel at a time
constexpr int64_t kAliasNumbers = 256;      // rows a multiple of this apart would meet in few sets of the L1 cache
constexpr int64_t kTaskProducts = 1 << 24;  // multiply-adds worth a task of their own
constexpr int64_t kTaskRows = 1 << 8;       // that make up for packing D
constexpr int64_t kMaxSplits = 16;

// Consecutive runs that meet a panel together.
struct Chunk {
  size_t first_run, run_count;
  int64_t depth;  // numbers before it
};

// How rows lie in memory: the places of a block from its first on, and within a row the runs.
struct Plan {
  DirectionalLayer layer;
  int64_t lanes, grid[kSpatialRank], vectors;  // vectors: of output channels
  bool is_linear;  // one place in each sample: samples next to each other are as good as a line
  bool inputs_in_place, grads_in_place;
  int64_t input_pitch, grad_pitch;          // of rows in blocks
  int axis;                                 // along which a sample is cut into bands
  int64_t band, samples;                    // lines of the grid, and samples, in a block
  int64_t extent[kSpatialRank];             // of a sample in a block of inputs, its border included
  int64_t sample_step, step[kSpatialRank];  // between samples and neighbouring places of inputs
  std::vector<Run> runs;
  std::vector<Chunk> chunks;
  std::vector<int64_t> column_of;  // of D, for each number of a row in the order of the runs
  int64_t splits;                  // tasks that the samples are shared among

  explicit Plan(const DirectionalLayer& of) : layer(of), lanes(kVectorBytes / of.inputs.sum_bytes()) {
    const RowSource& x = layer.inputs;
    for (int i = 0; i < kSpatialRank; ++i) grid[i] = x.grid(i);
    vectors = ceil_div(layer.d_out(), lanes);
    grad_pitch = vectors * lanes;
    grads_in_place = is_sum_type(layer.grads) && layer.grads.channel_stride == 1 && layer.d_out() == grad_pitch;
    const int64_t channels = x.channels_per_group();
    input_pitch = channels % kAliasNumbers == 0 ? channels + lanes : channels;
    choose_block();
    is_linear = x.places() == 1 && extent[0] * extent[1] * extent[2] == 1 && !has_border(x);
    inputs_in_place = can_stay(x);
    if (inputs_in_place) {
      sample_step = x.batch_stride;
      std::copy_n(x.spatial_stride, kSpatialRank, step);
    } else {
      step[2] = input_pitch;
      for (int i = kSpatialRank - 1; i > 0; --i) step[i - 1] = step[i] * extent[i];
      sample_step = step[0] * extent[0];
    }
    make_runs();
    const int64_t rows = x.batch * x.grid_places();
    splits = std::min({products() / kTaskProducts, rows / kTaskRows, kMaxSplits, x.batch});
    splits = std::max<int64_t>(1, splits);
  }

  int64_t products() const {
    return layer.inputs.batch * layer.inputs.grid_places() * layer.d_in() * vectors * lanes * layer.count *
           layer.groups();
  }

 private:
  static bool is_sum_type(const RowSource& source) { return element_bytes(source.element_type) == source.sum_bytes(); }

  static bool has_border(const RowSource& x) {
    bool has = false;
    for (int i = 0; i < kSpatialRank; ++i) has = has || x.window.pad_low[i] > 0 || x.window.pad_high[i] > 0;
    return has;
  }

  bool can_stay(const RowSource& x) const {
    bool stays = is_sum_type(x) && x.channel_stride == 1 && x.batch_stride % kAliasNumbers != 0 && !has_border(x);
    for (int i = 0; i < kSpatialRank; ++i) stays = stays && (grid[i] == 1 || x.spatial_stride[i] % kAliasNumbers != 0);
    return stays;
  }

  int64_t span(int i, int64_t places) const {  // of the border and the map under so many places
    const Window& window = layer.inputs.window;
    return (places - 1) * window.stride[i] + window.dilation[i] * (window.kernel[i] - 1) + 1;
  }

  void choose_block() {
    for (axis = 0; axis < kSpatialRank - 1 && grid[axis] == 1;) ++axis;
    for (int i = 0; i < kSpatialRank; ++i) extent[i] = span(i, grid[i]);
    int64_t rows_of_line = 1, inputs_of_line = input_pitch;
    for (int i = 0; i < kSpatialRank; ++i) {
      if (i == axis) continue;
      rows_of_line *= grid[i];
      inputs_of_line *= extent[i];
    }
    const auto bytes = [&](int64_t lines) {
      return (span(axis, lines) * inputs_of_line + lines * rows_of_line * grad_pitch) * layer.inputs.sum_bytes();
    };
    band = grid[axis];
    while (band > 1 && (bytes(band) > kBlockBytes || band * rows_of_line > kBlockRows)) band = (band + 1) / 2;
    samples = 1;
    if (band == grid[axis])
      samples = std::max<int64_t>(
          1, std::min({kBlockBytes / bytes(band), kBlockRows / (band * rows_of_line), layer.inputs.batch}));
    extent[axis] = span(axis, band);
  }

  void make_runs() {
    const Window& window = layer.inputs.window;
    const int64_t channels = layer.inputs.channels_per_group();
    // Neighbouring patches of the fastest axis that touch are one run.
    const bool merged = window.kernel[2] > 1 && window.dilation[2] == 1 && step[2] == channels;
    const int64_t across = merged ? 1 : window.kernel[2], length = merged ? window.kernel[2] * channels : channels;
    for (int64_t z = 0; z < window.kernel[0]; ++z) {
      for (int64_t y = 0; y < window.kernel[1]; ++y) {
        for (int64_t x = 0; x < across; ++x) {
          const int64_t first = (z * window.kernel[1] + y) * window.kernel[2] + x;
          add_run(
              z * window.dilation[0] * step[0] + y * window.dilation[1] * step[1] + x * window.dilation[2] * step[2],
              length);
          for (int64_t i = 0; i < length; ++i)
            column_of.push_back(i % channels * window.offsets() + first + i / channels);
        }
      }
    }
    int64_t depth = 0, in_chunk = kDepth;
    for (size_t run = 0; run < runs.size(); ++run) {
      if (in_chunk + runs[run].length > kDepth) chunks.push_back({run, 0, depth}), in_chunk = 0;
      ++chunks.back().run_count;
      in_chunk += runs[run].length;
      depth += runs[run].length;
    }
  }

  void add_run(int64_t shift, int64_t length) {  // in pieces of at most kDepth
    const int64_t pieces = ceil_div(length, kDepth);
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t begin = length * piece / pieces, end = length * (piece + 1) / pieces;
      runs.push_back({shift + begin, end - begin});
    }
  }
};

}  // namespace kfac2::cpu

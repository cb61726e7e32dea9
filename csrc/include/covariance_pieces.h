// A layer's covariance consists of k x k blocks, one for each pair of kernel offsets (o1, o2):
//
//   block(o1, o2) = sum over samples and places t of x[t*stride + o1] x[t*stride + o2]^T,   C x C.
//
// Written with u = t*stride + o1 it is a sum over u of x[u] x[u + (o2 - o1)]^T, and the summand depends on
// the difference o2 - o1 alone. Pairs with the same difference sum the same products over ranges of u that
// differ only at the edges of the map. So each range is cut at the ends of all of them: every piece is
// computed once, and added to each pair whose range holds it. Nothing is subtracted, no patch is formed,
// and the zero padding is never visited.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "integers.h"
#include "window.h"

namespace kfac2 {

// One axis of a piece: x[first + m*step] times x[first + m*step + shift], m < count, for every pair
// (o1, o1 + difference) with o1 = offset_first, offset_first + offset_step, ..., offset_last. Positions are those of
// the input, padding taken off. The offsets whose range holds a piece follow each other, since their ranges all have
// the length of the grid and move with them.
struct AxisPiece {
  int difference;
  int first, count, step, shift;
  int offset_first, offset_last, offset_step;

  KFAC2_HOST_DEVICE bool holds(int o1, int o2) const {
    return o2 - o1 == difference && o1 >= offset_first && o1 <= offset_last &&
           (offset_step == 1 || (o1 - offset_first) % offset_step == 0);
  }
};

// Steps m for which base + m*step lies in [0, extent).
KFAC2_HOST_DEVICE inline Range steps_inside(int64_t base, int64_t step, int64_t extent) {
  return {ceil_div(-base, step), floor_div(extent - 1 - base, step) + 1};
}

// Pieces of one axis for one difference, among the offsets whose position is `phase` modulo the stride.
inline void add_pieces(const Window& window, int axis, int64_t extent, int64_t grid, int64_t difference, int64_t phase,
                       std::vector<AxisPiece>& pieces) {
  const int64_t step = window.stride[axis], dilation = window.dilation[axis], kernel = window.kernel[axis];
  const int64_t base = phase - window.pad_low[axis];
  const int64_t shift = difference * dilation;
  const Range inside = steps_inside(base, step, extent).intersect(steps_inside(base + shift, step, extent));
  std::vector<int64_t> offsets, cuts;
  const auto range_of = [&](int64_t offset) {
    const int64_t begin = (offset * dilation - phase) / step;
    return Range{begin, begin + grid};
  };
  for (int64_t o1 = std::max<int64_t>(0, -difference); o1 < std::min(kernel, kernel - difference); ++o1) {
    if (o1 * dilation % step != phase) continue;
    const Range range = range_of(o1).intersect(inside);
    if (range.size() == 0) continue;
    offsets.push_back(o1);
    cuts.push_back(range.begin);
    cuts.push_back(range.end);
  }
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  for (std::size_t cut = 0; cut + 1 < cuts.size(); ++cut) {
    std::vector<int64_t> held;
    for (const int64_t o1 : offsets) {
      const Range range = range_of(o1);
      if (range.begin <= cuts[cut] && cuts[cut + 1] <= range.end) held.push_back(o1);
    }
    if (held.empty()) continue;
    const auto as_int = [](int64_t number) { return static_cast<int>(number); };
    pieces.push_back({as_int(difference), as_int(base + cuts[cut] * step), as_int(cuts[cut + 1] - cuts[cut]),
                      as_int(step), as_int(shift), as_int(held.front()), as_int(held.back()),
                      held.size() > 1 ? as_int(held[1] - held[0]) : 1});
  }
}

inline std::vector<AxisPiece> axis_pieces(const RowSource& source, int axis) {
  std::vector<AxisPiece> pieces;
  const Window& window = source.window;
  const int64_t kernel = window.kernel[axis], stride = window.stride[axis];
  for (int64_t difference = 1 - kernel; difference < kernel; ++difference) {
    for (int64_t phase = 0; phase < stride; ++phase) {
      add_pieces(window, axis, source.extent[axis], source.grid(axis), difference, phase, pieces);
    }
  }
  return pieces;
}

// A piece of all three axes. A symmetric one has no difference: it is added to the block of each of its offsets and
// itself, and the sums of its x to the bias's row there.
struct Piece {
  AxisPiece axes[kSpatialRank];
  bool symmetric;

  KFAC2_HOST_DEVICE int64_t positions() const {  // of one sample
    return int64_t{axes[0].count} * axes[1].count * axes[2].count;
  }
};

// All pieces of a source. Block(o2, o1) is the transpose of block(o1, o2): one of two opposite differences is enough,
// the one that leads with a positive number.
inline std::vector<Piece> pieces_of(const RowSource& source) {
  const std::vector<AxisPiece> z_axis = axis_pieces(source, 0), y_axis = axis_pieces(source, 1),
                               x_axis = axis_pieces(source, 2);
  std::vector<Piece> pieces;
  for (const AxisPiece& z : z_axis) {
    for (const AxisPiece& y : y_axis) {
      for (const AxisPiece& x : x_axis) {
        const int leading = z.difference != 0 ? z.difference : y.difference != 0 ? y.difference : x.difference;
        if (leading >= 0) pieces.push_back({{z, y, x}, leading == 0});
      }
    }
  }
  return pieces;
}

}  // namespace kfac2

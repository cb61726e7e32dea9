// A layer's covariance consists of k x k blocks, one for each pair of kernel offsets (o1, o2):
//
//   block(o1, o2) = sum over samples and places t of x[t*stride + o1] x[t*stride + o2]^T,   C x C.
//
// Written with u = t*stride + o1 it is a sum over u of x[u] x[u + (o2 - o1)]^T, and the summand depends on
// the difference o2 - o1 alone. Pairs with the same difference sum the same products over ranges of u that
// differ only at the edges of the map. So each range is cut at the ends of all of them: every piece is
// computed once, and added to each pair whose range holds it. Nothing is subtracted, no patch is formed,
// and the zero padding is never visited.
//
// Floor: x is read once; of the k^2 * k^2 blocks about half of (2k-1)^2 are computed, so 13 C^2
// multiply-adds for each place of a 3x3 convolution where the im2col product spends 81.
#include "covariances.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "outer_products.h"
#include "scalar.h"

namespace kfac2::cpu {
namespace {

constexpr int64_t kBlockBytes = 1 << 18;       // samples converted at a time: half of a common L2
constexpr int64_t kTaskProducts = 1 << 26;     // multiply-adds worth a task of their own
constexpr int64_t kMaxSplits = 8;              // tasks of one layer, each with its own sums
constexpr int64_t kMaxSplitNumbers = 1 << 22;  // numbers in those sums together

struct Range {
  int64_t begin, end;
  int64_t size() const { return std::max<int64_t>(0, end - begin); }
  Range intersect(Range other) const { return {std::max(begin, other.begin), std::min(end, other.end)}; }
};

int64_t ceil_div(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }
int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

// One axis of a piece: x[first + m*step] times x[first + m*step + shift], m < count, for every pair
// (o1, o1 + difference) with o1 among `offsets`. Positions are those of the input, padding taken off.
struct AxisPiece {
  int64_t difference;
  int64_t first, count, step, shift;
  std::vector<int64_t> offsets;
};

// Steps m for which base + m*step lies in [0, extent).
Range steps_inside(int64_t base, int64_t step, int64_t extent) {
  return {ceil_div(-base, step), floor_div(extent - 1 - base, step) + 1};
}

// Pieces of one axis for one difference, among the offsets whose position is `phase` modulo the stride.
void add_pieces(const Window& window, int axis, int64_t extent, int64_t grid, int64_t difference, int64_t phase,
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
  for (size_t cut = 0; cut + 1 < cuts.size(); ++cut) {
    AxisPiece piece{difference, base + cuts[cut] * step, cuts[cut + 1] - cuts[cut], step, shift, {}};
    for (const int64_t o1 : offsets) {
      const Range range = range_of(o1);
      if (range.begin <= cuts[cut] && cuts[cut + 1] <= range.end) piece.offsets.push_back(o1);
    }
    if (!piece.offsets.empty()) pieces.push_back(std::move(piece));
  }
}

std::vector<AxisPiece> axis_pieces(const RowSource& source, int axis) {
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

// A piece of all three axes, with the pairs of (flattened) kernel offsets it is added to.
struct Piece {
  const AxisPiece* axes[kSpatialRank];
  bool symmetric;  // o1 == o2
};

std::vector<Piece> combine(const std::vector<AxisPiece> (&axes)[kSpatialRank]) {
  std::vector<Piece> pieces;
  for (const AxisPiece& z : axes[0]) {
    for (const AxisPiece& y : axes[1]) {
      for (const AxisPiece& x : axes[2]) {
        // block(o2, o1) is the transpose of block(o1, o2): one of two opposite differences is enough.
        const int64_t leading = z.difference != 0 ? z.difference : y.difference != 0 ? y.difference : x.difference;
        if (leading >= 0) pieces.push_back({{&z, &y, &x}, leading == 0});
      }
    }
  }
  return pieces;
}

// What is the same for all samples and groups of a layer.
struct Plan {
  RowSource source;
  void* covariances;
  std::vector<AxisPiece> axes[kSpatialRank];
  std::vector<Piece> pieces;
  int64_t splits;  // tasks that the samples are shared among

  Plan(const RowSource& row_source, void* out) : source(row_source), covariances(out) {
    for (int axis = 0; axis < kSpatialRank; ++axis) axes[axis] = axis_pieces(source, axis);
    pieces = combine(axes);
    const int64_t numbers = source.row_length() * source.row_length();
    splits = std::min(
        {products() / kTaskProducts, kMaxSplits, kMaxSplitNumbers / std::max<int64_t>(1, numbers), source.batch});
    splits = std::max<int64_t>(1, splits);
  }

  int64_t products() const {  // multiply-adds of one group
    int64_t places = 0;
    for (const Piece& piece : pieces) places += piece.axes[0]->count * piece.axes[1]->count * piece.axes[2]->count;
    return places * source.batch * source.channels_per_group() * source.channels_per_group();
  }
};

// x of a block of samples as [sample, place, channel], channels padded with zeros to whole vectors.
template <typename T>
void to_channels_last(const RowSource& source, const T* x, int64_t samples, int64_t padded, SumType<T>* block) {
  const int64_t channels = source.channels_per_group();
  const int64_t width = source.extent[2], lines = source.extent[0] * source.extent[1];
  constexpr int64_t kTile = 16;  // places whose cache lines stay in L1 while the channels pass
  for (int64_t n = 0; n < samples; ++n) {
    for (int64_t line = 0; line < lines; ++line) {
      const T* start = x + n * source.batch_stride + line / source.extent[1] * source.spatial_stride[0] +
                       line % source.extent[1] * source.spatial_stride[1];
      SumType<T>* out = block + (n * lines + line) * width * padded;
      for (int64_t w0 = 0; w0 < width; w0 += kTile) {
        const int64_t w1 = std::min(width, w0 + kTile);
        for (int64_t c = 0; c < channels; ++c) {
          for (int64_t w = w0; w < w1; ++w) {
            out[w * padded + c] = to_sum_type(start[c * source.channel_stride + w * source.spatial_stride[2]]);
          }
        }
        for (int64_t w = w0; w < w1; ++w) std::fill(out + w * padded + channels, out + (w + 1) * padded, SumType<T>(0));
      }
    }
  }
}

// Sums of one layer, one group and one share of its samples, in units of whole vectors of channels.
template <typename T>
class Accumulator {
  using Sum = SumType<T>;

 public:
  Accumulator(const Plan& plan, int64_t group)
      : plan_(plan),
        source_(plan.source),
        channels_(source_.channels_per_group()),
        padded_(ceil_div(channels_, kVectorBytes / int64_t{sizeof(Sum)}) * (kVectorBytes / int64_t{sizeof(Sum)})),
        x_(static_cast<const T*>(source_.data) + group * channels_ * source_.channel_stride),
        products_(plan.pieces.size() * padded_ * padded_, Sum(0)),
        bias_(source_.window.bias != 0 ? source_.window.offsets() * padded_ : 0, Sum(0)) {}

  void add(int64_t sample_begin, int64_t sample_end) {
    const int64_t sample_numbers = source_.places() * padded_;
    const int64_t samples =
        std::max<int64_t>(1, kBlockBytes / int64_t{sizeof(Sum)} / std::max<int64_t>(1, sample_numbers));
    block_.resize(std::min(samples, sample_end - sample_begin) * sample_numbers);
    for (int64_t n = sample_begin; n < sample_end; n += samples) {
      const int64_t count = std::min(samples, sample_end - n);
      to_channels_last<T>(source_, x_ + n * source_.batch_stride, count, padded_, block_.data());
      for (size_t piece = 0; piece < plan_.pieces.size(); ++piece) add_piece(piece, count);
      if (!bias_.empty()) add_bias(count);
    }
  }

  // Adds what was summed to a [d, d] matrix; channel slowest, kernel offsets faster, bias last.
  void scatter(int64_t samples, Sum* covariance) const {
    const int64_t offsets = source_.window.offsets(), d = source_.row_length();
    for (size_t index = 0; index < plan_.pieces.size(); ++index) {
      const Piece& piece = plan_.pieces[index];
      const Sum* products = products_.data() + index * padded_ * padded_;
      for (const auto& [o1, o2] : offset_pairs(piece)) {
        for (int64_t c1 = 0; c1 < channels_; ++c1) {
          for (int64_t c2 = piece.symmetric ? c1 : 0; c2 < channels_; ++c2) {
            const Sum sum = products[c1 * padded_ + c2];
            const int64_t row = c1 * offsets + o1, column = c2 * offsets + o2;
            covariance[row * d + column] += sum;
            if (row != column) covariance[column * d + row] += sum;
          }
        }
      }
    }
    if (bias_.empty()) return;
    const Sum ones = static_cast<Sum>(source_.window.bias);
    for (int64_t c = 0; c < channels_; ++c) {
      for (int64_t o = 0; o < offsets; ++o) {
        const Sum sum = ones * bias_[o * padded_ + c];
        covariance[(c * offsets + o) * d + d - 1] += sum;
        covariance[(d - 1) * d + c * offsets + o] += sum;
      }
    }
    covariance[d * d - 1] += ones * ones * static_cast<Sum>(samples * source_.grid_places());
  }

 private:
  std::vector<std::pair<int64_t, int64_t>> offset_pairs(const Piece& piece) const {
    std::vector<std::pair<int64_t, int64_t>> pairs;
    const int64_t* kernel = source_.window.kernel;
    const auto flat = [&](int64_t z, int64_t y, int64_t x) { return (z * kernel[1] + y) * kernel[2] + x; };
    for (const int64_t z : piece.axes[0]->offsets)
      for (const int64_t y : piece.axes[1]->offsets)
        for (const int64_t x : piece.axes[2]->offsets)
          pairs.emplace_back(flat(z, y, x), flat(z + piece.axes[0]->difference, y + piece.axes[1]->difference,
                                                 x + piece.axes[2]->difference));
    return pairs;
  }

  void add_piece(size_t index, int64_t samples) {
    const Piece& piece = plan_.pieces[index];
    const int64_t height = source_.extent[1], width = source_.extent[2];
    const AxisPiece &z = *piece.axes[0], &y = *piece.axes[1], &x = *piece.axes[2];
    OuterProducts<Sum> run;
    run.left = block_.data() + ((z.first * height + y.first) * width + x.first) * padded_;
    run.right = run.left + ((z.shift * height + y.shift) * width + x.shift) * padded_;
    run.sums = products_.data() + index * padded_ * padded_;
    run.channels = padded_;
    run.upper_only = piece.symmetric;
    const int64_t counts[4] = {samples, z.count, y.count, x.count};
    const int64_t steps[4] = {source_.places() * padded_, z.step * height * width * padded_, y.step * width * padded_,
                              x.step * padded_};
    std::copy_n(counts, 4, run.count);
    std::copy_n(steps, 4, run.step);
    add_outer_products(run);
  }

  // bias_[o] += sum of x at offset o of every place.
  void add_bias(int64_t samples) {
    const Window& window = source_.window;
    const auto steps = [&](int axis, int64_t offset) {
      const int64_t base = offset * window.dilation[axis] - window.pad_low[axis];
      return steps_inside(base, window.stride[axis], source_.extent[axis]).intersect({0, source_.grid(axis)});
    };
    const auto position = [&](int axis, int64_t offset, int64_t t) {
      return t * window.stride[axis] + offset * window.dilation[axis] - window.pad_low[axis];
    };
    for (int64_t o = 0; o < window.offsets(); ++o) {
      const int64_t oz = o / (window.kernel[1] * window.kernel[2]), oy = o / window.kernel[2] % window.kernel[1],
                    ox = o % window.kernel[2];
      const Range z = steps(0, oz), y = steps(1, oy), x = steps(2, ox);
      Sum* sums = bias_.data() + o * padded_;
      for (int64_t n = 0; n < samples; ++n)
        for (int64_t tz = z.begin; tz < z.end; ++tz)
          for (int64_t ty = y.begin; ty < y.end; ++ty)
            for (int64_t tx = x.begin; tx < x.end; ++tx) {
              const int64_t place =
                  ((n * source_.extent[0] + position(0, oz, tz)) * source_.extent[1] + position(1, oy, ty)) *
                      source_.extent[2] +
                  position(2, ox, tx);
              const Sum* from = block_.data() + place * padded_;
#pragma omp simd
              for (int64_t c = 0; c < padded_; ++c) sums[c] += from[c];
            }
    }
  }

  const Plan& plan_;
  const RowSource& source_;
  int64_t channels_, padded_;
  const T* x_;
  std::vector<Sum> products_;  // [pieces, padded, padded]
  std::vector<Sum> bias_;      // [offsets, padded]
  std::vector<Sum> block_;     // [samples, places, padded]
};

struct Task {
  const Plan* plan;
  int64_t group, split;
  int64_t products;
  std::vector<char> sums;  // [d, d] of a split layer; an unsplit one writes its result at once
};

}  // namespace

struct Covariances::State {
  std::vector<std::unique_ptr<Plan>> plans;
  std::vector<Task> tasks;

  template <typename T>
  void run(Task& task) {
    const Plan& plan = *task.plan;
    const int64_t numbers = plan.source.row_length() * plan.source.row_length();
    using Sum = SumType<T>;
    Sum* sums = static_cast<Sum*>(plan.covariances) + task.group * numbers;
    if (plan.splits > 1) {
      task.sums.resize(numbers * sizeof(Sum));
      sums = reinterpret_cast<Sum*>(task.sums.data());
    }
    std::fill_n(sums, numbers, Sum(0));
    const int64_t begin = plan.source.batch * task.split / plan.splits;
    const int64_t end = plan.source.batch * (task.split + 1) / plan.splits;
    Accumulator<T> accumulator(plan, task.group);
    accumulator.add(begin, end);
    accumulator.scatter(end - begin, sums);
  }

  template <typename Sum>
  void merge(const Task& first) {
    const int64_t numbers = first.plan->source.row_length() * first.plan->source.row_length();
    Sum* out = static_cast<Sum*>(first.plan->covariances) + first.group * numbers;
    std::fill_n(out, numbers, Sum(0));
    for (int64_t split = 0; split < first.plan->splits; ++split) {
      for (Task& task : tasks) {
        if (task.plan != first.plan || task.group != first.group || task.split != split) continue;
        const Sum* sums = reinterpret_cast<const Sum*>(task.sums.data());
        for (int64_t i = 0; i < numbers; ++i) out[i] += sums[i];
      }
    }
  }

  std::vector<const Task*> split_layers;  // the first task of each layer and group that needs a merge
};

Covariances::Covariances(const CovariancesParams& params) : state_(new State) {
  for (int64_t i = 0; i < params.layers; ++i) {
    state_->plans.push_back(std::make_unique<Plan>(params.sources[i], params.covariances[i]));
    const Plan& plan = *state_->plans.back();
    for (int64_t group = 0; group < plan.source.window.groups; ++group)
      for (int64_t split = 0; split < plan.splits; ++split)
        state_->tasks.push_back({&plan, group, split, plan.products() / plan.splits, {}});
  }
  // The largest first, so that no thread is left with one at the end.
  std::stable_sort(state_->tasks.begin(), state_->tasks.end(),
                   [](const Task& a, const Task& b) { return a.products > b.products; });
  for (const Task& task : state_->tasks)
    if (task.plan->splits > 1 && task.split == 0) state_->split_layers.push_back(&task);
}

Covariances::~Covariances() { delete state_; }

int64_t Covariances::tasks() const { return static_cast<int64_t>(state_->tasks.size()); }

void Covariances::run_task(int64_t index) {
  Task& task = state_->tasks[index];
  switch (task.plan->source.element_type) {
    case ElementType::kFloat32: state_->run<float>(task); break;
    case ElementType::kFloat64: state_->run<double>(task); break;
    case ElementType::kFloat16: state_->run<Half>(task); break;
    case ElementType::kBFloat16: state_->run<BFloat16>(task); break;
  }
}

int64_t Covariances::merges() const { return static_cast<int64_t>(state_->split_layers.size()); }

void Covariances::run_merge(int64_t index) {
  const Task& first = *state_->split_layers[index];
  if (first.plan->source.element_type == ElementType::kFloat64) {
    state_->merge<double>(first);
  } else {
    state_->merge<float>(first);
  }
}

}  // namespace kfac2::cpu

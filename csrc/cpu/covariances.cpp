// The pieces of include/covariance_pieces.h, each an outer product of vectors of channels summed over positions.
//
// Floor: x is read once; of the k^2 * k^2 blocks about half of (2k-1)^2 are computed, so 13 C^2
// multiply-adds for each place of a 3x3 convolution where the im2col product spends 81.
#include "covariances.h"

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "covariance_pieces.h"
#include "outer_products.h"
#include "scalar.h"

namespace kfac2::cpu {
namespace {

constexpr int64_t kBlockBytes = 1 << 18;  // samples converted at a time: half of a common L2
// Places a multiple of this apart would meet in few sets of the L1 cache; they are moved apart by one vector.
constexpr int64_t kAliasNumbers = 256;
constexpr int64_t kScatterTile = 32;
constexpr int64_t kDirectChannels = 64;     // at most, to be read where they are
constexpr int64_t kTaskProducts = 1 << 26;  // multiply-adds worth a task of their own
constexpr int64_t kMaxSplits = 8;           // tasks of one layer, each with its own sums
constexpr int64_t kSplitWorth = 1 << 10;    // multiply-adds for each number of a task's own sums

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
    splits = std::min({products() / kTaskProducts, products() / std::max<int64_t>(1, kSplitWorth * numbers), kMaxSplits,
                       source.batch});
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
      if (source.channel_stride == 1) {  // channels last already: whole rows
        for (int64_t w = 0; w < width; ++w) {
          const T* row = start + w * source.spatial_stride[2];
#pragma omp simd
          for (int64_t c = 0; c < channels; ++c) out[w * padded + c] = to_sum_type(row[c]);
          std::fill(out + w * padded + channels, out + (w + 1) * padded, SumType<T>(0));
        }
        continue;
      }
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
        pitch_(padded_ % kAliasNumbers == 0 ? padded_ + kVectorBytes / int64_t{sizeof(Sum)} : padded_),
        x_(static_cast<const T*>(source_.data) + group * channels_ * source_.channel_stride),
        products_(plan.pieces.size() * padded_ * padded_, Sum(0)),
        bias_(source_.window.bias != 0 ? source_.window.offsets() * padded_ : 0, Sum(0)) {}

  void add(int64_t sample_begin, int64_t sample_end) {
    const int64_t step = source_.places() * pitch_;
    const int64_t at_once = std::max<int64_t>(1, kBlockBytes / int64_t{sizeof(Sum)} / std::max<int64_t>(1, step));
    const int64_t direct_end = std::min(sample_end, direct_samples());
    for (int64_t n = sample_begin, count = 0; n < sample_end; n += count) {
      count = std::min(at_once, (n < direct_end ? direct_end : sample_end) - n);
      const T* x = x_ + n * source_.batch_stride;
      if constexpr (std::is_same_v<T, Sum>) {
        if (n < direct_end) {
          add_positions({x, count, source_.batch_stride, place_step()});
          continue;
        }
      }
      block_.resize(count * step);
      to_channels_last<T>(source_, x, count, pitch_, block_.data());
      add_positions({block_.data(), count, step, pitch_});
    }
  }

  // Adds what was summed to a [d, d] matrix; channel slowest, kernel offsets faster, bias last.
  void scatter(int64_t samples, Sum* covariance) const {
    const int64_t offsets = source_.window.offsets(), d = source_.row_length();
    for (size_t index = 0; index < plan_.pieces.size(); ++index) {
      const Piece& piece = plan_.pieces[index];
      const Sum* products = products_.data() + index * padded_ * padded_;
      for (const auto& [o1, o2] : offset_pairs(piece)) {
        // In tiles, since one of the two elements written for each product lies a row of the result further.
        for (int64_t first1 = 0; first1 < channels_; first1 += kScatterTile) {
          for (int64_t first2 = piece.symmetric ? first1 : 0; first2 < channels_; first2 += kScatterTile) {
            for (int64_t c1 = first1; c1 < std::min(channels_, first1 + kScatterTile); ++c1) {
              const int64_t begin = piece.symmetric ? std::max(c1, first2) : first2;
              for (int64_t c2 = begin; c2 < std::min(channels_, first2 + kScatterTile); ++c2) {
                const Sum sum = products[c1 * padded_ + c2];
                const int64_t row = c1 * offsets + o1, column = c2 * offsets + o2;
                covariance[row * d + column] += sum;
                if (row != column) covariance[column * d + row] += sum;
              }
            }
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
  // Samples that may be read where they are: few channels, next to each other, so that the copy would cost as much
  // as the products. Whole vectors reach into what lies behind a place's channels, which adds to sums that nobody
  // reads; the last samples are copied, since there is nothing behind them.
  int64_t direct_samples() const {
    const int64_t* stride = source_.spatial_stride;
    const int64_t height = source_.extent[1], width = source_.extent[2];
    const bool even = (width == 1 || stride[2] == place_step()) && (height == 1 || stride[1] == width * place_step()) &&
                      (source_.extent[0] == 1 || stride[0] == height * width * place_step());
    if (!std::is_same_v<T, Sum> || source_.channel_stride != 1 || channels_ > kDirectChannels || !even) return 0;
    const int64_t in_sample = (source_.places() - 1) * place_step();
    const int64_t end = (source_.batch - 1) * source_.batch_stride + in_sample + channels_;
    const int64_t room = end - in_sample - padded_;
    return room < 0 || source_.batch_stride <= 0 ? 0 : room / source_.batch_stride + 1;
  }

  int64_t place_step() const {
    for (int axis = kSpatialRank - 1; axis >= 0; --axis)
      if (source_.extent[axis] > 1) return source_.spatial_stride[axis];
    return channels_;
  }

  // Samples with their channels last: x itself, or the block.
  struct Positions {
    const Sum* x;
    int64_t samples, sample_step, pitch;  // pitch: from place to place
  };

  void add_positions(const Positions& at) {
    for (size_t piece = 0; piece < plan_.pieces.size(); ++piece) add_piece(at, piece);
    if (!bias_.empty()) add_bias(at);
  }

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

  void add_piece(const Positions& at, size_t index) {
    const Piece& piece = plan_.pieces[index];
    const int64_t height = source_.extent[1], width = source_.extent[2];
    const AxisPiece &z = *piece.axes[0], &y = *piece.axes[1], &x = *piece.axes[2];
    OuterProducts<Sum> run;
    run.left = at.x + ((z.first * height + y.first) * width + x.first) * at.pitch;
    run.right = run.left + ((z.shift * height + y.shift) * width + x.shift) * at.pitch;
    run.sums = products_.data() + index * padded_ * padded_;
    run.rows = run.columns = run.sums_step = padded_;
    run.upper_only = piece.symmetric;
    const int64_t counts[4] = {at.samples, z.count, y.count, x.count};
    const int64_t steps[4] = {at.sample_step, z.step * height * width * at.pitch, y.step * width * at.pitch,
                              x.step * at.pitch};
    std::copy_n(counts, 4, run.count);
    std::copy_n(steps, 4, run.step);
    add_outer_products(run);
  }

  // bias_[o] += sum of x at offset o of every place.
  void add_bias(const Positions& at) {
    const int64_t* kernel = source_.window.kernel;
    for (int64_t o = 0; o < source_.window.offsets(); ++o) {
      const OffsetRange z = offset_range(source_, 0, o / (kernel[1] * kernel[2]));
      const OffsetRange y = offset_range(source_, 1, o / kernel[2] % kernel[1]);
      const OffsetRange x = offset_range(source_, 2, o % kernel[2]);
      Sum* sums = bias_.data() + o * padded_;
      for (int64_t n = 0; n < at.samples; ++n)
        for (int64_t i = 0; i < z.count; ++i)
          for (int64_t j = 0; j < y.count; ++j)
            for (int64_t k = 0; k < x.count; ++k) {
              const int64_t line = (z.first + i * z.step) * source_.extent[1] + y.first + j * y.step;
              const int64_t place = line * source_.extent[2] + x.first + k * x.step;
              const Sum* from = at.x + n * at.sample_step + place * at.pitch;
#pragma omp simd
              for (int64_t c = 0; c < padded_; ++c) sums[c] += from[c];
            }
    }
  }

  const Plan& plan_;
  const RowSource& source_;
  int64_t channels_, padded_;
  int64_t pitch_;  // from place to place in the block
  const T* x_;
  std::vector<Sum> products_;  // [pieces, padded, padded]
  std::vector<Sum> bias_;      // [offsets, padded]
  std::vector<Sum> block_;     // [samples, places, pitch]
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

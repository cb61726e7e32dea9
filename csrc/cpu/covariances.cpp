// The pieces of include/covariance_pieces.h, each an outer product of vectors of channels summed over positions.
//
// Floor: x is read once; of the k^2 * k^2 blocks about half of (2k-1)^2 are computed, so 13 C^2
// multiply-adds for each place of a 3x3 convolution where the im2col product spends 81.
#include "covariances.h"

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "channels_last.h"
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

// The cut of a layer's work, the same for all its samples and groups.
struct Plan {
  RowSource source;
  void* covariances;
  const void* previous;  // or null
  double kept, scale;
  std::vector<Piece> pieces;
  int64_t splits;  // tasks that the samples are shared among

  Plan(const CovariancesParams& params, int64_t layer)
      : source(params.sources[layer]),
        covariances(params.covariances[layer]),
        previous(params.previous_of(layer)),
        kept(params.kept),
        scale(params.scale_of(layer)),
        pieces(pieces_of(source)) {
    splits = std::min({products() / kTaskProducts, products() / std::max<int64_t>(1, kSplitWorth * numbers()),
                       kMaxSplits, source.batch});
    splits = std::max<int64_t>(1, splits);
  }

  int64_t products() const {  // multiply-adds of one group
    int64_t places = 0;
    for (const Piece& piece : pieces) places += piece.positions();
    return places * source.batch * source.channels_per_group() * source.channels_per_group();
  }

  Triangle triangle() const { return {source.row_length()}; }
  int64_t numbers() const { return triangle().numbers(); }  // of one covariance

  // From the sums of a group to its result.
  template <typename Sum>
  void finish(int64_t group, Sum* sums) const {
    if (scale != 1)
      for (int64_t i = 0; i < numbers(); ++i) sums[i] *= static_cast<Sum>(scale);
    if (previous == nullptr) return;
    const Sum* before = static_cast<const Sum*>(previous) + group * numbers();
    for (int64_t i = 0; i < numbers(); ++i) sums[i] += static_cast<Sum>(kept) * before[i];
  }
};

// x of a block of samples as [sample, place, channel], channels padded with zeros to whole vectors.
template <typename T>
void to_block(const RowSource& source, const T* x, int64_t samples, int64_t padded, SumType<T>* block) {
  const int64_t width = source.extent[2], lines = source.extent[0] * source.extent[1];
  for (int64_t n = 0; n < samples; ++n) {
    for (int64_t line = 0; line < lines; ++line) {
      const T* start = x + n * source.batch_stride + line / source.extent[1] * source.spatial_stride[0] +
                       line % source.extent[1] * source.spatial_stride[1];
      to_channels_last(start, width, source.spatial_stride[2], source.channels_per_group(), source.channel_stride,
                       padded, block + (n * lines + line) * width * padded);
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
        with_ones_(source_.window.bias != 0),
        ones_(with_ones_ ? plan.pieces.size() * padded_ : 0, Sum(0)) {}

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
      to_block<T>(source_, x, count, pitch_, block_.data());
      add_positions({block_.data(), count, step, pitch_});
    }
  }

  // Adds what was summed to a triangle of d; channel slowest, kernel offsets faster, bias last.
  void scatter(int64_t samples, Sum* covariance) const {
    for (size_t index = 0; index < plan_.pieces.size(); ++index) {
      const AxisPiece(&axes)[kSpatialRank] = plan_.pieces[index].axes;
      for (int z = axes[0].offset_first; z <= axes[0].offset_last; z += axes[0].offset_step)
        for (int y = axes[1].offset_first; y <= axes[1].offset_last; y += axes[1].offset_step)
          for (int x = axes[2].offset_first; x <= axes[2].offset_last; x += axes[2].offset_step)
            scatter(index, covariance, flat(z, y, x));
    }
    if (!with_ones_) return;
    const int64_t last = source_.row_length() - 1;
    covariance[plan_.triangle().index(last, last)] += static_cast<Sum>(samples * source_.grid_places());
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

  int64_t flat(int64_t z, int64_t y, int64_t x) const {  // number of a kernel offset
    return (z * source_.window.kernel[1] + y) * source_.window.kernel[2] + x;
  }

  // One piece at the pair (o1, o1 + difference), and with a bias the sums of x at o1.
  void scatter(size_t index, Sum* covariance, int64_t o1) const {
    const Piece& piece = plan_.pieces[index];
    const Sum* products = products_.data() + index * padded_ * padded_;
    const Triangle triangle = plan_.triangle();
    const int64_t offsets = source_.window.offsets(), last = source_.row_length() - 1;
    const int64_t o2 = o1 + flat(piece.axes[0].difference, piece.axes[1].difference, piece.axes[2].difference);
    // In tiles: an element whose row comes after its column is written as its mirror image, a row of the result further.
    for (int64_t first1 = 0; first1 < channels_; first1 += kScatterTile) {
      for (int64_t first2 = piece.symmetric ? first1 : 0; first2 < channels_; first2 += kScatterTile) {
        for (int64_t c1 = first1; c1 < std::min(channels_, first1 + kScatterTile); ++c1) {
          const int64_t begin = piece.symmetric ? std::max(c1, first2) : first2;
          for (int64_t c2 = begin; c2 < std::min(channels_, first2 + kScatterTile); ++c2) {
            covariance[triangle.index(c1 * offsets + o1, c2 * offsets + o2)] += products[c1 * padded_ + c2];
          }
        }
      }
    }
    for (int64_t c = 0; piece.symmetric && with_ones_ && c < channels_; ++c)
      covariance[triangle.index(c * offsets + o1, last)] += ones_[index * padded_ + c];
  }

  void add_positions(const Positions& at) {
    for (size_t piece = 0; piece < plan_.pieces.size(); ++piece) add_piece(at, piece);
  }

  void add_piece(const Positions& at, size_t index) {
    const Piece& piece = plan_.pieces[index];
    const int64_t width = source_.extent[2], plane = source_.extent[1] * width;
    const AxisPiece &z = piece.axes[0], &y = piece.axes[1], &x = piece.axes[2];
    OuterProducts<Sum> run;
    run.left = at.x + (z.first * plane + y.first * width + x.first) * at.pitch;
    run.right = run.left + (z.shift * plane + y.shift * width + x.shift) * at.pitch;
    run.sums = products_.data() + index * padded_ * padded_;
    run.rows = run.columns = run.sums_step = padded_;
    run.upper_only = piece.symmetric;
    const int64_t counts[4] = {at.samples, z.count, y.count, x.count};
    const int64_t steps[4] = {at.sample_step, z.step * plane * at.pitch, y.step * width * at.pitch, x.step * at.pitch};
    std::copy_n(counts, 4, run.count);
    std::copy_n(steps, 4, run.step);
    add_outer_products(run);
    if (piece.symmetric && with_ones_) add_ones(run, ones_.data() + index * padded_);
  }

  // sums += the piece's x: its products with the ones of the bias.
  void add_ones(const OuterProducts<Sum>& run, Sum* sums) const {
    for (int64_t i = 0; i < run.count[0]; ++i)
      for (int64_t j = 0; j < run.count[1]; ++j)
        for (int64_t k = 0; k < run.count[2]; ++k)
          for (int64_t l = 0; l < run.count[3]; ++l) {
            const Sum* x = run.left + i * run.step[0] + j * run.step[1] + k * run.step[2] + l * run.step[3];
#pragma omp simd
            for (int64_t c = 0; c < padded_; ++c) sums[c] += x[c];
          }
  }

  const Plan& plan_;
  const RowSource& source_;
  int64_t channels_, padded_;
  int64_t pitch_;  // from place to place in the block
  const T* x_;
  std::vector<Sum> products_;  // [pieces, padded, padded]
  bool with_ones_;
  std::vector<Sum> ones_;   // [pieces, padded], with a bias
  std::vector<Sum> block_;  // [samples, places, pitch]
};

struct Task {
  const Plan* plan;
  int64_t group, split;
  int64_t products;
  std::vector<char> sums;  // the triangle of a split layer; an unsplit one writes its result at once
};

class Covariances : public Work {
 public:
  explicit Covariances(const CovariancesParams& params) {
    for (int64_t i = 0; i < params.layers; ++i) {
      plans_.push_back(std::make_unique<Plan>(params, i));
      const Plan& plan = *plans_.back();
      for (int64_t group = 0; group < plan.source.window.groups; ++group)
        for (int64_t split = 0; split < plan.splits; ++split)
          tasks_.push_back({&plan, group, split, plan.products() / plan.splits, {}});
    }
    // The largest first, so that no thread is left with one at the end.
    std::stable_sort(tasks_.begin(), tasks_.end(),
                     [](const Task& a, const Task& b) { return a.products > b.products; });
    for (const Task& task : tasks_)
      if (task.plan->splits > 1 && task.split == 0) split_layers_.push_back(&task);
  }

  int64_t tasks() const override { return static_cast<int64_t>(tasks_.size()); }

  void run_task(int64_t index) override {
    Task& task = tasks_[index];
    const RowSource& source = task.plan->source;
    with_type(source.element_type, source.data, [&](const auto* x) { run<ElementOf<decltype(x)>>(task); });
  }

  int64_t merges() const override { return static_cast<int64_t>(split_layers_.size()); }

  void run_merge(int64_t index) override {
    const Task& first = *split_layers_[index];
    first.plan->source.element_type == ElementType::kFloat64 ? merge<double>(first) : merge<float>(first);
  }

 private:
  template <typename T>
  void run(Task& task) const {
    using Sum = SumType<T>;
    const Plan& plan = *task.plan;
    const int64_t numbers = plan.numbers();
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
    if (plan.splits == 1) plan.finish(task.group, sums);
  }

  template <typename Sum>
  void merge(const Task& first) const {
    const int64_t numbers = first.plan->numbers();
    Sum* out = static_cast<Sum*>(first.plan->covariances) + first.group * numbers;
    std::fill_n(out, numbers, Sum(0));
    for (int64_t split = 0; split < first.plan->splits; ++split) {
      for (const Task& task : tasks_) {
        if (task.plan != first.plan || task.group != first.group || task.split != split) continue;
        const Sum* sums = reinterpret_cast<const Sum*>(task.sums.data());
        for (int64_t i = 0; i < numbers; ++i) out[i] += sums[i];
      }
    }
    first.plan->finish(first.group, out);
  }

  std::vector<std::unique_ptr<Plan>> plans_;
  std::vector<Task> tasks_;
  std::vector<const Task*> split_layers_;  // the first task of each layer and group that needs a merge
};

}  // namespace

std::unique_ptr<Work> covariances(const CovariancesParams& params) { return std::make_unique<Covariances>(params); }

}  // namespace kfac2::cpu

// Floor: every map is read once (bytes = N * sum of T_i * sizeof) and N * T_ij multiply-adds are spent on
// each pair, T_ij being the places of the meeting grid. Maps are taken in blocks of samples that fit the
// cache, so that all pairs of a block are formed from one read.
#include "cross_layer_sums.h"

#include <algorithm>
#include <vector>

#include "simd.h"

namespace kfac2::cpu {
namespace {

constexpr int64_t kBlockPlaces = 2048;      // numbers of one map in a block of samples
constexpr int64_t kTaskProducts = 1 << 24;  // multiply-adds worth a task of their own
constexpr int64_t kMaxTasks = 16;           // each holds B*B partial sums
constexpr int64_t kRowTile = 4;             // maps x maps held in registers by dot_tile

// Two classes of maps, and where they meet.
struct ClassPair {
  int64_t first, second;
  Meeting meeting;
  int64_t places;
};

// sums[i][j] = rows_i . cols_j over `length` numbers, for a tile of kRowTile x kRowTile. Sixteen names, since the
// compiler keeps scalars in registers, and an array of them in memory.
template <typename T>
KFAC2_INLINE void dot_tile_of(const T* const* rows, const T* const* cols, int64_t length,
                              T (&sums)[kRowTile][kRowTile]) {
  T s00 = 0, s01 = 0, s02 = 0, s03 = 0, s10 = 0, s11 = 0, s12 = 0, s13 = 0;
  T s20 = 0, s21 = 0, s22 = 0, s23 = 0, s30 = 0, s31 = 0, s32 = 0, s33 = 0;
  const T *a0 = rows[0], *a1 = rows[1], *a2 = rows[2], *a3 = rows[3];
  const T *b0 = cols[0], *b1 = cols[1], *b2 = cols[2], *b3 = cols[3];
#pragma omp simd reduction(+ : s00, s01, s02, s03, s10, s11, s12, s13, s20, s21, s22, s23, s30, s31, s32, s33)
  for (int64_t p = 0; p < length; ++p) {
    const T x0 = a0[p], x1 = a1[p], x2 = a2[p], x3 = a3[p];
    const T y0 = b0[p], y1 = b1[p], y2 = b2[p], y3 = b3[p];
    s00 += x0 * y0, s01 += x0 * y1, s02 += x0 * y2, s03 += x0 * y3;
    s10 += x1 * y0, s11 += x1 * y1, s12 += x1 * y2, s13 += x1 * y3;
    s20 += x2 * y0, s21 += x2 * y1, s22 += x2 * y2, s23 += x2 * y3;
    s30 += x3 * y0, s31 += x3 * y1, s32 += x3 * y2, s33 += x3 * y3;
  }
  const T all[kRowTile][kRowTile] = {
      {s00, s01, s02, s03}, {s10, s11, s12, s13}, {s20, s21, s22, s23}, {s30, s31, s32, s33}};
  std::copy_n(&all[0][0], kRowTile * kRowTile, &sums[0][0]);
}

KFAC2_CLONES void dot_tile(const float* const* rows, const float* const* cols, int64_t length,
                           float (&sums)[kRowTile][kRowTile]) {
  dot_tile_of<float>(rows, cols, length, sums);
}
KFAC2_CLONES void dot_tile(const double* const* rows, const double* const* cols, int64_t length,
                           double (&sums)[kRowTile][kRowTile]) {
  dot_tile_of<double>(rows, cols, length, sums);
}

// Adds, in double, the products of all rows of a class with all rows of another; each pair at its place
// above the diagonal.
template <typename T>
void add_products(const std::vector<const T*>& rows, const std::vector<int64_t>& row_index,
                  const std::vector<const T*>& cols, const std::vector<int64_t>& col_index, bool same, int64_t length,
                  double* sums, int64_t count) {
  T tile[kRowTile][kRowTile];
  const int64_t row_count = static_cast<int64_t>(rows.size()), col_count = static_cast<int64_t>(cols.size());
  for (int64_t i = 0; i < row_count; i += kRowTile) {
    for (int64_t j = same ? i : 0; j < col_count; j += kRowTile) {
      // The last tile repeats the last row where there are fewer than kRowTile; the repeats are not added.
      const T *row_tile[kRowTile], *col_tile[kRowTile];
      for (int64_t k = 0; k < kRowTile; ++k) {
        row_tile[k] = rows[std::min(i + k, row_count - 1)];
        col_tile[k] = cols[std::min(j + k, col_count - 1)];
      }
      dot_tile(row_tile, col_tile, length, tile);
      for (int64_t di = 0; di < std::min(kRowTile, row_count - i); ++di) {
        for (int64_t dj = 0; dj < std::min(kRowTile, col_count - j); ++dj) {
          if (same && j + dj < i + di) continue;
          const auto [low, high] = std::minmax(row_index[i + di], col_index[j + dj]);
          sums[low * count + high] += static_cast<double>(tile[di][dj]);
        }
      }
    }
  }
}

// The maps of one class on a meeting grid, for a block of samples: where the grids agree the maps
// themselves, else a copy of the block's few places, in cache.
template <typename T>
class BlockRows {
 public:
  const std::vector<const T*>& at(const CrossLayerSumsParams& params, const GridClass& grid_class,
                                  const ClassPair& pair, int64_t sample_begin, int64_t samples) {
    const Grid& grid = grid_class.grid;
    const int64_t own = grid.places();
    const bool agree = pair.meeting.is(grid);
    rows_.clear();
    if (!agree) {
      copy_.resize(grid_class.members.size() * samples * pair.places);
      index_.resize(pair.places);
      for (int64_t place = 0; place < pair.places; ++place) index_[place] = nearest_index(grid, pair.meeting, place);
    }
    T* to = copy_.data();
    for (const int64_t member : grid_class.members) {
      const T* from = static_cast<const T*>(params.maps[member].data) + sample_begin * own;
      rows_.push_back(agree ? from : to);
      if (agree) continue;
      for (int64_t n = 0; n < samples; ++n, from += own, to += pair.places) {
        for (int64_t place = 0; place < pair.places; ++place) {
          to[place] = params.downsample == Downsample::kNearest ? from[index_[place]]
                                                                : area_mean(from, grid, pair.meeting, place);
        }
      }
    }
    return rows_;
  }

 private:
  std::vector<const T*> rows_;
  std::vector<int64_t> index_;
  std::vector<T> copy_;
};

class CrossLayerSums : public Work {
 public:
  explicit CrossLayerSums(const CrossLayerSumsParams& params)
      : params_(params),
        classes_(grid_classes(params.count, [&](int64_t i) -> const Grid& { return params.maps[i].grid; })) {
    int64_t products = 0;
    for (size_t p = 0; p < classes_.size(); ++p) {
      for (size_t q = p; q < classes_.size(); ++q) {
        const GridClass &first = classes_[p], &second = classes_[q];
        const Meeting meeting = meet(first.grid, second.grid);
        const int64_t places = meeting.grid.places();
        if (places == 0 || first.grid.places() == 0 || second.grid.places() == 0) continue;  // an empty grid: no rows
        pairs_.push_back({static_cast<int64_t>(p), static_cast<int64_t>(q), meeting, places});
        products += params.batch * places * static_cast<int64_t>(first.members.size() * second.members.size());
      }
    }
    tasks_ = std::max<int64_t>(1, std::min({products / kTaskProducts, kMaxTasks, params.batch}));
    partial_.assign(tasks_ * params.count * params.count, 0.0);
  }

  int64_t tasks() const override { return tasks_; }

  void run_task(int64_t task) override {
    const int64_t begin = params_.batch * task / tasks_, end = params_.batch * (task + 1) / tasks_;
    params_.is_double ? add_samples<double>(task, begin, end) : add_samples<float>(task, begin, end);
  }

  int64_t merges() const override { return 1; }

  void run_merge(int64_t) override { params_.is_double ? merge<double>() : merge<float>(); }

 private:
  template <typename T>
  void add_samples(int64_t task, int64_t begin, int64_t end) {
    double* sums = partial_.data() + task * params_.count * params_.count;
    BlockRows<T> first_rows, second_rows;
    for (const ClassPair& pair : pairs_) {
      const GridClass &first = classes_[pair.first], &second = classes_[pair.second];
      const int64_t block = std::max<int64_t>(1, kBlockPlaces / pair.places);
      for (int64_t n = begin; n < end; n += block) {
        const int64_t samples = std::min(block, end - n);
        const auto& rows = first_rows.at(params_, first, pair, n, samples);
        const bool same = pair.first == pair.second;
        const auto& cols = same ? rows : second_rows.at(params_, second, pair, n, samples);
        add_products<T>(rows, first.members, cols, second.members, same, samples * pair.places, sums, params_.count);
      }
    }
  }

  template <typename T>
  void merge() const {
    const int64_t count = params_.count;
    const T* previous = static_cast<const T*>(params_.previous);
    T* sums = static_cast<T*>(params_.sums);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = i; j < count; ++j) {
        double sum = 0;
        for (int64_t task = 0; task < tasks_; ++task) sum += partial_[(task * count + i) * count + j];
        sum *= params_.scale;
        if (previous != nullptr) sum += params_.kept * static_cast<double>(previous[i * count + j]);
        sums[i * count + j] = sums[j * count + i] = static_cast<T>(sum);
      }
    }
  }

  CrossLayerSumsParams params_;
  std::vector<GridClass> classes_;
  std::vector<ClassPair> pairs_;
  int64_t tasks_ = 1;
  std::vector<double> partial_;  // [tasks, count, count]
};

}  // namespace

std::unique_ptr<Work> cross_layer_sums(const CrossLayerSumsParams& params) {
  return std::make_unique<CrossLayerSums>(params);
}

}  // namespace kfac2::cpu

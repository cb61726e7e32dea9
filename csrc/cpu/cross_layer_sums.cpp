// Floor: every map is read once (bytes = N * sum of T_i * sizeof) and N * T_ij multiply-adds are spent on
// each pair, T_ij being the places of the meeting grid. Maps are taken in blocks of samples that fit the
// cache, so that all pairs of a block are formed from one read.
#include "cross_layer_sums.h"

#include <algorithm>
#include <map>
#include <vector>

#include "simd.h"

namespace kfac2::cpu {
namespace {

constexpr int64_t kBlockPlaces = 2048;      // numbers of one map in a block of samples
constexpr int64_t kTaskProducts = 1 << 24;  // multiply-adds worth a task of their own
constexpr int64_t kMaxTasks = 16;           // each holds B*B partial sums
constexpr int64_t kRowTile = 4;             // maps x maps held in registers by dot_tile

// Maps of one grid.
struct GridClass {
  GridMap shape;
  std::vector<int64_t> members;
};

// Where two classes meet: on the smaller extent of each axis; with different ranks, on one place.
struct Meeting {
  int64_t first, second;
  bool one_place;
  int rank;
  int64_t extent[kMaxGridRank];
  int64_t places;
};

Meeting meet(const std::vector<GridClass>& classes, int64_t first, int64_t second) {
  const GridMap &a = classes[first].shape, &b = classes[second].shape;
  Meeting meeting{first, second, a.rank != b.rank, a.rank, {}, 1};
  if (meeting.one_place) return meeting;
  for (int axis = 0; axis < a.rank; ++axis) {
    meeting.extent[axis] = std::min(a.extent[axis], b.extent[axis]);
    meeting.places *= meeting.extent[axis];
  }
  return meeting;
}

// What of the larger axis belongs to place t of the smaller one.
struct Span {
  int64_t begin, end;
};

Span span_of(int64_t t, int64_t smaller, int64_t larger, Downsample downsample) {
  const int64_t begin = t * larger / smaller;
  if (downsample == Downsample::kNearest) return {begin, begin + 1};
  return {begin, ((t + 1) * larger + smaller - 1) / smaller};  // adaptive average pooling
}

// Mean of the box of `map` (one sample) that belongs to place `place` of the meeting grid.
template <typename T>
T downsampled(const T* map, const GridMap& shape, const Meeting& meeting, int64_t place, Downsample downsample) {
  Span spans[kMaxGridRank] = {{0, 1}, {0, 1}, {0, 1}, {0, 1}};
  int64_t strides[kMaxGridRank] = {0, 0, 0, 0};
  int64_t stride = 1, count = 1;
  for (int axis = shape.rank - 1; axis >= 0; --axis) {
    const int64_t smaller = meeting.one_place ? 1 : meeting.extent[axis];
    spans[axis] = span_of(place % smaller, smaller, shape.extent[axis], downsample);
    place /= smaller;
    strides[axis] = stride;
    stride *= shape.extent[axis];
    count *= spans[axis].end - spans[axis].begin;
  }
  T sum = 0;
  for (int64_t i = spans[0].begin; i < spans[0].end; ++i)
    for (int64_t j = spans[1].begin; j < spans[1].end; ++j)
      for (int64_t k = spans[2].begin; k < spans[2].end; ++k)
        for (int64_t l = spans[3].begin; l < spans[3].end; ++l)
          sum += map[i * strides[0] + j * strides[1] + k * strides[2] + l * strides[3]];
  return sum / static_cast<T>(count);
}

// sums[i][j] = rows_i . cols_j over `length` numbers, for a tile of up to kRowTile x kRowTile.
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
                                  const Meeting& meeting, int64_t sample_begin, int64_t samples) {
    const int64_t own = grid_class.shape.places();
    const bool agree =
        !meeting.one_place && std::equal(meeting.extent, meeting.extent + meeting.rank, grid_class.shape.extent);
    rows_.clear();
    if (!agree) copy_.resize(grid_class.members.size() * samples * meeting.places);
    T* to = copy_.data();
    for (const int64_t member : grid_class.members) {
      const T* from = static_cast<const T*>(params.maps[member].data) + sample_begin * own;
      rows_.push_back(agree ? from : to);
      if (agree) continue;
      for (int64_t n = 0; n < samples; ++n, from += own)
        for (int64_t place = 0; place < meeting.places; ++place)
          *to++ = downsampled(from, grid_class.shape, meeting, place, params.downsample);
    }
    return rows_;
  }

 private:
  std::vector<const T*> rows_;
  std::vector<T> copy_;
};

}  // namespace

struct CrossLayerSums::State {
  CrossLayerSumsParams params;
  std::vector<GridClass> classes;
  std::vector<Meeting> meetings;
  int64_t tasks = 1;
  std::vector<double> partial;  // [tasks, count, count]

  template <typename T>
  void add_samples(int64_t task, int64_t begin, int64_t end);
};

CrossLayerSums::CrossLayerSums(const CrossLayerSumsParams& params) : state_(new State) {
  State& state = *state_;
  state.params = params;
  std::map<std::vector<int64_t>, int64_t> seen;
  for (int64_t i = 0; i < params.count; ++i) {
    const GridMap& map = params.maps[i];
    const std::vector<int64_t> key(map.extent, map.extent + map.rank);
    const auto [found, is_new] = seen.emplace(key, static_cast<int64_t>(state.classes.size()));
    if (is_new) state.classes.push_back({map, {}});
    state.classes[found->second].members.push_back(i);
  }
  int64_t products = 0;
  for (int64_t p = 0; p < static_cast<int64_t>(state.classes.size()); ++p) {
    for (int64_t q = p; q < static_cast<int64_t>(state.classes.size()); ++q) {
      const Meeting meeting = meet(state.classes, p, q);
      if (meeting.places == 0 || state.classes[p].shape.places() == 0 || state.classes[q].shape.places() == 0) {
        continue;  // an empty grid has no rows
      }
      state.meetings.push_back(meeting);
      products += params.batch * meeting.places *
                  static_cast<int64_t>(state.classes[p].members.size() * state.classes[q].members.size());
    }
  }
  state.tasks = std::max<int64_t>(1, std::min({products / kTaskProducts, kMaxTasks, params.batch}));
  state.partial.assign(state.tasks * params.count * params.count, 0.0);
}

CrossLayerSums::~CrossLayerSums() { delete state_; }

int64_t CrossLayerSums::tasks() const { return state_->tasks; }

template <typename T>
void CrossLayerSums::State::add_samples(int64_t task, int64_t begin, int64_t end) {
  double* sums = partial.data() + task * params.count * params.count;
  BlockRows<T> first_rows, second_rows;
  for (const Meeting& meeting : meetings) {
    const GridClass &first = classes[meeting.first], &second = classes[meeting.second];
    const int64_t block = std::max<int64_t>(1, kBlockPlaces / meeting.places);
    for (int64_t n = begin; n < end; n += block) {
      const int64_t samples = std::min(block, end - n);
      const auto& rows = first_rows.at(params, first, meeting, n, samples);
      const bool same = meeting.first == meeting.second;
      const auto& cols = same ? rows : second_rows.at(params, second, meeting, n, samples);
      add_products<T>(rows, first.members, cols, second.members, same, samples * meeting.places, sums, params.count);
    }
  }
}

void CrossLayerSums::run_task(int64_t task) {
  const int64_t begin = state_->params.batch * task / state_->tasks;
  const int64_t end = state_->params.batch * (task + 1) / state_->tasks;
  if (state_->params.is_double) {
    state_->add_samples<double>(task, begin, end);
  } else {
    state_->add_samples<float>(task, begin, end);
  }
}

void CrossLayerSums::merge() {
  const State& state = *state_;
  const int64_t count = state.params.count;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = i; j < count; ++j) {
      double sum = 0;
      for (int64_t task = 0; task < state.tasks; ++task) {
        sum += state.partial[(task * count + i) * count + j];
      }
      for (const int64_t entry : {i * count + j, j * count + i}) {
        if (state.params.is_double) {
          static_cast<double*>(state.params.sums)[entry] = sum;
        } else {
          static_cast<float*>(state.params.sums)[entry] = static_cast<float>(sum);
        }
      }
    }
  }
}

}  // namespace kfac2::cpu

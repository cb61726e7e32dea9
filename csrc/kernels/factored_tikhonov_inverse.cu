// Floor: n^3 operations for an n x n inverse; 1.5 n^2 numbers moved for each block of rows: half a matrix read and
// written, and Z.
//
// The sweeps of csrc/cpu/factored_tikhonov_inverse.cpp, all matrices side by side: a launch that eliminates the
// rows of block k (Z = L^-1 [rows]) and a launch that updates every tile, for each k up to the largest matrix. So
// the number of launches grows with the largest size only; a matrix of one block needs the first two alone. Only the
// upper triangle is kept: the last sweep writes the lower one.
#include <algorithm>
#include <vector>

#include "factored_tikhonov_inverse.h"
#include "sweep.h"
#include "tables.h"

namespace kfac2::cuda {
namespace {

constexpr int kDampThreads = 256;

__device__ double sum_of_threads(double* shared, double value) {
  shared[threadIdx.x] = value;
  __syncthreads();
  for (unsigned half = kDampThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  const double sum = shared[0];
  __syncthreads();
  return sum;
}

template <typename T>
__device__ double mean_diagonal(double* shared, const void* factor, int64_t size) {
  double sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < size; i += kDampThreads) sum += static_cast<const T*>(factor)[i * size + i];
  return sum_of_threads(shared, sum) / static_cast<double>(size);
}

// The upper triangle of inverse <- damped factor, kBlock rows in each thread block; status <- 0.
template <typename T>
__global__ void __launch_bounds__(kDampThreads) damp_kernel(const Matrix* matrices, int count, double damping) {
  KFAC2_SHARED(double, shared);
  const Matrix& matrix = matrices[entry_of_warp(count, blockIdx.x, [=](int m) { return matrices[m].first_item; })];
  const int64_t size = matrix.size, first = (blockIdx.x - matrix.first_item) * kBlock<T>;
  const double own = mean_diagonal<T>(&shared, matrix.factor, size);
  const double other = mean_diagonal<T>(&shared, matrix.other, matrix.other_size);
  const T shift =
      static_cast<T>(matrix.is_A ? tikhonov_shifts(own, other, damping).A : tikhonov_shifts(other, own, damping).G);
  const int warp = threadIdx.x / warpSize, lane = threadIdx.x % warpSize;
  const int64_t end = first + kBlock<T> < size ? first + kBlock<T> : size;
  for (int64_t row = first + warp; row < end; row += kDampThreads / warpSize) {
    const T* from = static_cast<const T*>(matrix.factor) + row * size;
    T* to = static_cast<T*>(matrix.inverse) + row * size;
    for (int64_t begin = row + lane; begin < size; begin += kInFlight * warpSize) {
      T numbers[kInFlight];
#pragma unroll
      for (int m = 0; m < kInFlight; ++m) numbers[m] = begin + m * warpSize < size ? from[begin + m * warpSize] : T(0);
      if (begin == row) numbers[0] += shift;
#pragma unroll
      for (int m = 0; m < kInFlight; ++m)
        if (begin + m * warpSize < size) to[begin + m * warpSize] = numbers[m];
    }
  }
  if (first == 0 && matrix.is_A && threadIdx.x == 0) *matrix.status = 0;
}

// Z = L^-1 [rows of block k], one block of columns in each thread block, which eliminates the block on the diagonal
// (L L^T) anew. A thread has a column: the first kBlock of them of the block on the diagonal, the others of Z. What a
// panel loses to the rows above is a product, in a loop: straight-line code of all steps is run once and takes longer
// to be fetched than to be run.
template <typename T>
__global__ void __launch_bounds__(2 * kBlock<T>) eliminate_kernel(const Matrix* matrices, int count, int k, T* all_Z) {
  constexpr int kRows = kBlock<T>;
  KFAC2_SHARED(Elimination<T>, shared);
  const Matrix& matrix = matrices[entry_of_warp(count, blockIdx.x, [=](int m) { return matrices[m].first_item; })];
  const int64_t columns = blockIdx.x - matrix.first_item, step = matrix.blocks * kRows;
  const int own = threadIdx.x;
  T* Z = all_Z + matrix.first_item * kRows * kRows + columns * kRows + own % kRows;
  load_rows(matrix, k, columns, shared);
  bool positive = true;
#pragma unroll 1
  for (int first = 0; first < kRows; first += kPanel) {
    __syncthreads();  // the rows above the panel are there
    T column[kPanel];
#pragma unroll
    for (int i = 0; i < kPanel; ++i) column[i] = shared.rows[first + i][own];
    const int above = own < first ? 0 : first;  // a column of the block on the diagonal ends there
#pragma unroll 4
    for (int s = 0; s < above; ++s) {
      const T multiple = shared.rows[s][own];
#pragma unroll
      for (int i = 0; i < kPanel; ++i) column[i] -= shared.rows[s][first + i] * multiple;
    }
    positive &= eliminate_panel(column, own - first, shared.pivot_rows);
#pragma unroll
    for (int i = 0; i < kPanel; ++i) shared.rows[first + i][own] = column[i];
    if (own < kRows) continue;
#pragma unroll
    for (int i = 0; i < kPanel; ++i) Z[(first + i) * step] = column[i];
  }
  if (!positive && own == 0) *matrix.status = 1;
}

// Sweeps one tile of the upper triangle: M_ij <- M_ij - Z_i^T Z_j, and the other cases of the CPU's formula.
template <typename T>
__global__ void __launch_bounds__(kSide* kSide, kTilesAtOnce)
    update_kernel(const Matrix* matrices, int count, int k, const T* all_Z) {
  constexpr int kRows = kBlock<T>;
  KFAC2_SHARED(Tiles<T>, tiles);
  const Matrix& matrix = matrices[entry_of_warp(count, blockIdx.x, [=](int m) { return matrices[m].first_tile; })];
  int64_t i, j;
  tile_place(blockIdx.x - matrix.first_tile, &i, &j);
  const T* Z = all_Z + matrix.first_item * kRows * kRows;
  const T sign = (i == k) != (j == k) ? T(1) : T(-1);
  load_Z(Z + i * kRows, Z + j * kRows, matrix.blocks * kRows, sign, tiles);
  __syncthreads();
  multiply(tiles);
  __syncthreads();
  const bool is_last = k == matrix.blocks - 1;
  write_swept(matrix, i, j, i != k && j != k, is_last, tiles);
  if (!is_last) return;  // the same for all threads
  __syncthreads();
  write_mirrored(matrix, i, j, tiles);
}

template <typename T>
class FactoredTikhonovInverse : public TableLaunch {
 public:
  explicit FactoredTikhonovInverse(const FactoredTikhonovInverseParams& params) : params_(params) {
    for (int64_t i = 0; i < params.count; ++i) {
      const FactorPair& pair = params.pairs[i];
      add_matrix(pair.A, pair.G, pair.A_inv, params.status + i, pair.d_in, pair.d_out, true);
      add_matrix(pair.G, pair.A, pair.G_inv, params.status + i, pair.d_out, pair.d_in, false);
    }
    // Sorted by their number of blocks, the largest first: the matrices that have a block k are then the first ones.
    std::stable_sort(matrices_.begin(), matrices_.end(),
                     [](const Matrix& a, const Matrix& b) { return a.blocks > b.blocks; });
    for (Matrix& matrix : matrices_) {
      matrix.first_item = items_;
      matrix.first_tile = tiles_;
      items_ += matrix.blocks;
      tiles_ += matrix.blocks * (matrix.blocks + 1) / 2;
    }
    table_ = add(matrices_);
    scratch_bytes_ = items_ * kBlock<T> * kBlock<T> * static_cast<int64_t>(sizeof(T));
  }

 private:
  void add_matrix(const void* factor, const void* other, void* inverse, int32_t* status, int64_t size,
                  int64_t other_size, bool is_A) {
    const int64_t blocks = std::max<int64_t>(1, ceil_div(size, kBlock<T>));  // an empty one has a status, too
    matrices_.push_back({factor, other, inverse, status, size, other_size, blocks, 0, 0, is_A});
  }

  cudaError_t start(unsigned char* workspace, cudaStream_t stream) const override {
    const Matrix* matrices = at(workspace, table_);
    T* Z = reinterpret_cast<T*>(scratch(workspace));
    int count = static_cast<int>(matrices_.size());
    cudaError_t status = launch(damp_kernel<T>, dim3(static_cast<unsigned>(items_)), dim3(kDampThreads),
                                kDampThreads * sizeof(double), stream, matrices, count, params_.damping);
    for (int k = 0; count > 0 && k < matrices_[0].blocks && status == cudaSuccess; ++k) {
      while (matrices_[count - 1].blocks <= k) --count;
      const Matrix& last = matrices_[count - 1];
      const dim3 blocks(static_cast<unsigned>(last.first_item + last.blocks));
      const dim3 tiles(static_cast<unsigned>(last.first_tile + last.blocks * (last.blocks + 1) / 2));
      status = launch(eliminate_kernel<T>, blocks, dim3(2 * kBlock<T>), sizeof(Elimination<T>), stream, matrices, count,
                      k, Z);
      if (status != cudaSuccess) break;
      status = launch(update_kernel<T>, tiles, dim3(kSide * kSide), sizeof(Tiles<T>), stream, matrices, count, k,
                      static_cast<const T*>(Z));
    }
    return status;
  }

  FactoredTikhonovInverseParams params_;
  std::vector<Matrix> matrices_;
  int64_t items_ = 0, tiles_ = 0;
  TableAt<Matrix> table_;
};

}  // namespace

std::unique_ptr<Launch> factored_tikhonov_inverse(const FactoredTikhonovInverseParams& params) {
  if (params.is_double) return std::make_unique<FactoredTikhonovInverse<double>>(params);
  return std::make_unique<FactoredTikhonovInverse<float>>(params);
}

}  // namespace kfac2::cuda

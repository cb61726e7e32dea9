// Floor: n^3 operations for an n x n inverse; 2 n^2 numbers moved for each block of rows.
//
// The sweeps of csrc/cpu/factored_tikhonov_inverse.cpp, all matrices side by side: a launch that eliminates the
// rows of block k (Z = L^-1 [rows]) and a launch that updates every tile, for each k up to the largest matrix. So
// the number of launches grows with the largest size only; a matrix of one block needs the first two alone.
#include <algorithm>
#include <vector>

#include "device.h"
#include "factored_tikhonov_inverse.h"
#include "tables.h"

namespace kfac2::cuda {
namespace {

constexpr int kDampThreads = 256;
constexpr int kSide = 16;  // threads along either side of a tile

// Rows of a block: as many columns a thread of eliminate_kernel keeps in registers.
template <typename T>
constexpr int kBlock = sizeof(T) == sizeof(float) ? 64 : 32;

// A factor on its way to its inverse. The inverse's own memory holds the matrix meanwhile. Z = L^-1 [rows of block k],
// [block, blocks * block], with L^-1 where the block on the diagonal was, lies behind that of the matrices before it.
struct Matrix {
  const void* factor;  // [size, size]
  const void* other;   // of the same pair, for pi
  void* inverse;       // [size, size]
  int32_t* status;     // of the pair
  int64_t size, other_size;
  int64_t blocks;      // of rows, the last perhaps incomplete
  int64_t first_item;  // of eliminate_kernel: one for each block; Z begins there, too
  int64_t first_tile;  // of update_kernel: one for each pair of blocks
  bool is_A;
};

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
  for (int64_t i = threadIdx.x; i < size; i += kDampThreads) sum += static_cast<const T*>(factor)[i * size + i];
  return sum_of_threads(shared, sum) / static_cast<double>(size);
}

// inverse <- damped factor, kBlock rows in each thread block; status <- 0.
template <typename T>
__global__ void __launch_bounds__(kDampThreads) damp_kernel(const Matrix* matrices, int count, double damping) {
  KFAC2_SHARED(double, shared);
  const Matrix& matrix = matrices[entry_of(matrices, count, blockIdx.x)];
  const int64_t first = (blockIdx.x - matrix.first_item) * kBlock<T>;
  const double own = mean_diagonal<T>(&shared, matrix.factor, matrix.size);
  const double other = mean_diagonal<T>(&shared, matrix.other, matrix.other_size);
  const T shift =
      static_cast<T>(matrix.is_A ? tikhonov_shifts(own, other, damping).A : tikhonov_shifts(other, own, damping).G);
  const int64_t begin = first * matrix.size;
  const int64_t end = (first + kBlock<T> < matrix.size ? first + kBlock<T> : matrix.size) * matrix.size;
  const T* from = static_cast<const T*>(matrix.factor);
  T* to = static_cast<T*>(matrix.inverse);
  for (int64_t i = begin + threadIdx.x; i < end; i += kDampThreads)
    to[i] = from[i] + (i / matrix.size == i % matrix.size ? shift : T(0));
  if (first == 0 && matrix.is_A && threadIdx.x == 0) *matrix.status = 0;
}

// A row of the block on the diagonal, twice: the next is written while the last is still read.
template <typename T>
struct PivotRows {
  T row[2][kBlock<T>];
};

// Element (row, column) of the matrix; outside of it that of the identity.
template <typename T>
__device__ T element_or_identity(const T* matrix, int64_t size, int64_t row, int64_t column) {
  return row < size && column < size ? matrix[row * size + column] : T(row == column);
}

// Z = L^-1 [rows of block k], one block of columns in each thread block, which eliminates the block on the diagonal
// (L D L^T) anew. A thread keeps a column: the first kBlock of them of the block on the diagonal, the others of Z.
template <typename T>
__global__ void __launch_bounds__(2 * kBlock<T>) eliminate_kernel(const Matrix* matrices, int count, int k, T* all_Z) {
  constexpr int kRows = kBlock<T>;
  KFAC2_SHARED(PivotRows<T>, pivots);
  const Matrix& matrix = matrices[entry_of(matrices, count, blockIdx.x)];
  const T* data = static_cast<const T*>(matrix.inverse);
  const int64_t columns = blockIdx.x - matrix.first_item;  // which block of columns
  const int64_t row = static_cast<int64_t>(k) * kRows;
  const int lane = threadIdx.x % kRows;
  const bool is_diagonal = threadIdx.x < kRows, takes_identity = columns == k;
  T column[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    column[i] = is_diagonal      ? element_or_identity(data, matrix.size, row + i, row + lane)
                : takes_identity ? T(i == lane)
                                 : element_or_identity(data, matrix.size, row + i, columns * kRows + lane);
  }
  bool positive = true;
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    T* pivot_row = pivots.row[j % 2];
    if (is_diagonal) pivot_row[lane] = column[j];
    __syncthreads();
    const T pivot = pivot_row[j];
    positive &= pivot > 0 && std::isfinite(pivot);
    const T multiple = column[j] / pivot;
#pragma unroll
    for (int i = j + 1; i < kRows; ++i) column[i] -= pivot_row[i] * multiple;
    column[j] /= std::sqrt(pivot);
  }
  if (!positive && threadIdx.x == 0) *matrix.status = 1;
  if (is_diagonal) return;  // no barrier follows
  T* Z = all_Z + matrix.first_item * kRows * kRows + columns * kRows + lane;
#pragma unroll
  for (int i = 0; i < kRows; ++i) Z[i * matrix.blocks * kRows] = column[i];
}

// Two blocks of columns of Z.
template <typename T>
struct alignas(16) ZTiles {
  T left[kBlock<T>][kBlock<T>], right[kBlock<T>][kBlock<T>];
};

// Row and column of the upper triangle that a tile is, tiles going down the columns.
__device__ void tile_place(int64_t tile, int64_t* row, int64_t* column) {
  int64_t j = static_cast<int64_t>((std::sqrt(8.0 * static_cast<double>(tile) + 1) - 1) / 2);
  while (j * (j + 1) / 2 > tile) --j;
  while ((j + 1) * (j + 2) / 2 <= tile) ++j;
  *column = j;
  *row = tile - j * (j + 1) / 2;
}

// Writes a swept element and its mirror image; the last sweep leaves minus the inverse, which is turned here.
template <typename T>
__device__ void write_swept(const Matrix& matrix, int k, int64_t i, int64_t j, T product) {
  if (i >= matrix.size || j >= matrix.size) return;
  T* data = static_cast<T*>(matrix.inverse);
  const bool row_swept = i / kBlock<T> == k, column_swept = j / kBlock<T> == k;
  T value = row_swept != column_swept ? product : -product;
  if (!row_swept && !column_swept) value += data[i * matrix.size + j];
  if (k == matrix.blocks - 1) {
    value = -value;
    if (!std::isfinite(value)) *matrix.status = 1;
  }
  data[i * matrix.size + j] = value;
  data[j * matrix.size + i] = value;
}

// Sweeps one tile of the upper triangle: M_ij <- M_ij - Z_i^T Z_j, and the other cases of the CPU's formula.
template <typename T>
__global__ void __launch_bounds__(kSide* kSide)
    update_kernel(const Matrix* matrices, int count, int k, const T* all_Z) {
  constexpr int kRows = kBlock<T>, kEach = kRows / kSide;
  KFAC2_SHARED(ZTiles<T>, tiles);
  const Matrix& matrix = matrices[entry_of(count, blockIdx.x, [matrices](int m) { return matrices[m].first_tile; })];
  int64_t i, j;
  tile_place(blockIdx.x - matrix.first_tile, &i, &j);
  const T* Z = all_Z + matrix.first_item * kRows * kRows;
  for (int at = threadIdx.x; at < kRows * kRows; at += kSide * kSide) {
    const int s = at / kRows, c = at % kRows;
    tiles.left[s][c] = Z[s * matrix.blocks * kRows + i * kRows + c];
    tiles.right[s][c] = Z[s * matrix.blocks * kRows + j * kRows + c];
  }
  __syncthreads();
  const int row = threadIdx.x / kSide * kEach, column = threadIdx.x % kSide * kEach;
  T products[kEach][kEach] = {};
#pragma unroll 8
  for (int s = 0; s < kRows; ++s) {
#pragma unroll
    for (int r = 0; r < kEach; ++r)
#pragma unroll
      for (int c = 0; c < kEach; ++c) products[r][c] += tiles.left[s][row + r] * tiles.right[s][column + c];
  }
#pragma unroll
  for (int r = 0; r < kEach; ++r)
#pragma unroll
    for (int c = 0; c < kEach; ++c) {
      const int64_t a = i * kRows + row + r, b = j * kRows + column + c;
      if (a <= b) write_swept(matrix, k, a, b, products[r][c]);
    }
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
      status =
          launch(eliminate_kernel<T>, blocks, dim3(2 * kBlock<T>), sizeof(PivotRows<T>), stream, matrices, count, k, Z);
      if (status != cudaSuccess) break;
      status = launch(update_kernel<T>, tiles, dim3(kSide * kSide), sizeof(ZTiles<T>), stream, matrices, count, k,
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

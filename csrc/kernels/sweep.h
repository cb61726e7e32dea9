// What a thread block does of one sweep: csrc/kernels/factored_tikhonov_inverse.cu.
#pragma once

#include <cmath>
#include <cstdint>

#include "device.h"

namespace kfac2::cuda {

constexpr int kPanel = 16;       // rows of a block that are eliminated at once, in registers
constexpr int kSide = 8;         // threads along either side of a tile
constexpr int kTilesAtOnce = 6;  // of a multiprocessor: as many as its shared memory holds
constexpr int kInFlight = 16;    // numbers that a thread loads before it waits for the first

// Rows of a block.
template <typename T>
constexpr int kBlock = sizeof(T) == sizeof(float) ? 64 : 32;

// Numbers between two rows of a tile in shared memory that is also read by columns: keeps rows aligned to 16 bytes and
// neighbouring rows off one bank.
template <typename T>
constexpr int kPad = 16 / sizeof(T);

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

// ---- Elimination of the rows of a block ----

// The block on the diagonal and beside it a block of columns, eliminated panel by panel: L^-1 times both. Of the panel
// at hand, two rows that the next two pivots take, written while those before are still read.
template <typename T>
struct alignas(16) Elimination {
  T rows[kBlock<T>][2 * kBlock<T> + kPad<T>];
  T pivot_rows[2][2][kPanel];
};

// Brings the upper triangle of block k of the diagonal and, of the same rows, one block of columns: of the upper
// triangle, where left of the diagonal it lies transposed. Outside of the matrix is the identity, which also comes in
// place of the block on the diagonal.
template <typename T>
__device__ void load_rows(const Matrix& matrix, int k, int64_t columns, Elimination<T>& shared) {
  constexpr int kRows = kBlock<T>;
  const int64_t size = matrix.size, first = static_cast<int64_t>(k) * kRows, other = columns * kRows;
  const int c = threadIdx.x % kRows;
  const bool transposed = columns < k, inside = first + c < size;
  const bool takes_other = transposed ? inside : columns > k && other + c < size;
  const int begin = threadIdx.x / kRows;  // every second row
  const T* data = static_cast<const T*>(matrix.inverse);
  const T* diagonal = data + (first + begin) * size + first + c;
  const T* beside = data + (transposed ? (other + begin) * size + first : (first + begin) * size + other) + c;
  const int step = transposed ? 1 : 2 * kRows + kPad<T>;
  T* to = (transposed ? &shared.rows[c][kRows] : &shared.rows[0][kRows + c]) + begin * step;
  const int rows = inside ? c + 1 : 0, ones = columns == k ? c : -1;
#pragma unroll 8
  for (int m = 0; m < kRows / 2; ++m, diagonal += 2 * size, beside += 2 * size, to += 2 * step) {
    const int r = begin + 2 * m;
    shared.rows[r][c] = r < rows ? *diagonal : T(r == c);
    *to = takes_other ? *beside : T(r == ones);
  }
}

// Eliminates the rows of a panel, of which each thread has a column, two pivots for each barrier: the threads that have
// the panel's own columns publish two rows as they are, and every thread takes the first of them off the second.
// Returns whether the pivots are positive.
template <typename T>
__device__ bool eliminate_panel(T (&column)[kPanel], int own, T (&pivot_rows)[2][2][kPanel]) {
  bool positive = true;
#pragma unroll
  for (int j = 0; j < kPanel; j += 2) {
    auto& rows = pivot_rows[j / 2 % 2];
    if (own >= 0 && own < kPanel) {
      rows[0][own] = column[j];
      rows[1][own] = column[j + 1];
    }
    __syncthreads();
    const T pivot = rows[0][j], beside = rows[0][j + 1];
    const T scale = rsqrt(pivot), of_beside = beside * scale * scale;
    const T next_pivot = rows[1][j + 1] - beside * of_beside;
    const T next_scale = rsqrt(next_pivot);
    positive &= pivot > 0 && std::isfinite(pivot) && next_pivot > 0 && std::isfinite(next_pivot);
    const T multiple = column[j] * scale * scale;
    column[j + 1] -= beside * multiple;
    const T next_multiple = column[j + 1] * next_scale * next_scale;
#pragma unroll
    for (int i = j + 2; i < kPanel; ++i) {
      column[i] -= rows[0][i] * multiple;
      column[i] -= (rows[1][i] - rows[0][i] * of_beside) * next_multiple;
    }
    column[j] *= scale;
    column[j + 1] *= next_scale;
  }
  return positive;
}

// ---- Update of a tile ----

// Two blocks of columns of Z; then the tile that they make.
template <typename T>
union alignas(16) Tiles {
  struct {
    T left[kBlock<T>][kBlock<T>], right[kBlock<T>][kBlock<T>];
  };
  T swept[kBlock<T>][kBlock<T> + kPad<T>];
};

// Row and column of the upper triangle that a tile is, tiles going down the columns.
__device__ void tile_place(int64_t tile, int64_t* row, int64_t* column) {
  int64_t j = static_cast<int64_t>((std::sqrt(8.0 * static_cast<double>(tile) + 1) - 1) / 2);
  while (j * (j + 1) / 2 > tile) --j;
  while ((j + 1) * (j + 2) / 2 <= tile) ++j;
  *column = j;
  *row = tile - j * (j + 1) / 2;
}

// Two blocks of columns of Z, the left one times a sign.
template <typename T>
__device__ void load_Z(const T* left, const T* right, int64_t step, T sign, Tiles<T>& tiles) {
  constexpr int kLanes = Vector<T>::kLanes, kInRow = kBlock<T> / kLanes, kRowsAtOnce = kSide * kSide / kInRow;
  const int begin = threadIdx.x / kInRow, c = threadIdx.x % kInRow * kLanes;
  left += begin * step + c;
  right += begin * step + c;
#pragma unroll 8
  for (int m = 0; m < kBlock<T> / kRowsAtOnce; ++m, left += kRowsAtOnce * step, right += kRowsAtOnce * step) {
    const int s = begin + m * kRowsAtOnce;
    Vector<T> of_left = *reinterpret_cast<const Vector<T>*>(left);
    *reinterpret_cast<Vector<T>*>(&tiles.right[s][c]) = *reinterpret_cast<const Vector<T>*>(right);
#pragma unroll
    for (int l = 0; l < kLanes; ++l) of_left.lane[l] *= sign;
    *reinterpret_cast<Vector<T>*>(&tiles.left[s][c]) = of_left;
  }
}

// Overwrites the two blocks with their product. A thread has two vectors of rows and of columns, half a tile apart: the
// threads of a warp read neighbouring ones, and two numbers for each eight products.
template <typename T>
__device__ void multiply(Tiles<T>& tiles) {
  constexpr int kRows = kBlock<T>, kLanes = Vector<T>::kLanes, kEach = kRows / kSide, kHalf = kRows / 2;
  static_assert(kEach == 2 * kLanes, "two vectors for each thread");
  const int row = threadIdx.x / kSide * kLanes, column = threadIdx.x % kSide * kLanes;
  T products[kEach][kEach] = {};
#pragma unroll 4
  for (int s = 0; s < kRows; ++s) {
    Vector<T> left[2], right[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      left[half] = *reinterpret_cast<const Vector<T>*>(&tiles.left[s][row + half * kHalf]);
      right[half] = *reinterpret_cast<const Vector<T>*>(&tiles.right[s][column + half * kHalf]);
    }
#pragma unroll
    for (int r = 0; r < kEach; ++r)
#pragma unroll
      for (int c = 0; c < kEach; ++c)
        products[r][c] += left[r / kLanes].lane[r % kLanes] * right[c / kLanes].lane[c % kLanes];
  }
  __syncthreads();  // the blocks of Z are done with
#pragma unroll
  for (int r = 0; r < kEach; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Vector<T> part;
#pragma unroll
      for (int l = 0; l < kLanes; ++l) part.lane[l] = products[r][half * kLanes + l];
      T* to = &tiles.swept[row + r / kLanes * kHalf + r % kLanes][column + half * kHalf];
      *reinterpret_cast<Vector<T>*>(to) = part;
    }
}

// Adds a tile of the upper triangle to what was swept, or not, and writes it row by row. The last sweep leaves minus
// the inverse, which is turned here.
template <typename T>
__device__ void write_swept(const Matrix& matrix, int64_t i, int64_t j, bool adds, bool is_last, Tiles<T>& tiles) {
  constexpr int kRows = kBlock<T>, kStep = kSide * kSide / kRows;
  const int c = threadIdx.x % kRows;
  const int64_t size = matrix.size;
  const int rows = j * kRows + c >= size ? 0 : i == j ? c + 1 : kRows;  // of this column
  const T turn = is_last ? T(-1) : T(1);
  T* data = static_cast<T*>(matrix.inverse) + i * kRows * size + j * kRows + c;
  bool finite = true;
#pragma unroll 1
  for (int first = threadIdx.x / kRows; first < kRows; first += kInFlight * kStep) {
    T values[kInFlight];
#pragma unroll
    for (int m = 0; m < kInFlight; ++m) {
      const int r = first + m * kStep;
      values[m] = adds && r < rows ? data[r * size] : T(0);
    }
#pragma unroll
    for (int m = 0; m < kInFlight; ++m) {
      const int r = first + m * kStep;
      const T value = turn * (values[m] + tiles.swept[r][c]);
      tiles.swept[r][c] = value;
      if (r < rows) {
        finite &= std::isfinite(value);
        data[r * size] = value;
      }
    }
  }
  if (is_last && !finite) *matrix.status = 1;
}

// Writes the mirror image of a tile, row by row.
template <typename T>
__device__ void write_mirrored(const Matrix& matrix, int64_t i, int64_t j, const Tiles<T>& tiles) {
  constexpr int kRows = kBlock<T>, kStep = kSide * kSide / kRows;
  const int r = threadIdx.x % kRows, begin = threadIdx.x / kRows, first = i == j ? r + 1 : 0;
  const int64_t size = matrix.size;
  T* data = static_cast<T*>(matrix.inverse) + j * kRows * size + i * kRows + r;
#pragma unroll 8
  for (int c = 0; c < kRows; c += kStep)
    if (begin + c >= first && j * kRows + begin + c < size) data[(begin + c) * size] = tiles.swept[r][begin + c];
}

}  // namespace kfac2::cuda

// Floor: the upper triangle and what was there before read once, the triangle written once. One launch, without tables:
// what it knows travels as its parameters.
#include "device.h"
#include "fold_products.h"

namespace kfac2::cuda {
namespace {

constexpr int kSide = 32;      // of a tile of the rectangle: 128 bytes of float
constexpr int kThreads = 256;  // 8 lines of a tile at a time
constexpr int kSteps = kThreads / kSide, kNumbers = kSide / kSteps;

template <typename T>
struct Fold {
  Panels<T> matrix;
  const T* previous;
  T* result;
  T kept, scale;
};

template <typename T>
struct Mirrored {
  T numbers[kSide][kSide + 1];  // [place][line], off one bank
};

template <typename T>
__device__ T number_at(const Panels<T>& matrix, const Triangle& triangle, int64_t line, int64_t place) {
  int64_t row, column;
  triangle.element(line, place, &row, &column);
  return matrix.at(row, column);
}

// One tile of the rectangle. Where it holds the upper triangle by rows, a warp reads 32 columns of a row. Where it
// holds the lower right one by columns, a warp reads 32 columns, which are lines of the rectangle, and the tile is
// turned in shared memory: neighbouring threads read, and write, neighbouring numbers everywhere.
template <typename T>
__global__ void __launch_bounds__(kThreads) fold_kernel(const KFAC2_GRID_CONSTANT Fold<T> fold) {
  KFAC2_SHARED(Mirrored<T>, shared);
  const Triangle triangle{fold.matrix.size()};
  const int64_t height = triangle.height(), width = triangle.width();
  const int64_t first_line = int64_t{blockIdx.y} * kSide, first_place = int64_t{blockIdx.x} * kSide;
  const int x = static_cast<int>(threadIdx.x % kSide), y = static_cast<int>(threadIdx.x / kSide);
  T numbers[kNumbers];
#pragma unroll
  for (int m = 0; m < kNumbers; ++m) {
    const int64_t line = first_line + y + m * kSteps, place = first_place + x;
    const bool inside = line < height && place < width;
    numbers[m] = inside && triangle.is_upper(line, place) ? number_at(fold.matrix, triangle, line, place) : T{};
  }
  if (!triangle.is_upper(first_line + kSide - 1, first_place)) {  // the same for all threads of the block
#pragma unroll
    for (int m = 0; m < kNumbers; ++m) {
      const int64_t line = first_line + x, place = first_place + y + m * kSteps;
      const bool inside = line < height && place < width && !triangle.is_upper(line, place);
      shared.numbers[y + m * kSteps][x] = inside ? number_at(fold.matrix, triangle, line, place) : T{};
    }
    __syncthreads();
  }
#pragma unroll
  for (int m = 0; m < kNumbers; ++m) {
    const int64_t line = first_line + y + m * kSteps, place = first_place + x;
    if (line >= height || place >= width) continue;  // no barrier follows
    const T number = triangle.is_upper(line, place) ? numbers[m] : shared.numbers[x][y + m * kSteps];
    const T sum = fold.scale * number;
    const int64_t at = line * width + place;
    fold.result[at] = fold.previous == nullptr ? sum : sum + fold.kept * fold.previous[at];
  }
}

class FoldProducts : public Launch {
 public:
  explicit FoldProducts(const FoldProductsParams& params) : params_(params) {}

  int64_t workspace() const override { return 0; }

  int run(void*, Stream stream) const override {
    return params_.is_double ? fold<double>(stream) : fold<float>(stream);
  }

 private:
  template <typename T>
  cudaError_t fold(cudaStream_t stream) const {
    const Triangle triangle{params_.size()};
    const int64_t across = ceil_div(triangle.width(), kSide), down = ceil_div(triangle.height(), kSide);
    const Fold<T> fold{params_.matrix<T>(), static_cast<const T*>(params_.previous), static_cast<T*>(params_.result),
                       static_cast<T>(params_.kept), static_cast<T>(params_.scale)};
    return launch(fold_kernel<T>, dim3(static_cast<unsigned>(across), static_cast<unsigned>(down)), dim3(kThreads),
                  sizeof(Mirrored<T>), stream, fold);
  }

  FoldProductsParams params_;
};

}  // namespace

std::unique_ptr<Launch> fold_products(const FoldProductsParams& params) {
  return std::make_unique<FoldProducts>(params);
}

}  // namespace kfac2::cuda

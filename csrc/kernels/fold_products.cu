// Floor: the upper triangles and what was there before read once, the triangles written once. One launch for as many
// products as its parameters hold, which are all of a call but in the largest: a table on the device would be a launch
// of its own, as long as this one.
#include <algorithm>
#include <vector>

#include "device.h"
#include "fold_products.h"

namespace kfac2::cuda {
namespace {

constexpr int kSide = 32;      // of a tile of the rectangle: 128 bytes of float
constexpr int kThreads = 256;  // 8 lines of a tile at a time
constexpr int kSteps = kThreads / kSide, kNumbers = kSide / kSteps;

struct Entry {
  PanelProduct product;
  int64_t first_item;  // its first block
};

// Parameters of a kernel hold 4 KB anywhere, nearly 32 KB from CUDA 12.1 on.
constexpr int kFew = 3840 / static_cast<int>(sizeof(Entry)), kMany = 30720 / static_cast<int>(sizeof(Entry));

template <int kEntries>
struct Entries {
  Entry of[kEntries];
};

template <typename T>
struct Mirrored {
  T numbers[kSide][kSide + 1];  // [place][line], off one bank
};

template <typename T>
__device__ T number_at(const PanelProduct& product, const Triangle& triangle, int64_t line, int64_t place) {
  int64_t row, column;
  triangle.element(line, place, &row, &column);
  return product.at<T>(row, column);
}

// One tile of the rectangle. Where it holds the upper triangle by rows, a warp reads 32 columns of a row. Where it
// holds the lower right one by columns, a warp reads 32 columns, which are lines of the rectangle, and the tile is
// turned in shared memory: neighbouring threads read, and write, neighbouring numbers everywhere.
template <typename T>
__device__ void fold_tile(const PanelProduct& product, T kept, unsigned tile, Mirrored<T>& shared) {
  const Triangle triangle{product.size()};
  const int64_t height = triangle.height(), width = triangle.width();
  const unsigned across = static_cast<unsigned>(ceil_div(width, kSide));
  const int64_t first_line = int64_t{tile / across} * kSide, first_place = int64_t{tile % across} * kSide;
  const int x = static_cast<int>(threadIdx.x % kSide), y = static_cast<int>(threadIdx.x / kSide);
  T numbers[kNumbers];
#pragma unroll
  for (int m = 0; m < kNumbers; ++m) {
    const int64_t line = first_line + y + m * kSteps, place = first_place + x;
    const bool inside = line < height && place < width;
    numbers[m] = inside && triangle.is_upper(line, place) ? number_at<T>(product, triangle, line, place) : T{};
  }
  if (!triangle.is_upper(first_line + kSide - 1, first_place)) {  // the same for all threads of the block
#pragma unroll
    for (int m = 0; m < kNumbers; ++m) {
      const int64_t line = first_line + x, place = first_place + y + m * kSteps;
      const bool inside = line < height && place < width && !triangle.is_upper(line, place);
      shared.numbers[y + m * kSteps][x] = inside ? number_at<T>(product, triangle, line, place) : T{};
    }
    __syncthreads();
  }
  const T scale = static_cast<T>(product.scale);
  const T* const previous = static_cast<const T*>(product.previous);
  T* const result = static_cast<T*>(product.result);
#pragma unroll
  for (int m = 0; m < kNumbers; ++m) {
    const int64_t line = first_line + y + m * kSteps, place = first_place + x;
    if (line >= height || place >= width) continue;  // no barrier follows
    const T sum = scale * (triangle.is_upper(line, place) ? numbers[m] : shared.numbers[x][y + m * kSteps]);
    const int64_t at = line * width + place;
    result[at] = previous == nullptr ? sum : sum + kept * previous[at];
  }
}

template <int kEntries>
__global__ void __launch_bounds__(kThreads)
    fold_kernel(const KFAC2_GRID_CONSTANT Entries<kEntries> entries, int count, double kept) {
  // All threads look at one entry after the other: of different ones, parameters would be read one by one.
  const Entry& entry = entries.of[entry_of(entries.of, count, blockIdx.x)];
  const unsigned tile = static_cast<unsigned>(blockIdx.x - entry.first_item);
  if (entry.product.is_double) {
    KFAC2_SHARED(Mirrored<double>, shared);
    fold_tile<double>(entry.product, kept, tile, shared);
  } else {
    KFAC2_SHARED(Mirrored<float>, shared);
    fold_tile<float>(entry.product, static_cast<float>(kept), tile, shared);
  }
}

class FoldProducts : public Launch {
 public:
  explicit FoldProducts(const FoldProductsParams& params)
      : products_(params.products, params.products + params.count), kept_(params.kept) {}

  int64_t workspace() const override { return 0; }

  int run(void*, Stream stream) const override {
    const int total = static_cast<int>(products_.size());
    cudaError_t status = cudaSuccess;
    for (int first = 0, count; first < total && status == cudaSuccess; first += count) {
      count = std::min(kMany, total - first);
      status = count <= kFew ? fold<kFew>(first, count, stream) : fold<kMany>(first, count, stream);
    }
    return status;
  }

 private:
  template <int kEntries>
  cudaError_t fold(int first, int count, cudaStream_t stream) const {
    Entries<kEntries> entries{};
    int64_t items = 0;
    bool has_double = false;
    for (int i = 0; i < count; ++i) {
      const PanelProduct& product = products_[first + i];
      const Triangle triangle{product.size()};
      entries.of[i] = {product, items};
      items += ceil_div(triangle.width(), kSide) * ceil_div(triangle.height(), kSide);
      has_double = has_double || product.is_double;
    }
    return launch(fold_kernel<kEntries>, dim3(static_cast<unsigned>(items)), dim3(kThreads),
                  has_double ? sizeof(Mirrored<double>) : sizeof(Mirrored<float>), stream, entries, count, kept_);
  }

  std::vector<PanelProduct> products_;
  double kept_;
};

}  // namespace

std::unique_ptr<Launch> fold_products(const FoldProductsParams& params) {
  return std::make_unique<FoldProducts>(params);
}

}  // namespace kfac2::cuda

// One launch forms the products of all layers: a block takes a tile of rows (places of samples) and a tile of columns
// (output channels of all directions), gathers the rows through the window into shared memory, a few numbers at a time,
// beside those of D, and meets the products with g at once. It leaves one number for each of its rows and directions;
// a second launch adds up each sample's, in a fixed order. No patch and no product of a whole layer is ever formed.
//
// Floor: x is read once from memory and again from L2 for each tile of columns and kernel offset, g once, D once for
// each tile of rows from L2; rows * d_in * d_out * K multiply-adds, in float32 (float64 for float64).
#include <algorithm>
#include <type_traits>
#include <vector>

#include "device.h"
#include "directional_derivatives.h"
#include "tables.h"

namespace kfac2::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 32, kColumns = 64;  // of a tile; each thread has 4 x 4 products
constexpr int kDepth = 16;                // numbers of a row held in shared memory
constexpr int kPad = 4;                   // keeps rows of shared memory 16-byte aligned and off one bank

struct LayerEntry {
  int64_t first_item;    // block of the products' launch
  int64_t first_output;  // block of the adding launch
  DirectionalLayer layer;
  int64_t partial;    // where its rows' numbers begin in the workspace, in bytes: [tiles of columns, K, rows]
  int64_t rows;       // N T
  int64_t row_tiles;  // column_tiles follow each other

  KFAC2_HOST_DEVICE int64_t columns() const { return layer.d_out() * layer.count; }
  KFAC2_HOST_DEVICE int64_t column_tiles() const { return ceil_div(columns(), kColumns); }
};

// A row of the tile: where its patch and its gradient begin, and its place in the padded map.
struct TileRow {
  int64_t input, grad;  // in elements; the patch's first corner may lie outside of the map
  int corner[kSpatialRank];
  bool exists;
};

// A number of all rows: from the patch's corner to it.
struct TileNumber {
  int64_t offset;
  int shift[kSpatialRank];
  bool exists, is_bias;
};

template <typename Sum>
struct SharedTile {
  union {
    struct {
      Sum inputs[kDepth][kRows + kPad];
      Sum directions[kDepth][kColumns + kPad];
    };
    Sum products[kRows][kColumns + 1];  // met with their gradients
  };
  TileRow rows[kRows];
  TileNumber numbers[kDepth];
};

__device__ TileRow tile_row(const LayerEntry& entry, int64_t row) {
  const RowSource &x = entry.layer.inputs, &g = entry.layer.grads;
  TileRow result{};
  result.exists = row < entry.rows;
  if (!result.exists) return result;
  for (int axis = kSpatialRank - 1; axis >= 0; --axis) {
    const int64_t place = row % g.extent[axis];
    row /= g.extent[axis];
    const int64_t corner = place * x.window.stride[axis] - x.window.pad_low[axis];
    result.corner[axis] = static_cast<int>(corner);
    result.input += corner * x.spatial_stride[axis];
    result.grad += place * g.spatial_stride[axis];
  }
  result.input += row * x.batch_stride;
  result.grad += row * g.batch_stride;
  return result;
}

__device__ TileNumber tile_number(const RowSource& x, int64_t number) {
  const Window& window = x.window;
  const int64_t patch = x.channels_per_group() * window.offsets();
  TileNumber result{};
  result.is_bias = window.bias != 0 && number == patch;
  result.exists = number < patch;
  if (!result.exists) return result;
  int64_t offset = number % window.offsets();
  result.offset = number / window.offsets() * x.channel_stride;
  for (int axis = kSpatialRank - 1; axis >= 0; --axis) {
    const int64_t shift = offset % window.kernel[axis] * window.dilation[axis];
    offset /= window.kernel[axis];
    result.shift[axis] = static_cast<int>(shift);
    result.offset += shift * x.spatial_stride[axis];
  }
  return result;
}

template <typename T>
__device__ SumType<T> input_at(const RowSource& source, const T* x, const TileRow& row, const TileNumber& number) {
  if (!row.exists || !number.exists) return number.is_bias ? SumType<T>(1) : SumType<T>(0);
  for (int axis = 0; axis < kSpatialRank; ++axis) {
    const int place = row.corner[axis] + number.shift[axis];
    if (place < 0 || place >= source.extent[axis]) return SumType<T>(0);
  }
  return to_sum_type(x[row.input + number.offset]);
}

// Column c of D holds output channel c / K of direction c % K, so that all directions share what is read.
template <typename Sum>
__device__ Sum direction_at(const DirectionalLayer& layer, int64_t group, int64_t column, int64_t number) {
  if (column >= layer.d_out() * layer.count || number >= layer.d_in()) return Sum(0);
  const int64_t channel = column / layer.count, k = column % layer.count;
  return static_cast<const Sum*>(
      layer.directions)[((k * layer.groups() + group) * layer.d_out() + channel) * layer.d_in() + number];
}

// Adds the products of one group to the thread's 4 x 4.
template <typename T>
__device__ void multiply(const LayerEntry& entry, int64_t group, int64_t first_column, SharedTile<SumType<T>>& shared,
                         SumType<T> (&products)[4][4]) {
  using Sum = SumType<T>;
  const RowSource& source = entry.layer.inputs;
  const T* x = static_cast<const T*>(source.data) + group * source.channels_per_group() * source.channel_stride;
  const bool channels_last = source.channel_stride == 1;  // neighbouring threads read neighbouring memory
  const int row = threadIdx.x / (kColumns / 4) * 4, column = threadIdx.x % (kColumns / 4) * 4;
  const int64_t d_in = entry.layer.d_in();
  for (int64_t first = 0; first < d_in; first += kDepth) {
    __syncthreads();  // the rows are there, and the last numbers are done with
    if (threadIdx.x < kDepth) shared.numbers[threadIdx.x] = tile_number(source, first + threadIdx.x);
    for (int i = threadIdx.x; i < kColumns * kDepth; i += kThreads)
      shared.directions[i % kDepth][i / kDepth] =
          direction_at<Sum>(entry.layer, group, first_column + i / kDepth, first + i % kDepth);
    __syncthreads();
    for (int i = threadIdx.x; i < kRows * kDepth; i += kThreads) {
      const int r = channels_last ? i / kDepth : i % kRows, k = channels_last ? i % kDepth : i / kRows;
      shared.inputs[k][r] = input_at(source, x, shared.rows[r], shared.numbers[k]);
    }
    __syncthreads();
#pragma unroll 2
    for (int k = 0; k < kDepth; ++k)
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) products[i][j] += shared.inputs[k][row + i] * shared.directions[k][column + j];
  }
}

// Meets the thread's products with their gradients: `met` gets what they give.
template <typename G, typename Sum>
__device__ void meet(const LayerEntry& entry, int64_t group, int64_t first_column, const SharedTile<Sum>& shared,
                     const G* grads, const Sum (&products)[4][4], Sum (&met)[4][4]) {
  const RowSource& source = entry.layer.grads;
  const G* g = grads + group * source.channels_per_group() * source.channel_stride;
  const int row = threadIdx.x / (kColumns / 4) * 4, column = threadIdx.x % (kColumns / 4) * 4;
  for (int j = 0; j < 4; ++j) {
    const int64_t c = first_column + column + j;
    if (c >= entry.columns()) break;
    const int64_t channel = c / entry.layer.count * source.channel_stride;
    for (int i = 0; i < 4; ++i) {
      const TileRow& at = shared.rows[row + i];
      if (at.exists) met[i][j] += products[i][j] * to_sum_type(g[at.grad + channel]);
    }
  }
}

template <typename T>
__device__ void run_item(const LayerEntry& entry, int64_t item, unsigned char* workspace,
                         SharedTile<SumType<T>>& shared) {
  using Sum = SumType<T>;
  const DirectionalLayer& layer = entry.layer;
  const int64_t first_row = item % entry.row_tiles * kRows, tile = item / entry.row_tiles;
  const int64_t first_column = tile * kColumns;
  if (threadIdx.x < kRows) shared.rows[threadIdx.x] = tile_row(entry, first_row + threadIdx.x);
  Sum met[4][4] = {};
  for (int64_t group = 0; group < layer.groups(); ++group) {
    Sum products[4][4] = {};
    multiply<T>(entry, group, first_column, shared, products);
    with_type(layer.grads.element_type, layer.grads.data, [&](const auto* grads) {
      if constexpr (std::is_same_v<SumType<ElementOf<decltype(grads)>>, Sum>)
        meet(entry, group, first_column, shared, grads, products, met);
    });
  }
  __syncthreads();  // before what was met overwrites the last numbers
  const int row = threadIdx.x / (kColumns / 4) * 4, column = threadIdx.x % (kColumns / 4) * 4;
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) shared.products[row + i][column + j] = met[i][j];
  __syncthreads();
  double* partial = reinterpret_cast<double*>(workspace + entry.partial) + tile * layer.count * entry.rows;
  const int count = static_cast<int>(layer.count), shift = static_cast<int>(first_column % count);
  for (int i = threadIdx.x; i < kRows * count; i += kThreads) {
    const int r = i % kRows, k = i / kRows;
    if (first_row + r >= entry.rows) continue;
    double sum = 0;
    for (int c = (k - shift + count) % count; c < kColumns; c += count) sum += shared.products[r][c];
    partial[k * entry.rows + first_row + r] = sum;
  }
}

// One kernel for layers summed in float and one for those in double, which needs twice the registers; a call
// with both kinds launches both, and each passes over the blocks of the other.
template <typename Sum>
__global__ void __launch_bounds__(kThreads, sizeof(Sum) == sizeof(double) ? 2 : 3)
    products_kernel(const LayerEntry* layers, int count, unsigned char* workspace) {
  KFAC2_SHARED(SharedTile<Sum>, shared);
  const LayerEntry& entry = layers[entry_of(layers, count, blockIdx.x)];
  with_type(entry.layer.inputs.element_type, entry.layer.inputs.data, [&](const auto* x) {
    using T = ElementOf<decltype(x)>;
    if constexpr (std::is_same_v<SumType<T>, Sum>) run_item<T>(entry, blockIdx.x - entry.first_item, workspace, shared);
  });
}

// A thread adds up one sample's rows, for one direction, over all tiles of columns.
__global__ void __launch_bounds__(kThreads)
    add_kernel(const LayerEntry* layers, int count, const unsigned char* workspace) {
  const LayerEntry& entry = layers[entry_of(count, blockIdx.x, [layers](int i) { return layers[i].first_output; })];
  const DirectionalLayer& layer = entry.layer;
  const int64_t batch = layer.inputs.batch, item = (blockIdx.x - entry.first_output) * kThreads + threadIdx.x;
  if (item >= layer.count * batch) return;
  const int64_t places = entry.rows / batch, k = item / batch, n = item % batch;
  const double* partial = reinterpret_cast<const double*>(workspace + entry.partial) + k * entry.rows + n * places;
  double sum = 0;
  for (int64_t tile = 0; tile < entry.column_tiles(); ++tile)
    for (int64_t place = 0; place < places; ++place) sum += partial[tile * layer.count * entry.rows + place];
  layer.derivatives[item] = sum;
}

class DirectionalDerivatives : public TableLaunch {
 public:
  explicit DirectionalDerivatives(const DirectionalDerivativesParams& params) : count_(static_cast<int>(params.count)) {
    std::vector<LayerEntry> layers;
    for (int64_t i = 0; i < params.count; ++i) {
      LayerEntry entry{items_, outputs_, params.layers[i], scratch_bytes_, 0, 0};
      entry.rows = entry.layer.inputs.batch * entry.layer.inputs.grid_places();
      entry.row_tiles = ceil_div(entry.rows, kRows);
      items_ += entry.row_tiles * entry.column_tiles();
      outputs_ += ceil_div(entry.layer.count * entry.layer.inputs.batch, kThreads);
      const int64_t numbers = entry.column_tiles() * entry.layer.count * entry.rows;
      scratch_bytes_ += ceil_div(numbers * int64_t{sizeof(double)}, 16) * 16;
      (entry.layer.is_double() ? any_double_ : any_float_) = true;
      layers.push_back(entry);
    }
    layers_ = add(layers);
  }

 private:
  cudaError_t start(unsigned char* workspace, cudaStream_t stream) const override {
    cudaError_t status = any_float_ ? form_products<float>(workspace, stream) : cudaSuccess;
    if (status == cudaSuccess && any_double_) status = form_products<double>(workspace, stream);
    if (status != cudaSuccess) return status;
    return launch(add_kernel, dim3(static_cast<unsigned>(outputs_)), dim3(kThreads), 0, stream, at(workspace, layers_),
                  count_, static_cast<const unsigned char*>(scratch(workspace)));
  }

  template <typename Sum>
  cudaError_t form_products(unsigned char* workspace, cudaStream_t stream) const {
    return launch(products_kernel<Sum>, dim3(static_cast<unsigned>(items_)), dim3(kThreads), sizeof(SharedTile<Sum>),
                  stream, at(workspace, layers_), count_, scratch(workspace));
  }

  int count_;
  int64_t items_ = 0, outputs_ = 0;
  bool any_float_ = false, any_double_ = false;
  TableAt<LayerEntry> layers_;
};

}  // namespace

std::unique_ptr<Launch> directional_derivatives(const DirectionalDerivativesParams& params) {
  return std::make_unique<DirectionalDerivatives>(params);
}

}  // namespace kfac2::cuda

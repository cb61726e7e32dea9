// All layers in one launch. A block takes a tile of one source's grid and a few samples: it sums
// the channels of the part of the input that the tile's patches cover into shared memory, then each place of
// the tile adds up its patch there (the sum over a patch of a channel sum; outside the map lie zeros). Where patches
// are single places, the sums of channels are the maps, and nothing waits for them in shared memory.
//
// Floor: every element of every source is read once, in 16-byte loads where its layout allows (bytes = sum of
// N*C*D*H*W*sizeof), and one number for each place is written; about one addition for each element read. Maps
// too large for shared memory are cut into tiles, whose halos of kernel - 1 places are read twice.
#include <algorithm>
#include <vector>

#include "device.h"
#include "layer_map_entry.h"
#include "layer_maps.h"
#include "tables.h"

namespace kfac2::cuda {
namespace {

constexpr int kBlocks = 4;    // that share a multiprocessor
constexpr int kInFlight = 4;  // loads of 16 bytes before a thread waits for the first; of rows, half as many
constexpr unsigned kAllLanes = 0xffffffffu;
// The slices' sums take at most 8 lanes of 4 bytes, or 2 of 8, for each thread.
constexpr int kPartialBytes = kThreads * 8 * static_cast<int>(sizeof(float));

// What a block keeps in shared memory, where it takes no registers.
struct Block {
  MapsEntry entry;
  int64_t first_sample;
  int samples;

  __device__ int places() const { return samples * entry.region.count(); }
};

constexpr int kBlockState = (sizeof(Block) + 15) / 16 * 16;  // bytes in front of the plane

__device__ void copy(const MapsEntry& from, MapsEntry& to) {
  constexpr int kParts = static_cast<int>(sizeof(MapsEntry) / sizeof(uint4));
  static_assert(sizeof(MapsEntry) % sizeof(uint4) == 0 && kParts <= kThreads, "a thread copies 16 bytes");
  if (threadIdx.x < kParts)
    reinterpret_cast<uint4*>(&to)[threadIdx.x] = reinterpret_cast<const uint4*>(&from)[threadIdx.x];
}

// The rest of a block whose entry was copied. Called by all threads, which may read it afterwards.
__device__ void find_tile(Block& block) {
  __syncthreads();
  if (threadIdx.x == 0) {
    MapsEntry& entry = block.entry;
    int item = static_cast<int>(blockIdx.x - entry.first_item);
    if (entry.is_cut) {
      for (int axis = kSpatialRank - 1; axis >= 0; --axis) {
        set_tile(entry.axes[axis], axis, item % entry.axes[axis].tiles, entry.region);
        item /= entry.axes[axis].tiles;
      }
      entry.region.offset = offset_of(entry.axes, entry.region);
    }
    block.first_sample = int64_t{item} * entry.samples;
    block.samples = static_cast<int>(std::min<int64_t>(entry.samples, entry.batch - block.first_sample));
  }
  __syncthreads();
}

// Offset of a place of the region from its first one, numbered sample slowest, W fastest.
__device__ int64_t offset_of(const Block& block, int place) {
  const MapsEntry& entry = block.entry;
  const int *size = block.entry.region.size, count = block.entry.region.count();
  int64_t offset = 0;
  if (block.samples > 1) {
    offset = place / count * entry.batch_stride;
    place %= count;
  }
  if (entry.is_run) return offset + place * entry.axes[2].step;
  const int line = place / size[2];
  return offset + place % size[2] * entry.axes[2].step + line % size[1] * entry.axes[1].step +
         line / size[1] * entry.axes[0].step;
}

template <typename T>
__device__ const T* first_place(const Block& block) {
  return static_cast<const T*>(block.entry.data) + block.first_sample * block.entry.batch_stride +
         block.entry.region.offset;
}

// Channels last: a few lanes of a warp add up the channels of a place, 16 bytes at a time.
template <typename T>
__device__ void sum_rows(const Block& block, SumType<T> bias, SumType<T>* sums) {
  constexpr int kLanes = Vector<T>::kLanes;
  const bool vectors = block.entry.is_vectors;
  const int channels = block.entry.channels, whole = vectors ? channels / kLanes * kLanes : 0;
  int lanes = 1;
  while (lanes < 32 && lanes * (vectors ? kLanes : 1) < channels) lanes *= 2;
  const int lane = threadIdx.x % lanes, step = lanes * kLanes, places = block.places();
  const T* x = first_place<T>(block);
  for (int first = 0; first < places; first += kThreads / lanes) {  // the same for all threads: they meet below
    const int place = first + threadIdx.x / lanes;
    SumType<T> sum = 0;
    if (place < places) {
      const T* row = x + offset_of(block, place);
      for (int c = lane * kLanes; c < whole; c += kInFlight / 2 * step) {
        Vector<T> parts[kInFlight / 2] = {};
#pragma unroll
        for (int i = 0; i < kInFlight / 2; ++i)
          if (c + i * step < whole) parts[i] = load(aligned<const Vector<T>>(row + c + i * step));
#pragma unroll
        for (int i = 0; i < kInFlight / 2; ++i)
          for (int k = 0; k < kLanes; ++k) sum += to_sum_type(parts[i].lane[k]);
      }
#pragma unroll 4
      for (int c = whole + lane; c < channels; c += lanes) sum += to_sum_type(row[c]);
    }
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, distance, lanes);
    }
    if (lane == 0 && place < places) sums[place] = sum + bias;
  }
}

template <typename T>
struct Single {
  T lane[1];
};

template <typename T>
__device__ Single<T> load(const Single<T>* data) {
  return *data;
}

// Channels apart: each thread takes kLanes places next to each other; where there are fewer places than
// threads, the channels are shared among slices of threads, whose sums are added in a fixed order.
template <typename T, int kLanes>
__device__ void sum_planes(const Block& block, SumType<T> bias, SumType<T>* sums, SumType<T>* partial) {
  using Sum = SumType<T>;
  using Part = std::conditional_t<kLanes == 1, Single<T>, Vector<T>>;
  constexpr int kLoads = kLanes == 8 ? kInFlight / 2 : kInFlight;  // 8 sums leave fewer registers
  const MapsEntry& entry = block.entry;
  const int unit_threads = 1 << entry.unit_bits, slices = kThreads >> entry.unit_bits, units = block.places() / kLanes;
  for (int unit = threadIdx.x & (unit_threads - 1); unit < units; unit += unit_threads) {
    const int slice = threadIdx.x >> entry.unit_bits, channels = entry.channels;
    const int64_t step = slices * entry.channel_stride;
    const T* from = first_place<T>(block) + offset_of(block, unit * kLanes) + slice * entry.channel_stride;
    Sum lane_sums[kLanes] = {};
#pragma unroll 1
    for (int c = slice; c < channels; c += kLoads * slices) {
      Part parts[kLoads] = {};
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (c + i * slices < channels) parts[i] = load(aligned<const Part>(from + i * step));
      }
      from += kLoads * step;
#pragma unroll
      for (int i = 0; i < kLoads; ++i)
        for (int k = 0; k < kLanes; ++k) lane_sums[k] += to_sum_type(parts[i].lane[k]);
    }
    Sum* to = (slices == 1 ? sums : partial + slice * units * kLanes) + unit * kLanes;
    for (int k = 0; k < kLanes; ++k) to[k] = slices == 1 ? lane_sums[k] + bias : lane_sums[k];
  }
  if (slices == 1) return;  // the same for all threads of the block
  __syncthreads();
  for (int place = threadIdx.x; place < units * kLanes; place += kThreads) {
    Sum sum = bias;
#pragma unroll 4
    for (int s = 0; s < slices; ++s) sum += partial[s * units * kLanes + place];
    sums[place] = sum;
  }
}

// The sum of channels at each place of the region, and the bias.
template <typename T>
__device__ void sum_channels(const Block& block, SumType<T> bias, SumType<T>* sums, SumType<T>* partial) {
  if (block.entry.is_rows) {
    sum_rows<T>(block, bias, sums);
  } else if (block.entry.is_vectors) {
    sum_planes<T, Vector<T>::kLanes>(block, bias, sums, partial);
  } else {
    sum_planes<T, 1>(block, bias, sums, partial);
  }
}

// The sum over the patch of one place of the tile; of the plane of its sample.
// kSide: of the kernel in H and W, 0 where it is not known before.
template <int kSide, typename Sum>
__device__ Sum patch_sum(const Axis* axes, const Region& region, const Sum* plane, int depth, int line, int column) {
  [[maybe_unused]] constexpr int kUnroll = kSide > 0 ? kSide : 1;
  const int height = kSide > 0 ? kSide : axes[1].kernel, width = kSide > 0 ? kSide : axes[2].kernel;
  const int y_step = axes[1].dilation, x_step = axes[2].dilation, lines = region.size[1], columns = region.size[2];
  const int z_first = region.first[0] + depth * axes[0].stride, y_first = region.first[1] + line * axes[1].stride,
            x_first = region.first[2] + column * axes[2].stride;
  Sum sum = 0;
#pragma unroll 1
  for (int i = 0; i < axes[0].kernel; ++i) {
    const int z = z_first + i * axes[0].dilation;
    if (z < 0 || z >= region.size[0]) continue;
#pragma unroll(kUnroll)
    for (int j = 0; j < height; ++j) {
      const int y = y_first + j * y_step;
      const bool in_map = y >= 0 && y < lines;
      const Sum* at = plane + (z * lines + y) * columns;
#pragma unroll(kUnroll)
      for (int k = 0; k < width; ++k) {
        const int x = x_first + k * x_step;
        if (in_map && x >= 0 && x < columns) sum += at[x];
      }
    }
  }
  return sum;
}

// The places of the tile, of which those at the grid's end may lie outside: so all tiles are divided alike.
template <int kSide, typename Sum>
__device__ void sum_patches(const Block& block, const Sum* plane) {
  const MapsEntry& entry = block.entry;
  const Region& region = entry.region;
  const Axis* axes = entry.axes;
  const int grid_places = axes[0].grid * axes[1].grid * axes[2].grid;
  const int tile_places = axes[0].tile * axes[1].tile * axes[2].tile, region_places = region.count();
  Sum* maps = static_cast<Sum*>(entry.maps) + block.first_sample * grid_places +
              (region.origin[0] * axes[1].grid + region.origin[1]) * axes[2].grid + region.origin[2];
  const int count = block.samples * tile_places;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int sample = entry.by_tile.quotient(i), in_tile = i - sample * tile_places;
    const int z = entry.by_layer.quotient(in_tile), line = entry.by_line.quotient(in_tile);
    const int y = line - z * axes[1].tile, x = in_tile - line * axes[2].tile;
    if (z >= region.places[0] || y >= region.places[1] || x >= region.places[2]) continue;
    const Sum sum = patch_sum<kSide>(axes, region, plane + sample * region_places, z, y, x);
    maps[sample * grid_places + (z * axes[1].grid + y) * axes[2].grid + x] = sum + static_cast<Sum>(entry.bias);
  }
}

template <typename Sum>
__device__ void sum_patches(const Block& block, const unsigned char* plane) {
  if (block.entry.axes[1].kernel == 3 && block.entry.axes[2].kernel == 3) {
    sum_patches<3>(block, reinterpret_cast<const Sum*>(plane));
  } else {
    sum_patches<0>(block, reinterpret_cast<const Sum*>(plane));
  }
}

template <typename T>
__device__ void sum_channels(const Block& block, unsigned char* plane, unsigned char* partial) {
  using Sum = SumType<T>;
  Sum *sums = reinterpret_cast<Sum*>(plane), bias = 0;
  if (block.entry.is_direct) {
    sums = static_cast<Sum*>(block.entry.maps) + block.first_sample * block.entry.axes[2].grid +
           block.entry.region.origin[2];
    bias = static_cast<Sum>(block.entry.bias);
  }
  sum_channels<T>(block, bias, sums, reinterpret_cast<Sum*>(partial));
}

// Few layers come as a parameter: a launch that brings their table takes as long as the sums of 10 MB.
constexpr int kFew = 3840 / static_cast<int>(sizeof(MapsEntry));  // of 4 KB of parameters
struct FewEntries {
  MapsEntry entries[kFew];
};

// Reads `entries`, or where it is null `few`.
__global__ void __launch_bounds__(kThreads, kBlocks)
    layer_maps_kernel(const KFAC2_GRID_CONSTANT FewEntries few, const MapsEntry* entries, int count, int plane_bytes) {
  KFAC2_SHARED(Block, block);
  unsigned char *plane = reinterpret_cast<unsigned char*>(&block) + kBlockState, *partial = plane + plane_bytes;
  if (entries == nullptr) {
    copy(few.entries[entry_of(few.entries, count, blockIdx.x)], block.entry);
  } else {
    copy(entries[entry_of_warp(entries, count, blockIdx.x)], block.entry);
  }
  find_tile(block);
  const ElementType type = block.entry.element_type;
  with_type(type, block.entry.data,
            [&](const auto* x) { sum_channels<ElementOf<decltype(x)>>(block, plane, partial); });
  if (block.entry.is_direct) return;  // the same for all threads of the block
  __syncthreads();
  if (type == ElementType::kFloat64) {
    sum_patches<double>(block, plane);
  } else {
    sum_patches<float>(block, plane);
  }
}

class LayerMaps : public TableLaunch {
 public:
  explicit LayerMaps(const LayerMapsParams& params) : count_(static_cast<int>(params.count)) {
    std::vector<MapsEntry> entries;
    int64_t plane = 16;
    for (int64_t i = 0; i < params.count; ++i) {
      MapsEntry entry = {};
      entry.first_item = blocks_;
      possible_ = possible_ && describe(params.sources[i], params.maps[i], entry);
      if (!possible_) return;
      int64_t blocks = ceil_div(entry.batch, entry.samples);
      for (const Axis& axis : entry.axes) blocks *= axis.tiles;
      blocks_ += blocks;
      const int64_t bytes = entry.samples * region_places(entry.axes) * params.sources[i].sum_bytes();
      if (!entry.is_direct) plane = std::max(plane, bytes);
      entries.push_back(entry);
    }
    plane_bytes_ = static_cast<int>(ceil_div(plane, 16) * 16);
    if (count_ <= kFew) {
      std::copy(entries.begin(), entries.end(), few_.entries);
    } else {
      entries_ = add(entries);
    }
  }

 private:
  cudaError_t start(unsigned char* workspace, cudaStream_t stream) const override {
    const MapsEntry* entries = count_ <= kFew ? nullptr : at(workspace, entries_);
    return launch(layer_maps_kernel, dim3(static_cast<unsigned>(blocks_)), dim3(kThreads),
                  kBlockState + plane_bytes_ + kPartialBytes, stream, few_, entries, count_, plane_bytes_);
  }

  int64_t blocks_ = 0;
  int count_, plane_bytes_ = 0;
  FewEntries few_ = {};  // where there are no more
  TableAt<MapsEntry> entries_;
};

}  // namespace

std::unique_ptr<Launch> layer_maps(const LayerMapsParams& params) { return std::make_unique<LayerMaps>(params); }

}  // namespace kfac2::cuda

// All layers in one launch. A block takes a tile of one source's grid and a few samples: it sums
// the channels of the part of the input that the tile's patches cover into shared memory, then each place of
// the tile adds up its patch there (the sum over a patch of a channel sum; outside the map lie zeros).
//
// Floor: every element of every source is read once, in 16-byte loads where its layout allows (bytes = sum of
// N*C*D*H*W*sizeof), and one number for each place is written; about one addition for each element read. Maps
// too large for shared memory are cut into tiles, whose halos of kernel - 1 places are read twice.
#include <algorithm>
#include <vector>

#include "device.h"
#include "layer_maps.h"
#include "tables.h"

namespace kfac2::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRegionPlaces = kMaxPatchSpan;  // places of the input held in shared memory
constexpr int64_t kBlockElements = 1 << 14;   // elements worth a block; small samples share one
constexpr int64_t kTileElements = 1 << 15;    // of a tile, where a cut costs no halo
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kBlocks = 3;    // that share a multiprocessor
constexpr int kInFlight = 8;  // loads of 16 bytes before a thread waits for the first; of rows, half as many
// The slices' sums take at most 8 lanes of 4 bytes, or 2 of 8, for each thread.
constexpr int kPartialBytes = kThreads * 8 * static_cast<int>(sizeof(float));

struct Entry {
  int64_t first_item;  // its first block
  RowSource source;
  void* maps;  // [N, *grid]
  int grid[kSpatialRank];
  int tile[kSpatialRank];   // places of the grid in a tile
  int tiles[kSpatialRank];  // tiles along each axis
  int samples;              // in a block
};

// The part of the input under one tile, inside the map; [begin, begin + size) along each axis.
struct Region {
  int64_t first_sample;
  int samples;
  int origin[kSpatialRank];  // of the tile, in the grid
  int places[kSpatialRank];  // of the tile
  int begin[kSpatialRank];
  int size[kSpatialRank];

  KFAC2_HOST_DEVICE int count() const { return samples * size[0] * size[1] * size[2]; }
};

int64_t region_places(const RowSource& source, const int* tile) {
  int64_t places = 1;
  for (int axis = 0; axis < kSpatialRank; ++axis) {
    const Window& window = source.window;
    const int64_t span = (tile[axis] - 1) * window.stride[axis] + window.dilation[axis] * (window.kernel[axis] - 1) + 1;
    places *= std::min(span, source.extent[axis]);
  }
  return places;
}

// Places of the input in a tile, at most. Where patches are single places and channels lie next to each other, as those
// of tokens do, a cut costs nothing, and few samples of many channels would else be few blocks: GPT-2's maps took 20
// times as long as their bytes on an H100.
int64_t most_places(const RowSource& source) {
  const bool cut_is_free = source.window.offsets() == 1 && source.channel_stride == 1 && source.channels > 1;
  return cut_is_free ? std::clamp<int64_t>(kTileElements / source.channels, 1, kRegionPlaces) : kRegionPlaces;
}

// Halves the longest axis of the tile until its region fits; false if a single patch is too large.
bool choose_tile(Entry& entry) {
  for (int axis = 0; axis < kSpatialRank; ++axis) entry.tile[axis] = entry.grid[axis];
  while (region_places(entry.source, entry.tile) > most_places(entry.source)) {
    int* longest = std::max_element(entry.tile, entry.tile + kSpatialRank);
    if (*longest == 1) return false;
    *longest = (*longest + 1) / 2;
  }
  const int64_t places = std::max<int64_t>(1, region_places(entry.source, entry.tile));
  const int64_t elements = std::max<int64_t>(1, places * entry.source.channels);
  entry.samples = static_cast<int>(
      std::max<int64_t>(1, std::min({kBlockElements / elements, kRegionPlaces / places, entry.source.batch})));
  return true;
}

__device__ Region region_of(const Entry& entry, int item) {
  Region region;
  const Window& window = entry.source.window;
  for (int axis = kSpatialRank - 1; axis >= 0; --axis) {
    const int tile = item % entry.tiles[axis];
    item /= entry.tiles[axis];
    region.origin[axis] = tile * entry.tile[axis];
    region.places[axis] = std::min(entry.tile[axis], entry.grid[axis] - region.origin[axis]);
    const int64_t begin = region.origin[axis] * window.stride[axis] - window.pad_low[axis];
    const int64_t span =
        (region.places[axis] - 1) * window.stride[axis] + window.dilation[axis] * (window.kernel[axis] - 1) + 1;
    const int64_t end = std::min(begin + span, entry.source.extent[axis]);
    region.begin[axis] = static_cast<int>(std::max<int64_t>(0, begin));
    region.size[axis] = static_cast<int>(std::max<int64_t>(0, end - region.begin[axis]));
  }
  region.first_sample = int64_t{item} * entry.samples;
  region.samples = static_cast<int>(std::min<int64_t>(entry.samples, entry.source.batch - region.first_sample));
  return region;
}

// Offset in x of a place of the region, numbered sample slowest, W fastest.
__device__ int64_t offset_of(const RowSource& source, const Region& region, int place) {
  int64_t offset = 0;
  for (int axis = kSpatialRank - 1; axis >= 0; --axis) {
    offset += (region.begin[axis] + place % region.size[axis]) * source.spatial_stride[axis];
    place /= region.size[axis];
  }
  return offset + (region.first_sample + place) * source.batch_stride;
}

template <typename T>
__device__ bool starts_aligned(const RowSource& source) {
  return reinterpret_cast<uintptr_t>(source.data) % 16 == 0 && source.batch_stride % Vector<T>::kLanes == 0;
}

// Channels last: a few lanes of a warp add up the channels of a place, 16 bytes at a time.
template <typename T>
__device__ void sum_rows(const RowSource& source, const Region& region, SumType<T>* plane) {
  constexpr int kLanes = Vector<T>::kLanes;
  bool vectors = starts_aligned<T>(source);
  for (int axis = 0; axis < kSpatialRank; ++axis) vectors = vectors && source.spatial_stride[axis] % kLanes == 0;
  const int channels = static_cast<int>(source.channels), whole = vectors ? channels / kLanes * kLanes : 0;
  int lanes = 1;
  while (lanes < 32 && lanes * (vectors ? kLanes : 1) < channels) lanes *= 2;
  const int lane = threadIdx.x % lanes, step = lanes * kLanes, places = region.count();
  const T* x = static_cast<const T*>(source.data);
  for (int first = 0; first < places; first += kThreads / lanes) {  // the same for all threads: they meet below
    const int place = first + threadIdx.x / lanes;
    SumType<T> sum = 0;
    if (place < places) {
      const T* row = x + offset_of(source, region, place);
      for (int c = lane * kLanes; c < whole; c += kInFlight / 2 * step) {
        Vector<T> parts[kInFlight / 2] = {};
#pragma unroll
        for (int i = 0; i < kInFlight / 2; ++i)
          if (c + i * step < whole) parts[i] = *aligned<const Vector<T>>(row + c + i * step);
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
    if (lane == 0 && place < places) plane[place] = sum;
  }
}

template <typename T>
struct Single {
  T lane[1];
};

// Channels apart: each thread takes kLanes places next to each other; where there are fewer places than
// threads, the channels are shared among slices of threads, whose sums are added in a fixed order.
template <typename T, int kLanes>
__device__ void sum_planes(const RowSource& source, const Region& region, SumType<T>* plane, SumType<T>* partial) {
  using Sum = SumType<T>;
  using Part = std::conditional_t<kLanes == 1, Single<T>, Vector<T>>;
  const int units = region.count() / kLanes, channels = static_cast<int>(source.channels);
  int unit_threads = 1;
  while (unit_threads < kThreads && unit_threads < units) unit_threads *= 2;
  const int slices = kThreads / unit_threads, slice = threadIdx.x / unit_threads;
  const T* x = static_cast<const T*>(source.data);
  for (int unit = threadIdx.x % unit_threads; unit < units; unit += unit_threads) {
    const T* place = x + offset_of(source, region, unit * kLanes);
    Sum sums[kLanes] = {};
    for (int first = slice; first < channels; first += kInFlight * slices) {
      Part parts[kInFlight] = {};
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int c = first + i * slices;
        if (c < channels) parts[i] = *aligned<const Part>(place + c * source.channel_stride);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i)
        for (int k = 0; k < kLanes; ++k) sums[k] += to_sum_type(parts[i].lane[k]);
    }
    Sum* to = (slices == 1 ? plane : partial + slice * units * kLanes) + unit * kLanes;
    for (int k = 0; k < kLanes; ++k) to[k] = sums[k];
  }
  if (slices == 1) return;  // the same for all threads of the block
  __syncthreads();
  for (int place = threadIdx.x; place < units * kLanes; place += kThreads) {
    Sum sum = 0;
    for (int s = 0; s < slices; ++s) sum += partial[s * units * kLanes + place];
    plane[place] = sum;
  }
}

template <typename T>
__device__ void sum_channels(const RowSource& source, const Region& region, SumType<T>* plane, SumType<T>* partial) {
  constexpr int kLanes = Vector<T>::kLanes;
  if (source.channel_stride == 1 && source.channels > 1) {
    sum_rows<T>(source, region, plane);
    return;
  }
  bool vectors = starts_aligned<T>(source) && source.spatial_stride[2] == 1 && region.size[2] % kLanes == 0 &&
                 region.begin[2] % kLanes == 0 && source.channel_stride % kLanes == 0;
  for (int axis = 0; axis < 2; ++axis) vectors = vectors && source.spatial_stride[axis] % kLanes == 0;
  if (vectors) {
    sum_planes<T, kLanes>(source, region, plane, partial);
  } else {
    sum_planes<T, 1>(source, region, plane, partial);
  }
}

// How the places of a tile read its region: in registers, since a compiler cannot know that maps are no table.
struct Patches {
  int first[kSpatialRank];  // of the first place's patch, in the region; may lie outside
  int kernel[kSpatialRank], stride[kSpatialRank], dilation[kSpatialRank], size[kSpatialRank];
};

__device__ Patches patches_of(const Window& window, const Region& region) {
  Patches patches;
  for (int axis = 0; axis < kSpatialRank; ++axis) {
    const int64_t begin = region.origin[axis] * window.stride[axis] - window.pad_low[axis];
    patches.first[axis] = static_cast<int>(begin - region.begin[axis]);
    patches.kernel[axis] = static_cast<int>(window.kernel[axis]);
    patches.stride[axis] = static_cast<int>(window.stride[axis]);
    patches.dilation[axis] = static_cast<int>(window.dilation[axis]);
    patches.size[axis] = region.size[axis];
  }
  return patches;
}

// The sum over the patch of one place of the tile.
template <typename Sum>
__device__ Sum patch_sum(const Patches& patches, const Sum* plane, int sample, const int* place) {
  const int *kernel = patches.kernel, *dilation = patches.dilation, *size = patches.size;
  int first[kSpatialRank];
  for (int axis = 0; axis < kSpatialRank; ++axis)
    first[axis] = patches.first[axis] + place[axis] * patches.stride[axis];
  Sum sum = 0;
  for (int i = 0; i < kernel[0]; ++i) {
    const int z = first[0] + i * dilation[0];
    if (z < 0 || z >= size[0]) continue;
    for (int j = 0; j < kernel[1]; ++j) {
      const int y = first[1] + j * dilation[1];
      if (y < 0 || y >= size[1]) continue;
      const Sum* line = plane + ((sample * size[0] + z) * size[1] + y) * size[2];
      for (int k = 0; k < kernel[2]; ++k) {
        const int x = first[2] + k * dilation[2];
        if (x >= 0 && x < size[2]) sum += line[x];
      }
    }
  }
  return sum;
}

template <typename T>
__device__ void tile_maps(const Entry& entry, const Region& region, unsigned char* shared, int plane_bytes) {
  using Sum = SumType<T>;
  Sum* plane = reinterpret_cast<Sum*>(shared);
  sum_channels<T>(entry.source, region, plane, reinterpret_cast<Sum*>(shared + plane_bytes));
  const Patches patches = patches_of(entry.source.window, region);
  const Sum bias = static_cast<Sum>(entry.source.window.bias);
  Sum* maps = static_cast<Sum*>(entry.maps);
  const int grid[kSpatialRank] = {entry.grid[0], entry.grid[1], entry.grid[2]};
  const int places = region.places[0] * region.places[1] * region.places[2];
  __syncthreads();
  for (int i = threadIdx.x; i < region.samples * places; i += kThreads) {
    const int sample = i / places;
    const int place[kSpatialRank] = {i % places / (region.places[1] * region.places[2]),
                                     i / region.places[2] % region.places[1], i % region.places[2]};
    int64_t index = region.first_sample + sample;
    for (int axis = 0; axis < kSpatialRank; ++axis) index = index * grid[axis] + region.origin[axis] + place[axis];
    maps[index] = patch_sum(patches, plane, sample, place) + bias;
  }
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    layer_maps_kernel(const Entry* entries, int count, int plane_bytes) {
  KFAC2_SHARED(unsigned char, shared);
  const Entry& entry = entries[entry_of_warp(entries, count, blockIdx.x)];
  const Region region = region_of(entry, static_cast<int>(blockIdx.x - entry.first_item));
  with_type(entry.source.element_type, entry.source.data,
            [&](const auto* x) { tile_maps<ElementOf<decltype(x)>>(entry, region, &shared, plane_bytes); });
}

class LayerMaps : public TableLaunch {
 public:
  explicit LayerMaps(const LayerMapsParams& params) {
    int64_t plane = 16;
    std::vector<Entry> entries;
    for (int64_t i = 0; i < params.count; ++i) {
      Entry entry{blocks_, params.sources[i], params.maps[i], {}, {}, {}, 1};
      for (int axis = 0; axis < kSpatialRank; ++axis) entry.grid[axis] = static_cast<int>(entry.source.grid(axis));
      possible_ = possible_ && choose_tile(entry);
      if (!possible_) return;
      int64_t tiles = 1;
      for (int axis = 0; axis < kSpatialRank; ++axis) {
        entry.tiles[axis] = static_cast<int>(ceil_div(entry.grid[axis], entry.tile[axis]));
        tiles *= entry.tiles[axis];
      }
      blocks_ += tiles * ceil_div(entry.source.batch, entry.samples);
      plane = std::max(plane, entry.samples * region_places(entry.source, entry.tile) * entry.source.sum_bytes());
      entries.push_back(entry);
    }
    plane_bytes_ = static_cast<int>(ceil_div(plane, 16) * 16);
    count_ = static_cast<int>(params.count);
    entries_ = add(entries);
  }

 private:
  cudaError_t start(unsigned char* workspace, cudaStream_t stream) const override {
    return launch(layer_maps_kernel, dim3(static_cast<unsigned>(blocks_)), dim3(kThreads), plane_bytes_ + kPartialBytes,
                  stream, at(workspace, entries_), count_, plane_bytes_);
  }

  int64_t blocks_ = 0;
  int count_ = 0, plane_bytes_ = 0;
  TableAt<Entry> entries_;
};

}  // namespace

std::unique_ptr<Launch> layer_maps(const LayerMapsParams& params) { return std::make_unique<LayerMaps>(params); }

}  // namespace kfac2::cuda

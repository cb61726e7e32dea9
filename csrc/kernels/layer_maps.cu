// All layers in one launch. A block takes a tile of one source's grid and a few samples: it sums
// the channels of the part of the input that the tile's patches cover into shared memory, then each place of
// the tile adds up its patch there (the sum over a patch of a channel sum; outside the map lie zeros). Where patches
// are single places, the sums of channels are the maps, and nothing waits for them in shared memory.
//
// Floor: every element of every source is read once, in 16-byte loads where its layout allows (bytes = sum of
// N*C*D*H*W*sizeof), and one number for each place is written; about one addition for each element read. Maps
// too large for shared memory are cut into tiles, whose halos of kernel - 1 places are read twice.
//
// A block is a few microseconds, most of which memory must be busy for it: what can be known before the launch, the
// host finds (Entry), so that a block has few instructions before its loads and after them.
#include <algorithm>
#include <limits>
#include <vector>

#include "device.h"
#include "layer_maps.h"
#include "tables.h"

namespace kfac2::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 4;    // that share a multiprocessor
constexpr int kInFlight = 4;  // loads of 16 bytes before a thread waits for the first; of rows, half as many
constexpr int kRegionPlaces = kMaxPatchSpan;    // places of the input held in shared memory
constexpr int kTilePlaces = 4 * kRegionPlaces;  // of the grid in a block; more only where padding exceeds the map
constexpr int64_t kBlockBytes = 1 << 16;        // worth a block; small samples share one
constexpr int64_t kRowElements = 1 << 15;       // of a tile of rows
constexpr int64_t kRunBytes = 256;              // that a tile reads of each channel, at least, where channels are apart
constexpr unsigned kAllLanes = 0xffffffffu;
// The slices' sums take at most 8 lanes of 4 bytes, or 2 of 8, for each thread.
constexpr int kPartialBytes = kThreads * 8 * static_cast<int>(sizeof(float));

// Divides numbers below kTilePlaces, which has 14 bits: with 2^31 / divisor, rounded up, the quotient is exact.
struct Divisor {
  uint32_t factor;

  static Divisor of(int divisor) { return {static_cast<uint32_t>((int64_t{1} << 31) / divisor + 1)}; }
  __device__ int quotient(int number) const {
    return static_cast<int>(uint64_t{static_cast<uint32_t>(number)} * factor >> 31);
  }
};

struct Axis {
  int64_t step;  // from a place of the input to the next, in elements
  int extent;
  int grid;
  int kernel, stride, dilation, pad_low;
  int tile;   // places of the grid in a tile
  int tiles;  // along this axis
};

// The part of one sample under one tile, inside the map.
struct Region {
  int64_t offset;            // of its first place, in elements
  int origin[kSpatialRank];  // of the tile, in the grid
  int places[kSpatialRank];  // of the tile, inside the grid
  int size[kSpatialRank];
  int first[kSpatialRank];  // of the first place's patch, in the region; may lie outside

  KFAC2_HOST_DEVICE int count() const { return size[0] * size[1] * size[2]; }
};

struct alignas(16) Entry {
  int64_t first_item;  // its first block
  const void* data;
  void* maps;  // [N, *grid]
  int64_t batch, batch_stride, channel_stride;
  Axis axes[kSpatialRank];
  Region region;  // of the first tile; in a block, of its own
  ElementType element_type;
  int channels, bias;
  int samples;    // in a block; 1 where tiles are cut
  int unit_bits;  // planes: 2^unit_bits threads share the places of a channel, where the loads' width counts as one
  Divisor by_tile, by_layer, by_line;  // places of a tile, of one depth of it, of one line
  bool is_rows;                        // channels lie next to each other
  bool is_vectors;                     // moved 16 bytes at a time
  bool is_run;                         // the region's places are as far from each other as those along W
  bool is_direct;                      // places of the input are places of the map, along W alone
  bool is_cut;
};

// What a block keeps in shared memory, where it takes no registers.
struct Block {
  Entry entry;
  int64_t first_sample;
  int samples;

  __device__ int places() const { return samples * entry.region.count(); }
};

constexpr int kBlockState = (sizeof(Block) + 15) / 16 * 16;  // bytes in front of the plane

// Where the region of a tile lies along an axis.
KFAC2_HOST_DEVICE void set_tile(const Axis& along, int axis, int tile, Region& region) {
  region.origin[axis] = tile * along.tile;
  region.places[axis] = std::min(along.tile, along.grid - region.origin[axis]);
  const int begin = region.origin[axis] * along.stride - along.pad_low;
  const int span = (region.places[axis] - 1) * along.stride + along.dilation * (along.kernel - 1) + 1;
  const int inside = std::max(0, begin);
  region.size[axis] = std::max(0, std::min(begin + span, along.extent) - inside);
  region.first[axis] = begin - inside;
}

KFAC2_HOST_DEVICE int64_t offset_of(const Axis* axes, const Region& region) {
  int64_t offset = 0;
  for (int axis = 0; axis < kSpatialRank; ++axis) {
    const int begin = region.origin[axis] * axes[axis].stride - axes[axis].pad_low - region.first[axis];
    offset += begin * axes[axis].step;
  }
  return offset;
}

// -- what the host finds --------------------------------------------------------------------------------------

// False if there is too much for 32 bits along an axis, padding counted.
bool set_axes(const RowSource& source, Entry& entry) {
  const Window& window = source.window;
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  int64_t places = 1, grid_places = 1;
  for (int axis = 0; axis < kSpatialRank; ++axis) {
    const int64_t extent = source.extent[axis], grid = source.grid(axis);
    places *= extent + window.pad_low[axis] + window.pad_high[axis];
    grid_places *= grid;
    if (places > kMost || grid_places > kMost || source.channels > kMost) return false;
    const int64_t stride = grid == 1 ? 1 : window.stride[axis];  // where nothing is strided it may be any number
    entry.axes[axis] = {source.spatial_stride[axis],
                        static_cast<int>(extent),
                        static_cast<int>(grid),
                        static_cast<int>(window.kernel[axis]),
                        static_cast<int>(stride),
                        window.kernel[axis] == 1 ? 1 : static_cast<int>(window.dilation[axis]),
                        static_cast<int>(window.pad_low[axis]),
                        static_cast<int>(grid),
                        1};
  }
  return true;
}

// Single places without padding are read where they are, and no others.
bool is_single(const Axis& axis) { return axis.kernel == 1 && axis.stride == 1 && axis.grid == axis.extent; }

void skip_places_between(Axis& axis) {
  if (axis.kernel != 1 || axis.pad_low != 0 || int64_t{axis.grid - 1} * axis.stride >= axis.extent) return;
  axis.step *= axis.stride;
  axis.stride = 1;
  axis.extent = axis.grid;
}

// Takes an axis into the next one if it only repeats it.
void merge(Axis& outer, Axis& inner) {
  if (!is_single(outer) || !is_single(inner)) return;
  if (outer.extent != 1 && inner.extent != 1 && outer.step != inner.step * inner.extent) return;
  if (inner.extent == 1) inner.step = outer.step;
  inner.extent *= outer.extent;
  inner.grid = inner.tile = inner.extent;
  outer.extent = outer.grid = outer.tile = 1;
}

// Places of the largest region of a tile, whichever tile it is.
int64_t region_places(const Axis* axes) {
  int64_t places = 1;
  for (int axis = 0; axis < kSpatialRank; ++axis) {
    const Axis& along = axes[axis];
    const int64_t span = int64_t{along.tile - 1} * along.stride + along.dilation * (along.kernel - 1) + 1;
    places *= std::min<int64_t>(span, along.extent);
  }
  return places;
}

int64_t tile_places(const Axis* axes) { return int64_t{axes[0].tile} * axes[1].tile * axes[2].tile; }

// Halves the longest axis of the tile until its region fits; false if a single patch is too large.
bool cut_to_fit(Axis* axes) {
  while (region_places(axes) > kRegionPlaces || tile_places(axes) > kTilePlaces) {
    Axis* longest =
        std::max_element(axes, axes + kSpatialRank, [](const Axis& a, const Axis& b) { return a.tile < b.tile; });
    if (longest->tile == 1) return false;
    longest->tile = (longest->tile + 1) / 2;
  }
  return true;
}

// Where patches are single places a cut costs nothing, and few samples of many channels would else be few blocks:
// GPT-2's maps took 20 times as long as their bytes on an H100, maps of 64 channels and 64x64 places 1.5 times.
void cut_evenly(Entry& entry, int64_t element) {
  Axis& axis = entry.axes[2];
  const int64_t channels = std::max(1, entry.channels);
  const int64_t most =
      entry.is_rows ? kRowElements / channels : std::max(kRunBytes / element, kBlockBytes / (element * channels));
  const int64_t tile = ceil_div(axis.extent, ceil_div(axis.extent, std::clamp<int64_t>(most, 1, kRegionPlaces)));
  // Planes: tiles begin where 16 bytes do, for all types.
  if (tile < axis.extent) axis.tile = static_cast<int>(entry.is_rows ? tile : ceil_div(tile, 8) * 8);
}

// Whether what a thread reads at once begins at a multiple of 16 bytes and lies within a channel, or a row.
bool is_aligned(const Entry& entry, int64_t element) {
  const int64_t lanes = 16 / element;
  const auto whole = [lanes](int64_t number) { return number % lanes == 0; };
  const Region& region = entry.region;
  if (reinterpret_cast<uintptr_t>(entry.data) % 16 != 0 || !whole(entry.batch_stride)) return false;
  bool aligned = true;
  for (int axis = 0; axis < (entry.is_rows ? kSpatialRank : kSpatialRank - 1); ++axis)
    aligned = aligned && (entry.axes[axis].extent == 1 || whole(entry.axes[axis].step));
  if (entry.is_rows) return aligned;
  const Axis& line = entry.axes[2];
  if (line.step != 1 || !whole(entry.channel_stride)) return false;
  if (entry.is_run && !entry.is_cut) return whole(region.offset) && whole(region.count());
  // The first tile's region is that of all tiles along an axis that is not cut.
  return aligned && whole(region.offset) &&
         (line.tiles == 1 ? whole(region.size[2]) : entry.is_direct && whole(line.tile) && whole(line.extent));
}

// Everything but `first_item`; false if this cannot be done.
bool describe(const RowSource& source, void* maps, Entry& entry) {
  entry.data = source.data;
  entry.maps = maps;
  entry.batch = source.batch;
  entry.batch_stride = source.batch_stride;
  entry.channel_stride = source.channel_stride;
  entry.element_type = source.element_type;
  entry.bias = static_cast<int>(source.window.bias);
  if (!set_axes(source, entry)) return false;
  entry.channels = static_cast<int>(source.channels);
  entry.is_rows = source.channel_stride == 1 && source.channels > 1;
  Axis* axes = entry.axes;
  for (int axis = 0; axis < kSpatialRank; ++axis) skip_places_between(axes[axis]);
  for (int axis = 0; axis + 1 < kSpatialRank; ++axis) merge(axes[axis], axes[axis + 1]);
  entry.is_direct =
      is_single(axes[0]) && is_single(axes[1]) && is_single(axes[2]) && axes[0].extent == 1 && axes[1].extent == 1;
  const int64_t element = element_bytes(source.element_type);
  if (entry.is_direct) cut_evenly(entry, element);
  if (!entry.is_direct && !cut_to_fit(axes)) return false;

  for (int axis = 0; axis < kSpatialRank; ++axis) {
    axes[axis].tiles = static_cast<int>(ceil_div(axes[axis].grid, axes[axis].tile));
    entry.is_cut = entry.is_cut || axes[axis].tiles > 1;
    set_tile(axes[axis], axis, 0, entry.region);
  }
  const Region& region = entry.region;
  entry.region.offset = offset_of(axes, region);
  const bool lines_follow = axes[2].tiles == 1 && region.size[2] == axes[2].extent &&
                            (axes[1].extent == 1 || axes[1].step == axes[2].step * axes[2].extent);
  const bool depths_follow = axes[0].extent == 1 || (axes[1].tiles == 1 && region.size[1] == axes[1].extent &&
                                                     axes[0].step == axes[1].step * axes[1].extent);
  entry.is_run = entry.is_direct || (lines_follow && depths_follow);
  entry.is_vectors = is_aligned(entry, element);
  const int64_t places = std::max<int64_t>(1, region_places(axes)), tile = tile_places(axes);
  const int64_t bytes = places * std::max(1, entry.channels) * element;
  const int64_t samples = std::min({kBlockBytes / bytes, kRegionPlaces / places, kTilePlaces / tile, source.batch});
  entry.samples = entry.is_cut ? 1 : static_cast<int>(std::max<int64_t>(1, samples));
  const int64_t units = entry.samples * places / (entry.is_vectors ? 16 / element : 1);
  while ((1 << entry.unit_bits) < kThreads && (1 << entry.unit_bits) < units) ++entry.unit_bits;
  entry.by_tile = Divisor::of(static_cast<int>(tile));
  entry.by_layer = Divisor::of(axes[1].tile * axes[2].tile);
  entry.by_line = Divisor::of(axes[2].tile);
  return true;
}

// -- what a block does ----------------------------------------------------------------------------------------

__device__ void copy(const Entry& from, Entry& to) {
  constexpr int kParts = static_cast<int>(sizeof(Entry) / sizeof(uint4));
  static_assert(sizeof(Entry) % sizeof(uint4) == 0 && kParts <= kThreads, "a thread copies 16 bytes");
  if (threadIdx.x < kParts)
    reinterpret_cast<uint4*>(&to)[threadIdx.x] = reinterpret_cast<const uint4*>(&from)[threadIdx.x];
}

// The rest of a block whose entry was copied. Called by all threads, which may read it afterwards.
__device__ void find_tile(Block& block) {
  __syncthreads();
  if (threadIdx.x == 0) {
    Entry& entry = block.entry;
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
  const Entry& entry = block.entry;
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
  const Entry& entry = block.entry;
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
  const Entry& entry = block.entry;
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
constexpr int kFew = 3840 / static_cast<int>(sizeof(Entry));  // of 4 KB of parameters
struct FewEntries {
  Entry entries[kFew];
};

// Reads `entries`, or where it is null `few`.
__global__ void __launch_bounds__(kThreads, kBlocks)
    layer_maps_kernel(const KFAC2_GRID_CONSTANT FewEntries few, const Entry* entries, int count, int plane_bytes) {
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
    std::vector<Entry> entries;
    int64_t plane = 16;
    for (int64_t i = 0; i < params.count; ++i) {
      Entry entry = {};
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
    const Entry* entries = count_ <= kFew ? nullptr : at(workspace, entries_);
    return launch(layer_maps_kernel, dim3(static_cast<unsigned>(blocks_)), dim3(kThreads),
                  kBlockState + plane_bytes_ + kPartialBytes, stream, few_, entries, count_, plane_bytes_);
  }

  int64_t blocks_ = 0;
  int count_, plane_bytes_ = 0;
  FewEntries few_ = {};  // where there are no more
  TableAt<Entry> entries_;
};

}  // namespace

std::unique_ptr<Launch> layer_maps(const LayerMapsParams& params) { return std::make_unique<LayerMaps>(params); }

}  // namespace kfac2::cuda

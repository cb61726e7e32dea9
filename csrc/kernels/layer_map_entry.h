// What a block of layer_maps.cu knows of a layer, and how the host finds it. A block is a few microseconds, most of
// which memory must be busy for it: what can be known before the launch is known here, so that it has few instructions
// before its loads and after them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "compat.h"
#include "integers.h"
#include "layer_maps.h"
#include "window.h"

namespace kfac2::cuda {

constexpr int kThreads = 256;
constexpr int kRegionPlaces = kMaxPatchSpan;    // places of the input held in shared memory
constexpr int kTilePlaces = 4 * kRegionPlaces;  // of the grid in a block; more only where padding exceeds the map
constexpr int64_t kBlockBytes = 1 << 16;        // worth a block; small samples share one
constexpr int64_t kRowElements = 1 << 15;       // of a tile of rows
constexpr int64_t kRunBytes = 256;              // that a tile reads of each channel, at least, where channels are apart

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

struct alignas(16) MapsEntry {
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

// Where the region of a tile lies along an axis.
KFAC2_HOST_DEVICE inline void set_tile(const Axis& along, int axis, int tile, Region& region) {
  region.origin[axis] = tile * along.tile;
  region.places[axis] = std::min(along.tile, along.grid - region.origin[axis]);
  const int begin = region.origin[axis] * along.stride - along.pad_low;
  const int span = (region.places[axis] - 1) * along.stride + along.dilation * (along.kernel - 1) + 1;
  const int inside = std::max(0, begin);
  region.size[axis] = std::max(0, std::min(begin + span, along.extent) - inside);
  region.first[axis] = begin - inside;
}

KFAC2_HOST_DEVICE inline int64_t offset_of(const Axis* axes, const Region& region) {
  int64_t offset = 0;
  for (int axis = 0; axis < kSpatialRank; ++axis) {
    const int begin = region.origin[axis] * axes[axis].stride - axes[axis].pad_low - region.first[axis];
    offset += begin * axes[axis].step;
  }
  return offset;
}

// -- what the host finds --------------------------------------------------------------------------------------

// False if there is too much for 32 bits along an axis, padding counted.
inline bool set_axes(const RowSource& source, MapsEntry& entry) {
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
inline bool is_single(const Axis& axis) { return axis.kernel == 1 && axis.stride == 1 && axis.grid == axis.extent; }

inline void skip_places_between(Axis& axis) {
  if (axis.kernel != 1 || axis.pad_low != 0 || int64_t{axis.grid - 1} * axis.stride >= axis.extent) return;
  axis.step *= axis.stride;
  axis.stride = 1;
  axis.extent = axis.grid;
}

// Takes an axis into the next one if it only repeats it.
inline void merge(Axis& outer, Axis& inner) {
  if (!is_single(outer) || !is_single(inner)) return;
  if (outer.extent != 1 && inner.extent != 1 && outer.step != inner.step * inner.extent) return;
  if (inner.extent == 1) inner.step = outer.step;
  inner.extent *= outer.extent;
  inner.grid = inner.tile = inner.extent;
  outer.extent = outer.grid = outer.tile = 1;
}

// Places of the largest region of a tile, whichever tile it is.
inline int64_t region_places(const Axis* axes) {
  int64_t places = 1;
  for (int axis = 0; axis < kSpatialRank; ++axis) {
    const Axis& along = axes[axis];
    const int64_t span = int64_t{along.tile - 1} * along.stride + along.dilation * (along.kernel - 1) + 1;
    places *= std::min<int64_t>(span, along.extent);
  }
  return places;
}

inline int64_t tile_places(const Axis* axes) { return int64_t{axes[0].tile} * axes[1].tile * axes[2].tile; }

// Halves the longest axis of the tile until its region fits; false if a single patch is too large.
inline bool cut_to_fit(Axis* axes) {
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
inline void cut_evenly(MapsEntry& entry, int64_t element) {
  Axis& axis = entry.axes[2];
  const int64_t channels = std::max(1, entry.channels);
  const int64_t most =
      entry.is_rows ? kRowElements / channels : std::max(kRunBytes / element, kBlockBytes / (element * channels));
  const int64_t tile = ceil_div(axis.extent, ceil_div(axis.extent, std::clamp<int64_t>(most, 1, kRegionPlaces)));
  // Planes: tiles begin where 16 bytes do, for all types.
  if (tile < axis.extent) axis.tile = static_cast<int>(entry.is_rows ? tile : ceil_div(tile, 8) * 8);
}

// Whether what a thread reads at once begins at a multiple of 16 bytes and lies within a channel, or a row.
inline bool is_aligned(const MapsEntry& entry, int64_t element) {
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
inline bool describe(const RowSource& source, void* maps, MapsEntry& entry) {
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

}  // namespace kfac2::cuda

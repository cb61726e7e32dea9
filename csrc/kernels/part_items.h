// Gradients cut into items: as many elements as one thread block takes.
#pragma once

#include <cstdint>
#include <vector>

#include "device.h"
#include "gradient_part.h"
#include "tables.h"

namespace kfac2::cuda {

constexpr int kPartThreads = 256;
constexpr int64_t kItemElements = 4096;
constexpr int kTogether = 4;  // elements that a thread moves at once, where they lie as they are wanted
constexpr int kAtOnce = 4;    // of these loads so many are on their way before the first is waited for

// Elements side by side, moved in 16 bytes, or in 8 of a half type.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Numbers {
  T lane[kCount];
};

struct PartEntry {
  GradientPart part;
  int first_item;
  bool together;  // kTogether elements at once, in the gradient and in its matrix
};

// Its rows as one where nothing lies between them.
inline GradientPart with_rows_joined(GradientPart part) {
  const bool joins = part.columns_contiguous() && part.row_stride == part.columns &&
                     (!part.belongs() || part.row_length == part.columns);
  if (!joins || part.rows == 0) return part;
  part.columns = part.extent[kColumnAxes - 1] = part.row_stride = part.row_length = part.elements();
  part.rows = 1;
  return part;
}

// Whether each row begins where Numbers may, and none ends among some of them; the end of the only row may.
inline bool moves_together(const GradientPart& part, const void* matrices) {
  const auto is_aligned = [](const void* data, int64_t element) {
    return reinterpret_cast<uintptr_t>(data) % std::min<int64_t>(kTogether * element, 16) == 0;
  };
  const int64_t rows_apart =
      part.rows == 1 ? 0 : part.columns | part.row_stride | (part.belongs() ? part.row_length : 0);
  return part.columns_contiguous() && is_aligned(part.data, element_bytes(part.element_type)) &&
         rows_apart % kTogether == 0 &&
         (!part.belongs() || (part.offset % kTogether == 0 && is_aligned(matrices, sizeof(float))));
}

// A launch with one block for each item of all parts. Parts without elements have no item.
class PartLaunch : public TableLaunch {
 protected:
  PartLaunch(const GradientPart* parts, int64_t count, const void* matrices) : count_(static_cast<int>(count)) {
    std::vector<PartEntry> entries;
    for (int64_t i = 0; i < count; ++i) {
      const GradientPart part = with_rows_joined(parts[i]);
      entries.push_back({part, items_, moves_together(part, matrices)});
      items_ += static_cast<int>(ceil_div(part.elements(), kItemElements));
    }
    entries_ = add(entries);
  }

  // kernel(entries, count, arguments...)
  template <typename... P, typename... A>
  cudaError_t launch_items(void (*kernel)(P...), const unsigned char* workspace, cudaStream_t stream,
                           const A&... arguments) const {
    return launch(kernel, dim3(static_cast<unsigned>(items_)), dim3(kPartThreads), 0, stream, at(workspace, entries_),
                  count_, arguments...);
  }

 private:
  int items_ = 0;
  int count_;
  TableAt<PartEntry> entries_;
};

// Moves an item's elements, kCount at a time, from unit `begin` of them on: a thread reads so many at once before it
// writes the first, since a write might be to what the next one reads. `move` has
//   Numbers<..., kCount> read<kCount>(offset in the gradient, place among the matrices)
//   void write(offset, place, numbers)
template <int kCount, typename Move>
__device__ __forceinline__ void move_units(const GradientPart& part, unsigned begin, unsigned end, Move& move) {
  const bool contiguous = kCount > 1 || part.columns_contiguous();
  const unsigned columns = static_cast<unsigned>(part.columns) / kCount;  // at most kMaxPartElements, as are all
  for (unsigned first = begin + threadIdx.x; first < end; first += kAtOnce * kPartThreads) {
    int64_t offsets[kAtOnce], places[kAtOnce];
    decltype(move.template read<kCount>(int64_t{}, int64_t{})) numbers[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const unsigned own = first + i * kPartThreads, at = own < end ? own : end - 1;  // read, not written: no branch
      const unsigned row = part.rows == 1 ? 0 : at / columns, column = (at - row * columns) * kCount;
      offsets[i] = row * part.row_stride + (contiguous ? column : part.column_offset(column));
      places[i] = part.offset + row * part.row_length + column;
      numbers[i] = move.template read<kCount>(offsets[i], places[i]);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (first + i * kPartThreads < end) move.write(offsets[i], places[i], numbers[i]);
  }
}

// The elements of an item, dealt out to the threads of a block.
template <typename Move>
__device__ __forceinline__ void move_item(const PartEntry& entry, int64_t number_of_item, Move& move) {
  const GradientPart part = entry.part;  // in registers: what is written might be the table, for all a compiler knows
  const unsigned begin = static_cast<unsigned>(number_of_item * kItemElements);
  const unsigned rest = static_cast<unsigned>(part.elements()) - begin;
  const unsigned count = rest < kItemElements ? rest : static_cast<unsigned>(kItemElements);
  if (!entry.together) return move_units<1>(part, begin, begin + count, move);
  move_units<kTogether>(part, begin / kTogether, (begin + count) / kTogether, move);
  const unsigned last = begin + count / kTogether * kTogether + threadIdx.x;  // of one row, the last few
  if (last < begin + count) move.write(last, part.offset + last, move.template read<1>(last, part.offset + last));
}

}  // namespace kfac2::cuda

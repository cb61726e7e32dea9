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

struct PartEntry {
  GradientPart part;
  int64_t first_item;
};

// A launch with one block for each item of all parts. Parts without elements have no item.
class PartLaunch : public TableLaunch {
 protected:
  PartLaunch(const GradientPart* parts, int64_t count) : count_(static_cast<int>(count)) {
    std::vector<PartEntry> entries;
    for (int64_t i = 0; i < count; ++i) {
      entries.push_back({parts[i], items_});
      items_ += ceil_div(parts[i].elements(), kItemElements);
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
  int64_t items_ = 0;
  int count_;
  TableAt<PartEntry> entries_;
};

// The elements of an item, dealt out to the threads of a block: read(offset, place) gives what write(offset, place,
// value) takes. A thread reads so many elements at once before it writes the first, since a write might be to what the
// next one reads; `part` is a copy in registers for the same reason.
constexpr int kAtOnce = 4;

template <typename Read, typename Write>
__device__ void for_each_element(const GradientPart part, int64_t number_of_item, const Read& read,
                                 const Write& write) {
  const int64_t begin = number_of_item * kItemElements, elements = part.elements();
  const unsigned end = static_cast<unsigned>(begin + kItemElements < elements ? begin + kItemElements : elements);
  const bool contiguous = part.columns_contiguous();
  const unsigned columns = static_cast<unsigned>(part.columns);  // at most kMaxPartElements, as are all elements
  for (unsigned first = static_cast<unsigned>(begin) + threadIdx.x; first < end; first += kAtOnce * kPartThreads) {
    int64_t offsets[kAtOnce] = {}, places[kAtOnce] = {};
    decltype(read(int64_t{}, int64_t{})) values[kAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const unsigned at = first + i * kPartThreads, row = at / columns, column = at % columns;
      if (at >= end) break;
      offsets[i] = row * part.row_stride + (contiguous ? column : part.column_offset(column));
      places[i] = part.offset + row * part.row_length + column;
      values[i] = read(offsets[i], places[i]);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (first + i * kPartThreads < end) write(offsets[i], places[i], values[i]);
  }
}

}  // namespace kfac2::cuda

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

// The table of all parts, on its way to the device. Those without elements have no item.
struct PartTable {
  Tables tables;
  int64_t items = 0;
  int count = 0;

  PartTable(const GradientPart* parts, int64_t all) {
    std::vector<PartEntry> entries;
    for (int64_t i = 0; i < all; ++i) {
      entries.push_back({parts[i], items});
      items += ceil_div(parts[i].elements(), kItemElements);
    }
    count = static_cast<int>(all);
    tables.add(entries);
  }
};

// The elements of an item, dealt out to the threads of a block.
template <typename Visit>
__device__ void for_each_element(const PartEntry& entry, int64_t item, const Visit& visit) {
  const GradientPart& part = entry.part;
  const int64_t begin = (item - entry.first_item) * kItemElements, elements = part.elements();
  const int64_t end = begin + kItemElements < elements ? begin + kItemElements : elements;
  const bool contiguous = part.columns_contiguous();
  const unsigned columns = static_cast<unsigned>(part.columns);  // below 2^31, as are all elements of a part
  for (unsigned at = static_cast<unsigned>(begin) + threadIdx.x; at < end; at += kPartThreads) {
    const unsigned row = at / columns, column = at % columns;
    const int64_t offset = row * part.row_stride + (contiguous ? column : part.column_offset(column));
    visit(offset, part.offset + row * part.row_length + column);
  }
}

}  // namespace kfac2::cuda

// Memory of the device that runs the kernels, an emulated or a real one: what a test holds on the host is copied there,
// each array to memory of exactly its size, and what was computed is copied back.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "drawn.h"
#include "where.h"

namespace kfac2::tests {

inline void expect_success(const char* what, int status) {
  if (status != 0) fail("%s: %s", what, cuda::error_text(status));
}

// Memory that holds nothing of use: NaNs where it is poisoned, and to initcheck nothing at all where it is not.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    expect_success("cudaMalloc", cudaMalloc(&memory_, static_cast<size_t>(std::max<int64_t>(bytes, 1))));
    if (poisoned() && bytes > 0) expect_success("cudaMemset", cudaMemset(memory_, 0xFF, static_cast<size_t>(bytes)));
  }
  ~Workspace() { cudaFree(memory_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* get() const { return memory_; }

 private:
  void* memory_ = nullptr;
};

class DeviceCopies {
 public:
  DeviceCopies() = default;
  ~DeviceCopies() {
    for (const Copy& copy : copies_) cudaFree(copy.memory);
  }
  DeviceCopies(const DeviceCopies&) = delete;
  DeviceCopies& operator=(const DeviceCopies&) = delete;

  // What kernels read. `count` elements, or bytes of what has no type; null stays null.
  template <typename T>
  const T* in(const T* host, int64_t count) {
    return static_cast<const T*>(copied(host, count * size_of(host), nullptr));
  }

  // What kernels write, perhaps after they have read it.
  template <typename T>
  T* out(T* host, int64_t count) {
    return static_cast<T*>(copied(host, count * size_of(host), host));
  }

  // A table that stays on the host, with entries that `move(entry, i)` makes point to the device.
  template <typename Entry, typename Move>
  Entry* table(Entry* entries, int64_t count, const Move& move) {
    auto moved = std::make_shared<std::vector<std::remove_const_t<Entry>>>(entries, entries + count);
    for (int64_t i = 0; i < count; ++i) move((*moved)[i], i);
    tables_.push_back(moved);
    return moved->data();
  }

  // Copies back what kernels have written, once they have ended.
  void bring_back() const {
    for (const Copy& copy : copies_)
      if (copy.back != nullptr)
        expect_success("cudaMemcpy", cudaMemcpy(copy.back, copy.at, copy.bytes, cudaMemcpyDeviceToHost));
  }

 private:
  struct Copy {
    void *memory, *at;  // at: where the first element is, in the memory
    size_t bytes;
    void* back;  // or null
  };

  static int64_t size_of(const void*) { return 1; }
  template <typename T>
  static int64_t size_of(const T*) {
    return sizeof(T);
  }

  // As far from a multiple of 16 as the original: kernels read 16 bytes at once only where they may.
  void* copied(const void* host, int64_t count, void* back) {
    if (host == nullptr) return nullptr;
    const size_t bytes = static_cast<size_t>(count), shift = reinterpret_cast<uintptr_t>(host) % 16;
    Copy copy{nullptr, nullptr, bytes, bytes > 0 ? back : nullptr};
    expect_success("cudaMalloc", cudaMalloc(&copy.memory, std::max<size_t>(bytes + shift, 1)));
    copy.at = static_cast<unsigned char*>(copy.memory) + shift;
    copies_.push_back(copy);
    if (bytes > 0) expect_success("cudaMemcpy", cudaMemcpy(copy.at, host, bytes, cudaMemcpyHostToDevice));
    return copy.at;
  }

  std::vector<Copy> copies_;
  std::vector<std::shared_ptr<void>> tables_;
};

}  // namespace kfac2::tests

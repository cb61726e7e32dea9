// Runs a launch as the binding does: with a workspace of exactly its size; an error ends the test.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "op.h"

namespace kfac2::tests {

// Memory of exactly the size asked for, as the device would give it: aligned, and holding nothing of use.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : bytes_(static_cast<size_t>(bytes)), memory_(std::malloc(bytes_ + 1)) {
    std::memset(memory_, 0xFF, bytes_);
  }
  ~Workspace() { std::free(memory_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* get() const { return memory_; }

 private:
  size_t bytes_;
  void* memory_;
};

inline void expect_success(const char* what, int status) {
  if (status == 0) return;
  std::fprintf(stderr, "%s: %s\n", what, cuda::error_text(status));
  std::exit(1);
}

// Runs a launch with a workspace of exactly its size.
inline void run_emulated(const char* what, const cuda::Launch& launch) {
  const Workspace workspace(launch.workspace());
  expect_success(what, launch.run(workspace.get(), nullptr));
}

}  // namespace kfac2::tests

// Running numbered tasks of unequal weight on torch's own threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace kfac2 {

// Each thread takes the next task as it becomes free. Which thread runs a task must not matter.
template <typename Run>
void run_tasks(int64_t tasks, const Run& run) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t task = next++; task < tasks; task = next++) run(task);
  });
}

}  // namespace kfac2

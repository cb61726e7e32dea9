// gather_gradients: copies every parameter's gradient to its place among the gradient matrices, and finds the first
// that holds a NaN or an infinity.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda_launchers.h"
#include "gradient_part.h"

namespace kfac2 {

struct GatherGradientsParams {
  const GradientPart* parts;  // [count]
  void* matrices;             // float or double
  int32_t* first_bad;         // one number: the least of the parts that are not finite, or none_bad
  int64_t count;
  int64_t none_bad;  // above all numbers
  bool is_double;
};

namespace cpu {

// Any thread may run any task. merge() comes last.
class GatherGradients {
 public:
  explicit GatherGradients(const GatherGradientsParams& params);
  int64_t tasks() const { return static_cast<int64_t>(first_bad_.size()); }
  void run_task(int64_t task);
  void merge();

 private:
  GatherGradientsParams params_;
  std::vector<int64_t> first_part_;  // of each task, and their number
  std::vector<int64_t> first_bad_;   // by task
};

}  // namespace cpu

namespace cuda {

int64_t gather_gradients_workspace(const GatherGradientsParams& params);
int gather_gradients(const GatherGradientsParams& params, void* workspace, Stream stream);

}  // namespace cuda
}  // namespace kfac2

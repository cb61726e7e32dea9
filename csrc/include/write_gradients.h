// write_gradients: nu (v_i + omega c_i) back into every parameter's gradient.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda_launchers.h"
#include "gradient_part.h"

namespace kfac2 {

struct WriteGradientsParams {
  const GradientPart* parts;  // [count]; those of no layer keep their gradients
  const void* directions;     // the matrices of all layers, float or double
  const double* shifts;       // [layers]: omega c_i
  const double* scale;        // nu
  const float* found;         // not 0: every gradient becomes 0, of layers or not
  const double* usable;       // [layers]: 0 for a layer that keeps its gradient
  int64_t count;
  bool is_double;
};

namespace cpu {

// Any thread may run any task.
class WriteGradients {
 public:
  explicit WriteGradients(const WriteGradientsParams& params);
  int64_t tasks() const { return static_cast<int64_t>(first_part_.size()) - 1; }
  void run_task(int64_t task);

 private:
  WriteGradientsParams params_;
  std::vector<int64_t> first_part_;  // of each task, and their number
};

}  // namespace cpu

namespace cuda {

int64_t write_gradients_workspace(const WriteGradientsParams& params);
int write_gradients(const WriteGradientsParams& params, void* workspace, Stream stream);

}  // namespace cuda
}  // namespace kfac2

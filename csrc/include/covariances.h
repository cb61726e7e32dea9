// covariances: sum over samples and places of row row^T, for every layer and group.
#pragma once

#include "cuda_launchers.h"
#include "window.h"

namespace kfac2 {

struct CovariancesParams {
  const RowSource* sources;  // [layers]
  void* const* covariances;  // [layers] -> [groups, d, d], float64 for float64 sources, else float32
  int64_t layers;
};

namespace cpu {

// The work of one call: opaque tasks that may run in any order and on any thread, then a merge.
// The cut into tasks depends on the sizes alone, never on the number of threads, so that a result
// does not change with it.
class Covariances {
 public:
  explicit Covariances(const CovariancesParams& params);
  ~Covariances();
  Covariances(const Covariances&) = delete;
  Covariances& operator=(const Covariances&) = delete;

  int64_t tasks() const;
  void run_task(int64_t task);
  int64_t merges() const;
  void run_merge(int64_t merge);

 private:
  struct State;
  State* state_;
};

}  // namespace cpu

namespace cuda {

int64_t covariances_workspace(const CovariancesParams& params);
int covariances(const CovariancesParams& params, void* workspace, Stream stream);

}  // namespace cuda
}  // namespace kfac2

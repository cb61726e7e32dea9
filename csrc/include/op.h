// The contract of every op on either device. The header of an op declares the struct of its parameters, OpParams, and
//
//   std::unique_ptr<Work>   cpu::op(const OpParams&);
//   std::unique_ptr<Launch> cuda::op(const OpParams&);
//
// which make the plan of one call: where everything lies, and how the work is cut. What the parameters point to must
// stay until the call has ended. No CUDA header is needed: a build for the CPU alone reads this, too.
#pragma once

#include <cstdint>
#include <memory>

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace kfac2 {
namespace cpu {

// Tasks run in any order on any threads; the merges follow when all tasks have ended, in any order, too. The cut into
// tasks depends on the sizes alone, never on the number of threads, so that a result does not change with it.
class Work {
 public:
  virtual ~Work() = default;
  virtual int64_t tasks() const = 0;
  virtual void run_task(int64_t task) = 0;
  virtual int64_t merges() const { return 0; }
  virtual void run_merge(int64_t) {}
};

}  // namespace cpu

namespace cuda {

using Stream = CUstream_st*;

// Starts kernels on a stream and never waits for them.
class Launch {
 public:
  virtual ~Launch() = default;
  // Bytes of device memory, aligned to 16 bytes, that `run` may use until the stream has passed it.
  virtual int64_t workspace() const = 0;
  // Returns a cudaError_t, 0 for success; `error_text` gives its name.
  virtual int run(void* workspace, Stream stream) const = 0;
};

const char* error_text(int status);

}  // namespace cuda
}  // namespace kfac2

#include "factored_tikhonov_inverse.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "allocate.h"
#include "check.h"
#include "parallel.h"
#ifdef KFAC2_WITH_CUDA
#include "on_device.h"
#endif

namespace kfac2 {
namespace {

using torch::stable::Tensor;
using Inverses = std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor>;

constexpr const char* kOp = "factored_tikhonov_inverse";

// A: [d_in, d_in] or [q, d_in, d_in], G: [d_out, d_out] or [q, d_out, d_out] for each layer
void check_factors(const std::vector<Tensor>& A, const std::vector<Tensor>& G, double damping) {
  check(!A.empty() && A.size() == G.size(), kOp, "expected as many A as G, at least one, got ", A.size(), " and ",
        G.size());
  check(damping >= 0, kOp, "expected damping of at least 0, got ", damping);
  for (size_t i = 0; i < A.size(); ++i) {
    for (const Tensor* factor : {&A[i], &G[i]}) {
      check(is_square(*factor) && blocks_of(*factor) == blocks_of(A[i]), kOp, "expected A[", i, "] and G[", i,
            "] of shape [d, d], or [q, d, d] with one q, got ", shape_of(A[i]), " and ", shape_of(G[i]));
      check(is_float_or_double(*factor) && factor->scalar_type() == A[0].scalar_type(), kOp,
            "expected all factors of one dtype, float32 or float64");
      check(same_device(*factor, A[0]), kOp, "expected all factors on one device");
    }
  }
}

// Checked inputs, contiguous, and the outputs made for them.
struct Call {
  std::vector<Tensor> inputs, A_inv, G_inv;
  Tensor status;
  std::vector<FactorPair> pairs;
  double damping;
  bool factors_are_double;

  Call(const std::vector<Tensor>& A, const std::vector<Tensor>& G, double damping_) : damping(damping_) {
    check_factors(A, G, damping);
    factors_are_double = is_double(A[0]);
    const int64_t bytes = factors_are_double ? 8 : 4;
    for (size_t i = 0; i < A.size(); ++i) {
      inputs.push_back(torch::stable::contiguous(A[i]));
      inputs.push_back(torch::stable::contiguous(G[i]));
      const int64_t d_in = A[i].size(-1), d_out = G[i].size(-1);
      A_inv.push_back(allocate(A[i], shape_vector(A[i]), A[i].scalar_type()));
      G_inv.push_back(allocate(G[i], shape_vector(G[i]), G[i].scalar_type()));
      const auto block = [&](const Tensor& stack, int64_t q, int64_t d) {
        return static_cast<unsigned char*>(stack.data_ptr()) + q * d * d * bytes;
      };
      for (int64_t q = 0; q < blocks_of(A[i]); ++q) {
        pairs.push_back({block(inputs[2 * i], q, d_in), block(inputs[2 * i + 1], q, d_out), block(A_inv[i], q, d_in),
                         block(G_inv[i], q, d_out), d_in, d_out});
      }
    }
    const std::vector<int64_t> count = {static_cast<int64_t>(pairs.size())};
    status = allocate(A[0], count, torch::headeronly::ScalarType::Int);
  }

  FactoredTikhonovInverseParams params() const {
    return {pairs.data(), static_cast<int32_t*>(status.data_ptr()), static_cast<int64_t>(pairs.size()), damping,
            factors_are_double};
  }

  Inverses result() const { return {A_inv, G_inv, status}; }
};

Inverses factored_tikhonov_inverse_cpu(const std::vector<Tensor>& A, const std::vector<Tensor>& G, double damping) {
  const Call call(A, G, damping);
  cpu::FactoredTikhonovInverse work(call.params());
  run_tasks(work.tasks(), [&](int64_t task) { work.run_task(task); });
  work.merge();
  return call.result();
}

#ifdef KFAC2_WITH_CUDA
Inverses factored_tikhonov_inverse_cuda(const std::vector<Tensor>& A, const std::vector<Tensor>& G, double damping) {
  const Call call(A, G, damping);
  const FactoredTikhonovInverseParams params = call.params();
  run_on_device(
      kOp, A[0], cuda::factored_tikhonov_inverse_workspace(params),
      [&](void* workspace, cuda::Stream stream) { return cuda::factored_tikhonov_inverse(params, workspace, stream); });
  return call.result();
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kfac2, CPU, m) {
  m.impl("factored_tikhonov_inverse", TORCH_BOX(&factored_tikhonov_inverse_cpu));
}
#ifdef KFAC2_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(kfac2, CUDA, m) {
  m.impl("factored_tikhonov_inverse", TORCH_BOX(&factored_tikhonov_inverse_cuda));
}
#endif

}  // namespace kfac2

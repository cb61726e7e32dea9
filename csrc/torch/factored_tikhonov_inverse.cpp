#include "factored_tikhonov_inverse.h"

#include <tuple>

#include "bind.h"

namespace kfac2 {
namespace {

using torch::stable::Tensor;
using Result = std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor>;

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

// A_inv, G_inv: like A and G; status: one for each block of all layers
Result factored_tikhonov_inverse(const std::vector<Tensor>& A, const std::vector<Tensor>& G, double damping) {
  check_factors(A, G, damping);
  std::vector<Tensor> inputs, A_inv, G_inv;
  std::vector<FactorPair> pairs;
  for (size_t i = 0; i < A.size(); ++i) {
    const Tensor A_i = as_contiguous(A[i]), G_i = as_contiguous(G[i]);
    inputs.insert(inputs.end(), {A_i, G_i});
    A_inv.push_back(allocate(A[i], shape_vector(A[i]), A[i].scalar_type()));
    G_inv.push_back(allocate(G[i], shape_vector(G[i]), G[i].scalar_type()));
    const auto block = [&](const Tensor& stack, int64_t q) {
      const int64_t d = stack.size(-1);
      return static_cast<unsigned char*>(stack.data_ptr()) + q * d * d * (is_double(stack) ? 8 : 4);
    };
    for (int64_t q = 0; q < blocks_of(A_i); ++q)
      pairs.push_back(
          {block(A_i, q), block(G_i, q), block(A_inv[i], q), block(G_inv[i], q), A_i.size(-1), G_i.size(-1)});
  }
  const int64_t count = static_cast<int64_t>(pairs.size());
  const Tensor status = allocate(A[0], {count}, torch::headeronly::ScalarType::Int);
  const FactoredTikhonovInverseParams params{pairs.data(), static_cast<int32_t*>(status.data_ptr()), count, damping,
                                             is_double(A[0])};
  KFAC2_RUN(factored_tikhonov_inverse, A[0], params);
  return {A_inv, G_inv, status};
}

}  // namespace

KFAC2_BIND(factored_tikhonov_inverse)

}  // namespace kfac2

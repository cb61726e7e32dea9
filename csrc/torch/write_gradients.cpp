#include "write_gradients.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "gradient_parts.h"
#include "parallel.h"
#ifdef KFAC2_WITH_CUDA
#include "on_device.h"
#endif

namespace kfac2 {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "write_gradients";

// Checked inputs. shifts, usable: [layers]; scale: at least [1]; found: [1].
struct Call {
  std::vector<GradientPart> parts;
  Tensor directions, shifts, scale, found, usable;

  Call(const std::vector<Tensor>& gradients, const Tensor& layout, const Tensor& directions_, const Tensor& shifts_,
       const Tensor& scale_, const Tensor& found_, const Tensor& usable_)
      : parts(gradient_parts(kOp, gradients, layout, directions_, shifts_.numel())),
        directions(directions_),
        shifts(shifts_),
        scale(scale_),
        found(found_),
        usable(usable_) {
    for (const Tensor* numbers : {&shifts, &scale, &usable}) {
      check(is_double(*numbers) && numbers->is_contiguous() && same_device(*numbers, directions), kOp,
            "expected shifts, scale and usable to be float64, contiguous, on the device of the directions");
    }
    check(found.scalar_type() == ScalarType::Float && found.numel() == 1 && same_device(found, directions), kOp,
          "expected found to be one float32 number on the device of the directions, got shape ", shape_of(found));
    check(usable.numel() == shifts.numel() && scale.numel() >= 1, kOp, "expected usable of shape ", shape_of(shifts),
          ", got ", shape_of(usable));
  }

  WriteGradientsParams params() const {
    return {parts.data(),
            directions.const_data_ptr(),
            static_cast<const double*>(shifts.const_data_ptr()),
            static_cast<const double*>(scale.const_data_ptr()),
            static_cast<const float*>(found.const_data_ptr()),
            static_cast<const double*>(usable.const_data_ptr()),
            static_cast<int64_t>(parts.size()),
            is_double(directions)};
  }
};

void write_gradients_cpu(const std::vector<Tensor>& gradients, const Tensor& layout, const Tensor& directions,
                         const Tensor& shifts, const Tensor& scale, const Tensor& found, const Tensor& usable) {
  const Call call(gradients, layout, directions, shifts, scale, found, usable);
  cpu::WriteGradients work(call.params());
  run_tasks(work.tasks(), [&](int64_t task) { work.run_task(task); });
}

#ifdef KFAC2_WITH_CUDA
void write_gradients_cuda(const std::vector<Tensor>& gradients, const Tensor& layout, const Tensor& directions,
                          const Tensor& shifts, const Tensor& scale, const Tensor& found, const Tensor& usable) {
  const Call call(gradients, layout, directions, shifts, scale, found, usable);
  const WriteGradientsParams params = call.params();
  run_on_device(kOp, directions, cuda::write_gradients_workspace(params),
                [&](void* workspace, cuda::Stream stream) { return cuda::write_gradients(params, workspace, stream); });
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kfac2, CPU, m) { m.impl("write_gradients", TORCH_BOX(&write_gradients_cpu)); }
#ifdef KFAC2_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(kfac2, CUDA, m) { m.impl("write_gradients", TORCH_BOX(&write_gradients_cuda)); }
#endif

}  // namespace kfac2

// kfac2._C: how this build was made, and what its kernels can do. No torch in it, so that it can be read when torch
// does not fit.
#include <pybind11/pybind11.h>

#include "eigendecompose.h"
#include "fold_products.h"
#include "gradient_part.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "Build information of kfac2, and the limits of its kernels.";
  module.attr("torch_version") = KFAC2_BUILT_WITH_TORCH;
  module.attr("cuda_arch") = KFAC2_CUDA_ARCH;  // separated by semicolons; empty in a build for the CPU alone
  module.attr("gradient_max_axes") = kfac2::kColumnAxes + 1;  // of a gradient whose strides do not merge
  module.attr("gradient_max_elements") = kfac2::kMaxPartElements;
  module.attr("fold_products_max_panels") = kfac2::kMaxPanels;     // of one product
  module.attr("eigendecompose_max_size") = kfac2::kMaxMatrixSize;  // of the CUDA kernel
}

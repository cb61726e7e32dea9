// kfac2._C: how this build was made. No torch in it, so that it can be read when torch does not fit.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, module) {
  module.doc() = "Build information of kfac2.";
  module.attr("torch_version") = KFAC2_BUILT_WITH_TORCH;
  module.attr("cuda_arch") = KFAC2_CUDA_ARCH;  // separated by semicolons; empty in a build for the CPU alone
}

// Every native op of kfac2: the table of contents. Documentation and shapes are in kfac2/ops/.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(kfac2, m) {
  m.def("layer_maps(Tensor[] tensors, int[] windows) -> Tensor[]");
  m.def("covariances(Tensor[] tensors, int[] windows) -> Tensor[]");
  m.def("cross_layer_sums(Tensor[] maps, bool area, Tensor? previous, float kept, float scale) -> Tensor");
  m.def("coarse_fisher(Tensor input_sums, Tensor grad_sums, int[] layer_of_block, int layers) -> Tensor");
  m.def("eigendecompose(Tensor[] matrices) -> (Tensor[] values, Tensor[] vectors, Tensor status)");
}

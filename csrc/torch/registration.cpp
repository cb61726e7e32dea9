// Every native op of kfac2: the table of contents. Documentation and shapes are in kfac2/ops/.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(kfac2, m) {
  m.def("layer_maps(Tensor[] tensors, int[] windows) -> Tensor[]");
  m.def("covariances(Tensor[] tensors, int[] windows, Tensor[] previous, float kept, float[] scales) -> Tensor[]");
  m.def(
      "fold_products(Tensor[] panels, int[] counts, Tensor[] last, float[] corners, Tensor[] previous, float kept, "
      "float[] scales) -> Tensor[]");
  m.def("directional_derivatives(Tensor[] inputs, int[] windows, Tensor[] grads, Tensor[] directions) -> Tensor[]");
  m.def("cross_layer_sums(Tensor[] maps, bool area, Tensor? previous, float kept, float scale) -> Tensor");
  m.def(
      "coarse_fisher(Tensor input_sums, Tensor grad_sums, Tensor? input_scales, Tensor? grad_scales, "
      "Tensor? previous_inputs, Tensor? previous_grads, float kept, int[] layer_of_block, int layers) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("factored_tikhonov_inverse(Tensor[] A, Tensor[] G, float damping) -> (Tensor[], Tensor[], Tensor)");
  m.def("eigendecompose(Tensor[] matrices) -> (Tensor[], Tensor[], Tensor)");
  m.def("gather_gradients(Tensor[] gradients, Tensor layout, int layers, int none_bad, Tensor(a!) matrices) -> Tensor");
  m.def(
      "shift_and_scale(Tensor gradients, Tensor directions, Tensor spans, Tensor rates, Tensor? device_rates, "
      "Tensor in_coarse, Tensor usable, Tensor? coarse_inverse, Tensor first_bad, int none_bad, float coarse_weight, "
      "float kl_clip, Tensor(a!) skipped, Tensor? limits=None, Tensor? largest=None) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "write_gradients(Tensor(a!)[] gradients, Tensor layout, Tensor directions, Tensor shifts, Tensor factors, "
      "Tensor found, Tensor usable) -> ()");
}

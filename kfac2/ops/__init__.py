"""The kernels of kfac2 as functions on tensors. The statistics are raw sums; scaling is the caller's.

| function | for | runs in |
|---|---|---|
| `layer_maps`, with its fronts `channel_sums` and `patch_sums` | the sum of each row, all layers at once | csrc |
| `cross_layer_sums` | inner products of all pairs of maps | csrc |
| `average_coarse_sums` | running averages of these, and the L×L Fisher of the second level | csrc |
| `coarse_fisher` | the latter alone | torch; csrc where a layer has several blocks |
| `covariances`, with `input_covariance` and `grad_covariance` | Kronecker factors, all layers | csrc; torch (CUDA) |
| `folded_covariances` | the same as triangles | csrc; torch (CUDA) |
| `directional_derivatives` | gᵀ D ā of each sample: Fisher norms of steps, all layers | csrc |
| `factored_tikhonov_inverse` | damped inverses of both factors, all layers | csrc; torch for large ones on a CPU |
| `eigendecompose` | both factors of every layer, for the exact damped inverse | torch; csrc for small sizes on CUDA |
| `precondition`, `precondition_in_basis`, `precondition_eigh` | their use | torch, by size |

The three native calls of every step are for the optimizer alone, and documented beside it in their own files:
`gather_gradients`, `shift_and_scale`, `write_gradients`. So is `fold_products`, which is for `covariances` alone.
"""

from kfac2.ops.coarse_fisher import CoarseFisher, average_coarse_sums, coarse_fisher
from kfac2.ops.covariances import covariances, folded_covariances, grad_covariance, input_covariance
from kfac2.ops.cross_layer_sums import cross_layer_sums
from kfac2.ops.directional_derivatives import directional_derivatives
from kfac2.ops.eigendecompose import Eigendecomposition, eigendecompose
from kfac2.ops.factored_tikhonov_inverse import FactoredInverse, factored_tikhonov_inverse
from kfac2.ops.layer_maps import channel_sums, layer_maps, patch_sums
from kfac2.ops.precondition import precondition, precondition_eigh, precondition_in_basis
from kfac2.window import Window

__all__ = [
    "CoarseFisher",
    "Eigendecomposition",
    "FactoredInverse",
    "Window",
    "average_coarse_sums",
    "channel_sums",
    "coarse_fisher",
    "covariances",
    "cross_layer_sums",
    "directional_derivatives",
    "eigendecompose",
    "factored_tikhonov_inverse",
    "folded_covariances",
    "grad_covariance",
    "input_covariance",
    "layer_maps",
    "patch_sums",
    "precondition",
    "precondition_eigh",
    "precondition_in_basis",
]

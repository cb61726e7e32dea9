"""The kernels of kfac2 as functions on tensors. All return raw sums; scaling is the caller's."""

from kfac2.ops.coarse_fisher import coarse_fisher
from kfac2.ops.covariances import covariances, grad_covariance, input_covariance
from kfac2.ops.cross_layer_sums import cross_layer_sums
from kfac2.ops.layer_maps import channel_sums, layer_maps, patch_sums
from kfac2.window import Window

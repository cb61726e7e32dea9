"""Where K-FAC is exact: a deep linear network under squared loss, every input with every residual."""

from itertools import pairwise

import torch
from compare import assert_equal
from paper import KFAC
from torch.distributions import Independent, Normal

N, D = 4, 3


class Crossed(Independent):
    """Labels whose residuals are √d·e_k in place of normal draws: each input meets each k once."""

    def __init__(self, mean):
        super().__init__(Normal(mean, 1.0), 1)

    def sample(self, *args):
        residuals = D**0.5 * torch.eye(D, dtype=torch.float64).repeat(N, 1)
        return self.mean.detach() + residuals


def layer_order(jacobian):
    """d out / d W as (d_out, d_in · d_out): vec stacks the columns of W."""
    return jacobian.transpose(1, 2).flatten(1)


def test_blocks_and_coarse_fisher_equal_the_dense_fisher():
    widths = [5, 4, 6, 3]
    model = torch.nn.Sequential(*(torch.nn.Linear(a, b, bias=False) for a, b in pairwise(widths))).double()
    inputs = torch.randn(N, widths[0], dtype=torch.float64)
    opt = KFAC(model, kl_clip=None)
    out = model(inputs.repeat_interleave(D, 0))
    opt.accumulate_fisher(Crossed(out))
    out.sum().backward()
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def predict(weights, x):
        return torch.func.functional_call(model, weights, (x,))

    jacobians = torch.func.vmap(torch.func.jacrev(predict), (None, 0))(weights, inputs)
    opt.step()
    per_layer = [torch.stack([layer_order(j) for j in jacobians[f"{name}.weight"]]) for name in opt.layers]
    J = torch.cat(per_layer, 2)  # (N, d, P)
    fisher = torch.einsum("ndp,ndq->pq", J, J) / N
    sizes = [part.shape[2] for part in per_layer]
    Z = torch.block_diag(*(torch.ones(1, size, dtype=torch.float64) for size in sizes))
    start = 0
    for name, size in zip(opt.layers, sizes, strict=True):
        A, G = opt.factors(name)
        assert_equal(torch.kron(A, G), fisher[start : start + size, start : start + size])
        start += size
    assert_equal(opt.coarse_fisher(), Z @ fisher @ Z.T)

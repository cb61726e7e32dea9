"""Labels drawn from a softmax, and their log-probabilities, whose gradient is known: ∂ log p_y / ∂z = 1_y - p.

`Categorical(logits=z)` normalises, l = z - logsumexp(z). Differentiated op by op, l_y costs a language model seven
kernels that go through tensors as large as its logits, four of which are there at once. Here the probabilities
p = exp(l) are made once: labels are drawn by them, and a gradient is one multiplication of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import Categorical

_LAST = ((-1,), (2**64 - 1,))  # dim=-1, as a node of torch tells it


class Softmax(NamedTuple):
    """A softmax over the last axis.

    Attributes:
        z: what it is taken of, with its graph.
        logits: l = z - logsumexp(z), detached.
        probs: p = exp(l), detached.
    """

    z: Tensor
    logits: Tensor
    probs: Tensor

    @staticmethod
    def of(distribution: Categorical) -> Softmax | None:
        """Find the softmax that a distribution is; None where it was not built from float32 or float64 logits."""
        logits = vars(distribution).get("logits")
        z = _normalised(logits) if type(logits) is Tensor else None
        if logits is None or z is None:
            return None
        logits = logits.detach()
        return Softmax(z, logits, logits.exp())

    def draw(self) -> Tensor:
        """Draw a label of each row; return their log-probabilities, with a graph. Of NaNs they are NaN."""
        labels = won_race(self.probs)
        with torch.enable_grad():
            return _LogProb.apply(self.z, self.logits, self.probs, labels)


@torch.no_grad()
def won_race(probs: Tensor) -> Tensor:
    """Return the label whose p_c / clock_c is largest: the race of exponential clocks by which torch.multinomial draws.

    The random numbers are those of `Categorical.sample`. That a p below 1e-38 is 0 in float32, or loses digits, changes
    no label: one of K classes has p ≥ 1/K, and torch's float32 clocks lie between 1e-11 and 40. The one would have
    p / clock < 1e-27 and the other > 1 / (40 K), so that it could win among more than 1e25 classes only.
    """
    clocks = torch.empty_like(probs, memory_format=torch.contiguous_format).exponential_()
    return torch.div(probs, clocks, out=clocks).argmax(-1)


class _LogProb(torch.autograd.Function):
    """l_y with the gradient (1_y - p) g at z."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, logits: Tensor, probs: Tensor, labels: Tensor) -> Tensor:
        """Return l_y of each row; z only says where the gradient goes."""
        labels = labels.unsqueeze(-1)
        ctx.save_for_backward(probs, labels)
        return logits.gather(-1, labels).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the gradient in memory of its own: p may be asked for again."""
        probs, labels = ctx.saved_tensors
        g = g.unsqueeze(-1)
        return (probs * -g).scatter_add_(-1, labels, g), None, None, None


def _normalised(logits: Tensor) -> Tensor | None:
    """Return z where logits are just what `Categorical` makes of it, z - logsumexp(z, -1, keepdim=True); else None.

    Its graph tells: the subtraction has the edge of z, and the node of logsumexp, which has saved z, no other. Neither
    was overwritten, and no hook of the user's wants to see what would be left out.
    """
    node: Any = logits.grad_fn
    is_new = logits._version == 0 and not logits._backward_hooks
    if not is_new or logits.dtype not in (torch.float32, torch.float64) or node is None:
        return None
    if node.name() != "SubBackward0" or node._saved_alpha != 1:
        return None
    edge, (total, _) = node.next_functions
    if total is None or total.name() != "LogsumexpBackward0" or total.next_functions != (edge,):
        return None
    if total._saved_dim not in _LAST or not total._saved_keepdim:
        return None
    try:
        is_packed = getattr(total._raw_saved_self, "unpack_hook", None) is not None  # to unpack may run the model again
        z: Tensor | None = None if is_packed else total._saved_self
    except RuntimeError:  # freed or overwritten, as a backward pass will say
        return None
    return z

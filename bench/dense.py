"""The Fisher of a small network as a dense matrix, and the quadratic model that it makes of the loss.

    F = 1/M Σ Jᵀ H J,    m(v) = −gᵀv + ½ vᵀ(F + λI)v,

J the derivatives of a case's outputs by all parameters of K-FAC's layers, H the Fisher of the predicted distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Independent
from torch.func import functional_call, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

SAMPLES = 16  # whose Jacobians are alive at a time


class Flat:
    """The parameters of some layers as one vector: layer after layer, row after row, a row's bias last.

    Args:
        model: the network.
        layers: names of modules with a `weight` (d_out, ...), and perhaps a `bias`.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        found = dict(model.named_parameters())
        self.parameters = {
            name: p.detach() for layer in layers for name, p in found.items() if name.rpartition(".")[0] == layer
        }
        self.layers = list(layers)
        self.shapes = []  # (d_out, d_in) of each layer, the bias counted in
        for layer in layers:
            weight = self.parameters[f"{layer}.weight"]
            self.shapes.append((len(weight), weight[0].numel() + (f"{layer}.bias" in self.parameters)))
        ends = torch.tensor([0] + [math.prod(shape) for shape in self.shapes]).cumsum(0).tolist()
        self.slices = [slice(*pair) for pair in pairwise(ends)]
        self.size: int = ends[-1]

    def vector(self, named: Mapping[str, Tensor]) -> Tensor:
        """Return (..., p) from tensors by name, shaped as the parameters or with leading axes more."""
        parts = []
        for layer, (d_out, _) in zip(self.layers, self.shapes, strict=True):
            weight = named[f"{layer}.weight"]
            lead = weight.shape[: weight.dim() - self.parameters[f"{layer}.weight"].dim()]
            rows = [weight.reshape(*lead, d_out, -1)]
            if f"{layer}.bias" in self.parameters:
                rows.append(named[f"{layer}.bias"].unsqueeze(-1))
            parts.append(torch.cat(rows, -1).flatten(-2))
        return torch.cat(parts, -1)

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """Return the tensors, shaped as the parameters, that (p,) is made of."""
        result = {}
        for layer, shape, part in zip(self.layers, self.shapes, self.slices, strict=True):
            rows, weight = vector[part].reshape(shape), self.parameters[f"{layer}.weight"]
            has_bias = f"{layer}.bias" in self.parameters
            result[f"{layer}.weight"] = rows[:, : shape[1] - has_bias].reshape(weight.shape)
            if has_bias:
                result[f"{layer}.bias"] = rows[:, -1]
        return result

    def split(self, vector: Tensor, most_rows: int = 0) -> Tensor:
        """Return (p, k) whose columns add up to a vector: one for each layer.

        Args:
            vector: (p,).
            most_rows: a layer of at most so many outputs has a column for each.
        """
        columns = []
        for (d_out, d_in), part in zip(self.shapes, self.slices, strict=True):
            width = d_in if d_out <= most_rows else d_out * d_in
            for begin in range(part.start, part.stop, width):
                column = torch.zeros_like(vector)
                column[begin : begin + width] = vector[begin : begin + width]
                columns.append(column)
        return torch.stack(columns, 1)


class Fisher(NamedTuple):
    """What a batch says about the curvature."""

    matrix: Tensor  # F, (p, p)
    scores: Tensor  # (N, p): gradients of -log p(y|x) of each sample, labels drawn once, summed over its cases
    cases: int  # M: terms that the mean loss averages over


def jacobians(model: nn.Module, flat: Flat, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield outputs (n, *shape) and their Jacobian (n, *shape, p), a share of the samples at a time.

    With batch norm an output depends on all samples; J is that of the whole batch then, one row for each output.
    """
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        yield _whole_jacobian(model, flat, x)
        return

    def of_sample(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, parameters, (sample.unsqueeze(0),)).squeeze(0)

    for some in x.split(SAMPLES):
        with torch.no_grad():
            out = functional_call(model, flat.parameters, (some,))
        with sdpa_kernel(SDPBackend.MATH):  # the only one that vmap knows
            J = vmap(jacrev(of_sample), (None, 0))(flat.parameters, some)
        yield out, flat.vector(J).detach()


def _whole_jacobian(model: nn.Module, flat: Flat, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return all outputs and their Jacobian; jacrev would keep the graphs of all backward passes."""
    parameters = {name: p.clone().requires_grad_() for name, p in flat.parameters.items()}
    out = functional_call(model, parameters, (x,))
    rows = []
    for start in torch.eye(out.numel(), dtype=out.dtype).split(SAMPLES):
        gradients = torch.autograd.grad(
            out, list(parameters.values()), start.unflatten(1, out.shape), retain_graph=True, is_grads_batched=True
        )
        rows.append(flat.vector(dict(zip(parameters, gradients, strict=True))))
    return out.detach(), torch.cat(rows).unflatten(0, out.shape)


def halved(predicted: Distribution, J: Tensor) -> tuple[Tensor, Tensor]:
    """Return K (..., p) with KᵀK = Σ JᵀHJ, and the samples' gradients Jᵀr with labels drawn, (n, p).

    Raises:
        TypeError: if the distribution is no Categorical and no vector of independent Bernoullis.
    """
    if isinstance(predicted, Categorical):  # H = diag(p) − ppᵀ
        p = predicted.probs.unsqueeze(-1)
        K = p.sqrt() * (J - (p * J).sum(-2, keepdim=True))
        residual = predicted.probs - F.one_hot(predicted.sample(), p.shape[-2])
    elif isinstance(predicted, Independent) and isinstance(predicted.base_dist, Bernoulli):  # H = diag(p(1 − p))
        p = predicted.base_dist.probs
        K = (p * (1 - p)).sqrt().unsqueeze(-1) * J
        residual = p - predicted.sample()
    else:
        raise TypeError(f"predicted must be a Categorical or independent Bernoullis, got {predicted}")
    return K, torch.einsum("nk,nkp->np", residual.flatten(1), J.flatten(1, -2))


def dense_fisher(model: nn.Module, flat: Flat, x: Tensor, distribution: Callable[[Tensor], Distribution]) -> Fisher:
    """Form the exact Fisher of a batch, and draw labels from torch's global generator."""
    matrix, scores, cases = torch.zeros(flat.size, flat.size, dtype=torch.float64), [], 0
    for out, J in jacobians(model, flat, x):
        predicted = distribution(out)
        K, drawn = halved(predicted, J)
        K = K.flatten(0, -2)
        matrix.addmm_(K.mT, K)
        scores.append(drawn)
        cases += math.prod(predicted.batch_shape)
    return Fisher(matrix / cases, torch.cat(scores), cases)


def loss_gradient(model: nn.Module, flat: Flat, loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the gradient of a loss of the outputs, (p,)."""
    parameters = {name: p.clone().requires_grad_() for name, p in flat.parameters.items()}
    value = loss(functional_call(model, parameters, (x,)))
    return flat.vector(dict(zip(parameters, torch.autograd.grad(value, list(parameters.values())), strict=True)))


class Quadratic:
    """m(v) = −gᵀv + ½ vᵀ(F + λI)v, the change of the damped model by the step −v, least at v* = (F + λI)⁻¹g.

    Args:
        fisher: F, (p, p).
        gradient: g, (p,).
        damping: λ > 0.
    """

    def __init__(self, fisher: Tensor, gradient: Tensor, damping: float) -> None:
        self.gradient, self.damping = gradient, damping
        self.matrix = fisher + damping * torch.eye(len(fisher), dtype=fisher.dtype)
        self.best = torch.cholesky_solve(gradient.unsqueeze(1), torch.linalg.cholesky(self.matrix)).squeeze(1)
        self.least = -(gradient @ self.best).item() / 2

    def value(self, v: Tensor) -> float:
        """Return m(v)."""
        return (v @ (self.matrix @ v) / 2 - self.gradient @ v).item()

    def scale(self, v: Tensor) -> float:
        """Return the a >= 0 of the least m(a v)."""
        bend = (v @ (self.matrix @ v)).item()
        return max(0.0, (self.gradient @ v).item() / bend) if bend > 0 else 0.0

    def share(self, v: Tensor) -> float:
        """Return q, the share of the largest decrease that v reaches with its best scale."""
        return self.value(self.scale(v) * v) / self.least

    def within(self, Z: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the Z c of the least m(Z c): Zᵀ(F + λI)Z c = Zᵀg.

        Args:
            Z: (p, k).
            mask: (k, k), which entries of the left side count.
        """
        Q = Z.mT @ (self.matrix @ Z)
        return Z @ coefficients(Q if mask is None else Q * mask, Z.mT @ self.gradient)

    def within_sampled(self, Z: Tensor, scores: Tensor, cases: float) -> Tensor:
        """Return the same with SᵀS/M in the place of ZᵀFZ, S = scores · Z."""
        S = scores @ Z
        return Z @ coefficients(S.mT @ S / cases + self.damping * Z.mT @ Z, Z.mT @ self.gradient)


def coefficients(Q: Tensor, b: Tensor, cut: float = 1e-12) -> Tensor:
    """Solve Q c = b, Q (k, k) positive semi-definite: in units of its diagonal, without what is nearly dependent."""
    units = torch.where(Q.diagonal() > 0, Q.diagonal().clamp_min(torch.finfo(Q.dtype).tiny).rsqrt(), 0)
    values, vectors = torch.linalg.eigh(units.unsqueeze(1) * Q * units)
    kept = values > cut * values[-1].clamp_min(torch.finfo(Q.dtype).tiny)
    return units * (vectors @ (torch.where(kept, 1 / values.where(kept, 1), 0) * (vectors.mT @ (units * b))))

"""Steps in the space of directions: from the rows at hand and two directions of each layer to new parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac2.coarse.directions import TAU, Quadratic, coefficients, divergence_of, products, quadratic, with_correlations
from kfac2.descent import Rate, times
from kfac2.divergence import KeptPass, Matrices, derivatives
from kfac2.kinds import Layer
from kfac2.own_steps import OwnSteps
from kfac2.processes import Processes
from kfac2.signal_share import SignalShare
from kfac2.weight_norms import WeightNorms

PER_LAYER = 32  # samples for each layer, where nothing else is said: 16 for each unknown
MOST_DAMPING = 0.01  # c while steps are taken in the space: the coefficients, too, hold a step back
MOST_CHANGE = 0.3  # of a layer's weights in a step: where a softmax saturates, the Fisher says nothing against any
SHARE_OF_BOUND = 0.2  # of K, which bounds one level's steps where they are measured, now and then; here each step is

State = Mapping[Tensor, dict[str, Any]]


class Coefficients(NamedTuple):
    """What a step is made with, float64 on the device.

    Attributes:
        names: of the layers.
        fine: α of each.
        last: β.
    """

    names: tuple[str, ...]
    fine: Tensor
    last: Tensor


class _Settings(NamedTuple):
    """η and μ of each layer, float64 on the device."""

    rates: Tensor
    momentum: Tensor

    @staticmethod
    def of(groups: Sequence[Mapping[str, Any]], device: torch.device) -> _Settings:
        """Read them from the group of each layer's weight."""
        return _Settings(*(_column([group[name] for group in groups], device) for name in ("lr", "momentum")))


def _column(values: Sequence[Rate], device: torch.device) -> Tensor:
    if not any(isinstance(value, Tensor) for value in values):
        return torch.tensor(values, dtype=torch.float64, device="cpu").to(device)
    return torch.stack([torch.as_tensor(value, device=device).double().reshape(()) for value in values])


class _Layers:
    """What is always the same of some layers."""

    def __init__(self, layers: list[Layer]) -> None:
        self.layers = layers
        self.names = tuple(layer.name for layer in layers)
        self.matrices = Matrices(layers, 2)
        self._weights = WeightNorms(layers, layers[0].weight.device)
        self._made_for = self._kind()

    def _kind(self) -> list[tuple[torch.dtype, torch.device]]:
        return [(p.dtype, p.device) for p in self._weights.parameters]

    def fits(self, layers: list[Layer]) -> bool:
        """Tell whether these are the layers, where and in what dtype they were."""
        return layers == self.layers and self._kind() == self._made_for

    def squares(self) -> Tensor:
        """Return |W_i|², (L,), with a floor: weights may be 0."""
        return torch.maximum(self._weights.now(), self._weights.floors).square()


class Directed(OwnSteps):
    """The steps of one optimizer in the space of directions.

    Args:
        samples: gives how many samples they are measured with, at most.

    Attributes:
        signal: whether they pay.
        latest: coefficients of the last one, or None.
    """

    reads_gradients = True

    def __init__(self, samples: Callable[[], int]) -> None:
        self.signal = SignalShare()
        self.latest: Coefficients | None = None
        self._samples = samples
        self._batch = 0  # samples of this iteration's largest pass
        self._correlations: tuple[tuple[str, ...], Tensor] | None = None
        self._layers: _Layers | None = None

    @property
    def waits(self) -> bool:
        """Whether the last step was one in the space, so that the slope along it is wanted."""
        return self.signal.waits

    def wants_step(self, iteration: int) -> bool:
        """Tell whether an iteration's step is one in the space."""
        return self.signal.wants_step(iteration)

    def part(self, samples: int) -> int:
        """Return how many of so many samples of a batch are measured."""
        self._batch = max(self._batch, samples)  # an own pass is asked about as well, when the batch is known
        return min(samples, self._samples())

    def decide(self) -> None:
        """Read what the last steps were like, and say whether steps are taken in the space from now on."""
        self.signal.decide()

    def step(
        self,
        passes: Sequence[KeptPass],
        layers: list[Layer],
        gradient: Callable[[Layer], Tensor],
        groups: Sequence[Mapping[str, Any]],
        state: State,
        tau: float | None,
        bound: float | None,
        factor: Rate,
        found: Tensor | None,
        processes: Processes,
        has_rows: bool,
    ) -> set[int]:
        """Take a step with the layers that have rows, and return ids of the parameters that have moved.

        Without any rows nothing moves, and what the last step was like is measured.

        Args:
            passes: kept rows of this iteration.
            layers: that have a fine direction, in `.grad`.
            gradient: gives ∇ of a layer, one dimension.
            groups: of the optimizer: `lr`, `momentum` and `weight_decay`.
            state: the optimizer's, whose `momentum_buffer` is d, the last update.
            tau: τ; None: 3.
            bound: K; the step's ηc holds to cᵀZᵀFZc ≤ ℓ² K/5, with the signal's length ℓ. None: to nothing.
            factor: of all rates.
            found: on the device, 1 where the step is to be skipped; None where it is not.
            processes: whose rows count together.
            has_rows: whether some process has rows.
        """
        if has_rows and processes.is_alone:
            used = {use.layer for one in passes for use in one.uses}
            layers = [layer for layer in layers if layer in used]
        if not layers or not (has_rows or self.signal.waits):
            return set()
        batch, self._batch = self._batch, 0
        if batch and processes.is_alone:
            self.signal.rows = min(1.0, self._samples() / batch)
        if self._layers is None or not self._layers.fits(layers):
            self._layers = _Layers(layers)
        parts = _with_gradients(layers)
        group_of = {id(p): group for group in groups for p in group["params"]}
        # one level's step without momentum is not kept: the buffer is then of a step in the space, long ago
        last = {
            key: state[p].get("momentum_buffer") if self.signal.waits or group_of[key]["momentum"] else None
            for key, p in parts.items()
        }

        def given(layers: Sequence[Layer]) -> tuple[_Settings, list[Tensor]]:
            settings = _Settings.of([group_of[id(layer.weight)] for layer in layers], layers[0].weight.device)
            return settings, [gradient(layer) for layer in layers]

        if not has_rows:
            settings, gradients = given(layers)
            _, slopes = _inner_products(self._layers.matrices.of((last, last)), gradients)
            self._measure(self._layers.names, slopes[:, 1], settings.rates, found)
            return set()
        matrices = self._layers.matrices.of(({key: p.grad for key, p in parts.items()}, last))
        fisher, places, taken = _fisher(passes, layers, matrices, processes, (min(batch, self._samples()), batch))
        self.signal.rows = self.signal.rows if taken is None else taken
        of = self._layers
        if len(places) < len(layers):  # no process has rows of the others
            layers, matrices = [layers[i] for i in places], [matrices[i] for i in places]
            parts, of = _with_gradients(layers), _Layers(layers)
        settings, gradients = given(layers)
        self.latest = self._solved(fisher, of, matrices, gradients, settings, tau, bound, found)
        on_host = found is None and self.latest.fine.device.type == "cpu"
        fine_and_last = (list(c.tolist() if on_host else c.unbind()) for c in (self.latest.fine, self.latest.last))
        pairs = zip(layers, *fine_and_last, strict=True)
        of_part = {id(p): (alpha, beta) for layer, alpha, beta in pairs for p in (layer.weight, layer.bias)}
        for group in groups:
            moving = [p for p in group["params"] if id(p) in parts]
            if moving:
                rate = times(group["lr"], factor)
                _move(moving, state, rate, group["weight_decay"], [of_part[id(p)] for p in moving], found)
        return {*parts}

    def _solved(
        self,
        fisher: Tensor,
        of: _Layers,
        matrices: Sequence[Tensor],
        gradients: Sequence[Tensor],
        settings: _Settings,
        tau: float | None,
        bound: float | None,
        found: Tensor | None,
    ) -> Coefficients:
        """Return the coefficients of a step; where the solve fails, those of one level, v + μ d."""
        names = of.names
        grams, slopes = _inner_products(matrices, gradients)
        self._measure(names, slopes[:, 1], settings.rates, found)
        known = self._correlations[1] if self._correlations is not None and self._correlations[0] == names else None
        weights = of.squares()
        model, correlations = with_correlations(quadratic(fisher, grams, slopes, weights), known)
        c = coefficients(model, TAU if tau is None else tau)
        c = c * _within(MOST_CHANGE, c, settings.rates, grams, weights)
        c = self._held(model, c, settings.rates.repeat(2), bound, found)
        is_solved = c.isfinite().all()
        self._correlations = names, torch.where(is_solved, correlations, 0.0 if known is None else known)
        momentum = settings.momentum
        c = torch.where(is_solved, c, torch.cat([torch.ones_like(momentum), momentum]))
        return Coefficients(names, *c.chunk(2))

    def _held(self, model: Quadratic, c: Tensor, rates: Tensor, bound: float | None, found: Tensor | None) -> Tensor:
        """Hold a step to its bound, and note what it was like."""
        c = min(1.0, self.signal.length) * c
        if bound is not None:
            most = SHARE_OF_BOUND * bound * self.signal.length**2
            divergence = divergence_of(model, c, rates)
            c = c * torch.where(divergence > most, (most / divergence).sqrt(), 1.0)
        self.signal.took((rates * c) @ model.slopes, divergence_of(model, c, rates), found)
        return c

    def _measure(self, names: tuple[str, ...], slopes: Tensor, rates: Tensor, found: Tensor | None) -> None:
        is_same = self.latest is not None and self.latest.names == names
        self.signal.measured((slopes.double() * rates).sum() if is_same else None, found)

    # -- state ----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return what a saved state holds."""
        return {
            "signal": self.signal.state(),
            "names": None if self.latest is None else list(self.latest.names),
            "correlations": None if self._correlations is None else self._correlations[1].clone(),
        }

    def load(self, state: Mapping[str, Any] | None, device: torch.device) -> None:
        """Go on from what `state` returned; None: from the start."""
        self.latest = self._correlations = None
        self.signal.load(**(SignalShare().state() if state is None else state["signal"]))
        if state is None:
            return
        self.signal.to(device)
        if state["correlations"] is not None:
            names, correlations = tuple(state["names"]), state["correlations"].to(device)
            self._correlations = names, correlations
            self.latest = Coefficients(names, *torch.full_like(correlations[0], torch.nan).chunk(2))


def _with_gradients(layers: Sequence[Layer]) -> dict[int, Tensor]:
    """Return the parameters of layers that have a gradient, by id."""
    parameters = (p for layer in layers for p in (layer.weight, layer.bias) if p is not None)
    return {id(p): p for p in parameters if p.grad is not None}


def _fisher(
    passes: Sequence[KeptPass],
    layers: Sequence[Layer],
    matrices: Sequence[Tensor],
    processes: Processes,
    samples: tuple[int, int],
) -> tuple[Tensor, list[int], float | None]:
    """Return SᵀS/M, (2L, 2L), of the L layers that have rows in some process, and which these are.

    Args:
        passes: kept rows of this process.
        layers: that may have rows.
        matrices: their directions.
        processes: whose rows count together.
        samples: how many samples of this process's batch are kept, and how many it has.

    Returns:
        Of several processes also the share of the samples of all that is kept.
    """
    s, cases = derivatives(passes, layers, matrices)
    if processes.is_alone:
        return products(s) / cases, list(range(len(layers))), None
    used = {use.layer for one in passes for use in one.uses}
    counts = torch.tensor([cases, *samples, *(layer in used for layer in layers)], dtype=torch.float64, device=s.device)
    gram, counts = processes.added("the products of derivatives", [products(s), counts])
    total, kept, of_all, *flags = counts.tolist()
    places = [i for i, flag in enumerate(flags) if flag]
    index = torch.tensor([*places, *(len(layers) + i for i in places)], device=s.device)
    return gram[index][:, index] / total, places, kept / of_all if of_all else None


def _within(share: float, c: Tensor, rates: Tensor, grams: Tensor, weights: Tensor) -> Tensor:
    """Return the factor, at most 1, that holds each layer's step to a share of its weights, η|d_i| ≤ share |W_i|."""
    pairs = c.view(2, -1).T
    squares = torch.einsum("lk,lkm,lm->l", pairs, grams.double(), pairs) * rates**2
    return (share**2 * weights / squares).min().clamp(max=1.0).sqrt()


def _inner_products(matrices: Sequence[Tensor], gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the Gram matrices of v_i and d_i, (L, 2, 2), and their products with ∇_i, (L, 2)."""
    flat = [m.flatten(1) for m in matrices]
    grams = torch.stack([m @ m.T for m in flat])
    return grams, torch.stack([m @ g.to(m.dtype) for m, g in zip(flat, gradients, strict=True)])


def _move(
    params: Sequence[Tensor],
    state: State,
    lr: float | Tensor,
    weight_decay: float,
    coefficients: Sequence[tuple[Rate, Rate]],
    found: Tensor | None,
) -> None:
    """Take D ← αv + βD, W ← W - η(D + weight decay W), with v in `.grad` and D the momentum buffer.

    Args:
        params: parameters, all with a gradient.
        state: the optimizer's.
        lr: η.
        weight_decay: of the group.
        coefficients: α and β of each parameter; on a CUDA device tensors there.
        found: on the device, 1 where the step is to be skipped; None where it is not.
    """
    for parameter in params:
        if state[parameter].get("momentum_buffer") is None:
            state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    buffers = [state[parameter]["momentum_buffer"] for parameter in params]
    gradients = [parameter.grad.to(parameter.dtype) for parameter in params if parameter.grad is not None]
    alphas, betas = zip(*coefficients, strict=True)
    if found is not None:  # all gradients are 0 then
        betas = tuple(torch.where(found.reshape(()) > 0, 1.0, beta) for beta in betas)
        lr = lr * (found.reshape(()) == 0)
    torch._foreach_mul_(buffers, betas)
    torch._foreach_add_(buffers, torch._foreach_mul(gradients, alphas))
    moves = torch._foreach_add(buffers, list(params), alpha=weight_decay) if weight_decay else buffers
    if isinstance(lr, Tensor):
        torch._foreach_sub_(list(params), [move * lr.to(move.device) for move in moves])
    else:
        torch._foreach_add_(list(params), list(moves), alpha=-lr)

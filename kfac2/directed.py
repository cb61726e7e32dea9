"""Steps in the space of directions: from the rows at hand and two directions of each layer to new parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac2.coarse.directions import TAU, Quadratic, coefficients, divergence_of, products, quadratic, with_correlations
from kfac2.descent import directed_step, times
from kfac2.directed_work import Settings, Work
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


class _Layers:
    """What steps need of some layers, and is the same each time: made once."""

    def __init__(self, layers: list[Layer]) -> None:
        self.matrices = Matrices(layers, 2)
        self._weights = WeightNorms(layers, layers[0].weight.device)

    def squares(self) -> Tensor:
        """Return |W_i|², (L,), with a floor: weights may be 0."""
        return torch.maximum(self._weights.now(), self._weights.floors).square()


class _Projection(NamedTuple):
    """What a step in the space is made of, once it is known which layers have rows.

    Attributes:
        work: of these layers.
        settings: η and μ of each.
        matrices: v and d of each, (2, blocks, d_out, d_in).
        grams: their inner products, (L, 2, 2).
        slopes: ⟨v_i, ∇_i⟩ and ⟨d_i, ∇_i⟩, (L, 2).
        fisher: ZᵀFZ, (2L, 2L).
        weights: |W_i|², (L,).
    """

    work: Work
    settings: Settings
    matrices: list[Tensor]
    grams: Tensor
    slopes: Tensor
    fisher: Tensor
    weights: Tensor

    @property
    def rates(self) -> Tensor:
        """η of each coefficient, (2L,)."""
        return self.settings.rates.repeat(2)

    @property
    def one_level(self) -> Tensor:
        """Coefficients of one level's step, v + μ d, (2L,)."""
        return torch.cat([torch.ones_like(self.settings.momentum), self.settings.momentum])


class Directed(OwnSteps):
    """The steps of one optimizer in the space of directions.

    Args:
        samples: gives how many samples they are measured with, at most.

    Attributes:
        signal: whether they pay.
        latest: coefficients of the last one that was taken, or None.
    """

    reads_gradients = True

    def __init__(self, samples: Callable[[], int]) -> None:
        self.signal = SignalShare()
        self.latest: Coefficients | None = None
        self._samples = samples
        self._batch = 0  # samples of this iteration's largest pass
        self._correlations: tuple[tuple[str, ...], Tensor] | None = None
        self._layers: _Layers | None = None
        self._looked: dict[str, Tensor] = {}  # by layer, the step ηD that was looked at last, one dimension

    @property
    def waits(self) -> bool:
        """Whether the slope along the last step in the space is wanted, be it taken or only looked at."""
        return self.signal.waits

    @property
    def only_looks(self) -> bool:
        """Whether steps in the space are not taken for now, only looked at."""
        return not self.signal.is_on

    def wants_step(self, iteration: int) -> bool:
        """Tell whether an iteration has a step in the space, or a look at one."""
        return self.signal.wants_step(iteration)

    def part(self, samples: int) -> int:
        """Return how many of so many samples of a batch are measured; note the size of the batch."""
        self._batch = max(self._batch, samples)  # an own pass is asked about as well, when the batch is known
        return min(samples, self._samples())

    def decide(self) -> None:
        """Read what the last steps were like, and say whether steps are taken in the space from now on."""
        self.signal.decide()

    def step(self, work: Work) -> set[int]:
        """Take a step with the layers that have rows, or look at it; return ids of the parameters that have moved.

        Without any rows nothing moves, and what the last step was like is measured.

        Args:
            work: what it is made of.
        """
        if work.has_rows and work.processes.is_alone:
            used = {use.layer for one in work.passes for use in one.uses}
            work = work._replace(layers=[layer for layer in work.layers if layer in used])
        if not work.layers or not (work.has_rows or self.signal.waits):
            return set()
        if self._looked:
            self._measure_look(work)
            if self.signal.is_new:
                self.signal.decide()
                if not self.signal.is_on:
                    return set()
        if not work.has_rows:
            self._measure_without_rows(work)
            return set()
        of = self._projected(work)
        self._measure_step(of.work, of.slopes, of.settings.rates)
        model, c = self._solved(of)
        if self.signal.is_on:
            return self._take(of, model, c)
        self._look(of, model, c)
        return set()

    def _made_of(self, layers: list[Layer]) -> _Layers:
        if self._layers is None or not self._layers.matrices.fits(layers):
            self._layers = _Layers(layers)
        return self._layers

    def _projected(self, work: Work) -> _Projection:
        """Project the Fisher of the rows on the space of the layers that have rows in some process."""
        batch, self._batch = self._batch, 0
        samples = min(batch, self._samples()), batch
        if batch and work.processes.is_alone:
            self.signal.rows = samples[0] / batch
        fine = {key: p.grad for key, p in work.parameters().items()}
        own = self._made_of(work.layers)
        matrices = own.matrices.of((fine, work.last_updates(self.signal.was_taken)))
        fisher, places, taken = _fisher(work.passes, work.layers, matrices, work.processes, samples)
        self.signal.rows = self.signal.rows if taken is None else taken
        weights = own.squares()
        if len(places) < len(work.layers):  # no process has rows of the others
            work, matrices = work._replace(layers=[work.layers[i] for i in places]), [matrices[i] for i in places]
            weights = weights[places]
        grams, slopes = _inner_products(matrices, work.gradients())
        return _Projection(work, work.settings(), matrices, grams, slopes, fisher, weights)

    def _measure_look(self, work: Work) -> None:
        """Measure the slope on this batch along the step that was looked at last."""
        looked, self._looked = self._looked, {}
        slope = None
        if sorted(looked) == sorted(work.names):
            pairs = zip((looked[name] for name in work.names), work.gradients(), strict=True)
            slope = torch.stack([step @ gradient.to(step.dtype) for step, gradient in pairs]).double().sum()
        self.signal.measured(slope, work.found)

    def _measure_without_rows(self, work: Work) -> None:
        """Measure the slope along the last step that was taken, unless that is done."""
        if self.signal.waits:
            last = work.last_updates(was_taken=True)
            matrices = self._made_of(work.layers).matrices.of((last, last))
            self._measure_step(work, _inner_products(matrices, work.gradients())[1], work.settings().rates)

    def _measure_step(self, work: Work, slopes: Tensor, rates: Tensor) -> None:
        """Measure the slope on this batch along the last step that was taken; after a look there is nothing to do.

        Args:
            work: of the layers.
            slopes: ⟨v_i, ∇_i⟩ and ⟨d_i, ∇_i⟩, (L, 2).
            rates: η of each, (L,).
        """
        is_same = self.latest is not None and self.latest.names == work.names
        self.signal.measured((slopes[:, 1].double() * rates).sum() if is_same else None, work.found)

    def _solved(self, of: _Projection) -> tuple[Quadratic, Tensor]:
        """Return the model and the coefficients, held to their bounds; where the solve fails, those of one level."""
        work, names = of.work, of.work.names
        known = self._correlations[1] if self._correlations is not None and self._correlations[0] == names else None
        model, correlations = with_correlations(quadratic(of.fisher, of.grams, of.slopes, of.weights), known)
        c = coefficients(model, TAU if work.tau is None else work.tau)
        c = c * _within(MOST_CHANGE, c, of.settings.rates, of.grams, of.weights)
        c = self._held(model, c, of.rates, work.bound)
        is_solved = c.isfinite().all()
        self._correlations = names, torch.where(is_solved, correlations, 0.0 if known is None else known)
        return model, torch.where(is_solved, c, of.one_level)

    def _held(self, model: Quadratic, c: Tensor, rates: Tensor, bound: float | None) -> Tensor:
        """Shorten a step by the length of the signal, and hold it to its bound."""
        c = min(1.0, self.signal.length) * c
        if bound is None:
            return c
        most = SHARE_OF_BOUND * bound * self.signal.length**2
        divergence = divergence_of(model, c, rates)
        return c * torch.where(divergence > most, (most / divergence).sqrt(), 1.0)

    def _take(self, of: _Projection, model: Quadratic, c: Tensor) -> set[int]:
        """Take a step, and note what the model says of it; return ids of the parameters that have moved."""
        work, rates = of.work, of.rates
        self.signal.took((rates * c) @ model.slopes, divergence_of(model, c, rates), work.found)
        self.latest = Coefficients(work.names, *c.chunk(2))
        on_host = work.found is None and c.device.type == "cpu"
        fine_and_last = (list(half.tolist() if on_host else half.unbind()) for half in c.chunk(2))
        pairs = zip(work.layers, *fine_and_last, strict=True)
        of_part = {id(p): (alpha, beta) for layer, alpha, beta in pairs for p in (layer.weight, layer.bias)}
        moving = work.parameters()
        for group in work.groups:
            own = [p for p in group["params"] if id(p) in moving]
            if own:
                rate = times(group["lr"], work.factor)
                decay, coefficients_of = group["weight_decay"], [of_part[id(p)] for p in own]
                directed_step(own, work.state, rate, decay, coefficients_of, work.found)
        return {*moving}

    def _look(self, of: _Projection, model: Quadratic, c: Tensor) -> None:
        """Note a step that is not taken, and what the model says of its slope after one level's step."""
        moved, taken = of.rates * c, of.rates * of.one_level
        self.signal.looked(moved @ model.slopes, moved @ model.fisher @ taken, of.work.found)
        pairs = zip(of.work.names, of.matrices, moved.view(2, -1).T, strict=True)
        self._looked = {name: own.to(m.dtype) @ m.flatten(1) for name, m, own in pairs}

    # -- state ----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return what a saved state holds."""
        return {
            "signal": self.signal.state(),
            "names": None if self.latest is None else list(self.latest.names),
            "correlated": None if self._correlations is None else list(self._correlations[0]),
            "correlations": None if self._correlations is None else self._correlations[1].clone(),
            "looked": {name: step.clone() for name, step in self._looked.items()},
        }

    def load(self, state: Mapping[str, Any] | None, device: torch.device) -> None:
        """Go on from what `state` returned; None: from the start."""
        self.latest, self._correlations, self._looked = None, None, {}
        self.signal.load(**(SignalShare().state() if state is None else state["signal"]))
        if state is None:
            return
        self.signal.to(device)
        if state["names"] is not None:
            unknown = torch.full((len(state["names"]),), torch.nan, dtype=torch.float64, device=device)
            self.latest = Coefficients(tuple(state["names"]), unknown, unknown)
        if state["correlations"] is not None:  # states of before there were looks lack whose they are
            self._correlations = tuple(state.get("correlated", state["names"])), state["correlations"].to(device)
        self._looked = {name: step.to(device) for name, step in state.get("looked", {}).items()}


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

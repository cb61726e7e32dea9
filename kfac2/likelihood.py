"""What is differentiated for the Fisher: log-probabilities of drawn labels, or every direction of a distribution."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal

from kfac2.softmax import Softmax, won_race

Prediction = Distribution | Tensor | list[Distribution] | tuple[Distribution, ...]
"""A predictive distribution; log-probabilities of labels drawn from one; or one distribution for each head."""

_REDRAWS = 10  # of labels whose log-probability is not finite


class NotFiniteError(ValueError):
    """Statistics cannot be taken for a NaN or an infinity.

    Attributes:
        source: what holds it.
    """

    def __init__(self, source: str) -> None:
        super().__init__(f"statistics must be finite, got a NaN or an infinity in {source}")
        self.source = source


@dataclass(frozen=True)
class Scores:
    """Scalars with a graph, whose gradients g at the outputs make the Fisher: F = 1/M Σ g gᵀ over scalars and cases.

    Attributes:
        cases: M, log-probabilities of one head.
        leading: the leading size of these.
        drawn: the log-probabilities of labels drawn once, added up.
        weight: what its gradients are multiplied by; 0 where they are no part of the Fisher.
        directions: the further scalars.
        total: Σ of the log-probabilities of labels that were drawn unseen, one number: not finite where one of them is
            not. None: the host has looked, or the labels are the caller's.
    """

    cases: int
    leading: tuple[int, ...]
    drawn: Tensor
    weight: float = 1.0
    directions: Sequence[Callable[[], Tensor]] = ()
    total: Tensor | None = None


def scores_of(prediction: Prediction, exact: bool = False, samples: int = 1, looks: bool = True) -> Scores:
    """Draw labels from a prediction, or find its directions.

    The Fishers of several heads add up: each is the mean over its own cases, as its loss is. A head with other cases
    than the first is weighted by √(M_1/M_h). Labels of heads are drawn apart: their products vanish in the mean.

    Args:
        prediction: distributions whose parameters carry the graph, or log-probabilities that do.
        exact: whether all directions of the Fisher are wanted, not drawn labels.
        samples: how often labels are drawn.
        looks: whether the host looks for NaNs and infinities before it draws. If not, a Categorical, a Normal, or
            one that is Independent of these is drawn from unseen, and `total` tells; nothing waits for the device.

    Raises:
        TypeError: if it is none of these, or no directions are known of a distribution.
        ValueError: if it carries no graph, or the list is empty.
        NotFiniteError: if no labels can be drawn for a NaN or an infinity.
    """
    if isinstance(prediction, Tensor):
        if exact or samples > 1:
            raise TypeError(
                "distribution must be a torch.distributions.Distribution with fisher='exact' or samples above 1, got "
                "log-probabilities of labels that are drawn already"
            )
        _check_graph("log-probabilities", prediction)
        return Scores(prediction.numel(), tuple(prediction.shape[:1]), _added([prediction]))
    heads: list[Distribution] = list(prediction) if isinstance(prediction, (list, tuple)) else [prediction]
    if not heads:
        raise ValueError("distribution must hold at least one head, got an empty list")
    for head in heads:
        if not isinstance(head, Distribution):
            raise TypeError(
                "distribution must be a torch.distributions.Distribution, a list of them, or a tensor of "
                f"log-probabilities, got {type(head).__name__}"
            )
    draws = [_draws(head, looks) for head in heads]
    drawn = [draw() for draw in draws]
    cases = drawn[0].numel()
    weights = [math.sqrt(cases / max(log_prob.numel(), 1)) for log_prob in drawn]
    directions: list[Callable[[], Tensor]] = []
    if exact:
        for head, weight in zip(heads, weights, strict=True):
            directions += [_weighted(direction, weight) for direction in _directions(head)]
    else:
        directions = [_weighted(_draw_again(draws, weights), samples**-0.5)] * (samples - 1)
    weight_of_drawn = 0.0 if exact else samples**-0.5
    total = None if looks else torch.stack([log_prob.detach().sum(dtype=torch.float64) for log_prob in drawn]).sum()
    return Scores(cases, tuple(drawn[0].shape[:1]), _added(drawn, weights), weight_of_drawn, directions, total)


def tensors_of(prediction: Prediction) -> list[Tensor]:
    """Return the tensors that a prediction is made of."""
    if isinstance(prediction, Tensor):
        return [prediction]
    heads = prediction if isinstance(prediction, (list, tuple)) else [prediction]
    return [value for head in heads if isinstance(head, Distribution) for _, value in _parameters(head)]


# -- drawn labels -----------------------------------------------------------------------------------------------


def _draws(distribution: Distribution, looks: bool) -> Callable[[], Tensor]:
    """Return what draws labels, each time other ones, and gives their log-probabilities."""
    draw = _of_softmax(distribution)
    if draw is None:
        return lambda: _log_prob_of_drawn_labels(distribution, looks)
    if looks:
        _check_no_nan(distribution)
    return draw


def _of_softmax(distribution: Distribution) -> Callable[[], Tensor] | None:
    """Return what draws, unseen, from a Categorical of logits, or one that is Independent; None of any other."""
    if type(distribution) is Independent:
        draw = _of_softmax(distribution.base_dist)
        return None if draw is None else _with_events(draw, distribution.reinterpreted_batch_ndims)
    softmax = Softmax.of(distribution) if type(distribution) is Categorical else None
    return None if softmax is None else softmax.draw


def _with_events(draw: Callable[[], Tensor], axes: int) -> Callable[[], Tensor]:
    """Add up so many of the last axes of what is drawn."""

    def summed() -> Tensor:
        with torch.enable_grad():
            return draw().sum(tuple(range(-axes, 0)))

    return summed if axes else draw


def _log_prob_of_drawn_labels(distribution: Distribution, looks: bool) -> Tensor:
    labels = None if looks else _labels_unseen(distribution)
    if labels is not None:
        with torch.enable_grad():
            log_prob = _unchecked(distribution).log_prob(labels)
        _check_graph(f"a {type(distribution).__name__} of detached parameters", log_prob)
        return log_prob
    _check_no_nan(distribution)
    try:
        labels = _finite_labels(distribution)
        with torch.enable_grad():
            log_prob = distribution.log_prob(labels)
    except (RuntimeError, ValueError) as error:  # what sampling from infinities raises
        source = _not_finite_source(distribution)
        if source is None:
            raise
        raise NotFiniteError(source) from error
    _check_graph(f"a {type(distribution).__name__} of detached parameters", log_prob)
    return log_prob


@torch.no_grad()
def _labels_unseen(distribution: Distribution) -> Tensor | None:
    """Draw what `.sample()` would, of the same random numbers, without its checks, which wait for the device.

    Of NaNs a label is drawn as well, whose log-probability is NaN. None: of this distribution that is not known.
    """
    if type(distribution) is Independent:
        return _labels_unseen(distribution.base_dist)
    if type(distribution) is Categorical:
        return won_race(distribution.probs)
    if type(distribution) is Normal:
        return torch.randn_like(distribution.loc) * distribution.scale + distribution.loc
    return None


def _unchecked(distribution: Distribution) -> Distribution:
    """Return the same distribution without checks of what it is given."""
    same = copy.copy(distribution)
    same._validate_args = False
    if isinstance(same, Independent):
        same.base_dist = _unchecked(same.base_dist)
    return same


@torch.no_grad()
def _finite_labels(distribution: Distribution) -> Tensor:
    """Draw labels; one whose log-probability is not finite (a saturated tanh of a Gaussian) is drawn again."""
    labels = distribution.sample()
    if not labels.is_floating_point():
        return labels
    for _ in range(_REDRAWS):
        bad = ~distribution.log_prob(labels).isfinite()
        if not bool(bad.any()):
            break
        shape = bad.reshape(*bad.shape, *(1,) * (labels.dim() - bad.dim()))
        labels = torch.where(shape, distribution.sample(), labels)
    return labels


def _draw_again(draws: Sequence[Callable[[], Tensor]], weights: Sequence[float]) -> Callable[[], Tensor]:
    return lambda: _added([draw() for draw in draws], weights)


def _added(log_probs: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    with torch.enable_grad():
        sums = [log_prob.sum() for log_prob in log_probs]
        return sum((s * w for s, w in zip(sums[1:], (weights or [1.0])[1:], strict=True)), sums[0])


def _check_graph(what: str, log_prob: Tensor) -> None:
    if not log_prob.requires_grad:
        raise ValueError(
            f"distribution must carry the model's graph, got {what}: build it from the model's output, outside "
            "torch.no_grad()"
        )


# -- all directions ---------------------------------------------------------------------------------------------


def _directions(distribution: Distribution) -> Iterator[Callable[[], Tensor]]:
    """Yield scalars whose gradients' outer products add up to M times the Fisher, for each sample (type-2 GGN).

    Categorical: √p_c log p_c, since F = Σ_c p_c s_c s_cᵀ with the scores s_c. Bernoulli: √(p(1-p)) · logit. Normal:
    loc / scale, and √2 log scale where that carries a graph. One for each number that a sample predicts.
    """
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    with torch.enable_grad():
        if isinstance(distribution, Categorical):
            logits = distribution.logits.log_softmax(-1)
            parts = [logits.detach().exp().sqrt() * logits]
        elif isinstance(distribution, Bernoulli):
            p = distribution.probs.detach()
            parts = [(p * (1 - p)).sqrt() * distribution.logits]
        elif isinstance(distribution, Normal):
            scale = distribution.scale.detach()
            parts = [distribution.loc / scale, math.sqrt(2) * distribution.scale.log()]
        else:
            raise TypeError(
                "distribution must be a Categorical, Bernoulli or Normal with fisher='exact', got "
                f"{type(distribution).__name__}: take fisher='mc', with samples= for less noise"
            )
    for part in parts:
        if not part.requires_grad:
            continue
        with torch.enable_grad():
            flat = part.reshape(part.shape[0], -1) if part.dim() else part.reshape(1, 1)
        for number in range(flat.shape[1]):
            yield _column(flat, number)


def _column(flat: Tensor, number: int) -> Callable[[], Tensor]:
    """Add up one number of all samples, with drawn signs.

    Where samples depend on each other (batch norm), the products of two samples' scores, which are no part of the
    Fisher, vanish in the mean; elsewhere a sign changes nothing.
    """

    def direction() -> Tensor:
        signs = 2 * torch.randint(2, flat.shape[:1], device=flat.device).to(flat.dtype) - 1
        with torch.enable_grad():
            return (flat[:, number] * signs).sum()

    return direction


def _weighted(direction: Callable[[], Tensor], weight: float) -> Callable[[], Tensor]:
    def weighted() -> Tensor:
        with torch.enable_grad():
            return direction() * weight

    return weighted


# -- what is not finite -----------------------------------------------------------------------------------------


def _parameters(distribution: Distribution) -> Iterator[tuple[str, Tensor]]:
    """Find the tensors of a distribution, and of those that it is made of."""
    for name, value in vars(distribution).items():
        if isinstance(value, Distribution):
            yield from _parameters(value)
        elif isinstance(value, Tensor) and value.is_floating_point():
            yield name, value


def _not_finite_source(distribution: Distribution) -> str | None:
    """Name what is not finite where drawing labels failed."""
    for name, value in _parameters(distribution):
        if not value.isfinite().all():
            return f"{name.lstrip('_')} of the distribution"
    return None


def _check_no_nan(distribution: Distribution) -> None:
    """Check before labels are drawn: on a CUDA device, to draw of NaNs ends the process."""
    if any(_has_nan(value) for _, value in _parameters(distribution)):
        raise NotFiniteError(_not_finite_source(distribution) or "the distribution")


def _has_nan(values: Tensor) -> bool:
    """Tell by the greatest number, which is NaN if any is: no mask as large as a language model's logits."""
    return bool(values.numel()) and bool(values.detach().amax().isnan())

"""What the loss reaches of a pass: how many samples it has, and which rows are none, as no gradient comes to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from kfac2.statistics import Use, is_of_samples


def share_reached(use: Use) -> float:
    """Return the share of the leading entries of a use that have a gradient."""
    return float((use.g != 0).reshape(use.samples, -1).any(1).double().mean())


def batch_size(uses: Sequence[Use], leading: Sequence[int], share: Callable[[Use], float] = share_reached) -> int:
    """Return N, the leading size that most uses share; of two, that of the log-probabilities, then the last use's.

    Where they differ, a use has a vote as large as the share of its leading entries that the loss reaches: experts have
    slots that stay empty.
    """
    votes = dict.fromkeys((use.samples for use in uses), 0.0)
    for use in uses:
        votes[use.samples] += 1.0 if len(votes) == 1 else share(use)
    most = max(votes.values())
    shared = [size for size, count in votes.items() if count > most - 1e-9]
    return next(size for size in (*leading, *(use.samples for use in reversed(uses))) if size in shared)


def counted_cases(last: Use, samples: int, cases: int | str | None) -> int:
    """Return M of an ordinary backward pass, whose loss says no M.

    Args:
        last: the last use of its forward pass.
        samples: N.
        cases: see `KFAC`.

    Raises:
        ValueError: if nobody says whether the loss is a mean over samples or over rows.
    """
    rows = last.row_count
    if cases is None and rows != samples:
        raise ValueError(
            "cases must be given with fisher='empirical' where the last layer has another number of rows than there "
            f"are samples, got None with {rows} rows of {last.layer.title} and {samples} samples: "
            "cases='rows' if the loss is a mean over all of them (a token loss), 'samples' if it is one over samples, "
            "or the number of its terms"
        )
    return {"rows": rows, "samples": samples, None: samples}.get(cases, cases)  # type: ignore[arg-type,return-value]


class Reach:
    """Finds the rows that the loss cannot reach, one use after the other, the last ones first.

    A row cannot be reached if g is exactly 0 there in every use on its grid. Where the use that is seen first has none
    such, as in most passes, nothing else is looked at. A use that does not fit the samples (an expert, some of its
    slots empty) is a grid of its own: others of that size hold other rows.

    Args:
        uses: of the pass, whose sizes alone count here.
        samples: N.
        mask: bool, (N, S): which tokens are data, or None.

    Raises:
        ValueError: if `mask` is none, or fits no use.
    """

    def __init__(self, uses: Sequence[Use], samples: int, mask: Tensor | None) -> None:
        self._samples = samples
        self._mask = mask
        self._places = {use.places for use in uses if use.samples == samples}
        self._has_dead = False
        self._dead: dict[object, Tensor | None] = {}  # by grid; None: it is known that all rows are reached
        if mask is not None:
            _check_mask(mask, uses)

    def see(self, use: Use) -> Use:
        """Look at the gradients of a use, and return it with those left out that `mask` leaves out."""
        masked = use
        if self._mask is not None and (use.samples, use.places) in _shapes(self._mask):
            masked = use.only(self._mask.to(use.g.device).reshape(use.samples, use.places))
        looked_at: list[tuple[object, Use]] = [("samples", masked)] if use.samples == self._samples else []
        looked_at += [(self._grid(use), use)] if use.layer.has_tokens else []
        self._look([(key, rows) for key, rows in looked_at if self._dead.get(key, rows) is not None])
        return masked

    def without_zeros(self, use: Use) -> Use:
        """Return a use that was seen without rows whose g is known to be 0: in Σ g gᵀ they say nothing."""
        for dead in self._dead_of(use) if self._has_dead else ():
            use = use.only(~dead.expand(-1, use.places))
        return use

    def applied(self, uses: Sequence[Use]) -> list[Use]:
        """Return the uses without rows that cannot be reached, now that all were seen; none where no row is left."""
        result = [self.without_zeros(use) for use in uses]
        return [use for use in result if use.reached is None or use.row_count]

    def _grid(self, use: Use) -> object:
        if use.samples == self._samples or is_of_samples(use, self._places, self._samples):
            return use.samples, use.places
        return use.samples, use.places, use.order

    def _dead_of(self, use: Use) -> list[Tensor]:
        keys = ["samples"] if use.samples == self._samples else []
        found = [self._dead.get(key) for key in (*keys, *([self._grid(use)] if use.layer.has_tokens else []))]
        return [dead for dead in found if dead is not None]

    def _look(self, uses: Sequence[tuple[object, Use]]) -> None:
        """Look where rows are dead; waits for the device, once."""
        dead: dict[object, Tensor] = {}
        for key, use in uses:
            none = (use.grads.tensor == 0).all(1).reshape(use.samples, -1)
            none = none.all(1, keepdim=True) if key == "samples" else none
            before = self._dead.get(key)
            dead[key] = none if before is None else before & none
        for key, has_some in zip(dead, _any(dead.values()), strict=True):
            self._dead[key] = dead[key] if has_some else None
            self._has_dead = self._has_dead or has_some


def _any(masks: Iterable[Tensor]) -> list[bool]:
    """Tell of each mask whether anything is set, in one copy."""
    found = [mask.any() for mask in masks]
    return torch.stack(found).tolist() if found else []


def with_reached(uses: Sequence[Use], samples: int, mask: Tensor | None) -> list[Use]:
    """Leave out the rows that the loss cannot reach, and those that `mask` does, of uses whose gradients are there."""
    reach = Reach(uses, samples, mask)
    return reach.applied([reach.see(use) for use in reversed(uses)][::-1])


def _shapes(mask: Tensor) -> set[tuple[int, ...]]:
    return {tuple(mask.shape), (mask.numel(), 1)}


def _check_mask(mask: Tensor, uses: Sequence[Use]) -> None:
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise ValueError(f"mask must be a bool tensor of shape (N, S), got {mask.dtype} of shape {tuple(mask.shape)}")
    if not any((use.samples, use.places) in _shapes(mask) for use in uses):
        raise ValueError(
            f"mask must have the shape (N, S) of the tokens of a layer, got {tuple(mask.shape)}; "
            f"the layers have {sorted({(use.samples, use.places) for use in uses})}"
        )

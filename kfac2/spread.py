"""Damping by the spread of factors between updates, `damping="auto"`: as much as the factors are not known."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfac2.brought import brought
from kfac2.layout import Layout, Stacks
from kfac2.triangles import all_diagonals, bytes_of_diagonals, few_at_a_time

FIRST = 0.1  # c until there is a spread
KEPT = 0.8  # of the spread so far, at each update
LEAST, MOST = 0.14, 3.0  # bounds of √c; below it a deep stack of batch norm went astray (c = 0.02)


def followed(
    layout: Layout,
    spread: Tensor | None,
    old: tuple[Stacks, Stacks],
    new: tuple[Stacks, Stacks],
    again: Sequence[bool],
    kept: float,
) -> Tensor:
    """Average in how far one batch lies from the running averages: s ← 0.8 s + 0.2 d |X_batch - X̄_old|²_F / (tr X̄)².

    X_batch - X̄_old = (X̄_new - X̄_old) / (1 - ε), since X̄_new = ε X̄_old + (1 - ε) X_batch. A block's first value is
    taken as it is. Reads nothing back.

    Args:
        layout: where the factors lie.
        spread: s so far, see `damping`; None: of no block.
        old: the running averages of A and G before the update.
        new: after it.
        again: by layer, whether its factors had been there before, and have had rows in this update.
        kept: ε of the update.

    Returns:
        The new s. A block that is not there `again`, or whose factor is zero, keeps what it has.
    """
    spread = unknown(layout) if spread is None else spread
    if not any(again):
        return spread
    sizes = [b.d_in for b in layout.batches for _ in range(b.blocks)]
    sizes += [b.d_out for b in layout.batches for _ in range(b.blocks)]
    squares = _squares([*old[0], *old[1]], [*new[0], *new[1]], brought(sizes, torch.float64, layout.device))
    latest = squares.view(2, -1) / (1 - kept) ** 2
    usable = latest.isfinite()  # a zero divided by a zero says nothing
    if not all(again):
        usable &= brought(again, torch.bool, layout.device)[layout.layer_of_block]
    mixed = torch.where(spread.isnan(), latest, torch.lerp(latest, spread, KEPT))
    return torch.where(usable, mixed, spread)


def _squares(old: Stacks, new: Stacks, sizes: Tensor) -> Tensor:
    """Return d |new - old|²_F / (tr new)² of the blocks of all stacks, in float64, given triangles, and d of each."""
    halves = [norms for part in few_at_a_time(new) for norms in _norms_of_differences(old[part], new[part])]
    parts = [(old[part], new[part]) for part in few_at_a_time(new, bytes_of_diagonals)]
    of_diagonals, traces = (
        torch.cat(numbers) for numbers in zip(*(_of_diagonals(*part) for part in parts), strict=True)
    )
    # what is off the diagonal is there twice
    squares = 2 * torch.cat(halves).double().square() - of_diagonals.square()
    return sizes * squares / traces.square()


def _of_diagonals(old: Stacks, new: Stacks) -> tuple[Tensor, Tensor]:
    """Return the norm of what the diagonals of some blocks have changed by, and their traces."""
    dtype = new[0].dtype if len({stack.dtype for stack in new}) == 1 else torch.float64
    diagonals = all_diagonals(new, dtype)
    changes = torch.linalg.vector_norm(diagonals - all_diagonals(old, dtype), dim=-1)
    return changes.double(), diagonals.sum(-1).double()


def _norms_of_differences(old: Stacks, new: Stacks) -> Stacks:
    return [torch.linalg.vector_norm(difference, dim=(1, 2)) for difference in torch._foreach_sub(new, old)]


def damping(layout: Layout, spread: Tensor | None, kept: float) -> Tensor:
    """Return c, where √c is the median relative error of the factors.

        r = √((1 - ε)/(1 + ε) · s),    √c = the median of r over the A and G of all blocks, within [0.14, 3].

    Where batches are independent draws of a factor, |X_batch - X̄|²_F estimates the variance of a draw, and a running
    average, whose weights are (1 - ε) εᵏ, has (1 - ε)/(1 + ε) of it: r is the standard error of an average, a root mean
    square over its d eigenvalues, in units of their mean. An eigenvalue below r is noise, and its inverse no more than
    that: a factor known to ± r cannot be inverted better than with r added. Eq. 9 adds √c of the mean to both factors.

    Args:
        layout: where the factors lie.
        spread: s, (2, blocks), float64: of the A and the G of each block, batch after batch; NaN, or None, where there
            is none.
        kept: ε of the last update.

    Returns:
        c, float64, on the device, which is not waited for; 0.1 where there is no spread yet.
    """
    spread = unknown(layout) if spread is None else spread
    ordered = spread.flatten().sort().values  # NaNs come last; torch.nanmedian would wait for a CUDA device
    middle = (ordered.isfinite().sum() - 1).clamp(min=0) // 2
    error = (ordered.gather(0, middle.reshape(1))[0] * ((1 - kept) / (1 + kept))).sqrt()
    return torch.where(error.isnan(), FIRST, error.clamp(LEAST, MOST).square())


def unknown(layout: Layout) -> Tensor:
    """Return s where nothing is known."""
    return torch.full((2, len(layout.layer_of_block)), torch.nan, dtype=torch.float64, device=layout.device)


def moved(spread: Tensor | None, old: Layout, new: Layout) -> Tensor | None:
    """Return s where another layout says; a layer that was not there has none."""
    if spread is None:
        return None
    result = unknown(new)
    for target, source in zip(result, spread, strict=True):
        new.moved(by_batch(old, source), old, by_batch(new, target))
    return result


def by_batch(layout: Layout, numbers: Tensor) -> Stacks:
    """View one number for each block as a field of the layout."""
    return list(numbers.split([batch.blocks for batch in layout.batches]))

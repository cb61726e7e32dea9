"""A step measured: dᵀFd, with the Fisher of the rows at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kfac2.kinds import Layer, Rows
from kfac2.ops.directional_derivatives import directional_derivatives
from kfac2.ops.gather_gradients import gather_gradients
from kfac2.ops.layer_maps import sum_dtype
from kfac2.statistics import Pass

Direction = Callable[[Tensor], Tensor | None]


class KeptUse(NamedTuple):
    """What is kept of a use until the step is known: the first samples of its rows.

    Attributes:
        layer: whose weight it is.
        inputs: the rows ā.
        grads: the rows g.
        samples: the leading size.
        fits: whether its rows belong to the samples, see `Pass.fits`.
    """

    layer: Layer
    inputs: Rows
    grads: Rows
    samples: int
    fits: bool


class KeptPass(NamedTuple):
    """What is kept of a pass.

    Attributes:
        uses: of its layers.
        samples: how many samples were kept.
        cases: M of these.
    """

    uses: list[KeptUse]
    samples: int
    cases: float


def kept_of(passed: Pass, share: float = 0.25, least: int = 32) -> KeptPass:
    """Keep a share of the samples of a pass, and at least so many."""
    whole = passed.samples
    count = min(whole, max(least, int(whole * share)))
    uses = []
    for use in passed.uses:
        inputs, grads, samples = use.inputs, use.grads, use.samples
        g = grads.tensor
        if count < whole and samples > 1:
            samples = max(1, samples * count // whole)
            inputs, g = Rows(inputs.tensor[:samples], inputs.window), g[:samples].clone()  # else all of g would stay
        grads = Rows(g * passed.scale if passed.scale != 1 else g, grads.window)
        uses.append(KeptUse(use.layer, inputs, grads, samples, passed.fits(use)))
    return KeptPass(uses, count, passed.cases * count / whole)


def divergence(passes: Sequence[KeptPass], direction: Direction) -> Tensor:
    """Return dᵀFd = 1/M Σ_n (Σ_i s_ni)², s_ni = Σ_t g_ntᵀ D_i ā_nt: twice the divergence that a step d would bring.

    s_ni is the derivative of sample n's log-likelihood along layer i's part D_i of the step. All layers are coupled,
    where the KL clip sees each for itself. A use whose rows do not fit the samples counts for
    itself here, too.

    Args:
        passes: kept rows of this iteration.
        direction: gives d of a parameter; None where it does not move.

    Returns:
        float64, one number on the device.
    """
    layers = dict.fromkeys(use.layer for kept in passes for use in kept.uses)
    moved = {id(p): direction(p) for layer in layers for p in (layer.weight, layer.bias) if p is not None}
    moving = [layer for layer in layers if moved[id(layer.weight)] is not None]
    matrices = dict(zip(moving, _as_matrices(moving, moved), strict=True))
    squares, cases = [], 0.0
    for kept in passes:
        cases += kept.cases
        uses = [use for use in kept.uses if use.layer in matrices]
        if not uses:
            continue
        products = []
        for use, s in zip(uses, _derivatives(uses, matrices), strict=True):
            if not use.fits:
                squares.append(s.square().sum())
            else:
                products.append(s if use.samples == kept.samples else s.view(1, kept.samples, -1).sum(2))
        if products:
            squares.append(torch.cat(products).sum(0).square().sum())
    return torch.stack(squares).sum() / cases


def _as_matrices(layers: Sequence[Layer], moved: dict[int, Tensor | None]) -> list[Tensor]:
    """Return what moves the parameters as matrices, (1, blocks, d_out, d_in); a bias that does not move has zeros."""
    parts: list[Tensor] = []
    places: list[tuple[int, int, int, int]] = []
    sizes: list[int] = []
    begin = 0
    for i, layer in enumerate(layers):
        blocks, d_out, d_in = layer.matrix_shape
        for part in layer.parts():
            d = moved[id(part.parameter)]
            if d is not None:
                parts.append(d if part.view is None else part.view(d))
                places.append((begin + part.place, d_in, i, 0))
        sizes.append(blocks * d_out * d_in)
        begin += sizes[-1]
    dtype = torch.float64 if any(layer.factor_dtype == torch.float64 for layer in layers) else torch.float32
    matrices = torch.zeros(begin, dtype=dtype, device=layers[0].weight.device if layers else None)
    if layers:
        gather_gradients(parts, torch.tensor(places, device="cpu"), len(layers), 1, matrices)
    return [m.view(1, *layer.matrix_shape) for layer, m in zip(layers, matrices.split(sizes), strict=True)]


def _derivatives(uses: Sequence[KeptUse], matrices: dict[Layer, Tensor]) -> list[Tensor]:
    """Return s_ni of each use, (1, samples)."""
    inputs, windows = zip(*(use.inputs for use in uses), strict=True)
    directions = [matrices[use.layer] for use in uses]
    for i, x in enumerate(inputs):
        if (x.dtype == torch.float64) != (directions[i].dtype == torch.float64):
            directions[i] = directions[i].to(sum_dtype(x.dtype))
    return directional_derivatives(inputs, windows, [use.grads.tensor for use in uses], directions)

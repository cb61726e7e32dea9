"""Raw sums of one iteration, and their running averages (Algorithm 1 of the paper)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kfac2 import ops
from kfac2.layers import Layer
from kfac2.ops.covariances import encoded_covariances
from kfac2.ops.gather_gradients import first_not_finite
from kfac2.ops.layer_maps import encoded_layer_maps

MAP_NUMBERS = 2**22  # of all maps that are alive at a time: 16 MB


@dataclass
class Rows:
    """What one layer contributed to one forward-backward pass: x (N, C, *spatial) and g (N, C, *grid)."""

    layer: Layer
    x: Tensor
    g: Tensor


@dataclass
class RawSums:
    """Sums over the rows of one iteration, not yet normalised; several passes add up.

    Attributes:
        A: Σ ā āᵀ by layer, (blocks, d_in, d_in).
        G: Σ g gᵀ by layer, (blocks, d_out, d_out).
        rows: number of g rows by layer, N · T_i.
        cases: M, independent cases of the loss.
        input_sums: (B, B) over the maps of all layers, or None with one level.
        grad_sums: likewise for g.
    """

    A: dict[Layer, Tensor] = field(default_factory=dict)
    G: dict[Layer, Tensor] = field(default_factory=dict)
    rows: dict[Layer, int] = field(default_factory=dict)
    cases: int = 0
    input_sums: Tensor | None = None
    grad_sums: Tensor | None = None

    def add_pass(
        self,
        passed: Sequence[Rows],
        layers: Sequence[Layer],
        cases: int,
        scale: float,
        levels: int,
        downsample: str,
    ) -> None:
        """Add one forward-backward pass.

        Args:
            passed: the layers that took part, each once, in the order of `layers`.
            layers: all handled layers.
            cases: M of this pass.
            scale: what each g is to be multiplied by (M where g is the gradient of a mean).
            levels: 1 or 2; with 1 no maps are formed.
            downsample: how maps of different grids meet.
        """
        windows = [rows.layer.encoded("input", rows.x.dim() - 2) for rows in passed]
        windows += [rows.layer.encoded("grad", rows.g.dim() - 2) for rows in passed]
        tensors = [rows.x for rows in passed] + [rows.g for rows in passed]
        sums = encoded_covariances(tensors, [number for window in windows for number in window])
        for rows, A, G in zip(passed, sums, sums[len(passed) :], strict=False):
            G = G * scale**2 if scale != 1 else G
            self.A[rows.layer] = self.A[rows.layer] + A if rows.layer in self.A else A
            self.G[rows.layer] = self.G[rows.layer] + G if rows.layer in self.G else G
            self.rows[rows.layer] = self.rows.get(rows.layer, 0) + rows.g.numel() // rows.g.shape[1]
        self.cases += cases
        if levels == 2:
            input_sums, grad_sums = _pair_sums(passed, layers, downsample, scale)
            self.input_sums = input_sums if self.input_sums is None else self.input_sums + input_sums
            self.grad_sums = grad_sums if self.grad_sums is None else self.grad_sums + grad_sums

    def not_finite(self) -> str | None:
        """Name what holds a NaN or an infinity among the sums, or None."""
        if not self.A:
            return None
        sums = [*self.A.values(), *self.G.values()]
        if self.input_sums is not None and self.grad_sums is not None:  # a sum of features may overflow by itself
            sums += [self.input_sums, self.grad_sums]
        first = first_not_finite(sums)
        if first == len(sums):
            return None
        names = [f"the statistics of {layer.name}" for layer in (*self.A, *self.G)]
        return [*names, "the coarse sums of inputs", "the coarse sums of output gradients"][first]


@dataclass(frozen=True)
class Statistics:
    """Running averages; never changed, only replaced, so that a step that fails leaves them as they were.

    Attributes:
        updates: t, statistics updates so far.
        A: A_ii by layer, (blocks, d_in, d_in); a layer not used so far has none.
        G: G_ii by layer, (blocks, d_out, d_out).
        input_sums: the sums of A over all pairs of blocks, (B, B); None with one level.
        grad_sums: the sums of G, (B, B); None with one level.
    """

    updates: int
    A: dict[Layer, Tensor]
    G: dict[Layer, Tensor]
    input_sums: Tensor | None
    grad_sums: Tensor | None


def updated(old: Statistics | None, raw: RawSums, layers: Sequence[Layer], decay: float) -> Statistics:
    """Average one iteration in: ε = min(1 - 1/t, decay), X ← εX + (1 - ε)X_new.

    A layer's first statistics are taken as they are; a layer without rows in this iteration keeps its
    factors, and counts as a zero map in the sums.
    """
    t = 1 if old is None else old.updates + 1
    kept = min(1 - 1 / t, decay)

    def averages(
        before: dict[Layer, Tensor], raw_sums: dict[Layer, Tensor], scales: list[float]
    ) -> dict[Layer, Tensor]:
        new = dict(zip(raw_sums, torch._foreach_mul(list(raw_sums.values()), scales), strict=True))
        known = [layer for layer in new if layer in before]
        if known:
            olds = [before[layer] for layer in known]
            mixed = torch._foreach_lerp([new[layer] for layer in known], olds, kept)
            new.update(zip(known, mixed, strict=True))
        return {**before, **new}

    before_a, before_g = (old.A, old.G) if old is not None else ({}, {})
    A = averages(before_a, raw.A, [1 / raw.cases] * len(raw.A))
    G = averages(before_g, raw.G, [1 / raw.rows[layer] for layer in raw.G])
    if raw.input_sums is None or raw.grad_sums is None:
        return Statistics(t, A, G, None, None)
    in_coarse = [float(layer.in_coarse) for layer in layers for _ in range(layer.maps)]
    counts = [raw.rows.get(layer, 0) for layer in layers for _ in range(layer.maps)]
    mask = raw.input_sums.new_tensor(in_coarse)
    # 1/√(N T_i) for each map: with √(T_i T_j) both matrices of sums stay Gram matrices.
    root = mask * raw.grad_sums.new_tensor([count**-0.5 if count else 0.0 for count in counts])
    return Statistics(
        t,
        A,
        G,
        _average(None if old is None else old.input_sums, raw.input_sums * torch.outer(mask, mask) / raw.cases, kept),
        _average(None if old is None else old.grad_sums, raw.grad_sums * torch.outer(root, root), kept),
    )


def _average(before: Tensor | None, new: Tensor, kept: float) -> Tensor:
    return new if before is None else torch.lerp(new, before, kept)


def without(statistics: Statistics, layers: Sequence[Layer], layer: Layer) -> Statistics:
    """Leave a layer out of the statistics."""
    A, G = (
        {key: value for key, value in factors.items() if key is not layer} for factors in (statistics.A, statistics.G)
    )
    input_sums, grad_sums = statistics.input_sums, statistics.grad_sums
    if input_sums is not None and grad_sums is not None:
        owners = [other for other in layers for _ in range(other.maps)]
        others = [i for i, owner in enumerate(owners) if owner is not layer]
        kept = torch.tensor(others, dtype=torch.long, device=input_sums.device)
        input_sums, grad_sums = input_sums[kept][:, kept], grad_sums[kept][:, kept]
    return Statistics(statistics.updates, A, G, input_sums, grad_sums)


def _pair_sums(passed: Sequence[Rows], layers: Sequence[Layer], downsample: str, scale: float) -> tuple[Tensor, Tensor]:
    """Both (B, B) matrices of sums of one pass, g multiplied by `scale`; a layer that took no part is a zero map."""
    first, blocks = {}, 0
    for layer in layers:
        first[layer] = blocks
        blocks += layer.maps
    samples = next((rows.x.shape[0] for rows in passed if rows.layer.in_coarse), 0)
    fitting = [rows for rows in passed if _fits(rows, samples)]
    if not fitting:
        dtype = torch.float64 if passed[0].x.dtype == torch.float64 else torch.float32
        zeros = torch.zeros(blocks, blocks, dtype=dtype, device=passed[0].x.device)
        return zeros, zeros.clone()
    # One kind after the other, and few samples at a time, so that not all maps are alive together.
    numbers = sum(rows.layer.maps * rows.g.numel() // rows.g.shape[1] for rows in fitting)
    share = max(1, samples * MAP_NUMBERS // max(numbers, 1))
    inputs = [(rows.layer.encoded("input map", rows.x.dim() - 2), rows.x) for rows in fitting]
    grads = [(rows.layer.encoded("grad map", rows.g.dim() - 2), rows.g) for rows in fitting]
    sums = (
        _sums_of_maps(inputs, samples, share, downsample, 1.0),
        _sums_of_maps(grads, samples, share, downsample, scale**2),
    )
    index = [first[rows.layer] + q for rows in fitting for q in range(rows.layer.maps)]
    if len(index) == blocks:
        return sums
    places = torch.tensor(index, device=sums[0].device)
    whole = (sums[0].new_zeros(blocks, blocks), sums[1].new_zeros(blocks, blocks))
    for to, present in zip(whole, sums, strict=True):
        to[places.unsqueeze(1), places] = present
    return whole


def _sums_of_maps(
    sources: Sequence[tuple[list[int], Tensor]], samples: int, share: int, downsample: str, factor: float
) -> Tensor:
    """Add up one matrix of sums over all maps of one kind, `share` of the samples at a time."""
    numbers = [number for window, _ in sources for number in window]
    tensors = [tensor for _, tensor in sources]
    sums: Tensor | None = None
    for begin in range(0, samples, share):
        count = min(share, samples - begin)
        parts = tensors
        if count < samples:
            parts = [x[begin * len(x) // samples : (begin + count) * len(x) // samples] for x in tensors]
        maps = [_on_samples(m, count) for m in encoded_layer_maps(parts, numbers)]
        if len({m.dtype for m in maps}) > 1:  # layers of several precisions
            maps = [m.double() for m in maps]
        sums = ops.cross_layer_sums(maps, downsample, previous=sums, kept=1.0, scale=factor)
    assert sums is not None
    return sums


def _fits(rows: Rows, samples: int) -> bool:
    """Tell whether a layer is in the coarse space; one whose batch is no multiple of N leaves it for good."""
    layer = rows.layer
    if layer.in_coarse and (samples == 0 or rows.x.shape[0] % samples != 0):
        layer.in_coarse = False
        warnings.warn(
            f"kfac2: {layer.name} has a leading size of {rows.x.shape[0]}, which is no multiple of the batch size "
            f"{samples} of the first handled layer; it leaves the coarse space and keeps its own block",
            RuntimeWarning,
            stacklevel=2,
        )
    return layer.in_coarse


def _on_samples(values: Tensor, samples: int) -> Tensor:
    """View a map (N·r, *grid) as (N, r, *grid); r = 1 adds no axis."""
    if values.shape[0] == samples:
        return values
    return values.reshape(samples, values.shape[0] // samples, *values.shape[1:])

"""The paper's coarse space: one vector of ones for each layer (eq. 5-7).

An entry of the coarse Fisher is the sum of all elements of A_ij ⊗ G_ij, which is (sum of A_ij) · (sum of G_ij); and the
sum of A_ij is 1/M Σ_n Σ_t s_i s_j with s_i = 1ᵀā_i. So each layer gives one scalar map, and both matrices of sums are
inner products of maps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kfac2 import ops
from kfac2.brought import brought
from kfac2.coarse.base import CoarseSpace
from kfac2.kinds import Layer
from kfac2.layout import Layout
from kfac2.ops.eigendecompose import floored_eigh
from kfac2.statistics import Averages, Pass, Sums, Use

# Numbers of all maps that are alive at a time: 16 MB, and 256 MB where each part of the samples is four launches more.
MAP_NUMBERS = {"cpu": 2**22, "cuda": 2**26}


class Ones(CoarseSpace):
    """One vector of ones for each layer; `averages.coarse` is what `ops.average_coarse_sums` returns.

    Args:
        downsample: how maps of different grids meet.
    """

    names = ("input_sums", "grad_sums", "fisher")
    per_layer = 1

    def __init__(self, downsample: str) -> None:
        self._downsample = downsample

    def maps_of(self, uses: Sequence[Use]) -> list[list[Tensor]]:
        """Return the maps of the output gradients of all samples: of C channels, 1/C of what the gradients need."""
        rows = [use.grad_map_rows() for use in uses]
        maps = iter(ops.layer_maps([r.tensor for r in rows], [r.window for r in rows]))
        return [[next(maps) for _ in range(use.layer.maps)] for use in uses]

    def add(self, layout: Layout, sums: Sums, passed: Pass) -> None:
        """Add the inner products of all pairs of maps, few samples at a time."""
        layers = passed.by_layer()
        sums.misfits |= {layer for layer, uses in layers.items() if not all(map(passed.fits, uses))}
        fitting = {layer: uses for layer, uses in layers.items() if layer not in sums.misfits}
        new = self._pair_sums(layout, fitting, passed)
        sums.coarse = tuple(a + b for a, b in zip(sums.coarse, new, strict=True)) if sums.coarse else new

    def _pair_sums(self, layout: Layout, layers: dict[Layer, list[Use]], passed: Pass) -> tuple[Tensor, Tensor]:
        """Both (B, B) matrices of sums of one pass; a layer that took no part is a zero map."""
        maps = len(layout.layer_of_map)
        if not layers:
            dtype = torch.float64 if passed.uses[0].x.dtype == torch.float64 else torch.float32
            return _zeros(layout, dtype)
        # One kind after the other, and few samples at a time, so that not all maps are alive together.
        uses = [use for of_layer in layers.values() for use in of_layer]
        numbers = sum(use.layer.maps * use.samples * use.places for use in uses)
        at_once = MAP_NUMBERS.get(layout.device.type, MAP_NUMBERS["cpu"])
        share = max(1, passed.samples * at_once // max(numbers, 1))
        grad_maps = [m for use in uses for m in (use.taken.maps if use.taken is not None else ())]
        grad_sums = self._sums_of_maps(
            uses,
            lambda begin, count: [_samples_of(m, begin, count, passed.samples) for m in grad_maps],
            passed.samples,
            share,
            passed.scale**2,
        )
        if passed.is_repeated:
            sums = torch.zeros_like(grad_sums), grad_sums
        else:
            inputs = [use.input_map_rows() for use in uses]
            sums = (
                self._sums_of_maps(
                    uses,
                    lambda begin, count: ops.layer_maps(
                        [_samples_of(rows.tensor, begin, count, passed.samples) for rows in inputs],
                        [rows.window for rows in inputs],
                    ),
                    passed.samples,
                    share,
                    1.0,
                ),
                grad_sums,
            )
        firsts = [(layout.first_map[layout.number(layer)], layer.maps) for layer in layers]
        index = [first + q for first, count in firsts for q in range(count)]
        if len(index) == maps:
            return sums
        places = brought(index, torch.int64, layout.device)
        whole = sums[0].new_zeros(maps, maps), sums[1].new_zeros(maps, maps)
        for to, present in zip(whole, sums, strict=True):
            to[places.unsqueeze(1), places] = present
        return whole

    def _sums_of_maps(
        self,
        uses: Sequence[Use],
        maps_of: Callable[[int, int], Sequence[Tensor]],
        samples: int,
        share: int,
        factor: float,
    ) -> Tensor:
        """Add up one matrix of sums over all maps of one kind, `share` of the samples at a time.

        Args:
            uses: of the pass.
            maps_of: gives the maps of some samples: the first, and how many.
            samples: N.
            share: samples that are looked at together.
            factor: what the sums are multiplied by.
        """
        sums: Tensor | None = None
        for begin in range(0, samples, share):
            count = min(share, samples - begin)
            maps = [_on_samples(m, count) for m in _of_layers(uses, maps_of(begin, count), begin, samples)]
            if len({m.dtype for m in maps}) > 1:  # layers of several precisions
                maps = [m.double() for m in maps]
            sums = ops.cross_layer_sums(maps, self._downsample, previous=sums, kept=1.0, scale=factor)
        assert sums is not None
        return sums

    def averaged(self, layout: Layout, averages: Averages, sums: Sums, kept: float) -> tuple[Tensor, ...]:
        """Normalise, average and multiply, in one native call: 1/M for inputs, 1/(N √(T_i T_j)) for gradients.

        With √(T_i T_j) both matrices stay Gram matrices. A layer outside of the space, or not used, is a zero map.
        """
        inside = torch.tensor([averages.in_coarse[i] for i in layout.layer_of_map], device="cpu").double()
        counts = torch.tensor([sums.rows.get(layout.layers[i], 0) for i in layout.layer_of_map], device="cpu").double()
        return ops.average_coarse_sums(
            *sums.coarse,
            input_scales=inside / sums.cases**0.5,
            grad_scales=inside * torch.where(counts > 0, counts.rsqrt(), 0.0),
            previous=(averages.coarse[0], averages.coarse[1]) if averages.coarse else None,
            kept=kept,
            layer_of_block=layout.layer_of_map,
        )

    def no_sums(self, layout: Layout) -> tuple[Tensor, ...]:
        """Return two matrices of zeros."""
        return _zeros(layout, layout.dtype)

    def without(self, layout: Layout, averages: tuple[Tensor, ...], number: int) -> tuple[Tensor, ...]:
        """Return the averages, or the two sums, without the rows and columns of a layer."""
        if not averages:
            return ()
        owners = layout.layer_of_map, layout.layer_of_map, range(len(layout.layers))
        others = [
            torch.tensor(
                [place for place, owner in enumerate(owner_of) if owner != number], dtype=torch.long, device="cpu"
            )
            for owner_of in owners
        ]
        return tuple(
            matrix[places][:, places]
            for matrix, places in zip(averages, (kept.to(layout.device) for kept in others), strict=False)
        )

    def invert(self, averages: tuple[Tensor, ...], damping: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return (F_coarse + diag λ_c)⁻¹, eigenvalues floored at 0, and whether that failed."""
        return coarse_inverse(averages[2], damping)


def _zeros(layout: Layout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    maps = len(layout.layer_of_map)
    zeros = torch.zeros(maps, maps, dtype=dtype, device=layout.device)
    return zeros, zeros.clone()


def coarse_inverse(fisher: Tensor, damping: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return (F_coarse + diag λ_c)⁻¹ in float64, and whether that failed, on the device.

    It is D (D F_coarse D + I)⁻¹ D with D = diag(λ_c^-½), whose eigenvalues are floored: grids that do not divide each
    other can make F_coarse indefinite, and the floor keeps the coarse step from ever turning uphill. In float64: an L×L
    matrix costs nothing, and its condition may be large.

    Args:
        fisher: F_coarse, (L, L).
        damping: λ_c > 0, one number or (L,).
    """
    fisher = fisher.double()
    damping = damping.to(fisher) if isinstance(damping, Tensor) else fisher.new_full((), damping)
    scales = damping.rsqrt().expand(len(fisher))
    try:
        scaled = scales.unsqueeze(1) * fisher * scales
        values, vectors, status = (part[0] for part in floored_eigh(scaled.unsqueeze(0)))
    except torch.linalg.LinAlgError:
        return torch.zeros_like(fisher), torch.ones_like(fisher[0, 0], dtype=torch.bool)
    vectors = scales.unsqueeze(1) * vectors
    return (vectors / (values + 1)) @ vectors.mT, status != 0


def _of_layers(uses: Sequence[Use], maps: Sequence[Tensor], begin: int, samples: int) -> list[Tensor]:
    """Return one map for each block of each layer: those of several uses side by side, 0 where a row does not count.

    Args:
        uses: those of one layer follow each other.
        maps: of a share of the samples, one for each block of each use.
        begin: the first of these samples.
        samples: N.
    """
    result: list[Tensor] = []
    rest, last = iter(maps), None
    for use in uses:
        own = [next(rest) for _ in range(use.layer.maps)]
        if use.reached is not None:
            r = use.samples // samples
            counted = use.reached[begin * r : begin * r + len(own[0])]
            own = [torch.where(counted.reshape(m.shape), m, 0) for m in own]
        if use.layer is last:  # places of several grids have no order in common: they are one axis
            count = own[0].shape[0] // (use.samples // samples)
            before = result[-len(own) :]
            result[-len(own) :] = [
                torch.cat([old.reshape(count, -1), new.reshape(count, -1)], 1)
                for old, new in zip(before, own, strict=True)
            ]
        else:
            result += own
        last = use.layer
    return result


def _samples_of(tensor: Tensor, begin: int, count: int, samples: int) -> Tensor:
    """Take `count` of the samples of a tensor that has r rows of each."""
    if count == samples:
        return tensor
    r = len(tensor) // samples
    return tensor[begin * r : (begin + count) * r]


def _on_samples(values: Tensor, samples: int) -> Tensor:
    """View a map (N·r, *grid) as (N, r, *grid); r = 1 adds no axis."""
    if values.shape[0] == samples:
        return values
    return values.reshape(samples, values.shape[0] // samples, *values.shape[1:])

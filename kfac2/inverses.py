"""From running averages to what a step multiplies with; and what happens where a factor is bad."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac2 import ops
from kfac2.layers import Layer
from kfac2.ops.eigendecompose import floored_eigh
from kfac2.options import Options
from kfac2.statistics import Statistics

Warn = Callable[[str, str], None]
Fields = dict[str, Tensor]

FIELDS = {
    "cholesky": ("A_inv", "G_inv"),
    "eigh": ("A_values", "A_vectors", "G_values", "G_vectors"),
}


@dataclass
class Inverses:
    """The damped inverses of one inverse update.

    Attributes:
        damping: λ of that update.
        fine: for each layer that has one its block's inverse, fields as in `FIELDS`, each (blocks, ...).
        coarse: (F_coarse + λ_c I)⁻¹, (L, L); None with one level, or while there is none.
        status: for each layer, (blocks,): not 0 where an inverse failed. None where that was seen to already.
    """

    damping: float
    fine: dict[Layer, Fields]
    coarse: Tensor | None
    status: dict[Layer, Tensor] | None = None


def invert(
    statistics: Statistics,
    layers: Sequence[Layer],
    previous: Inverses | None,
    options: Options,
    warn: Warn,
    unread: bool = False,
) -> Inverses:
    """Invert every layer's damped block, and the coarse Fisher.

    Args:
        statistics: the running averages.
        layers: the handled layers; those without statistics get no inverse.
        previous: the inverses so far, which stand in where a factor is not finite.
        options: `inverse`, `damping`, `coarse_damping` and `inverse_dtype`.
        warn: called with a key and a message where a factor had to be mended.
        unread: leave the status on the device, for `mend` to see to later.
    """
    present = [layer for layer in layers if layer in statistics.A]
    if not present:
        return Inverses(options.damping, {}, None)
    A_list, G_list = ([factors[layer] for layer in present] for factors in (statistics.A, statistics.G))
    decompose = _factored if options.inverse == "cholesky" else _decomposed
    if options.inverse_dtype is None:
        results, status = decompose(A_list, G_list, options.damping)
    else:
        dtype = options.inverse_dtype
        results, status = decompose([A.to(dtype) for A in A_list], [G.to(dtype) for G in G_list], options.damping)
        results = [
            {name: value.to(A.dtype) for name, value in fields.items()}
            for fields, A in zip(results, A_list, strict=True)
        ]
    inverses = Inverses(options.damping, dict(zip(present, results, strict=True)), None)
    if unread:
        inverses.status = dict(zip(present, status, strict=True))
    elif torch.cat(status).any():
        for i in torch.stack([s.max() for s in status]).nonzero().flatten().tolist():
            layer = present[i]
            mended = mend(statistics, layer, options, warn)
            if mended is None and previous is not None:
                mended = previous.fine.get(layer)
            if mended is None:
                del inverses.fine[layer]
            else:
                inverses.fine[layer] = mended
    inverses.coarse = _coarse(statistics, layers, previous, options, warn, unread)
    return inverses


def mend(statistics: Statistics, layer: Layer, options: Options, warn: Warn) -> Fields | None:
    """Invert in float64 what could not be inverted; None, and a warning, where a factor is not finite.

    Args:
        statistics: the running averages that were inverted.
        layer: whose.
        options: `inverse` and `damping`.
        warn: called with a key and a message.
    """
    fields = _floored(statistics.A[layer], statistics.G[layer], options.inverse, options.damping)
    if fields is None:
        warn(f"not finite {layer.name}", f"kfac2: a factor of {layer.name} is not finite; its last inverse is kept")
    else:
        warn(
            f"indefinite {layer.name}",
            f"kfac2: a factor of {layer.name} is not positive definite (or its eigendecomposition did not converge); "
            "it was decomposed in float64, its eigenvalues floored at 0",
        )
    return fields


def _coarse(
    statistics: Statistics,
    layers: Sequence[Layer],
    previous: Inverses | None,
    options: Options,
    warn: Warn,
    unread: bool,
) -> Tensor | None:
    if statistics.input_sums is None or statistics.grad_sums is None:
        return None
    fisher = ops.coarse_fisher(statistics.input_sums, statistics.grad_sums, layer_of_block(layers))
    damping = options.damping if options.coarse_damping is None else options.coarse_damping
    coarse, failed = coarse_inverse(fisher, damping)
    last = previous.coarse if previous is not None else None
    if unread:
        return torch.where(failed, torch.zeros_like(coarse) if last is None else last, coarse)
    if failed:
        warn("not finite coarse", "kfac2: the coarse Fisher is not finite; its last inverse is kept")
        return last
    return coarse


def layer_of_block(layers: Sequence[Layer]) -> list[int]:
    """Return the layer number of each map of the coarse space."""
    return [i for i, layer in enumerate(layers) for _ in range(layer.maps)]


def coarse_inverse(fisher: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return (F_coarse + λ_c I)⁻¹, eigenvalues floored at 0, and whether that failed, on the device.

    Grids that do not divide each other can make F_coarse indefinite; the floor keeps the coarse step from
    ever turning uphill. In float64: an L×L matrix costs nothing, and its condition may be large.
    """
    matrix = fisher.double().unsqueeze(0)
    try:
        values, vectors, status = (part[0] for part in floored_eigh(matrix))
    except torch.linalg.LinAlgError:
        return torch.zeros_like(fisher), torch.ones_like(fisher[0, 0], dtype=torch.bool)
    return ((vectors / (values + damping)) @ vectors.mT).to(fisher.dtype), status != 0


_Result = tuple[list[Fields], list[Tensor]]


def _by_layer(inverse: str, lists: Sequence[list[Tensor]]) -> list[Fields]:
    return [dict(zip(FIELDS[inverse], fields, strict=True)) for fields in zip(*lists, strict=True)]


def _factored(A_list: list[Tensor], G_list: list[Tensor], damping: float) -> _Result:
    A_inv, G_inv, status = ops.factored_tikhonov_inverse(A_list, G_list, damping)
    return _by_layer("cholesky", (A_inv, G_inv)), status


def _decomposed(A_list: list[Tensor], G_list: list[Tensor], damping: float) -> _Result:
    try:
        *lists, status = ops.eigendecompose(A_list, G_list)
    except torch.linalg.LinAlgError:  # one of them did not converge: find it layer by layer
        results, failed = [], []
        for A, G in zip(A_list, G_list, strict=True):
            mended = _floored(A, G, "eigh", damping)
            zeros = {"A_values": A[..., 0], "A_vectors": A, "G_values": G[..., 0], "G_vectors": G}
            results.append(zeros if mended is None else mended)
            failed.append(torch.full((len(A),), int(mended is None), dtype=torch.int32, device=A.device))
        return results, failed
    return _by_layer("eigh", lists), status


def _floored(A: Tensor, G: Tensor, inverse: str, damping: float) -> Fields | None:
    """Decompose a layer's factors in float64, floor the eigenvalues at 0; None where that is impossible."""
    if not (bool(A.isfinite().all()) and bool(G.isfinite().all())):
        return None
    try:
        (A_values, A_vectors), (G_values, G_vectors) = (
            torch.linalg.eigh(A.double()),
            torch.linalg.eigh(G.double()),
        )
    except torch.linalg.LinAlgError:
        return None
    A_values, G_values = A_values.clamp(min=0), G_values.clamp(min=0)
    if inverse == "eigh":
        fields = (A_values, A_vectors, G_values, G_vectors)
    else:
        A_scale, G_scale = (M.double().diagonal(dim1=-2, dim2=-1).mean(-1) for M in (A, G))
        pi = torch.where((A_scale > 0) & (G_scale > 0), A_scale / G_scale, 1.0).sqrt()
        root = math.sqrt(damping)
        fields = tuple(
            (vectors / (values + shift.unsqueeze(-1)).unsqueeze(-2)) @ vectors.mT
            for values, vectors, shift in ((A_values, A_vectors, root * pi), (G_values, G_vectors, root / pi))
        )
    return {name: value.to(A.dtype) for name, value in zip(FIELDS[inverse], fields, strict=True)}

"""A step measured: dᵀFd, with the Fisher of the rows at hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kfac2.brought import brought
from kfac2.kinds import Layer, Rows
from kfac2.ops.directional_derivatives import directional_derivatives
from kfac2.ops.gather_gradients import gather_gradients
from kfac2.ops.layer_maps import sum_dtype
from kfac2.processes import ALONE, Processes
from kfac2.statistics import Pass, Use

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
        whole: how many samples the pass had.
    """

    uses: list[KeptUse]
    samples: int
    cases: float
    whole: int


class Keeps(NamedTuple):
    """How much is kept of a pass.

    Attributes:
        count: given how many samples there are, how many are kept, at most.
        rounds: whether float32 rows g are rounded to bfloat16: half the memory, and below 1 % of a divergence,
            which the drawn labels of n samples make uncertain by √(2/n) at the least.
    """

    count: Callable[[int], int]
    rounds: bool = False


def kept_of(passed: Pass, count: int, rounds: bool = False) -> KeptPass:
    """Keep so many samples of a pass.

    Args:
        passed: the pass.
        count: how many samples; all where there are no more. Where the gradients were let go, as many as were taken.
        rounds: see `Keeps`.
    """
    count, uses = min(passed.samples, count), []
    there = [use for use in passed.uses if use.taken is None]
    rows = iter(first_rows(passed, there, count, rounds))
    for use in passed.uses:
        grads = next(rows) if use.taken is None else use.taken.first
        assert grads is not None
        samples = len(grads.tensor)
        first = use.inputs.tensor[:samples]
        inputs = Rows(first.clone() if use.is_given else first, use.inputs.window)  # others nobody overwrites
        uses.append(KeptUse(use.layer, inputs, grads, samples, passed.fits(use)))
    return KeptPass(uses, count, passed.cases * count / passed.samples, passed.samples)


def first_of(kept: KeptPass, count: int) -> KeptPass:
    """Return so many of the kept samples of a pass, or all."""
    if count >= kept.samples:
        return kept
    uses = []
    for use in kept.uses:
        samples = _leading(use.samples, count, kept.samples)
        inputs, grads = (Rows(rows.tensor[:samples], rows.window) for rows in (use.inputs, use.grads))
        uses.append(use._replace(inputs=inputs, grads=grads, samples=samples))
    return KeptPass(uses, count, kept.cases * count / kept.samples, kept.whole)


def rounded(kept: KeptPass) -> KeptPass:
    """Return what is kept with the rows g in bfloat16 where they are float32, see `Keeps`."""
    rows = [use.grads.tensor for use in kept.uses]
    if not any(g.dtype == torch.float32 for g in rows):
        return kept
    grads = _in_16_bits(rows)
    uses = [use._replace(grads=Rows(g, use.grads.window)) for use, g in zip(kept.uses, grads, strict=True)]
    return kept._replace(uses=uses)


def first_rows(passed: Pass, uses: Sequence[Use], count: int, rounds: bool = False) -> list[Rows]:
    """Return the rows g of so many samples of each use, times the scale of the pass; few launches for all of them.

    Args:
        passed: the pass, whose sizes count.
        uses: of it.
        count: how many samples.
        rounds: see `Keeps`.
    """
    views = [use.grads.tensor[: _leading(use.samples, count, passed.samples)] for use in uses]
    new = list(torch._foreach_mul(views, passed.scale)) if passed.scale != 1 and views else views
    new = _in_16_bits(new) if rounds else new
    result = []
    for use, view, g in zip(uses, views, new, strict=True):
        stays = g is view and len(view) < use.samples  # of a view all of the gradient would
        result.append(Rows(g.clone() if stays else g, use.grads.window))
    return result


def _in_16_bits(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return float32 in bfloat16, and the others as they are."""
    full = [t for t in tensors if t.dtype == torch.float32]
    halves = [torch.empty_like(t, dtype=torch.bfloat16) for t in full]
    if full:
        torch._foreach_copy_(halves, full)
    rest = iter(halves)
    return [next(rest) if t.dtype == torch.float32 else t for t in tensors]


def _leading(size: int, count: int, whole: int) -> int:
    """Return how much of a leading size belongs to so many of all samples; of a size of 1, all of them have it."""
    return max(1, size * count // whole) if count < whole and size > 1 else size


def quarter(samples: int) -> int:
    """Return how many of so many samples a divergence is measured with: a quarter, and at least 32."""
    return max(32, samples // 4)


def divergence(
    passes: Sequence[KeptPass],
    direction: Direction,
    processes: Processes = ALONE,
    matrices_of: Callable[[Sequence[Layer]], Matrices] | None = None,
) -> Tensor:
    """Return dᵀFd = 1/M Σ_n (Σ_i s_ni)², s_ni = Σ_t g_ntᵀ D_i ā_nt: twice the divergence that a step d would bring.

    All layers are coupled, where the KL clip sees each for itself.

    Args:
        passes: kept rows of this iteration; this process may have none.
        direction: gives d of a parameter; None where it does not move.
        processes: whose rows count together.
        matrices_of: gives what writes directions of these layers as matrices, one of each; by default it is made.

    Returns:
        float64, one number; on the device, if there are rows.
    """
    layers = dict.fromkeys(use.layer for kept in passes for use in kept.uses)
    moved = {id(p): direction(p) for layer in layers for p in (layer.weight, layer.bias) if p is not None}
    moving = [layer for layer in layers if moved[id(layer.weight)] is not None]
    cases = sum(kept.cases for kept in passes)
    squares = torch.zeros((), dtype=torch.float64, device=next(iter(layers)).weight.device if layers else "cpu")
    if moving:
        matrices = Matrices(moving, 1) if matrices_of is None else matrices_of(moving)
        squares = derivatives(passes, moving, matrices.of([moved]))[0].sum(2).square().sum()
    if processes.is_alone:
        return squares / cases
    (total,) = processes.added("the measured divergence", [torch.stack([squares, torch.full_like(squares, cases)])])
    return total[0] / total[1]


def derivatives(
    passes: Sequence[KeptPass], layers: Sequence[Layer], matrices: Sequence[Tensor]
) -> tuple[Tensor, float]:
    """Return s_nki = Σ_t g_ntᵀ D_ki ā_nt, the derivative of sample n's log-likelihood as layer i moves along D_ki.

    A use whose rows do not fit the samples has rows of its own here, in which all other layers are 0: nobody knows
    which sample each belongs to, so it counts for itself.

    Args:
        passes: kept rows of an iteration.
        layers: the L layers that move; uses of others are left out.
        matrices: D of each layer, (K, blocks, d_out, d_in).

    Returns:
        s, (rows, K, L), float64; and M.
    """
    number = {layer: i for i, layer in enumerate(layers)}
    count = matrices[0].shape[0]
    parts, cases = [], 0.0
    for kept in passes:
        cases += kept.cases
        uses = [use for use in kept.uses if use.layer in number]
        fitting: dict[int, list[tuple[int, Tensor]]] = {}  # by leading size
        for use, s in zip(uses, _derivatives(uses, [matrices[number[use.layer]] for use in uses]), strict=True):
            if use.fits:
                fitting.setdefault(use.samples, []).append((number[use.layer], s))
            else:
                own = s.new_zeros(s.shape[1], count, len(layers))
                own[:, :, number[use.layer]] = s.T
                parts.append(own)
        if fitting:
            places = brought([i for some in fitting.values() for i, _ in some], torch.int64, matrices[0].device)
            stacks = [torch.stack([s for _, s in some]) for some in fitting.values()]
            rows = torch.cat([stack.view(len(stack), count, kept.samples, -1).sum(3) for stack in stacks])
            parts.append(rows.new_zeros(len(layers), *rows.shape[1:]).index_add_(0, places, rows).permute(2, 1, 0))
    none = torch.zeros(0, count, len(layers), dtype=torch.float64, device=matrices[0].device)
    return torch.cat([none, *parts]), cases


class Matrices:
    """Writes directions of the parameters of some layers as matrices, K of each layer.

    Args:
        layers: the layers.
        count: K.
    """

    def __init__(self, layers: Sequence[Layer], count: int) -> None:
        self.layers = tuple(layers)
        self._shapes = [(count, *layer.matrix_shape) for layer in layers]
        self._sizes = [math.prod(shape) for shape in self._shapes]
        self._dtype = torch.float64 if any(layer.factor_dtype == torch.float64 for layer in layers) else torch.float32
        begins = [0, *itertools.accumulate(self._sizes)]
        self._parts = [  # of each: which direction, id of the parameter, view, and its row in the table
            (k, id(part.parameter), part.view, (begin + part.row * d_in + part.column, d_in, i, 0))
            for i, (layer, first, size) in enumerate(zip(layers, begins, self._sizes, strict=False))
            for d_in in layer.matrix_shape[2:]
            for k, begin in enumerate(first + k * (size // count) for k in range(count))
            for part in layer.parts()
        ]
        self._present: list[bool] = []
        self._table = torch.empty(0, 4, dtype=torch.int64, device="cpu")
        self._made_for = self._kind()

    def _kind(self) -> list[tuple[torch.dtype, torch.device]]:
        own = (p for layer in self.layers for p in (layer.weight, layer.bias) if p is not None)
        return [(p.dtype, p.device) for p in own]

    def fits(self, layers: Sequence[Layer]) -> bool:
        """Tell whether these are the layers, where and in what dtype they were."""
        return tuple(layers) == self.layers and self._kind() == self._made_for

    def of(self, directions: Sequence[Mapping[int, Tensor | None]]) -> list[Tensor]:
        """Return the directions of each layer, (K, blocks, d_out, d_in).

        Args:
            directions: K of them, each by id of the parameter; one that is not there does not move, and has zeros.
        """
        found = [(directions[k].get(key), view) for k, key, view, _ in self._parts]
        present = [d is not None for d, _ in found]
        if present != self._present:
            rows = [row for (*_, row), is_there in zip(self._parts, present, strict=True) if is_there]
            self._table = torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, 4)
            self._present = present
        make = torch.empty if all(present) else torch.zeros
        matrices = make(sum(self._sizes), dtype=self._dtype, device=self.layers[0].weight.device)
        moved = [d if view is None else view(d) for d, view in found if d is not None]
        gather_gradients(moved, self._table, len(self.layers), 1, matrices)
        return [m.view(shape) for m, shape in zip(matrices.split(self._sizes), self._shapes, strict=True)]


def _derivatives(uses: Sequence[KeptUse], matrices: Sequence[Tensor]) -> list[Tensor]:
    """Return s of each use, (K, samples)."""
    if not uses:
        return []
    inputs, windows = zip(*(use.inputs for use in uses), strict=True)
    directions = [
        m if (x.dtype == torch.float64) == (m.dtype == torch.float64) else m.to(sum_dtype(x.dtype))
        for x, m in zip(inputs, matrices, strict=True)
    ]
    return directional_derivatives(inputs, windows, [use.grads.tensor for use in uses], directions)

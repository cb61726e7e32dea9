"""Each op beside the algorithm as the paper states it and the best plain torch: what is timed, and its check.

`paper` forms the matrices and loops over layers or pairs. Where that takes too long it works on a sample, every
k-th layer or pair, and its time is multiplied by the ratio of the arithmetic (`scale`); likewise `torch` where
its name says so. Rows are (N, d, T) here: N samples, d features, T places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations_with_replacement
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from layer_sets import LayerSet
from torch import Tensor

from kfac2 import ops
from kfac2.ops import Window

DAMPING = 1e-2
SAMPLED_LAYERS, SAMPLED_PAIRS = 14, 12
Item = TypeVar("Item")


@dataclass(frozen=True)
class Sample:
    """Every k-th item of a case, on which some of its functions work because all items would take too long."""

    names: Sequence[str] = ()  # of those functions; none where nothing is left out
    taken: Sequence[Any] = ()  # the items: places in what `kfac2` returns
    scale: float = 1.0  # what the functions' times are to be multiplied by
    note: str = ""  # the same in words


def every(items: Sequence[Item], most: int) -> list[Item]:
    """Take every k-th of the items, at most so many."""
    return list(items[:: math.ceil(len(items) / most)])


def sample(names: Sequence[str], unit: str, items: Sequence[Item], most: int, work: Callable[[Item], float]) -> Sample:
    """Take every k-th of the items, at most so many; `work` counts the arithmetic of an item."""
    taken = every(items, most)
    if len(taken) == len(items):
        return Sample(taken=taken)
    note = f"{' and '.join(names)} on {len(taken)} of {len(items)} {unit}"
    return Sample(names, taken, sum(map(work, items)) / sum(map(work, taken)), note)


@dataclass(frozen=True)
class Case:
    """One comparison."""

    title: str  # op, network and batch
    functions: dict[str, Callable[[], Any]]  # by name, `kfac2` among them
    sample: Sample = Sample()  # what some of them work on
    shown: Callable[[Any], Any] = lambda result: result  # turns what a function returns into what is to agree
    others: Sequence[str] = ()  # functions that are timed beside and compute something else
    remark: str = ""  # added to the note

    def scale(self, name: str) -> float:
        """Return what the times of a function are to be multiplied by."""
        return self.sample.scale if name in self.sample.names else 1.0

    @property
    def note(self) -> str:
        """What a reader must know of the numbers."""
        return self.sample.note + self.remark

    def check(self) -> None:
        """Raise AssertionError where a function disagrees with `kfac2`."""
        own = self.shown(self.functions["kfac2"]())
        some = [own[item] for item in self.sample.taken]
        for name, function in self.functions.items():
            if name not in ("kfac2", *self.others):
                agree(self.shown(function()), some if name in self.sample.names else own)


def agree(found: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """Hold each result against its twin, to 1/2000 of the twin's largest element; a matrix is one."""
    pairs = list(zip(found, expected, strict=True))
    if all(twin.dim() < 2 for _, twin in pairs):  # numbers of one matrix
        pairs = [(torch.stack([result for result, _ in pairs]), torch.stack([twin for _, twin in pairs]))]
    for result, twin in pairs:
        tolerance = max(twin.abs().max().item(), 1e-6) / 2000
        torch.testing.assert_close(result.reshape(twin.shape), twin, rtol=0, atol=tolerance)


def form_rows(x: Tensor, window: Window) -> Tensor:
    """Form the rows of a layer, (N, d, T): patches by unfold for a convolution."""
    rows = x.flatten(2) if x.dim() != 2 else x.unsqueeze(2)
    if x.dim() == 4:
        padding = tuple(low for low, _ in window.padding)
        rows = F.unfold(x, window.kernel_size, window.dilation, padding, window.stride)
    return torch.cat([rows, torch.ones_like(rows[:, :1])], 1) if window.bias else rows


def map_by_torch(x: Tensor, window: Window) -> Tensor:
    """Sum the channels, then take a box filter: no patch is formed."""
    sums = x.sum(1)
    if math.prod(window.kernel_size) > 1:
        height, width = (low for low, _ in window.padding)
        sums = F.avg_pool2d(sums, window.kernel_size, window.stride, (height, width), divisor_override=1)
    elif math.prod(window.stride) > 1:
        sums = sums[:, :: window.stride[0], :: window.stride[1]].contiguous()
    return sums + 1 if window.bias else sums


def layer_maps(layers: LayerSet) -> Case:
    """Maps of all inputs and all output gradients."""
    tensors, windows = layers.inputs + layers.grads, layers.input_windows + layers.grad_windows
    sizes = [shape.rows * shape.d_in for shape in layers.shapes] + [shape.rows * shape.d_out for shape in layers.shapes]
    some = sample(["paper"], "tensors", range(len(tensors)), 2 * SAMPLED_LAYERS, lambda i: sizes[i])
    functions: dict[str, Callable[[], list[Tensor]]] = {
        "paper": lambda: [form_rows(tensors[i], windows[i]).sum(1) for i in some.taken],
        "torch": lambda: [map_by_torch(x, window) for x, window in zip(tensors, windows, strict=True)],
        "kfac2": lambda: ops.layer_maps(tensors, windows),
    }
    return Case(f"layer_maps, {layers.title}", dict(functions), some)


def channel_sums(batch: int, device: str) -> Case:
    """One tensor larger than the caches (134 MB at batch 128), beside what reads or copies it."""
    x = torch.randn(batch, 64, 64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    y = torch.empty_like(x)
    functions: dict[str, Callable[[], Tensor]] = {
        "paper": lambda: x.flatten(2).transpose(1, 2).contiguous().sum(2),
        "torch": lambda: x.sum(1),
        "x.sum(), one number": lambda: x.sum(),
        "a copy": lambda: y.copy_(x),
        "kfac2": lambda: ops.channel_sums(x),
    }
    title = f"channel_sums, {batch}x64x64x64"
    return Case(title, dict(functions), others=("x.sum(), one number", "a copy"))


def covariance_by_paper(x: Tensor, window: Window) -> Tensor:
    """Unfold, and multiply the matrix of rows with itself."""
    rows = form_rows(x, window).transpose(1, 2).flatten(0, 1)
    return rows.T @ rows


def covariance_by_torch(x: Tensor, window: Window) -> Tensor:
    """Stack shifted planes of the padded input, channels first, and multiply."""
    if math.prod(window.kernel_size) == 1:
        rows = x[:, :, :: window.stride[0], :: window.stride[1]] if x.dim() == 4 else x
        rows = rows.transpose(0, 1).flatten(1)
    else:
        (top, bottom), (left, right) = window.padding
        padded = F.pad(x.transpose(0, 1), (left, right, top, bottom))
        (height, width), (down, across) = window.grid(x.shape[2:]), window.stride
        planes = [
            padded[:, :, i : i + (height - 1) * down + 1 : down, j : j + (width - 1) * across + 1 : across]
            for i in range(window.kernel_size[0])
            for j in range(window.kernel_size[1])
        ]
        rows = torch.stack(planes, 1).flatten(0, 1).flatten(1)
    rows = torch.cat([rows, torch.ones_like(rows[:1])]) if window.bias else rows
    return rows @ rows.T


def covariances(layers: LayerSet) -> Case:
    """Both factors of all layers."""
    tensors, windows = layers.inputs + layers.grads, layers.input_windows + layers.grad_windows
    work = [s.rows * s.d_in**2 for s in layers.shapes] + [s.rows * s.d_out**2 for s in layers.shapes]
    some = sample(["paper", "torch"], "tensors", range(len(tensors)), 2 * SAMPLED_LAYERS, lambda i: work[i])
    functions: dict[str, Callable[[], list[Tensor]]] = {
        "paper": lambda: [covariance_by_paper(tensors[i], windows[i]) for i in some.taken],
        "torch": lambda: [covariance_by_torch(tensors[i], windows[i]) for i in some.taken],
        "kfac2": lambda: ops.covariances(tensors, windows),
    }
    return Case(f"covariances, {layers.title}", dict(functions), some)


def input_covariance(channels: int, extent: int, batch: int, device: str) -> Case:
    """One 3×3 convolution: `paper` unfolds, `torch` stacks nine shifted planes."""
    x = torch.randn(batch, channels, extent, extent, generator=torch.Generator().manual_seed(0)).to(device)
    window = Window.of(2, 3, padding=1)
    functions: dict[str, Callable[[], Tensor]] = {
        "paper": lambda: covariance_by_paper(x, window),
        "torch": lambda: covariance_by_torch(x, window),
        "kfac2": lambda: ops.input_covariance(x, 3, padding=1),
    }
    return Case(f"input_covariance, 3x3, {channels}x{extent}x{extent}, batch {batch}", dict(functions))


def meeting_grid(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    """Return the grid on which two maps meet: one place where ranks differ."""
    return tuple(map(min, a, b)) if len(a) == len(b) else ()


def nearest(values: Tensor, grid: tuple[int, ...], meeting: tuple[int, ...]) -> Tensor:
    """Bring values (N, *grid, d) onto a coarser grid by the nearest-neighbour index, as one matrix (N · T, d)."""
    if grid and not meeting:
        return values.flatten(1, -2)[:, 0]
    for axis, (larger, places) in enumerate(zip(grid, meeting, strict=True), start=1):
        if larger % places == 0:
            values = values[(slice(None),) * axis + (slice(None, None, larger // places),)]
        else:
            values = values.index_select(axis, torch.arange(places, device=values.device) * larger // places)
    return values.flatten(0, -2)


def pairs_of(layers: LayerSet, work: Callable[[tuple[int, int]], float]) -> tuple[Sample, float]:
    """Return the pairs i ≤ j that `paper` takes, and the work of all in units of 1e12."""
    pairs = list(combinations_with_replacement(range(len(layers.shapes)), 2))
    return sample(["paper"], "pairs", pairs, SAMPLED_PAIRS, work), sum(map(work, pairs)) / 1e12


def cross_by_torch(maps: Sequence[Tensor]) -> Tensor:
    """Stack the maps of each grid, downsample each class onto each coarser one, and multiply class by class."""
    classes: dict[tuple[int, ...], list[int]] = {}
    for i, values in enumerate(maps):
        classes.setdefault(tuple(values.shape[1:]), []).append(i)
    stacks = {grid: torch.stack([maps[i] for i in members], -1) for grid, members in classes.items()}  # (N, *grid, b)
    result = maps[0].new_empty(len(maps), len(maps))
    index = {grid: torch.tensor(members, device=result.device) for grid, members in classes.items()}
    known = list(stacks)
    for position, a in enumerate(known):
        for b in known[position:]:
            meeting = meeting_grid(a, b)
            u, v = (nearest(stacks[grid], grid, meeting) for grid in (a, b))
            products = u.T @ v
            result[index[a][:, None], index[b]] = products
            result[index[b][:, None], index[a]] = products.T
    return result


def cross_layer_sums(layers: LayerSet) -> Case:
    """All pairs of the inputs' maps. `paper` multiplies rows that were formed before the clock starts."""
    maps = ops.layer_maps(layers.inputs, layers.input_windows)

    def work(pair: tuple[int, int]) -> float:
        first, second = (layers.shapes[i] for i in pair)
        return min(first.rows, second.rows) * first.d_in * second.d_in

    some, tmacs = pairs_of(layers, work)
    needed = sorted({i for pair in some.taken for i in pair})
    grids = {i: tuple(maps[i].shape[1:]) for i in needed}
    rows = {}  # (N, *grid, d)
    for i in needed:
        formed = form_rows(layers.inputs[i], layers.input_windows[i]).transpose(1, 2)
        rows[i] = formed.reshape(layers.batch, *grids[i], -1).contiguous()

    def form(i: int, j: int) -> Tensor:
        meeting = meeting_grid(grids[i], grids[j])
        a, b = (nearest(rows[k], grids[k], meeting) for k in (i, j))
        return a.T @ b

    functions: dict[str, Callable[[], Any]] = {
        "paper": lambda: torch.stack([form(i, j).sum() for i, j in some.taken]),
        "torch": lambda: cross_by_torch(maps),
        "kfac2": lambda: ops.cross_layer_sums(maps),
    }
    remark = f" ({tmacs:.3g} TMAC in all), rows formed before"
    return Case(f"cross_layer_sums, {layers.title}", functions, some, remark=remark)


def coarse_fisher(layers: LayerSet) -> Case:
    """The L×L matrix from both matrices of sums; `paper` has A_ij and G_ij, and sums their elements."""
    shapes, generator = layers.shapes, torch.Generator().manual_seed(0)

    def elements(pair: tuple[int, int]) -> float:
        first, second = (shapes[i] for i in pair)
        return first.d_in * second.d_in + first.d_out * second.d_out

    some, _ = pairs_of(layers, elements)
    sums = [torch.randn(len(shapes), len(shapes), generator=generator).to(layers.device) for _ in range(2)]
    formed = []
    for i, j in some.taken:
        A = torch.randn(shapes[i].d_in, shapes[j].d_in, generator=generator).to(layers.device)
        G = torch.randn(shapes[i].d_out, shapes[j].d_out, generator=generator).to(layers.device)
        sums[0][i, j], sums[1][i, j] = A.sum(), G.sum()
        formed.append((A, G))
    functions: dict[str, Callable[[], Tensor]] = {
        "paper": lambda: torch.stack([A.sum() * G.sum() for A, G in formed]),
        "torch": lambda: sums[0] * sums[1],
        "kfac2": lambda: ops.coarse_fisher(sums[0], sums[1]),
    }
    return Case(f"coarse_fisher, {layers.title}", dict(functions), some, remark=", formed before")


def damped(factors: Tensor, damping: Tensor) -> Tensor:
    """Add its damping to the diagonal of each factor, (b, d, d)."""
    result = factors.clone()
    result.diagonal(dim1=1, dim2=2).add_(damping[:, None])
    return result


def by_size(function: Callable[..., Any], *lists: Sequence[Tensor]) -> list[Any]:
    """Stack what has one shape, apply a batched function, and take the results apart again."""
    classes: dict[tuple[int, ...], list[int]] = {}
    for i, matrix in enumerate(lists[0]):
        classes.setdefault(tuple(matrix.shape), []).append(i)
    results: list[Any] = [None] * len(lists[0])
    for members in classes.values():
        stacked = function(*(torch.stack([matrices[i] for i in members]) for matrices in lists))
        for position, i in enumerate(members):
            results[i] = stacked[position]
    return results


def inverses_by_paper(A_list: Sequence[Tensor], G_list: Sequence[Tensor]) -> list[Tensor]:
    """Invert layer by layer with torch.linalg.inv (eq. 8, 9)."""
    inverses = []
    for A, G in zip(A_list, G_list, strict=True):
        pi = torch.sqrt((A.trace() / len(A)) / (G.trace() / len(G)))
        for M, shift in ((A, pi * math.sqrt(DAMPING)), (G, math.sqrt(DAMPING) / pi)):
            inverses.append(torch.linalg.inv(M + shift * torch.eye(len(M), device=M.device)))
    return inverses[::2] + inverses[1::2]


def inverses_by_torch(A_list: Sequence[Tensor], G_list: Sequence[Tensor]) -> list[Tensor]:
    """Cholesky and cholesky_inverse, once for each size."""

    def means(matrices: Sequence[Tensor]) -> Tensor:
        return torch.stack([matrix.diagonal().mean() for matrix in matrices])

    pi, root = torch.sqrt(means(A_list) / means(G_list)), math.sqrt(DAMPING)

    def invert(factors: Tensor, shift: Tensor) -> Tensor:
        return torch.cholesky_inverse(torch.linalg.cholesky_ex(damped(factors, shift))[0])

    return by_size(invert, A_list, (pi * root).unbind()) + by_size(invert, G_list, (root / pi).unbind())


def factored_tikhonov_inverse(layers: LayerSet) -> Case:
    """Damped inverses of both factors of all layers."""
    A_list, G_list = layers.factors

    def by_kfac2() -> list[Tensor]:
        A_inv, G_inv, _ = ops.factored_tikhonov_inverse(A_list, G_list, DAMPING)
        return A_inv + G_inv

    functions: dict[str, Callable[[], Any]] = {
        "paper": lambda: inverses_by_paper(A_list, G_list),
        "torch": lambda: inverses_by_torch(A_list, G_list),
        "kfac2": by_kfac2,
    }
    return Case(f"factored_tikhonov_inverse, {layers.title}", functions)


def eigendecompose(layers: LayerSet) -> Case:
    """Eigendecompositions of both factors of every k-th layer, for all three."""
    A_list, G_list = (every(factors, SAMPLED_LAYERS) for factors in layers.factors)

    def by_kfac2() -> list[tuple[Tensor, Tensor]]:
        done = ops.eigendecompose(A_list, G_list)
        return list(zip(done.A_values + done.G_values, done.A_vectors + done.G_vectors, strict=True))

    def batched(matrices: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        return by_size(lambda stack: list(zip(*torch.linalg.eigh(stack), strict=True)), matrices)

    functions: dict[str, Callable[[], Any]] = {
        "paper": lambda: [torch.linalg.eigh(matrix) for matrix in A_list + G_list],
        "torch": lambda: batched(A_list) + batched(G_list),
        "kfac2": by_kfac2,
    }
    remark = f"all three on {len(A_list)} of {len(layers.shapes)} layers"
    shown = lambda pairs: [vectors * values @ vectors.T for values, vectors in pairs]  # noqa: E731
    return Case(f"eigendecompose, {layers.title}", functions, shown=shown, remark=remark)


def precondition(layers: LayerSet) -> Case:
    """G⁻¹ ∇ A⁻¹ of all layers."""
    grads, (A_inv, G_inv) = layers.grad_matrices, layers.factors
    functions: dict[str, Callable[[], list[Tensor]]] = {
        "paper": lambda: [G @ grad @ A for grad, A, G in zip(grads, A_inv, G_inv, strict=True)],
        "torch": lambda: by_size(lambda grad, A, G: torch.bmm(torch.bmm(G, grad), A), grads, A_inv, G_inv),
        "kfac2": lambda: ops.precondition(grads, A_inv, G_inv),
    }
    return Case(f"precondition, {layers.title}", dict(functions))


BY_LAYERS: dict[str, Callable[[LayerSet], Case]] = {
    "layer_maps": layer_maps,
    "covariances": covariances,
    "cross_layer_sums": cross_layer_sums,
    "coarse_fisher": coarse_fisher,
    "factored_tikhonov_inverse": factored_tikhonov_inverse,
    "eigendecompose": eigendecompose,
    "precondition": precondition,
}
SINGLE: dict[str, list[Callable[[int, str], Case]]] = {  # one tensor; from batch and device
    "channel_sums": [channel_sums],
    "input_covariance": [partial(input_covariance, *size) for size in ((16, 32), (32, 16), (64, 8))],
}
OPS = [*SINGLE, *BY_LAYERS]

"""Each op beside the algorithm as the paper states it and the best plain torch: what is timed, and its check.

`paper` forms the matrices and loops over layers or pairs. Where that takes too long it works on a sample, every
k-th layer or pair, and its time is multiplied by the ratio of the arithmetic (`scale`); likewise `torch` where
its name says so. Rows are (N, d, T) here: N samples, d features, T places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations_with_replacement
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from layer_sets import LayerSet
from torch import Tensor

from kfac2 import ops
from kfac2.ops import Window
from kfac2.triangles import packed

DAMPING = 1e-2
SAMPLED_LAYERS, SAMPLED_PAIRS = 14, 12
Item = TypeVar("Item")
Function = Callable[[], Any]


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
    paper: Function
    plain: Function  # the best of plain torch
    kfac2: Function
    others: Mapping[str, Function] = field(default_factory=dict)  # are timed beside, and compute something else
    sample: Sample = Sample()  # what some functions work on
    shown: Callable[[Any], Any] = lambda result: result  # turns what a function returns into what is to agree
    remark: str = ""  # added to the note

    @property
    def functions(self) -> dict[str, Function]:
        """What is timed, by name."""
        return {"paper": self.paper, "torch": self.plain, **self.others, "kfac2": self.kfac2}

    def scale(self, name: str) -> float:
        """Return what the times of a function are to be multiplied by."""
        return self.sample.scale if name in self.sample.names else 1.0

    @property
    def note(self) -> str:
        """What a reader must know of the numbers."""
        return self.sample.note + self.remark

    def check(self) -> None:
        """Raise AssertionError where a function disagrees with `kfac2`."""
        own = self.shown(self.kfac2())
        some = [own[item] for item in self.sample.taken]
        for name, function in (("paper", self.paper), ("torch", self.plain)):
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
    tensors, windows = layers.tensors, layers.windows
    sizes = [s.rows * s.d_in for s in layers.shapes] + [s.rows * s.d_out for s in layers.shapes]
    some = sample(["paper"], "tensors", range(len(tensors)), 2 * SAMPLED_LAYERS, lambda i: sizes[i])
    return Case(
        f"layer_maps, {layers.title}",
        lambda: [form_rows(tensors[i], windows[i]).sum(1) for i in some.taken],
        lambda: [map_by_torch(x, window) for x, window in zip(tensors, windows, strict=True)],
        lambda: ops.layer_maps(tensors, windows),
        sample=some,
    )


def channel_sums(batch: int, device: str) -> Case:
    """One tensor larger than the caches (134 MB at batch 128), beside what reads or copies it."""
    x = torch.randn(batch, 64, 64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    y = torch.empty_like(x)
    return Case(
        f"channel_sums, {batch}x64x64x64",
        lambda: x.flatten(2).transpose(1, 2).contiguous().sum(2),
        lambda: x.sum(1),
        lambda: ops.channel_sums(x),
        others={"x.sum(), one number": lambda: x.sum(), "a copy": lambda: y.copy_(x)},
    )


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
    """Both factors of all layers, kfac2's as triangles."""
    tensors, windows = layers.tensors, layers.windows
    work = [s.rows * s.d_in**2 for s in layers.shapes] + [s.rows * s.d_out**2 for s in layers.shapes]
    some = sample(["paper", "torch"], "tensors", range(len(tensors)), 2 * SAMPLED_LAYERS, lambda i: work[i])
    return Case(
        f"covariances, {layers.title}",
        lambda: [covariance_by_paper(tensors[i], windows[i]) for i in some.taken],
        lambda: [covariance_by_torch(tensors[i], windows[i]) for i in some.taken],
        lambda: ops.folded_covariances(tensors, windows),
        shown=lambda results: [packed(one[None]) if one.dim() == 2 else one for one in results],
        sample=some,
    )


def along_by_torch(x: Tensor, window: Window, g: Tensor, directions: Tensor) -> Tensor:
    """Apply the layer with each direction in place of its weight, and multiply with g: (K, N), double."""
    results = []
    for matrix in directions[:, 0]:
        weight, bias = (matrix[:, :-1], matrix[:, -1]) if window.bias else (matrix, None)
        if x.dim() == 4:
            kernel, padding = window.kernel_size, tuple(low for low, _ in window.padding)
            moved = F.conv2d(x, weight.unflatten(1, (-1, *kernel)), bias, window.stride, padding)
        else:  # features second, as a view where there are positions
            moved = F.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)
        results.append((moved * g).flatten(1).sum(1).double())
    return torch.stack(results)


def directional_derivatives(layers: LayerSet) -> Case:
    """One direction for each layer. `paper` forms each sample's gradient."""
    count = len(layers.shapes)
    inputs, windows, grads = layers.tensors[:count], layers.windows[:count], layers.tensors[count:]
    directions = [matrix[None, None] for matrix in layers.grad_matrices]
    work = [s.rows * s.d_in * s.d_out for s in layers.shapes]
    some = sample(["paper"], "layers", range(count), SAMPLED_LAYERS, lambda i: work[i])

    def by_samples(i: int) -> Tensor:
        gradients = grads[i].reshape(layers.batch, grads[i].shape[1], -1) @ form_rows(inputs[i], windows[i]).mT
        return (gradients * directions[i][0]).sum((1, 2)).double()[None]

    return Case(
        f"directional_derivatives, {layers.title}",
        lambda: [by_samples(i) for i in some.taken],
        lambda: [along_by_torch(*entry) for entry in zip(inputs, windows, grads, directions, strict=True)],
        lambda: ops.directional_derivatives(inputs, windows, grads, directions),
        sample=some,
    )


def input_covariance(channels: int, extent: int, batch: int, device: str) -> Case:
    """One 3×3 convolution: `paper` unfolds, `plain` stacks nine shifted planes."""
    x = torch.randn(batch, channels, extent, extent, generator=torch.Generator().manual_seed(0)).to(device)
    window = Window.of(2, 3, padding=1)
    return Case(
        f"input_covariance, 3x3, {channels}x{extent}x{extent}, batch {batch}",
        lambda: covariance_by_paper(x, window),
        lambda: covariance_by_torch(x, window),
        lambda: ops.input_covariance(x, 3, padding=1),
    )


def product_of(a: Tensor, b: Tensor) -> Tensor:
    """Bring values (N, *grid, d) onto the coarser grid, or one place where ranks differ, and multiply them."""
    rows = []
    for values, other in ((a, b), (b, a)):
        grid, met = values.shape[1:-1], other.shape[1:-1]
        if len(grid) != len(met):
            values = values.flatten(1, -2)[:, :1] if grid else values[:, None]
        else:
            steps = (slice(None, None, max(1, larger // places)) for larger, places in zip(grid, met, strict=True))
            values = values[(slice(None), *steps)]
        rows.append(values.flatten(0, -2))
    return rows[0].T @ rows[1]


def cross_by_torch(maps: Sequence[Tensor]) -> Tensor:
    """Stack the maps of each grid, downsample each class onto each coarser one, and multiply class by class."""
    classes: dict[tuple[int, ...], list[int]] = {}
    for i, values in enumerate(maps):
        classes.setdefault(tuple(values.shape[1:]), []).append(i)
    stacks = {grid: torch.stack([maps[i] for i in members], -1) for grid, members in classes.items()}  # (N, *grid, b)
    result = maps[0].new_empty(len(maps), len(maps))
    index = {grid: torch.tensor(members, device=result.device) for grid, members in classes.items()}
    for a, b in combinations_with_replacement(stacks, 2):
        products = product_of(stacks[a], stacks[b])
        result[index[a][:, None], index[b]] = products
        result[index[b][:, None], index[a]] = products.T
    return result


def cross_layer_sums(layers: LayerSet) -> Case:
    """All pairs of the inputs' maps. `paper` multiplies rows that were formed before the clock starts."""
    shapes = layers.shapes
    maps = ops.layer_maps(layers.tensors[: len(shapes)], layers.windows[: len(shapes)])
    pairs = list(combinations_with_replacement(range(len(shapes)), 2))

    def work(pair: tuple[int, int]) -> float:
        first, second = (shapes[i] for i in pair)
        return min(first.rows, second.rows) * first.d_in * second.d_in

    some = sample(["paper"], "pairs", pairs, SAMPLED_PAIRS, work)
    rows = {}  # (N, *grid, d)
    for i in {i for pair in some.taken for i in pair}:
        formed = form_rows(layers.tensors[i], layers.windows[i]).transpose(1, 2)
        rows[i] = formed.reshape(*maps[i].shape, -1).contiguous()
    return Case(
        f"cross_layer_sums, {layers.title}",
        lambda: torch.stack([product_of(rows[i], rows[j]).sum() for i, j in some.taken]),
        lambda: cross_by_torch(maps),
        lambda: ops.cross_layer_sums(maps),
        sample=some,
        remark=f" ({sum(map(work, pairs)) / 1e12:.3g} TMAC in all), rows formed before",
    )


def average_coarse_sums(layers: LayerSet) -> Case:
    """Both matrices of sums scaled, averaged and multiplied, at a statistics update."""
    count, kept = len(layers.shapes), 0.95
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(count, 2 * count, generator=generator).to(layers.tensors[0].device) for _ in range(4)]
    raw_a, raw_g, old_a, old_g = (matrix @ matrix.T for matrix in rows)
    scales = torch.linspace(0.5, 1.0, count, dtype=torch.float64)
    here = scales.to(raw_a)

    def by_entry() -> list[Tensor]:
        pairs = ((raw_a, old_a), (raw_g, old_g))
        a, g = (torch.lerp(raw * here[:, None] * here, old, kept) for raw, old in pairs)
        return [a, g, torch.stack([torch.stack([a[i, j] * g[i, j] for j in range(count)]) for i in range(count)])]

    def by_matrix() -> list[Tensor]:
        products = torch.outer(here, here)
        a, g = torch.lerp(raw_a * products, old_a, kept), torch.lerp(raw_g * products, old_g, kept)
        return [a, g, a * g]

    return Case(
        f"average_coarse_sums, {layers.title}",
        by_entry,
        by_matrix,
        lambda: ops.average_coarse_sums(
            raw_a, raw_g, input_scales=scales, grad_scales=scales, previous=(old_a, old_g), kept=kept
        ),
    )


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

    def invert(factors: Tensor, shift: Tensor) -> Tensor:
        damped = factors.clone()
        damped.diagonal(dim1=1, dim2=2).add_(shift[:, None])
        return torch.cholesky_inverse(torch.linalg.cholesky_ex(damped)[0])

    traces = [torch.stack([matrix.diagonal().mean() for matrix in matrices]) for matrices in (A_list, G_list)]
    pi, root = torch.sqrt(traces[0] / traces[1]), math.sqrt(DAMPING)
    return by_size(invert, A_list, (pi * root).unbind()) + by_size(invert, G_list, (root / pi).unbind())


def factored_tikhonov_inverse(layers: LayerSet) -> Case:
    """Damped inverses of both factors of all layers."""
    factors = layers.factors
    return Case(
        f"factored_tikhonov_inverse, {layers.title}",
        lambda: inverses_by_paper(*factors),
        lambda: inverses_by_torch(*factors),
        lambda: ops.factored_tikhonov_inverse(*factors, DAMPING),
        shown=lambda inverses: inverses if isinstance(inverses, list) else inverses.A_inv + inverses.G_inv,
    )


def eigendecompose(layers: LayerSet) -> Case:
    """Eigendecompositions of both factors of every k-th layer, for all three."""
    A_list, G_list = (every(factors, SAMPLED_LAYERS) for factors in layers.factors)

    def by_kfac2() -> list[tuple[Tensor, Tensor]]:
        done = ops.eigendecompose(A_list, G_list)
        return list(zip(done.A_values + done.G_values, done.A_vectors + done.G_vectors, strict=True))

    return Case(
        f"eigendecompose, {layers.title}",
        lambda: [torch.linalg.eigh(matrix) for matrix in A_list + G_list],
        lambda: by_size(lambda stack: list(zip(*torch.linalg.eigh(stack), strict=True)), A_list + G_list),
        by_kfac2,
        shown=lambda pairs: [vectors * values @ vectors.T for values, vectors in pairs],
        remark=f"all three on {len(A_list)} of {len(layers.shapes)} layers",
    )


def precondition(layers: LayerSet) -> Case:
    """G⁻¹ ∇ A⁻¹ of all layers."""
    grads, (A_inv, G_inv) = layers.grad_matrices, layers.factors
    return Case(
        f"precondition, {layers.title}",
        lambda: [G @ grad @ A for grad, A, G in zip(grads, A_inv, G_inv, strict=True)],
        lambda: by_size(lambda grad, A, G: torch.bmm(torch.bmm(G, grad), A), grads, A_inv, G_inv),
        lambda: ops.precondition(grads, A_inv, G_inv),
    )


BY_LAYERS: dict[str, Callable[[LayerSet], Case]] = {
    "layer_maps": layer_maps,
    "covariances": covariances,
    "directional_derivatives": directional_derivatives,
    "cross_layer_sums": cross_layer_sums,
    "average_coarse_sums": average_coarse_sums,
    "factored_tikhonov_inverse": factored_tikhonov_inverse,
    "eigendecompose": eigendecompose,
    "precondition": precondition,
}
SINGLE: dict[str, list[Callable[[int, str], Case]]] = {  # one tensor; from batch and device
    "channel_sums": [channel_sums],
    "input_covariance": [partial(input_covariance, *size) for size in ((16, 32), (32, 16), (64, 8))],
}
OPS = [*SINGLE, *BY_LAYERS]

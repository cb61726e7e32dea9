"""Large layers, as users' networks have them: each op on a device beside every route that torch itself has.

Whichever way kfac2 goes with covariances, both are timed: what `ops.gram_matrices` decides by is read off here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from layer_sets import LayerSet, shapes_of
from output import table
from timing import Clock, Spread, configure, digits, interleaved
from torch import Tensor

from kfac2 import ops
from kfac2.ops import Window
from kfac2.ops.covariances import _by_library as library
from kfac2.ops.covariances import _native as kernel
from kfac2.ops.gather_gradients import gather_gradients
from kfac2.ops.gram_matrices import row_products
from kfac2.ops.shift_and_scale import ShiftAndScale
from kfac2.ops.write_gradients import write_gradients
from kfac2.padding import padded_length
from kfac2.step import products_in

Function = Callable[[], object]
ROUNDS = 9


@dataclass(frozen=True)
class Comparison:
    """What is timed in turns.

    Attributes:
        title: of the row.
        kfac2: what kfac2 does, by setting.
        torch: what torch offers.
        others: what is timed beside, and is neither.
        flop: of the plain product, for a rate; None where it says nothing.
    """

    title: str
    kfac2: Mapping[str, Function]
    torch: Mapping[str, Function]
    others: Mapping[str, Function]
    flop: float | None = None


def at(precision: str, function: Function) -> Function:
    """Return a function that multiplies float32 in this precision."""

    def run() -> object:
        with products_in(precision):
            return function()

    return run


def in_each_precision(function: Callable[[Tensor], object], x: Tensor) -> dict[str, Function]:
    """Return what works on a float32 tensor, with and without TF32, and on the same in bfloat16."""
    full = partial(function, x)
    return {"fp32": full, "TF32": at("tf32", full), "bf16": partial(function, x.bfloat16())}


def covariances_of(title: str, x: Tensor, window: Window, by_torch: Callable[[Tensor], Tensor]) -> Comparison:
    """Compare the outer products of a tensor's rows, as triangles, beside both ways that kfac2 has for them.

    The kernel multiplies without tensor cores; the library's products are folded, and without folding are those of
    panels alone.
    """
    own = in_each_precision(lambda t: kernel([(t, window, None, 1.0)], 1.0), x)
    folded = in_each_precision(lambda t: library([(t, window, None, 1.0)], 1.0), x)
    panels = in_each_precision(lambda t: row_products(t, window), x)
    others = {f"kernel, {name}": own[name] for name in ("fp32", "bf16")}
    others |= {f"library, {name}": function for name, function in folded.items()}
    others |= {f"not folded, {name}": function for name, function in panels.items()}
    rows = x.shape[0] * math.prod(window.grid(x.shape[2:]))
    return Comparison(
        title,
        in_each_precision(lambda t: ops.folded_covariances([t], [window]), x),
        in_each_precision(by_torch, x),
        others,
        2.0 * rows * window.row_length(x.shape[1]) ** 2,
    )


def product(x: Tensor) -> Tensor:
    """Return XᵀX, added up in float32."""
    if x.dtype == torch.bfloat16 and x.is_cuda:
        return torch.mm(x.T, x, out_dtype=torch.float32)
    return x.T @ x


def product_of_patches(x: Tensor, window: Window) -> Tensor:
    """Unfold the patches of a convolution, and multiply."""
    padding = tuple(low for low, _ in window.padding)
    return product(F.unfold(x, window.kernel_size, padding=padding, stride=window.stride).transpose(1, 2).flatten(0, 1))


def product_of_places(x: Tensor) -> Tensor:
    """Bring channels last, and multiply."""
    return product(x.movedim(1, -1).flatten(0, -2))


def linear_covariances(device: str, is_tiny: bool) -> Iterator[Comparison]:
    """Rows of Linear layers: 8,192 of 128 to 4,096 features."""
    rows, widths = (64, (8, 16)) if is_tiny else (8192, (64, 128, 256, 512, 768, 1024, 2048, 3072, 4096))
    for width in widths:
        x = torch.randn(rows, width, device=device)
        yield covariances_of(f"{rows} rows of {width}", x, Window.places(0), product)


def covariances_together(device: str, is_tiny: bool) -> Iterator[Comparison]:
    """Rows of twelve Linear layers in one call, as a step has them: launches are shared."""
    count, rows, widths = (2, 64, (8, 16)) if is_tiny else (12, 8192, (64, 128, 256, 512, 768))

    def ours(layers: Tensor) -> object:
        return ops.folded_covariances(list(layers), [Window.places(0)] * count)

    def theirs(layers: Tensor) -> object:
        return [product(layer) for layer in layers]

    for width in widths:
        x = torch.randn(count, rows, width, device=device)
        title, flop = f"{count} of {rows} rows of {width}", 2.0 * count * rows * width**2
        yield Comparison(title, in_each_precision(ours, x), in_each_precision(theirs, x), {}, flop)


def patch_covariances(device: str, is_tiny: bool) -> Iterator[Comparison]:
    """Inputs of convolutions: 3x3 of the ResNets for small images and of ResNet-50 at batch 64; their first layers."""
    shapes = [(2, 4, 6)] if is_tiny else [(128, 16, 32), (128, 32, 16), (128, 64, 8)]
    shapes += [] if is_tiny else [(64, 64, 56), (64, 128, 28), (64, 256, 14), (64, 512, 7), (128, 3, 32)]
    cases = [(shape, Window.of(2, 3, padding=1)) for shape in shapes]
    cases.append(((2, 3, 9) if is_tiny else (64, 3, 224), Window.of(2, 7, 2, padding=3)))
    for (batch, channels, extent), window in cases:
        x = torch.randn(batch, channels, extent, extent, device=device)
        kernel_size = "x".join(map(str, window.kernel_size))
        title = f"{kernel_size}, {batch}x{channels}x{extent}x{extent}"
        yield covariances_of(title, x, window, partial(product_of_patches, window=window))


def map_covariances(device: str, is_tiny: bool) -> Iterator[Comparison]:
    """Inputs of 1x1 convolutions of ResNet-50 at batch 64, and gradients: channels are not last."""
    shapes = [(2, 4, 6)] if is_tiny else [(64, 128, 28), (64, 256, 56), (64, 512, 28), (64, 1024, 14), (64, 2048, 7)]
    for batch, channels, extent in shapes:
        x = torch.randn(batch, channels, extent, extent, device=device)
        yield covariances_of(f"1x1, {batch}x{channels}x{extent}x{extent}", x, Window.places(2), product_of_places)


def factors(device: str, sizes: Sequence[int]) -> list[Tensor]:
    """Return symmetric positive definite matrices, (1, d, d) each."""
    rows = [torch.randn(2 * d, d, device=device) for d in sizes]
    return [(r.T @ r / len(r))[None] for r in rows]


def stacked(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Join matrices of one size."""
    sizes = dict.fromkeys(m.shape[-1] for m in matrices)
    return [torch.cat([m for m in matrices if m.shape[-1] == d]) for d in sizes]


def pairs_of(device: str, is_tiny: bool) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Yield lists of d_in and d_out."""
    if is_tiny:
        yield "two layers", [(5, 4), (9, 3)]
        return
    yield "ResNet-110, 112 pairs", [(s.d_in, s.d_out) for s in shapes_of("resnet-110", 2)]
    block = [(769, 2304), (769, 768), (769, 3072), (3073, 768)]
    yield "12 of 3,073 and 768", [block[3]] * 12
    yield "GPT-2 small, 48 pairs", block * 12


def inverses(device: str, is_tiny: bool) -> Iterator[Comparison]:
    """Damped inverses of both factors of all layers."""
    for title, pairs in pairs_of(device, is_tiny):
        A, G = factors(device, [a for a, _ in pairs]), factors(device, [g for _, g in pairs])
        joined = stacked([*A, *G])
        by_torch = {
            "Cholesky": lambda joined=joined: [torch.cholesky_inverse(torch.linalg.cholesky_ex(m)[0]) for m in joined],
            "linalg.inv": lambda joined=joined: [torch.linalg.inv(m) for m in joined],
        }
        yield Comparison(title, {"sweeps": partial(ops.factored_tikhonov_inverse, A, G, 0.1)}, by_torch, {})


def eigendecompositions(device: str, is_tiny: bool) -> Iterator[Comparison]:
    """Eigendecompositions of both factors of the ResNet's layers."""
    title, pairs = next(pairs_of(device, is_tiny))
    A, G = factors(device, [a for a, _ in pairs]), factors(device, [g for _, g in pairs])
    joined = stacked([*A, *G])
    by_torch = {"linalg.eigh, by size": lambda: [torch.linalg.eigh(m) for m in joined]}
    yield Comparison(title, {"eigendecompose": partial(ops.eigendecompose, A, G)}, by_torch, {})


def products_of_a_step(device: str, is_tiny: bool) -> Iterator[Comparison]:
    """G⁻¹ ∇ A⁻¹ of GPT-2's layers: their rows of 769 and 3,073 padded, as in a step, and by torch as they are."""
    layers = [(2, 4, 5)] if is_tiny else [(12, 2304, 769), (12, 768, 769), (12, 3072, 769), (12, 768, 3073)]

    plain = [[torch.randn(q, *s, device=device) for s in ((g, a), (a, a), (g, g))] for q, g, a in layers]
    grads = [F.pad(grad, (0, padded_length(a) - a)) for (grad, *_), (_, _, a) in zip(plain, layers, strict=True)]
    A_inv = [F.pad(A, (0, padded_length(a) - a) * 2) for (_, A, _), (_, _, a) in zip(plain, layers, strict=True)]
    G_inv, (out, work) = [G for _, _, G in plain], ([torch.empty_like(grad) for grad in grads] for _ in range(2))

    def own() -> list[Tensor]:
        products = ops.precondition(grads, A_inv, G_inv, out=out, work=work)  # as a step does
        return [product[..., :a] for product, (_, _, a) in zip(products, layers, strict=True)]

    def multiplied() -> list[Tensor]:
        return [torch.bmm(torch.bmm(G, grad), A) for grad, A, G in plain]

    yield Comparison(
        "GPT-2 small, 48 layers",
        {"fp32": own, "TF32": at("tf32", own)},
        {"fp32": multiplied, "TF32": at("tf32", multiplied)},
        {},
        sum(2.0 * q * g * a * (g + a) for q, g, a in layers),
    )


def gradients_of_a_step(device: str, is_tiny: bool) -> Iterator[Comparison]:
    """GPT-2's gradients on their way to the matrices and back, beside a copy of as many bytes; rows padded and not."""
    blocks, shapes = (1, [(3, 4)]) if is_tiny else (12, [(2304, 768), (768, 768), (3072, 768), (768, 3072)])
    gradients = [torch.randn(size, device=device) for shape in shapes * blocks for size in (shape, shape[:1])]
    source, target = torch.empty(2, sum(g.numel() for g in gradients), device=device)
    layers, copy = len(gradients) // 2, {"copy": partial(target.copy_, source)}
    ones, found = torch.ones(layers, dtype=torch.float64, device=device), torch.zeros(1, device=device)
    step = ShiftAndScale(ones, ones[:2], found, ones, ones)
    for pad in (1, 4, 32):
        rows, end = [], 0
        for i, (outputs, inputs) in enumerate(shapes * blocks):
            length = -(-(inputs + 1) // pad) * pad
            rows += [(end, length, i, i), (end + inputs, length, i, i)]
            end += outputs * length
        layout, matrices = torch.tensor(rows), torch.zeros(end, device=device)
        gathered = partial(gather_gradients, gradients, layout, layers, layers, matrices)
        written = partial(write_gradients, gradients, layout, matrices, step, ones)
        for name, function in (("gathered", gathered), ("written", written)):
            yield Comparison(f"gradients {name}, rows a multiple of {pad}", {"op": function}, copy, {})


def rows_of_maps(device: str, is_tiny: bool) -> Iterator[Comparison]:
    """A ResNet's rows as a step sums them up: 16 MB of gradients at a time, inputs together; beside a copy."""
    layers = LayerSet("resnet-8" if is_tiny else "resnet-110", 2 if is_tiny else 128, device)
    count = len(layers.shapes)
    inputs, grads = slice(0, count), slice(count, count + 2)
    for title, taken in (("inputs", inputs), ("gradients of two layers", grads)):
        tensors, windows = layers.tensors[taken], layers.windows[taken]
        source, target = torch.empty(2, sum(t.numel() for t in tensors) // 2, device=device)
        by_op = partial(ops.layer_maps, tensors, windows)
        yield Comparison(f"maps of {title}", {"op": by_op}, {"copy": partial(target.copy_, source)}, {})


GROUPS: dict[str, Callable[[str, bool], Iterator[Comparison]]] = {
    "products of a step": products_of_a_step,
    "gradients of a step": gradients_of_a_step,
    "maps of rows": rows_of_maps,
    "covariances of Linear rows": linear_covariances,
    "covariances of twelve layers": covariances_together,
    "covariances of patches": patch_covariances,
    "covariances of maps": map_covariances,
    "inverses": inverses,
    "eigendecompositions": eigendecompositions,
}


def measure(group: str, is_tiny: bool, budget: float, device: str, threads: int) -> dict[str, Any]:
    """Time all of a group; `budget` is the seconds of each comparison."""
    configure(threads)
    rows = []
    for one in GROUPS[group](device, is_tiny):
        functions = {("kfac2", n): f for n, f in one.kfac2.items()}
        functions |= {("torch", n): f for n, f in one.torch.items()} | {("beside", n): f for n, f in one.others.items()}
        by_key = {" ".join(key): function for key, function in functions.items()}
        times = interleaved(by_key, Clock(device, threads, cold=True), ROUNDS, budget)
        rows.append({
            "title": one.title,
            "milliseconds": {name: Spread.of([1e3 * s for s in taken]) for name, taken in times.items()},
            "flop": one.flop,
        })  # fmt: skip
    return {"group": group, "rows": rows}


def report(result: dict[str, Any]) -> str:
    """Write the table of a group: medians in milliseconds, and kfac2's best over torch's."""
    names = list(dict.fromkeys(name for row in result["rows"] for name in row["milliseconds"]))
    lines = []
    for row in result["rows"]:
        medians = {name: spread.median for name, spread in row["milliseconds"].items()}
        best = {whose: min(t for name, t in medians.items() if name.startswith(whose)) for whose in ("kfac2", "torch")}
        rate = "" if row["flop"] is None else digits(row["flop"] / best["kfac2"] / 1e9)
        numbers = [digits(medians[name]) if name in medians else "" for name in names]
        lines.append([row["title"], *numbers, digits(best["kfac2"] / best["torch"]), rate])
    return table(["ms", *names, "kfac2's best / torch's", "TFLOP/s, kfac2's best"], lines)

"""Large layers, as users' networks have them: each op on a device beside every route that torch itself has.

Where kfac2 goes by the library its own kernel is timed, too: the crossovers of `ops.gram_matrices` are read off here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from layer_sets import shapes_of
from output import table
from timing import Clock, Spread, configure, digits, interleaved
from torch import Tensor

from kfac2 import ops
from kfac2.ops import Window
from kfac2.ops.covariances import _native as kernel
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
    """Compare the outer products of a tensor's rows, as triangles; the kernel multiplies without tensor cores."""
    own = in_each_precision(lambda t: kernel([(t, window, None, 1.0)], 1.0), x)
    rows = x.shape[0] * math.prod(window.grid(x.shape[2:]))
    return Comparison(
        title,
        in_each_precision(lambda t: ops.folded_covariances([t], [window]), x),
        in_each_precision(by_torch, x),
        {f"kernel, {name}": own[name] for name in ("fp32", "bf16")},
        2.0 * rows * window.row_length(x.shape[1]) ** 2,
    )


def product(x: Tensor) -> Tensor:
    """Return XᵀX, added up in float32."""
    if x.dtype == torch.bfloat16 and x.is_cuda:
        return torch.mm(x.T, x, out_dtype=torch.float32)
    return x.T @ x


def product_of_patches(x: Tensor) -> Tensor:
    """Unfold the patches of a 3×3 convolution, and multiply."""
    return product(F.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1))


def linear_covariances(device: str, is_tiny: bool) -> Iterator[Comparison]:
    """Rows of Linear layers: 8,192 of 128 to 4,096 features."""
    rows, widths = (64, (8, 16)) if is_tiny else (8192, (64, 128, 256, 512, 768, 1024, 2048, 3072, 4096))
    for width in widths:
        x = torch.randn(rows, width, device=device)
        yield covariances_of(f"{rows} rows of {width}", x, Window.places(0), product)


def convolution_covariances(device: str, is_tiny: bool) -> Iterator[Comparison]:
    """Inputs of 3×3 convolutions: of the ResNets for small images, and of ResNet-50 at batch 64."""
    shapes = [(2, 4, 6)] if is_tiny else [(128, 16, 32), (128, 32, 16), (128, 64, 8)]
    shapes += [] if is_tiny else [(64, 64, 56), (64, 128, 28), (64, 256, 14), (64, 512, 7)]
    window = Window.of(2, 3, padding=1)
    for batch, channels, extent in shapes:
        x = torch.randn(batch, channels, extent, extent, device=device)
        title = f"3x3, {batch}x{channels}x{extent}x{extent}"
        yield covariances_of(title, x, window, product_of_patches)


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


GROUPS: dict[str, Callable[[str, bool], Iterator[Comparison]]] = {
    "products of a step": products_of_a_step,
    "covariances of Linear rows": linear_covariances,
    "covariances of 3x3 patches": convolution_covariances,
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

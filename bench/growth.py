"""How the statistics of the second level grow: with layers, batch, channels and the extent of the maps.

Time and memory of what `levels=2` adds to a statistics step: maps of all layers, both matrices of sums, the coarse
Fisher. Exponents are least-squares fits of log time to log size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from layer_sets import LayerSet
from output import table
from timing import Clock, configure, digits, interleaved
from torch import Tensor

from kfac2 import ops
from kfac2.ops import Window

NETS = {"resnet-8": 10, "resnet-20": 22, "resnet-32": 34, "resnet-56": 58, "resnet-110": 112}  # layers of each
LAYERS = 16  # of the uniform stack
SIZES = {"batch": [16, 32, 64, 128, 256], "channels": [8, 16, 32, 64, 128], "extent": [4, 8, 16, 32, 64]}
TITLES = {"layers": "layers of ResNet-8 to -110", "batch": "batch", "channels": "channels", "extent": "places of a map"}


SecondLevel = Callable[[], list[Tensor]]


def second_level(tensors: list[Tensor], windows: list[Window]) -> list[Tensor]:
    """Compute what the second level adds to a statistics step; return all that is alive at the end.

    The layers' inputs come first, then the gradients of their outputs.
    """
    maps = ops.layer_maps(tensors, windows)
    half = len(maps) // 2
    input_sums, grad_sums = ops.cross_layer_sums(maps[:half]), ops.cross_layer_sums(maps[half:])
    return [*maps, input_sums, grad_sums, ops.coarse_fisher(input_sums, grad_sums)]


def uniform(device: str, batch: int = 32, channels: int = 16, extent: int = 16) -> SecondLevel:
    """Return the second level of equal 3×3 convolutions, one after the other."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, channels, extent, extent)
    tensors = [torch.randn(shape, generator=generator).to(device) for _ in range(2 * LAYERS)]
    return partial(second_level, tensors, [Window.of(2, 3, padding=1)] * LAYERS + [Window.places(2)] * LAYERS)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Fit value = factor · size^exponent."""
    return round(float(np.polyfit(np.log(sizes), np.log(values), 1)[0]), 3) + 0.0  # 0.0 makes -0 a 0


def series(what: str, batch: int, largest: int, device: str) -> dict[int, SecondLevel]:
    """Return the second level at each size up to the largest; the batch is that of the networks."""
    if what == "layers":
        sets = {count: LayerSet(name, batch, device) for name, count in NETS.items() if count <= largest}
        return {count: partial(second_level, layers.tensors, layers.windows) for count, layers in sets.items()}
    power = 2 if what == "extent" else 1
    return {size**power: uniform(device, **{what: size}) for size in SIZES[what] if size <= largest}


def measure(
    what: str, batch: int, largest: int, rounds: int, budget: float, device: str, threads: int
) -> dict[str, Any]:
    """Time all sizes of one series in turns, and count bytes; for the arguments see `series` and `timing`."""
    configure(threads)
    functions = series(what, batch, largest, device)
    times = interleaved({str(size): f for size, f in functions.items()}, Clock(device, threads), rounds, budget)
    milliseconds = [1e3 * median(taken) for taken in times.values()]
    megabytes = [sum(t.untyped_storage().nbytes() for t in each()) / 1e6 for each in functions.values()]
    sizes = list(functions)
    return {
        "what": what,
        "sizes": sizes,
        "milliseconds": milliseconds,
        "megabytes": megabytes,
        "time": exponent(sizes, milliseconds),
        "memory": exponent(sizes, megabytes),
    }


def report(results: Sequence[dict[str, Any]]) -> str:
    """Write the table of fitted exponents."""
    rows = []
    for found in results:
        exponents = [f"{found[name]:.2f}" for name in ("time", "memory")]
        largest = [digits(found["milliseconds"][-1]), digits(found["megabytes"][-1])]
        rows.append([TITLES[found["what"]], f"{found['sizes'][0]} to {found['sizes'][-1]}", *exponents, *largest])
    return table(["grows with", "from, to", "time ^", "memory ^", "ms at most", "MB at most"], rows)

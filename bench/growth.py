"""How the statistics of the second level grow with the number of layers: time, and bytes that are alive at the end."""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Any

import numpy as np
from layer_sets import LayerSet
from output import table
from timing import Clock, configure, digits, interleaved
from torch import Tensor

from kfac2 import ops
from kfac2.ops import Window

NETS = {"resnet-8": 10, "resnet-20": 22, "resnet-32": 34, "resnet-56": 58, "resnet-110": 112}  # layers of each


def second_level(tensors: list[Tensor], windows: list[Window]) -> list[Tensor]:
    """Compute what `levels=2` adds to a statistics step: maps, both matrices of sums, the coarse Fisher.

    The layers' inputs come first, then the gradients of their outputs.
    """
    maps = ops.layer_maps(tensors, windows)
    half = len(maps) // 2
    sums = ops.cross_layer_sums(maps[:half]), ops.cross_layer_sums(maps[half:])
    return [*maps, *sums, ops.average_coarse_sums(*sums).fisher]


def measure(batch: int, largest: int, rounds: int, budget: float, device: str, threads: int) -> dict[str, Any]:
    """Time all networks of at most so many layers in turns; exponents are fits of log value to log layers."""
    configure(threads)
    sets = {count: LayerSet(name, batch, device) for name, count in NETS.items() if count <= largest}
    functions = {str(count): partial(second_level, s.tensors, s.windows) for count, s in sets.items()}
    times = interleaved(functions, Clock(device, threads), rounds, budget)
    found: dict[str, Any] = {"layers": list(sets)}
    found["milliseconds"] = [1e3 * median(taken) for taken in times.values()]
    found["megabytes"] = [sum(t.untyped_storage().nbytes() for t in each()) / 1e6 for each in functions.values()]
    for name in ("milliseconds", "megabytes"):
        slope = np.polyfit(np.log(found["layers"]), np.log(found[name]), 1)[0]
        found[f"exponent of {name}"] = round(float(slope), 3)
    return found


def report(found: dict[str, Any]) -> str:
    """Write the table."""
    names = ("milliseconds", "megabytes")
    rows = [[str(count), *(digits(found[name][i]) for name in names)] for i, count in enumerate(found["layers"])]
    rows.append(["grows as layers to the", *(f"{found[f'exponent of {name}']:.2f}" for name in names)])
    return table(["layers of a ResNet", *names], rows)

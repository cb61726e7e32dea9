"""How the statistics of the second level grow: with layers, batch, channels and the extent of the maps.

Time and memory of what `levels=2` adds to a statistics step: maps of all layers, both matrices of sums, the coarse
Fisher. Exponents are least-squares fits of log time to log size.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
from arguments import above_zero, add_where, positive, some_of, writable
from layer_sets import LayerSet
from measure import Clock, Spread, digits, interleaved, machine, table, write_json
from torch import Tensor

from kfac2 import ops
from kfac2.ops import Window

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

NETS = {"resnet-8": 10, "resnet-20": 22, "resnet-32": 34, "resnet-56": 58, "resnet-110": 112}  # layers of each
LAYERS, BATCH, CHANNELS, EXTENT = 16, 32, 16, 16  # of the uniform stack, where they are not varied
SIZES = {
    "batch": [16, 32, 64, 128, 256],
    "channels": [8, 16, 32, 64, 128],
    "extent": [4, 8, 16, 32, 64],
}
TITLES = {
    "layers": "layers of ResNet-8 to -110",
    "batch": "batch",
    "channels": "channels",
    "extent": "places of a map",
}
COLOURS = {"time": "#D55E00", "memory": "#0072B2"}  # Okabe and Ito's


@dataclass
class Rows:
    """What all layers hand over."""

    tensors: list[Tensor]
    windows: list[Window]

    def second_level(self) -> list[Tensor]:
        """Compute what the second level adds to a statistics step; return all that is alive at the end."""
        maps = ops.layer_maps(self.tensors, self.windows)
        half = len(maps) // 2
        input_sums, grad_sums = ops.cross_layer_sums(maps[:half]), ops.cross_layer_sums(maps[half:])
        return [*maps, input_sums, grad_sums, ops.coarse_fisher(input_sums, grad_sums)]


def of_network(name: str, batch: int, device: str) -> Rows:
    """Return the rows of a ResNet."""
    layers = LayerSet(name, batch, device)
    return Rows(layers.inputs + layers.grads, layers.input_windows + layers.grad_windows)


def uniform(device: str, batch: int = BATCH, channels: int = CHANNELS, extent: int = EXTENT) -> Rows:
    """Return the rows of equal 3×3 convolutions, one after the other."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, channels, extent, extent)
    tensors = [torch.randn(shape, generator=generator).to(device) for _ in range(2 * LAYERS)]
    return Rows(tensors, [Window.of(2, 3, padding=1)] * LAYERS + [Window.places(2)] * LAYERS)


def fitted(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Fit value = factor · size^exponent; return exponent and factor."""
    xs, ys = ([math.log(number) for number in numbers] for numbers in (sizes, values))
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - x_mean) ** 2 for x in xs)
    exponent = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / spread
    return round(exponent, 3) + 0.0, math.exp(y_mean - exponent * x_mean)  # 0.0 makes -0 a 0


def series(what: str, batch: int, largest: int, device: str) -> dict[float, Callable[[], Rows]]:
    """Return what makes the rows of each size up to the largest; the batch is that of the networks."""
    if what == "layers":
        return {count: partial(of_network, name, batch, device) for name, count in NETS.items() if count <= largest}
    power = 2 if what == "extent" else 1
    return {size**power: partial(uniform, device, **{what: size}) for size in SIZES[what] if size <= largest}


def measure_series(
    what: str, batch: int, largest: int, rounds: int, budget: float, device: str, clock: Clock
) -> dict[str, Any]:
    """Time all sizes of one series in turns, and count bytes."""
    rows = {size: make() for size, make in series(what, batch, largest, device).items()}
    times = interleaved({str(size): each.second_level for size, each in rows.items()}, clock, rounds, budget)
    sizes = list(rows)
    spreads = [Spread.of([1e3 * taken for taken in times[str(size)]]) for size in sizes]
    megabytes = [sum(t.untyped_storage().nbytes() for t in each.second_level()) / 1e6 for each in rows.values()]
    exponents = {
        "time": fitted(sizes, [spread.median for spread in spreads]),
        "memory": fitted(sizes, megabytes),
    }
    return {
        "sizes": sizes,
        "milliseconds": [asdict(spread) for spread in spreads],
        "megabytes": megabytes,
        "exponents": {name: exponent for name, (exponent, _) in exponents.items()},
        "factors": {name: factor for name, (_, factor) in exponents.items()},
        "rounds": len(times[str(sizes[0])]),
    }


def measure(
    over: Sequence[str], batch: int, largest: int, rounds: int, budget: float, device: str, threads: int
) -> dict[str, Any]:
    """Measure several series.

    Args:
        over: what grows, of `TITLES`.
        batch: samples of the networks in the series over layers.
        largest: sizes above are left out.
        rounds: at most.
        budget: seconds for each series, after which no further round starts.
        device: where.
        threads: of torch on the CPU.
    """
    torch.set_num_threads(threads)
    clock = Clock(device, threads)
    return {what: measure_series(what, batch, largest, rounds, budget, device, clock) for what in over}


def draw(results: dict[str, Any], clock: str, path: Path) -> None:
    """Draw time and memory over size, both axes logarithmic, with the fitted lines."""
    figure, grid = plt.subplots(
        2, len(results), figsize=(3.4 * len(results), 6), constrained_layout=True, squeeze=False
    )
    for column, (what, found) in enumerate(results.items()):
        medians = [spread["median"] for spread in found["milliseconds"]]
        for axis, name, values, unit in (
            (grid[0][column], "time", medians, f"{clock}, ms"),
            (grid[1][column], "memory", found["megabytes"], "maps and sums, MB"),
        ):
            exponent, factor, sizes = found["exponents"][name], found["factors"][name], found["sizes"]
            axis.plot(sizes, values, "o", color=COLOURS[name], label=name)
            fit = [factor * size**exponent for size in sizes]
            axis.plot(sizes, fit, "--", color=COLOURS[name], label=f"size^{exponent:.2f}")
            axis.set(xscale="log", yscale="log", xlabel=TITLES[what], ylabel=unit)
            axis.set_xticks(sizes, [str(size) for size in sizes])
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            for ticks in (axis.xaxis, axis.yaxis):
                ticks.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.3, which="both")
            axis.legend(frameon=False)
    figure.suptitle("What the second level adds to a statistics step")
    part = path.with_name(f"{path.stem}.part{path.suffix}")
    figure.savefig(part, dpi=120)
    plt.close(figure)
    part.replace(path)


def report(results: dict[str, Any]) -> str:
    """Write the table of fitted exponents."""
    rows = []
    for what, found in results.items():
        last = digits(found["milliseconds"][-1]["median"])
        exponents = [f"{found['exponents'][name]:.2f}" for name in ("time", "memory")]
        span = f"{found['sizes'][0]:.0f} to {found['sizes'][-1]:.0f}"
        rows.append([TITLES[what], span, *exponents, last, digits(found["megabytes"][-1])])
    return table(["grows with", "from, to", "time ^", "memory ^", "ms at most", "MB at most"], rows)


def main() -> None:
    """Read the command line, measure, print, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--over", type=some_of(list(TITLES)), default=list(TITLES), help="with commas (default: all)")
    parser.add_argument("--batch", type=positive, default=128, help="samples of the ResNets (default: 128)")
    parser.add_argument("--largest", type=positive, default=256, help="leave out sizes above (default: 256)")
    parser.add_argument("--rounds", type=positive, default=25, help="at most (default: 25)")
    parser.add_argument("--seconds", type=above_zero, default=30.0, help="for each series (default: 30)")
    parser.add_argument("--out", type=writable, default=Path("growth.png"), help="the picture (default: growth.png)")
    parser.add_argument("--json", type=writable, metavar="PATH", help="also write the numbers there")
    add_where(parser)
    args = parser.parse_args()
    for what in args.over:
        if len(series(what, args.batch, args.largest, args.device)) < 2:
            parser.error(f"argument --largest: must leave two sizes of {what}, got {args.largest}")
    if args.out.suffix != ".png":
        parser.error(f"argument --out: must end in .png, got {args.out}")
    results = measure(args.over, args.batch, args.largest, args.rounds, args.seconds, args.device, args.threads)
    clock = Clock(args.device, args.threads).kind
    print(f"What the second level adds to a statistics step: exponents of {clock} and of bytes\n")
    print(report(results))
    draw(results, clock, args.out)
    print(f"\nDrawn: {args.out}")
    if args.json:
        write_json(args.json, {"machine": machine(args.device, args.threads), "growth": results})


if __name__ == "__main__":
    main()

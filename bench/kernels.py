"""Compare each op with the paper's algorithm and with plain torch, in turns: ratios of pairs, medians, quartiles.

The same cases as `pytest bench --benchmark-only`, which times one after the other.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from arguments import add_some, add_where, positive
from cases import BY_LAYERS, OPS, SINGLE, Case
from layer_sets import LayerSet
from networks import NETWORKS
from output import table
from timing import Clock, Spread, configure, digits, interleaved

SETS = ["deep-linear", "resnet-20", "resnet-32", "resnet-56", "resnet-110", "transformer"]


def all_cases(names: Sequence[str], sets: Sequence[str], batch: int, device: str) -> Iterator[Callable[[], Case]]:
    """Yield what builds each case; layer set by layer set, so that one set is in memory at a time."""
    for name in names:
        for build in SINGLE.get(name, []):
            yield partial(build, batch, device)
    for net in sets:
        layers = LayerSet(net, batch, device)
        for name in names:
            if name in BY_LAYERS and (name != "eigendecompose" or device != "cpu"):  # on a CPU it is torch's own
                yield partial(BY_LAYERS[name], layers)


def compare(build: Callable[[], Case], rounds: int, budget: float, device: str, threads: int) -> dict[str, Any]:
    """Build and check a case, time it, and divide by the time of kfac2 in the same round; see `timing`."""
    configure(threads)
    case = build()
    case.check()
    times = interleaved(case.functions, Clock(device, threads, cold=True), rounds, budget)
    times = {name: [case.scale(name) * seconds for seconds in taken] for name, taken in times.items()}
    own = times["kfac2"]
    return {
        "case": case.title,
        "milliseconds": {name: Spread.of([1e3 * s for s in taken]) for name, taken in times.items()},
        "over_kfac2": {name: Spread.of(taken, own) for name, taken in times.items() if name != "kfac2"},
        "rounds": len(own),
        "note": case.note,
    }


def report(results: Sequence[dict[str, Any]]) -> str:
    """Write the table: how many times as long as kfac2 the others take."""
    rows = []
    for result in results:
        over = result["over_kfac2"]
        others = "; ".join(f"{name} {spread}" for name, spread in over.items() if name not in ("paper", "torch"))
        notes = "; ".join(filter(None, (others, result["note"])))
        own = digits(result["milliseconds"]["kfac2"].median)
        rows.append([result["case"], own, str(over["paper"]), str(over["torch"]), str(result["rounds"]), notes])
    return table(["op", "kfac2, ms", "paper / kfac2", "torch / kfac2", "rounds", "notes"], rows)


def main() -> None:
    """Read the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_some(parser, "--ops", OPS, OPS)
    add_some(parser, "--sets", list(NETWORKS), SETS)
    parser.add_argument("--batch", type=positive, default=128, help="samples (default: 128)")
    parser.add_argument("--rounds", type=positive, default=25, help="of each case, at most (default: 25)")
    parser.add_argument("--seconds", type=float, default=5.0, help="then no further round of a case (default: 5)")
    add_where(parser)
    args = parser.parse_args()
    results = []
    for build in all_cases(args.ops, args.sets, args.batch, args.device):
        results.append(compare(build, args.rounds, args.seconds, args.device, args.threads))
        print(f"  {results[-1]['case']}", file=sys.stderr)
    print(report(results))


if __name__ == "__main__":
    main()

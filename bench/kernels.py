"""Compare each op with the paper's algorithm and with plain torch, in turns: ratios of pairs, medians, quartiles.

The same cases as `pytest bench --benchmark-only`, which times one after the other.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import cases
import torch
from arguments import above_zero, add_where, positive, some_of, writable
from cases import CONVOLUTIONS, GROUPS, Case
from layer_sets import LayerSet
from measure import Clock, Spread, digits, interleaved, machine, ratios, table, write_json
from networks import NETWORKS

SETS = ["deep-linear", "resnet-20", "resnet-32", "resnet-56", "resnet-110", "transformer"]
SINGLE = ["channel_sums", "input_covariance"]  # one tensor, no layer set


def all_cases(groups: Sequence[str], sets: Sequence[str], batch: int, device: str) -> Iterator[Callable[[], Case]]:
    """Yield what builds each case; layer by layer set, so that one set is in memory at a time."""
    if "channel_sums" in groups:
        yield partial(cases.channel_sums, batch, device)
    if "input_covariance" in groups:
        for channels, extent in CONVOLUTIONS.values():
            yield partial(cases.input_covariance, channels, extent, batch, device)
    for name in sets:
        layers = LayerSet(name, batch, device)
        for group in groups:
            if group in GROUPS:
                yield partial(GROUPS[group], layers)


def compare(case: Case, clock: Clock, rounds: int, budget: float) -> dict[str, Any]:
    """Check a case, time it, and divide by the time of kfac2 in the same round."""
    case.check()
    times = interleaved(case.functions, clock, rounds, budget)
    for name, scale in case.scale.items():
        times[name] = [scale * taken for taken in times[name]]
    own = times["kfac2"]
    return {
        "case": case.title,
        "milliseconds": {
            name: asdict(Spread.of([1e3 * taken for taken in taken_by])) for name, taken_by in times.items()
        },
        "over_kfac2": {name: asdict(Spread.of(ratios(taken, own))) for name, taken in times.items() if name != "kfac2"},
        "rounds": len(own),
        "note": case.note,
    }


def measure(
    groups: Sequence[str],
    sets: Sequence[str],
    batch: int,
    rounds: int,
    budget: float,
    device: str,
    threads: int,
) -> list[dict[str, Any]]:
    """Compare all cases of some groups on some layer sets.

    Args:
        groups: of `GROUPS` and `SINGLE`.
        sets: names of networks.
        batch: samples.
        rounds: of each case, at most.
        budget: seconds for each case, after which no further round starts.
        device: where.
        threads: of torch on the CPU.
    """
    torch.set_num_threads(threads)
    clock = Clock(device, threads)
    results = []
    for build in all_cases(groups, sets, batch, device):
        results.append(compare(build(), clock, rounds, budget))
        print(f"  {results[-1]['case']}", file=sys.stderr)
    return results


def report(results: Sequence[dict[str, Any]]) -> str:
    """Write the table: how many times as long as kfac2 the others take."""
    rows = []
    for result in results:
        over = {name: Spread(**spread) for name, spread in result["over_kfac2"].items()}
        others = "; ".join(f"{name} {spread}" for name, spread in over.items() if name not in ("paper", "torch"))
        notes = "; ".join(filter(None, (others, result["note"])))
        own = digits(result["milliseconds"]["kfac2"]["median"])
        rows.append([result["case"], own, str(over["paper"]), str(over["torch"]), str(result["rounds"]), notes])
    return table(["op", "kfac2, ms", "paper / kfac2", "torch / kfac2", "rounds", "notes"], rows)


def main() -> None:
    """Read the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    groups = [*SINGLE, *GROUPS]
    parser.add_argument("--ops", type=some_of(groups), default=groups, help="with commas (default: all)")
    parser.add_argument(
        "--sets", type=some_of(list(NETWORKS)), default=SETS, help=f"layer sets (default: {','.join(SETS)})"
    )
    parser.add_argument("--batch", type=positive, default=128, help="samples (default: 128)")
    parser.add_argument("--rounds", type=positive, default=25, help="of each case, at most (default: 25)")
    parser.add_argument(
        "--seconds", type=above_zero, default=5.0, help="for each case, then no further round (default: 5)"
    )
    parser.add_argument("--json", type=writable, metavar="PATH", help="also write the numbers there")
    add_where(parser)
    args = parser.parse_args()
    results = measure(args.ops, args.sets, args.batch, args.rounds, args.seconds, args.device, args.threads)
    print(report(results))
    if args.json:
        write_json(Path(args.json), {"machine": machine(args.device, args.threads), "kernels": results})


if __name__ == "__main__":
    main()

"""Whole training steps of SGD, AdamW, one- and two-level K-FAC and the peers that are installed.

Kinds of steps: `a` updates statistics, `b` statistics and inverses, `c` is an ordinary step. All optimizers take turns
in one process, in a new order each round; ratios are of one round, to SGD's whole step; medians and quartiles. On a
CUDA device ordinary steps are also captured in a graph, and each kernel of a step is timed.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import launches
import torch
from arguments import add_some, add_where, positive
from contenders import BUILDERS, Contender, NotInstalledError, nothing, prepared, shares
from networks import NETWORKS
from output import table
from timing import Clock, Mark, Spread, Work, configure, digits, interleaved, take_turns
from torch import Tensor

SCHEDULES = ((10, 100), (200, 2000))  # cov_every, inv_every
PARTS = ("forward", "statistics", "backward", "step")
KINDS = {"c": "ordinary step", "a": "step with statistics", "b": "step with inverses"}
Times = dict[tuple[str, str], list[float]]  # by optimizer and kind, one entry for each round


def _step(contender: Contender, kind: str, x: Tensor, y: Tensor, mark: Mark) -> None:
    contender.at[kind]()
    contender.step(x, y, mark)


def mean_at(whole: Times, name: str, schedule: tuple[int, int]) -> list[float]:
    """Return each round's mean step of an optimizer at a schedule."""
    kinds = [kind for other, kind in whole if other == name]
    often = shares(kinds, *schedule)
    return [sum(often[kind] * whole[name, kind][i] for kind in kinds) for i in range(len(whole[name, kinds[0]]))]


def summary(laps: dict[tuple[str, str], list[list[float]]]) -> dict[str, Any]:
    """Divide by the whole step of SGD of the same round, and summarise.

    Returns:
        Ratios by optimizer, kind and part; means at the schedules; of two levels over one.
    """
    whole: Times = {key: [sum(parts) for parts in rounds] for key, rounds in laps.items()}
    below = whole["sgd", "c"]

    optimizers = {}
    for name in dict.fromkeys(name for name, _ in laps):
        kinds = {}
        for kind in (kind for other, kind in laps if other == name):
            by_part = dict(zip(PARTS, zip(*laps[name, kind], strict=True), strict=True))
            spreads = {part: Spread.of(seconds, below) for part, seconds in by_part.items()}
            kinds[kind] = {"whole": Spread.of(whole[name, kind], below), **spreads}
        means = {f"{cov}/{inv}": Spread.of(mean_at(whole, name, (cov, inv)), below) for cov, inv in SCHEDULES}
        optimizers[name] = {"kinds": kinds, "means": means}
    levels = {
        kind: Spread.of(whole["kfac2-2", kind], whole["kfac2-1", kind])
        for kind in KINDS
        if ("kfac2-2", kind) in whole and ("kfac2-1", kind) in whole
    }
    milliseconds = Spread.of([1e3 * seconds for seconds in below])
    return {"sgd_milliseconds": milliseconds, "optimizers": optimizers, "levels": levels}


def measure(net: str, batch: int, rounds: int, optimizers: Sequence[str], device: str, threads: int) -> dict[str, Any]:
    """Measure the steps of one network, SGD's in any case; see `summary`. `missing` says which were not, and why."""
    configure(threads)
    works: dict[tuple[str, str], Work] = {}
    missing = {}
    for name in dict.fromkeys(["sgd", *optimizers]):
        try:
            contender, x, y = prepared(name, NETWORKS[net], batch, device)
        except NotInstalledError as error:
            missing[name] = str(error)
        else:
            works |= {(name, kind): partial(_step, contender, kind, x, y) for kind in contender.at}
    result = summary(take_turns(works, Clock(device, threads), rounds))
    if torch.device(device).type == "cuda":
        shown = [("sgd", "c"), *(("kfac2-1", kind) for kind in KINDS), ("kfac2-2", "a")]
        result["kernels"] = {
            " ".join(key): launches.kernels_of(partial(works[key], nothing)) for key in shown if key in works
        }
        if not NETWORKS[net].is_large:
            result["graph"] = in_graphs(net, batch, rounds, device)
    return {"net": net, "batch": batch, "rounds": rounds, **result, "missing": missing}


def in_graphs(net: str, batch: int, rounds: int, device: str) -> dict[str, Any]:
    """Replay an ordinary step from a CUDA graph, beside SGD's, and count the launches of the optimizer's part."""
    replays, counts = {}, {}
    for name in ("sgd", "kfac2-2"):
        contender, x, y = prepared(name, NETWORKS[net], batch, device)
        contender.at["c"]()
        replays[name] = captured(partial(contender.step, x, y, nothing))
        counts[name] = launches.launches(launches.kernels_of(contender.optimizers[0].step))
    times = interleaved(replays, Clock(device, 1), rounds)
    sgd, over = Spread.of([1e3 * seconds for seconds in times["sgd"]]), Spread.of(times["kfac2-2"], times["sgd"])
    return {"sgd_milliseconds": sgd, "over_sgd": over, "launches": counts}


def captured(step: Callable[[], object]) -> Callable[[], None]:
    """Capture a step in a CUDA graph; return what replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def report(result: dict[str, Any], clock: str) -> str:
    """Write the tables of one network."""
    schedules = [f"{cov}/{inv}" for cov, inv in SCHEDULES]
    wholes, parts = [], []
    for name, found in result["optimizers"].items():
        spreads = {kind: by_part["whole"] for kind, by_part in found["kinds"].items()} | found["means"]
        wholes.append([name, *(str(spreads[c]) if c in spreads else "" for c in (*KINDS, *schedules))])
        for kind, by_part in found["kinds"].items():
            parts.append([f"{name}, {kind}", *(digits(by_part[part].median) for part in PARTS)])
    header = ["optimizer", "ordinary (c)", "statistics (a)", "inverses (b)", *(f"mean at {s}" for s in schedules)]
    title = f"{NETWORKS[result['net']].title}, batch {result['batch']}, rounds: {result['rounds']}"
    below = f"SGD's whole step ({result['sgd_milliseconds']} ms)"
    lines = [f"{title}; {clock}, ratios to {below}, medians [quartiles]", "", table(header, wholes), ""]
    lines.append(table(["of which", *PARTS], parts))
    if result["levels"]:
        words = [f"{kind} {spread}" for kind, spread in result["levels"].items()]
        lines += ["", "Two levels over one level: " + ", ".join(words)]
    if "kernels" in result:
        by_kind = dict(result["kernels"])
        lines += ["", launches.report(by_kind.pop("sgd c"), by_kind)]
    if "graph" in result:
        graph = result["graph"]
        lines += [
            f"Ordinary step of two levels in a CUDA graph: {graph['over_sgd']} of SGD's "
            f"({graph['sgd_milliseconds']} ms); launches of the optimizer's step, not captured: "
            f"{graph['launches']['kfac2-2']} (SGD, foreach: {graph['launches']['sgd']})"
        ]
    return "\n".join([*lines, *(f"{name}: {why}" for name, why in result["missing"].items())])


def main() -> None:
    """Read the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_some(parser, "--net", list(NETWORKS), ["deep-linear", "resnet-20", "resnet-56"])
    add_some(parser, "--optimizers", BUILDERS, list(BUILDERS))
    parser.add_argument("--batch", type=positive, help="samples (default: what the comparison states for each)")
    parser.add_argument("--rounds", type=positive, default=25, help="default: 25")
    add_where(parser)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="singd|pytorch_optimizer")
    for net in args.net:
        batch = args.batch or NETWORKS[net].batch
        result = measure(net, batch, args.rounds, args.optimizers, args.device, args.threads)
        print(report(result, Clock(args.device, args.threads).kind), end="\n\n", flush=True)


if __name__ == "__main__":
    main()

"""Run all comparisons, and print what was measured.

The folder given by --out gets <device>.json and <device>.md, written after each measurement, so that one that breaks,
or takes too long, does not take the others with it.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cases
import contenders
import growth
import kernels
import large
import steps
from arguments import add_some, add_where
from networks import NETWORKS
from output import slug, write
from timing import machine

import kfac2

PARTS = ("kernels", "large", "steps", "growth")
Found = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is run."""

    seconds: float  # for each case of the kernels; four times as long for growth
    steps: dict[str, tuple[int, int, Sequence[str]]]  # networks of the whole steps: batch, rounds, optimizers
    sets: Sequence[str] = ("deep-linear", "resnet-20", "resnet-110", "transformer")  # layer sets of the kernels
    batch: int = 128  # samples of the layer sets
    largest: int = 112  # layers of the series of growth
    groups: Sequence[str] = ()  # of comparisons of large layers, which are for a device


OWN, ALL, LARGE = contenders.OWN, contenders.ALL, contenders.LARGE
NETS: dict[str, tuple[int, int, Sequence[str]]] = {
    "deep-linear": (512, 25, ALL),
    "resnet-110": (128, 15, OWN),
    "gpt2-small": (8, 5, LARGE),
    "resnet-50": (256, 3, [name for name in LARGE if name not in ("soap", "kfac2-2")]),  # a step takes half a second
}
PLANS = {
    "quick": Plan(3.0, {"deep-linear": (512, 75, ALL), "resnet-20": (128, 25, ALL), "resnet-56": (32, 25, OWN)}),
    "full": Plan(
        10.0, {"deep-linear": (512, 101, ALL), "resnet-20": (128, 41, ALL), "resnet-56": (32, 41, ALL)}, kernels.SETS
    ),
    "cuda": Plan(1.0, NETS, groups=tuple(large.GROUPS)),
    "tiny": Plan(
        0.01, {"deep-linear": (4, 1, OWN), "resnet-8": (2, 1, OWN)}, ("deep-linear", "resnet-8"), 2, 32, [*large.GROUPS]
    ),
}


def jobs(plan: Plan, args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Found]]]:
    """Yield each measurement that is asked for, with the part that it belongs to."""
    where = (args.device, args.threads)
    if "kernels" in args.parts:
        for build in kernels.all_cases(args.ops, plan.sets, plan.batch, args.device):
            yield "kernels", partial(kernels.compare, build, 25, plan.seconds, *where)
    if "large" in args.parts:
        for group in plan.groups:
            yield "large", partial(large.measure, group, args.tiny, plan.seconds, *where)
    if "steps" in args.parts:
        for net, (batch, rounds, names) in plan.steps.items():
            if net in (args.nets or plan.steps):
                yield "steps", partial(steps.measure, net, batch, rounds, names, *where)
    if "growth" in args.parts:
        yield "growth", partial(growth.measure, plan.batch, plan.largest, 25, 4 * plan.seconds, *where)


def markdown(found: Found, how: str) -> str:
    """Write everything for people."""
    about = found["machine"]
    lines = [
        f"# Speed of kfac2 on {about['device']}", "",
        f"{about['cpu']}; torch {about['torch']}, {about['threads']} thread(s), Python {about['python']}; "
        f"{about['clock']}; {how} run. Medians [quartiles] of ratios within one round.",
    ]  # fmt: skip
    if found["kernels"]:
        lines += ["", "## Kernels", "", kernels.report(found["kernels"])]
    for result in found["large"]:
        lines += ["", f"## Large layers: {result['group']}", "", large.report(result)]
    for result in found["steps"]:
        lines += ["", f"## Steps: {NETWORKS[result['net']].title}", "", steps.report(result, about["clock"])]
    for result in found["growth"]:
        lines += ["", "## Growth of the second level's statistics", "", growth.report(result)]
    if found["failed"]:
        lines += ["", "## Failed", "", *(f"- {failure}" for failure in found["failed"])]
    return "\n".join(lines) + "\n"


def save(found: Found, how: str, out: Path) -> str:
    """Write all that was found so far; return the text."""
    stem, text = slug(found["machine"]["device"]), markdown(found, how)
    write(out / f"{stem}.json", json.dumps(found, indent=1) + "\n")
    write(out / f"{stem}.md", text)
    return text


def main() -> None:
    """Read the command line, run, print, write; the exit status is 0 only if all was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="all sets, all peers, more rounds: hours, not 20 minutes")
    size.add_argument("--tiny", action="store_true", help="one round of tiny sizes, to see that all runs")
    add_some(parser, "--parts", PARTS, PARTS)
    add_some(parser, "--ops", cases.OPS, cases.OPS)
    parser.add_argument(
        "--nets", nargs="+", metavar="NAME", help="of whole steps, those of the run's plan (default: all)"
    )
    default = Path(__file__).with_name("results")
    parser.add_argument("--out", type=Path, default=default, help="folder of the results (default: bench/results)")
    add_where(parser)
    args = parser.parse_args()
    how = "full" if args.full else "tiny" if args.tiny else "quick" if args.device == "cpu" else "cuda"
    warnings.filterwarnings("ignore", module="singd|pytorch_optimizer")
    found: Found = {"machine": machine(args.device, args.threads), "build": kfac2.build_info(), "failed": []}
    found["machine"]["clock"] = found["machine"]["clock"] if args.device == "cpu" else "CUDA events"
    found |= {part: [] for part in PARTS}
    text = ""
    for part, job in jobs(PLANS[how], args):
        print(f"{part}, {len(found[part]) + 1} ...", file=sys.stderr, flush=True)
        try:
            found[part].append(job())
        except Exception as error:  # one that fails must not lose the others
            traceback.print_exc()
            found["failed"].append(f"{part}: {type(error).__name__}: {error}"[:500])
        text = save(found, how, args.out)
    print(text)
    sys.exit(bool(found["failed"]))


if __name__ == "__main__":
    main()

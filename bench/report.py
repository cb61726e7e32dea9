"""Run all comparisons, and print what was measured beside what this project wants to show.

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
import steps
from arguments import add_some, add_where
from networks import NETWORKS
from output import slug, table, write
from timing import Spread, machine

import kfac2

PARTS = ("kernels", "steps", "growth")
Found = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is run."""

    seconds: float  # for each case of the kernels; four times as long for each series of growth
    steps: dict[str, tuple[int, int, Sequence[str]]]  # networks of the whole steps: batch, rounds, optimizers
    sets: Sequence[str] = ("deep-linear", "resnet-20", "resnet-110", "transformer")  # layer sets of the kernels
    batch: int = 128  # samples of the layer sets
    largest: int = 256  # size of the series of growth


OWN, ALL = contenders.OWN, list(contenders.BUILDERS)
PLANS = {
    "quick": Plan(3.0, {"deep-linear": (512, 75, ALL), "resnet-20": (128, 25, ALL), "resnet-56": (32, 25, OWN)}),
    "full": Plan(
        10.0, {"deep-linear": (512, 101, ALL), "resnet-20": (128, 41, ALL), "resnet-56": (32, 41, ALL)}, kernels.SETS
    ),
    "cuda": Plan(1.0, {"deep-linear": (512, 25, ALL), "resnet-110": (128, 15, OWN)}),
    "tiny": Plan(0.01, {"deep-linear": (4, 1, OWN), "resnet-8": (2, 1, OWN)}, ("deep-linear", "resnet-8"), 2, 32),
}

# What is to be shown: at least so many times kfac2's time, by a part of a case's title and the rival ...
RIVALS = {
    ("cross_layer_sums, ResNet-110", "paper"): 1000.0,
    ("input_covariance", "paper"): 4.0,
    ("input_covariance", "torch"): 2.5,
    ("channel_sums", "x.sum(), one number"): 0.85,
    ("factored_tikhonov_inverse, ResNet-110", "paper"): 4.0,
    ("factored_tikhonov_inverse, ResNet-110", "torch"): 1.5,
}
# ... and at most so many times SGD's whole step by two levels, or one level's step (`levels`), by kind of step.
STEPS = {
    "deep-linear": {"c": 1.25, "a": 2.0, "mean": 1.35, "levels c": 1.05, "levels a": 1.05, "levels b": 1.05},
    "resnet-20": {"c": 1.03, "a": 2.5, "mean": 1.2},
    "resnet-56": {"mean": 1.25, "levels c": 1.02, "levels a": 1.015, "levels b": 1.015},
    "resnet-110": {"c": 1.1, "mean": 1.3},
}
EXPONENT = 1.1


def measured(found: Found) -> Iterator[tuple[str, Spread, str, float | None]]:
    """Yield what was measured, and the bound that is to be shown, None where there is none."""
    for result in found["kernels"]:
        for rival, spread in result["over_kfac2"].items():
            bounds = (bound for (part, name), bound in RIVALS.items() if part in result["case"] and name == rival)
            yield f"{result['case']}: {rival} / kfac2", spread, "≥", next(bounds, None)
    for result in found["steps"]:
        title, bound = f"{NETWORKS[result['net']].title}, batch {result['batch']}", STEPS.get(result["net"], {}).get
        own = result["optimizers"]["kfac2-2"]
        for kind, words in steps.KINDS.items():
            yield f"{title}: {words}, two levels / SGD", own["kinds"][kind]["whole"], "≤", bound(kind)
            levels = result["levels"][kind]
            yield f"{title}: {words}, two levels / one level", levels, "≤", bound(f"levels {kind}")
        yield f"{title}: mean at 10/100, two levels / SGD", own["means"]["10/100"], "≤", bound("mean")
    for series in found["growth"]:
        name = f"statistics of the second level, by {growth.TITLES[series['what']]}: exponent"
        yield name, Spread.of([series["time"]]), "≤", EXPONENT if series["what"] == "layers" else None


def _reached(spread: Spread, sign: str, bound: float) -> str:
    return "yes" if (spread.median >= bound if sign == "≥" else spread.median <= bound) else "no"


def jobs(plan: Plan, device: str, threads: int) -> Iterator[tuple[str, Callable[[], Found]]]:
    """Yield each measurement with the part that it belongs to."""
    where = (device, threads)
    for build in kernels.all_cases(cases.OPS, plan.sets, plan.batch, device):
        yield "kernels", partial(kernels.compare, build, 25, plan.seconds, *where)
    for net, (batch, rounds, names) in plan.steps.items():
        yield "steps", partial(steps.measure, net, batch, rounds, names, *where)
    for what in growth.TITLES:
        yield "growth", partial(growth.measure, what, plan.batch, plan.largest, 25, 4 * plan.seconds, *where)


def markdown(found: Found, how: str) -> str:
    """Write everything for people."""
    about = found["machine"]
    rows = [
        [name, f"{sign} {bound:g}", str(spread), _reached(spread, sign, bound)]
        for name, spread, sign, bound in measured(found)
        if bound is not None
    ]
    lines = [
        f"# Speed of kfac2 on {about['device']}", "",
        f"{about['cpu']}; torch {about['torch']}, {about['threads']} thread(s), Python {about['python']}; "
        f"{about['clock']}; {how} run. Medians [quartiles] of ratios within one round.", "",
        "## To show", "", table(["what", "to show", "measured", "reached"], rows),
    ]  # fmt: skip
    if found["kernels"]:
        lines += ["", "## Kernels", "", kernels.report(found["kernels"])]
    for result in found["steps"]:
        lines += ["", f"## Steps: {NETWORKS[result['net']].title}", "", steps.report(result, about["clock"])]
    if found["growth"]:
        lines += ["", "## Growth of the second level's statistics", "", growth.report(found["growth"])]
    if found["failed"]:
        lines += ["", "## Failed", "", *(f"- {failure}" for failure in found["failed"])]
    return "\n".join(lines) + "\n"


def save(found: Found, how: str, out: Path) -> str:
    """Write all that was found so far; return the text."""
    stem, text = slug(found["machine"]["device"]), markdown(found, how)
    lines = [{"name": name, "found": str(spread)} for name, spread, _, _ in measured(found)]
    write(out / f"{stem}.json", json.dumps({**found, "measured": lines}, indent=1) + "\n")
    write(out / f"{stem}.md", text)
    return text


def main() -> None:
    """Read the command line, run, print, write; the exit status is 0 only if all was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="all sets, all peers, more rounds: hours, not 20 minutes")
    size.add_argument("--tiny", action="store_true", help="one round of tiny sizes, to see that all runs")
    add_some(parser, "--parts", PARTS, PARTS)
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
    for part, job in jobs(PLANS[how], args.device, args.threads):
        if part in args.parts:
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

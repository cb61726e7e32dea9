"""Run all comparisons, and print what was measured beside what this project wants to show.

In the folder given by --out: <device>.json, <device>.md and growth.png, each written whole or not at all.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import contenders
import growth
import kernels
import memory
import steps
import torch
from arguments import add_where, some_of
from measure import Spread, digits, machine, table, write, write_json
from networks import NETWORKS

PARTS = ("kernels", "steps", "growth", "memory")
PEERS = [name for name in steps.ALL if name not in contenders.OWN]


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        sets: layer sets of the kernels.
        deepest: the network of many layers.
        batch: samples of the layer sets.
        seconds: for each case of the kernels and each series of growth.
        rounds: of SGD, AdamW and kfac2, by network.
        peers: rounds of the peers, by network; 0 leaves them out.
        batches: samples of the whole steps, by network.
        largest: size of the series of growth.
    """

    sets: Sequence[str]
    deepest: str
    batch: int
    seconds: float
    rounds: dict[str, int]
    peers: dict[str, int]
    batches: dict[str, int]
    largest: int


STEPS = {"deep-linear": 512, "resnet-20": 128, "resnet-56": 32}
PLANS = {
    "quick": Plan(
        ["deep-linear", "resnet-20", "resnet-110", "transformer"], "resnet-110", 128, 3.0,
        {"deep-linear": 75, "resnet-20": 25, "resnet-56": 25}, {"deep-linear": 25, "resnet-20": 25}, STEPS, 256,
    ),
    "full": Plan(
        kernels.SETS, "resnet-110", 128, 10.0,
        {"deep-linear": 101, "resnet-20": 41, "resnet-56": 41}, dict.fromkeys(STEPS, 25), STEPS, 256,
    ),
    "tiny": Plan(
        ["deep-linear", "resnet-8"], "resnet-8", 2, 0.01,
        {"deep-linear": 1, "resnet-8": 1}, {}, {"deep-linear": 4, "resnet-8": 2}, 32,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """One line of the table: what is to be shown, and what was measured."""

    what: str
    bound: float
    at_least: bool
    measured: Spread
    unit: str = "times"

    @property
    def reached(self) -> bool:
        """Whether the median keeps the bound."""
        return self.measured.median >= self.bound if self.at_least else self.measured.median <= self.bound

    def row(self) -> list[str]:
        """Write it for the table."""
        scale, sign = {"times": (1, " times"), "share": (100, " %"), "": (1, "")}[self.unit]
        spread = Spread(*(scale * number for number in (self.measured.median, self.measured.low, self.measured.high)))
        alone = self.measured.low == self.measured.high
        found = f"{digits(spread.median)}{sign}" + ("" if alone else f" [{digits(spread.low)}, {digits(spread.high)}]")
        bound = f"{'≥' if self.at_least else '≤'} {scale * self.bound:g}{sign}"
        return [self.what, bound, found, "yes" if self.reached else "no"]


# -- targets --------------------------------------------------------------------------------------------------


def kernel_targets(results: Sequence[dict[str, Any]], deepest: str) -> Iterator[Target]:
    """Yield what the kernels are to show."""
    over = {result["case"]: {n: Spread(**s) for n, s in result["over_kfac2"].items()} for result in results}
    title = NETWORKS[deepest].title
    for case, found in over.items():
        if case.startswith(f"cross_layer_sums, {title}"):
            yield Target(f"{case}: forming the A_ij / kfac2", 1000, True, found["paper"])
        if case.startswith("input_covariance"):
            yield Target(f"{case}: unfold, one product / kfac2", 4, True, found["paper"])
            yield Target(f"{case}: nine planes, one product / kfac2", 2.5, True, found["torch"])
        if case.startswith("channel_sums"):
            yield Target(
                f"{case}: reads so much of what x.sum() reads", 0.85, True, found["x.sum(), one number"], "share"
            )
        if case.startswith(f"factored_tikhonov_inverse, {title}"):
            yield Target(f"{case}: loop of linalg.inv / kfac2", 4, True, found["paper"])
            yield Target(f"{case}: Cholesky batched by size / kfac2", 1.5, True, found["torch"])


EXTRA = {"deep-linear": (0.05, 0.05, 0.05), "resnet-56": (0.015, 0.015, 0.02)}  # of steps a, b, c
WHOLE = {"deep-linear": {"c": 1.25, "a": 2.0}, "resnet-20": {"c": 1.03, "a": 2.5}}
MEAN = {"deep-linear": 1.35, "resnet-20": 1.2, "resnet-56": 1.25}


def step_targets(results: Sequence[dict[str, Any]]) -> Iterator[Target]:
    """Yield what the whole steps are to show."""
    for result in results:
        net = result["net"]
        title, own = f"{NETWORKS[net].title}, batch {result['batch']}", result["optimizers"]["kfac2-2"]
        for kind, bound in zip("abc", EXTRA.get(net, ()), strict=False):
            extra = Spread(**result["second_level"][kind])
            yield Target(f"{title}: two levels over one, extra time of ({kind})", bound, False, extra, "share")
        for kind, bound in WHOLE.get(net, {}).items():
            whole = Spread(**own["kinds"][kind]["whole"])
            yield Target(f"{title}: two-level step ({kind}) / SGD's step", bound, False, whole)
        if net in MEAN:
            mean = Spread(**own["means"]["10/100"])
            yield Target(f"{title}: two-level mean at 10/100 / SGD's step", MEAN[net], False, mean)


def other_targets(found: dict[str, Any]) -> Iterator[Target]:
    """Yield what growth and memory are to show."""
    if "layers" in found.get("growth", {}):
        series = found["growth"]["layers"]
        exponent = series["exponents"]["time"]
        what = (
            f"growth of the second level's statistics, {series['sizes'][0]} to {series['sizes'][-1]} layers: exponent"
        )
        yield Target(what, 1.1, False, Spread.of([exponent]), "")
    if "memory" in found:
        kept = found["memory"]
        title = f"{NETWORKS[kept['net']].title}, batch {kept['batch']}"
        for what, share in (("at the peak of training", "peak_share"), ("maps and sums alive at a time", "share")):
            yield Target(
                f"{title}: second level's memory / activations, {what}", 0.02, False, Spread.of([kept[share]]), "share"
            )


# -- running --------------------------------------------------------------------------------------------------


def run_steps(plan: Plan, device: str, threads: int) -> list[dict[str, Any]]:
    """Measure SGD, AdamW and kfac2 in many rounds, the peers in few, each beside SGD."""
    results = []
    for net, rounds in plan.rounds.items():
        batch = plan.batches[net]
        result = steps.measure(net, batch, rounds, contenders.OWN, device, threads)
        if plan.peers.get(net):
            names = PEERS if net == "deep-linear" or plan is PLANS["full"] else [n for n in PEERS if n != steps.JAX]
            peers = steps.measure(net, batch, plan.peers[net], names, device, threads)
            peers["optimizers"].pop("sgd")
            result["optimizers"] |= peers["optimizers"]
            result |= {key: peers[key] for key in ("missing", "jax_sgd_milliseconds") if key in peers}
            result["peer_rounds"] = plan.peers[net]
        results.append(result)
    return results


def run_memory(plan: Plan, device: str, threads: int) -> dict[str, Any]:
    """Count the second level's bytes, and measure how much it adds to the peak of training."""
    kept = memory.second_level(plan.deepest, plan.batch, device)
    peaks = memory.peaks(plan.deepest, plan.batch, ["sgd", "kfac2-1", "kfac2-2"], device, threads)
    extra = 1e6 * (peaks["kfac2-2"] - peaks["kfac2-1"])
    return {**kept, "peak_megabytes": peaks, "peak_share": extra / kept["activations"]}


def run(plan: Plan, parts: Sequence[str], device: str, threads: int) -> dict[str, Any]:
    """Run the chosen parts."""
    found: dict[str, Any] = {"machine": machine(device, threads)}
    names = [*kernels.SINGLE, *kernels.GROUPS]
    runs = {
        "kernels": lambda: kernels.measure(names, plan.sets, plan.batch, 25, plan.seconds, device, threads),
        "steps": lambda: run_steps(plan, device, threads),
        "growth": lambda: growth.measure(
            list(growth.TITLES), plan.batch, plan.largest, 25, 4 * plan.seconds, device, threads
        ),
        "memory": lambda: run_memory(plan, device, threads),
    }
    for part in parts:
        print(f"{part} ...", file=sys.stderr, flush=True)
        found[part] = runs[part]()
    return found


def markdown(found: dict[str, Any], plan: Plan, how: str) -> str:
    """Write everything for people."""
    targets = [
        *kernel_targets(found.get("kernels", []), plan.deepest),
        *step_targets(found.get("steps", [])),
        *other_targets(found),
    ]
    about, clock = found["machine"], found["machine"]["clock"]
    lines = [
        f"# Speed of kfac2 on {about['device']}",
        "",
        f"{about['cpu']}; torch {about['torch']}, {about['threads']} thread(s), Python {about['python']}; {clock}; "
        f"{how} run. Medians [quartiles] of ratios within one round.",
        "",
        "## To show",
        "",
        table(["what", "target", "measured", "reached"], [target.row() for target in targets]),
    ]
    if "kernels" in found:
        lines += ["", "## Kernels", "", kernels.report(found["kernels"])]
    for result in found.get("steps", []):
        lines += ["", f"## Steps: {NETWORKS[result['net']].title}", "", steps.report(result, clock)]
    if "growth" in found:
        lines += ["", "## Growth of the second level's statistics", "", growth.report(found["growth"])]
    if "memory" in found:
        kept = found["memory"]
        words = ", ".join(f"{name} {digits(peak)}" for name, peak in kept["peak_megabytes"].items())
        lines += [
            "", "## Memory", "",
            f"{NETWORKS[kept['net']].title}, batch {kept['batch']}: activations {kept['activations'] / 1e6:.0f} MB, "
            f"maps and sums alive at a time {kept['maps_and_sums'] / 1e6:.1f} MB. "
            f"Peak of training, MB, each in its own process: {words}",
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def folder(text: str) -> Path:
    """Read a folder, made where it is missing."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"must be a folder that can be made, got {text!r}: {error.strerror}"
        ) from error
    return path


def main() -> None:
    """Read the command line, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--full",
        dest="how",
        action="store_const",
        const="full",
        help="all sets, all peers, more rounds: hours; default: 20 minutes",
    )
    size.add_argument("--tiny", dest="how", action="store_const", const="tiny", help="one round of tiny sizes: it runs")
    parser.set_defaults(how="quick")
    parser.add_argument("--parts", type=some_of(PARTS), default=PARTS, help=f"of {','.join(PARTS)} (default: all)")
    default = Path(__file__).with_name("results")
    parser.add_argument("--out", type=folder, default=default, help="folder of the results (default: bench/results)")
    add_where(parser)
    args = parser.parse_args()
    plan = PLANS[args.how]
    found = run(plan, args.parts, args.device, args.threads)
    text = markdown(found, plan, args.how)
    print(text)
    on_cuda = torch.device(args.device).type == "cuda"
    stem = re.sub(r"[^a-z0-9]+", "-", found["machine"]["device"].lower()).strip("-") + ("-bench" if on_cuda else "")
    write_json(args.out / f"{stem}.json", found)
    write(args.out / f"{stem}.md", text)
    if "growth" in found:
        growth.draw(found["growth"], found["machine"]["clock"], args.out / "growth.png")


if __name__ == "__main__":
    main()

"""Whole training steps of SGD, AdamW, one- and two-level K-FAC and the peers that are installed.

Kinds of steps: `a` updates statistics, `b` statistics and inverses, `c` is an ordinary step. All optimizers take turns
in one process, in a new order each round; ratios are of one round, to SGD's whole step; medians and quartiles.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from arguments import add_where, positive, some_of, writable
from contenders import BUILDERS, Contender, NotInstalledError, prepared, shares
from instructions import second_level_instructions
from measure import Clock, Spread, digits, machine, ratios, table, write_json
from memory import peaks
from networks import NETWORKS
from torch import Tensor

SCHEDULES = ((10, 100), (200, 2000))
PARTS = ("forward", "statistics", "backward", "step")
JAX = "kfac-jax"
ALL = [*BUILDERS, JAX]
Times = dict[tuple[str, str], list[float]]  # by optimizer and kind, one entry for each round


@dataclass
class Stepped:
    """What all rounds of one network gave: seconds of whole steps, and of their parts."""

    whole: Times
    parts: dict[str, Times]


def timed(contender: Contender, x: Tensor, y: Tensor, clock: Clock) -> tuple[float, list[float]]:
    """Take a step; return its seconds and those of its parts. On a device events time the parts."""
    if x.is_cuda:
        events: list[torch.cuda.Event] = []

        def record() -> None:
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()

        begin = clock()
        contender.step(x, y, record)
        whole = clock() - begin
        return whole, [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]
    marks: list[float] = []
    contender.step(x, y, lambda: marks.append(clock()))
    return marks[-1] - marks[0], [b - a for a, b in pairwise(marks)]


def rounds_of(contenders: dict[str, tuple[Contender, Tensor, Tensor]], rounds: int, clock: Clock) -> Stepped:
    """Take every kind of step of every optimizer in each round, in a new order."""
    entries = [(name, kind) for name, (contender, *_) in contenders.items() for kind in contender.at]
    stepped = Stepped({entry: [] for entry in entries}, {part: {entry: [] for entry in entries} for part in PARTS})
    shuffle = random.Random(0)
    for _ in range(rounds):
        for name, kind in shuffle.sample(entries, len(entries)):
            contender, x, y = contenders[name]
            contender.at[kind]()
            whole, parts = timed(contender, x, y, clock)
            stepped.whole[name, kind].append(whole)
            for part, seconds in zip(PARTS, parts, strict=True):
                stepped.parts[part][name, kind].append(seconds)
    return stepped


def mean_at(whole: Times, name: str, schedule: tuple[int, int]) -> list[float]:
    """Return each round's mean step of an optimizer at a schedule."""
    kinds = [kind for other, kind in whole if other == name]
    often = shares(kinds, *schedule)
    return [sum(often[kind] * whole[name, kind][i] for kind in kinds) for i in range(len(whole[name, kinds[0]]))]


def summary(stepped: Stepped, base: tuple[str, str]) -> dict[str, Any]:
    """Divide by the whole step of SGD of the same round, and summarise."""
    below = stepped.whole[base]

    def spread(values: Sequence[float]) -> dict[str, float]:
        return asdict(Spread.of(ratios(values, below)))

    optimizers = {}
    for name in dict.fromkeys(name for name, _ in stepped.whole):
        kinds = {
            kind: {
                "whole": spread(times),
                **{part: spread(by_part[name, kind]) for part, by_part in stepped.parts.items()},
            }
            for (other, kind), times in stepped.whole.items()
            if other == name
        }
        means = {f"{cov}/{inv}": spread(mean_at(stepped.whole, name, (cov, inv))) for cov, inv in SCHEDULES}
        optimizers[name] = {"kinds": kinds, "means": means}
    return {"sgd_milliseconds": asdict(Spread.of([1e3 * s for s in below])), "optimizers": optimizers}


def second_level(whole: Times) -> dict[str, Any]:
    """Return the extra time of two levels over one in each kind of step, as a share of the one-level step."""
    return {
        kind: asdict(Spread.of([r - 1 for r in ratios(whole["kfac2-2", kind], whole["kfac2-1", kind])]))
        for kind in ("a", "b", "c")
        if ("kfac2-2", kind) in whole and ("kfac2-1", kind) in whole
    }


def in_jax(net: str, batch: int, rounds: int) -> tuple[dict[str, Any] | None, str]:
    """Run kfac-jax in its own process; return its summary over JAX's own SGD, or None and why there is none."""
    script = Path(__file__).with_name("kfac_jax_steps.py")
    command = [sys.executable, str(script), "--net", net, "--batch", str(batch), "--rounds", str(rounds)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    except subprocess.TimeoutExpired:
        return None, "took longer than 30 minutes"
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return None, reason if "not installed" in reason else f"does not run here: {reason}"
    times = json.loads(done.stdout.strip().splitlines()[-1])
    whole = {("jax SGD" if name == "sgd" else JAX, "c" if name == "sgd" else name): t for name, t in times.items()}
    return summary(Stepped(whole, {}), ("jax SGD", "c")), ""


def measure(net: str, batch: int, rounds: int, optimizers: Sequence[str], device: str, threads: int) -> dict[str, Any]:
    """Measure the steps of one network.

    Args:
        net: its name.
        batch: samples.
        rounds: how many.
        optimizers: names; SGD is measured in any case.
        device: where.
        threads: of torch on the CPU.

    Returns:
        Ratios to SGD's whole step by optimizer, kind and part; means at the schedules; the extra of the second
        level; what could not be measured, and why.
    """
    torch.set_num_threads(threads)
    contenders, missing = {}, {}
    for name in dict.fromkeys(["sgd", *optimizers]):
        if name == JAX:
            continue
        try:
            contenders[name] = prepared(name, NETWORKS[net], batch, device)
        except NotInstalledError as error:
            missing[name] = str(error)
    stepped = rounds_of(contenders, rounds, Clock(device, threads))
    result = {"net": net, "batch": batch, "rounds": rounds, **summary(stepped, ("sgd", "c"))}
    result["second_level"] = second_level(stepped.whole)
    if JAX in optimizers:
        found, why = (None, "measured on the CPU only") if device != "cpu" else in_jax(net, batch, min(rounds, 11))
        if found is None:
            missing[JAX] = why
        else:
            result["jax_sgd_milliseconds"] = found["sgd_milliseconds"]
            result["optimizers"][JAX] = found["optimizers"][JAX]
    return {**result, "missing": missing}


def report(result: dict[str, Any], clock: str) -> str:
    """Write the tables of one network."""
    milliseconds = Spread(**result["sgd_milliseconds"])
    rounds = f"rounds: {result['rounds']}" + (f", of peers {result['peer_rounds']}" if "peer_rounds" in result else "")
    lines = [
        f"{NETWORKS[result['net']].title}, batch {result['batch']}, {rounds}; "
        f"{clock}, ratios to SGD's whole step ({milliseconds} ms), medians [quartiles]",
        "",
    ]
    schedules = [f"{cov}/{inv}" for cov, inv in SCHEDULES]
    wholes, parts = [], []
    for name, found in result["optimizers"].items():
        spreads = {kind: by_part["whole"] for kind, by_part in found["kinds"].items()} | found["means"]
        columns = [Spread(**spreads[column]) if column in spreads else "" for column in ("c", "a", "b", *schedules)]
        wholes.append([name, *map(str, columns)])
        for kind, by_part in found["kinds"].items():
            if len(by_part) > 1:
                parts.append([f"{name}, {kind}", *(digits(by_part[part]["median"]) for part in PARTS)])
    header = ["optimizer", "ordinary (c)", "statistics (a)", "inverses (b)", *(f"mean at {s}" for s in schedules)]
    lines += [table(header, wholes), "", table(["of which", *PARTS], parts)]
    if result["second_level"]:
        extra = {kind: Spread(**spread) for kind, spread in result["second_level"].items()}
        words = [f"{k} {s.median:+.1%} [{s.low:+.1%}, {s.high:+.1%}]" for k, s in extra.items()]
        lines += ["", "Two levels over one: " + ", ".join(words)]
    if result.get("instructions"):
        words = [f"{kind} {extra:+.2%}" for kind, extra in result["instructions"].items()]
        lines += ["Two levels over one, instructions counted by callgrind: " + ", ".join(words)]
    if JAX in result["optimizers"]:
        below = digits(result["jax_sgd_milliseconds"]["median"])
        lines += [f"{JAX} is over SGD in JAX ({below} ms), in its own process."]
    if result.get("peak_megabytes"):
        words = [f"{name} {digits(peak)}" for name, peak in result["peak_megabytes"].items()]
        lines += ["Peak memory of training, MB, each in its own process: " + ", ".join(words)]
    lines += [f"{name}: {why}" for name, why in result["missing"].items()]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    nets = ["deep-linear", "resnet-20", "resnet-56"]
    parser.add_argument(
        "--net", type=some_of(list(NETWORKS)), default=nets, help=f"with commas (default: {','.join(nets)})"
    )
    parser.add_argument("--batch", type=positive, help="samples (default: what the comparison states for each)")
    parser.add_argument("--rounds", type=positive, default=25, help="default: 25")
    parser.add_argument(
        "--optimizers",
        type=some_of(ALL),
        default=list(BUILDERS),
        help=f"some of {','.join(ALL)} (default: all but {JAX}, which compiles for minutes)",
    )
    parser.add_argument("--memory", action="store_true", help="also measure the peak memory of each")
    parser.add_argument(
        "--instructions", action="store_true", help="also count the second level's instructions by callgrind"
    )
    parser.add_argument("--json", type=writable, metavar="PATH", help="also write the numbers there")
    add_where(parser)
    args = parser.parse_args(arguments)
    if args.instructions and shutil.which("valgrind") is None:
        parser.error("argument --instructions: needs valgrind, which is not installed")
    if args.instructions and args.device != "cpu":
        parser.error(f"argument --instructions: counts on the CPU only, got --device {args.device}")
    return args


def main() -> None:
    """Read the command line, measure, print, write."""
    args = parse()
    warnings.filterwarnings("ignore", module="singd|pytorch_optimizer")
    results = []
    for net in args.net:
        batch = args.batch or NETWORKS[net].batch
        result = measure(net, batch, args.rounds, args.optimizers, args.device, args.threads)
        if args.memory:
            result["peak_megabytes"] = peaks(net, batch, list(result["optimizers"]), args.device, args.threads)
        if args.instructions:
            result["instructions"] = second_level_instructions(net, batch)
        print(report(result, Clock(args.device, args.threads).kind), end="\n\n", flush=True)
        results.append(result)
    if args.json:
        write_json(args.json, {"machine": machine(args.device, args.threads), "steps": results})


if __name__ == "__main__":
    main()

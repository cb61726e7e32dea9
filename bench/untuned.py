"""Sixteen networks trained by kfac2 as it comes, beside AdamW, SGD and SINGD at several rates each.

`--kfac2 '{"lr": 0.1}' --label name` trains with arguments of its own. A run that is recorded is not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import traceback
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from arguments import add_some, positive
from networks import Transformer
from output import table, write
from timing import Clock, configure
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from untuned_nets import NETS

import kfac2

RATES = {"adamw": (1e-4, 3e-4, 1e-3, 3e-3), "sgd": (3e-3, 1e-2, 3e-2, 1e-1), "singd": (1e-3, 1e-2, 1e-1)}
BLOCK, LAST = 10, 20  # steps whose mean loss is recorded; steps at the end whose mean is the final loss
LIMIT = 1.02  # times AdamW's final loss is no worse
Record = dict[str, Any]


class Job(NamedTuple):
    """A run to make."""

    net: str
    optimizer: str
    label: str  # the rate, or what kfac2's settings are called
    seed: int
    steps: int
    settings: dict[str, Any]


def optimizers_of(job: Job, model: nn.Module) -> list[Optimizer]:
    """Build what steps the model's parameters, one after the other."""
    if job.optimizer == "kfac2":
        return [kfac2.KFAC(model, **job.settings)]
    if job.optimizer == "adamw":
        return [AdamW(model.parameters(), **job.settings)]
    if job.optimizer == "sgd":
        return [SGD(model.parameters(), momentum=0.9, **job.settings)]
    from singd.optim.optimizer import SINGD  # AdamW as it comes has what SINGD does not know

    known = [p for m in model.modules() if isinstance(m, SINGD.SUPPORTED_MODULES) for p in m.parameters()]
    rest = [p for p in model.parameters() if not any(p is other for other in known)]
    average = "batch+sequence" if isinstance(model, Transformer) else "batch"
    return [SINGD(model, known, loss_average=average, **job.settings), *([AdamW(rest)] if rest else [])]


def train(job: Job) -> Record:
    """Train, and return a record; a loss that is not finite ends the run, which has diverged."""
    net = NETS[job.net]
    torch.manual_seed(job.seed)
    model = net.make()
    optimizers = optimizers_of(job, model)
    generator = torch.Generator().manual_seed(job.seed + 1000)
    batches = [net.draw(net.batch, generator) for _ in range(job.steps)]
    torch.manual_seed(job.seed + 2000)  # of the labels that K-FAC draws
    clock, losses = Clock("cpu", 1), []  # losses of batches, each before its step
    start = clock.now()
    for x, y in batches:
        model.zero_grad()
        out = model(x)
        if isinstance(optimizers[0], kfac2.KFAC):
            optimizers[0].accumulate_fisher(net.prediction.distribution(out))
        loss = net.prediction.loss(out, y)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    seconds = clock.now() - start
    numbers = {"first": losses[0], "max": max(losses), "final": float(np.mean(losses[-LAST:]))}
    blocks = [float(np.mean(losses[i : i + BLOCK])) for i in range(0, len(losses), BLOCK)]
    return {
        **job._asdict(),
        "diverged": not math.isfinite(losses[-1]),
        **{name: rounded(number) for name, number in numbers.items()},
        "seconds": round(seconds, 3),
        "losses": [rounded(loss) for loss in blocks],
    }


def rounded(number: float) -> float | None:
    return float(f"{number:.5g}") if math.isfinite(number) else None


def attempt(job: Job) -> Record | None:
    """Train; an error is printed, and the other runs go on."""
    configure(threads=1)
    try:
        return train(job)
    except Exception:
        print(f"\n{job} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return None


def key(run: Record) -> tuple[Any, ...]:
    return tuple(run[name] for name in ("net", "optimizer", "label", "seed", "steps"))


def load(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def missing(jobs: Iterable[Job], path: Path) -> list[Job]:
    """Return the jobs that are not recorded; ValueError if a label is recorded with other settings."""
    found, result = {key(record): record["settings"] for record in load(path)}, []
    for job in jobs:
        old = found.get(key(job._asdict()))
        if old is None:
            result.append(job)
        elif old != job.settings:
            raise ValueError(f"{path} has {job.label!r} with {old}, not {job.settings}: take another label")
    return result


def run(jobs: Sequence[Job], path: Path, processes: int) -> int:
    """Make runs, recording each as it ends; return how many failed."""
    failed = 0
    pool = multiprocessing.get_context("spawn").Pool(processes) if processes > 1 else None
    for done, record in enumerate(pool.imap_unordered(attempt, jobs) if pool else map(attempt, jobs), start=1):
        if record is None:
            failed += 1
            continue
        before = path.read_text() if path.exists() else ""
        write(path, before + json.dumps(record, allow_nan=False) + "\n")
        name = " ".join(map(str, key(record)[:4]))
        print(f"{done}/{len(jobs)} {name}: {record['first']} to {record['final']}, {record['seconds']} s", flush=True)
    return failed


def final(record: Record) -> float:
    return math.inf if record["diverged"] else float(record["final"])


def rise(record: Record) -> float:
    return math.inf if record["diverged"] else record["max"] / record["first"]


def steps_to(record: Record, loss: float) -> float:
    """Return after how many steps the mean over the last two blocks was at most `loss`; infinity if never."""
    for i, (a, b) in enumerate(pairwise(record["losses"]), start=2):
        if None not in (a, b) and (a + b) / 2 <= loss * (1 + 1e-4):  # all of them are rounded
            return i * BLOCK
    return math.inf


def median(values: Iterable[float]) -> float:
    """Return the median, of an even number the larger of the middle two."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def digits(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "-"


def best(runs: Sequence[Record], net: str, optimizer: str, label: str | None) -> list[Record]:
    """Return the runs of an optimizer on a net at the rate of the least median final loss, or with that label."""
    groups: dict[str, list[Record]] = {}
    for r in runs:
        if (r["net"], r["optimizer"]) == (net, optimizer) and label in (None, r["label"]):
            groups.setdefault(r["label"], []).append(r)
    most = max(map(len, groups.values()), default=0)  # a rate whose seeds are not all there yet is no rival
    return min((g for g in groups.values() if len(g) == most), key=lambda g: median(map(final, g)), default=[])


def comparison(runs: Sequence[Record]) -> str:
    """Write a table of final losses, and one for each contender beside the best AdamW."""
    labels = dict.fromkeys(r["label"] for r in runs if r["optimizer"] == "kfac2")
    contenders = [*((name, None) for name in RATES), *(("kfac2", label) for label in labels)]
    names = [net for net in NETS if best(runs, net, "adamw", None)]
    finals, parts = [[net] for net in names], []
    half = max((r["steps"] for r in runs), default=0) / 2
    for optimizer, label in contenders:
        rows, rises = [], []
        good, good_always, quick, quick_always = 0, 0, 0, 0  # networks, by the median and on every seed
        for net, line in zip(names, finals, strict=True):
            reference = {r["seed"]: r for r in best(runs, net, "adamw", None)}
            group = [r for r in best(runs, net, optimizer, label) if r["seed"] in reference]
            if not group:
                line.append("")
                continue
            same = [reference[r["seed"]] for r in group]
            loss, seconds = median(map(final, group)), median(r["seconds"] for r in group)
            line.append(digits(loss) + f" ({group[0]['label']})" * (label is None))
            ratio = loss / median(map(final, same))
            steps = [steps_to(r, final(s)) for r, s in zip(group, same, strict=True)]
            good, quick = good + (ratio <= LIMIT), quick + (median(steps) <= half)
            good_always += all(final(r) <= LIMIT * final(s) for r, s in zip(group, same, strict=True))
            quick_always += max(steps) <= half
            rises.append(max(map(rise, group)))
            over = seconds / median(r["seconds"] for r in same)
            rows.append([net, *map(digits, (loss, ratio, median(steps), rises[-1], seconds, over))])
        header = ["net", "final", "over AdamW", "steps to AdamW", "worst rise", "seconds", "over AdamW"]
        parts.append(
            f"{optimizer} {label or '(best rate)'}\n{table(header, rows)}\n"
            f"No worse than the best AdamW on {good} of {len(rows)} ({good_always} on every seed), "
            f"at most half its steps on {quick} ({quick_always} on every seed); "
            f"worst rise {digits(max(rises, default=math.nan))}, above 1.5 on {sum(r > 1.5 for r in rises)}."
        )
    titles = [label or optimizer for optimizer, label in contenders]
    return "\n\n".join([f"Final loss, median over seeds (best rate)\n{table(['net', *titles], finals)}", *parts])


def main() -> None:
    """Make the runs that are not recorded yet, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_some(parser, "--nets", NETS, list(NETS))
    add_some(parser, "--optimizers", [*RATES, "kfac2"], [*RATES, "kfac2"])
    parser.add_argument("--kfac2", action="append", type=json.loads, help="arguments of KFAC as JSON; again and again")
    parser.add_argument("--label", action="append", help="what each --kfac2 is called")
    for name, usual in (("seeds", 3), ("steps", 400), ("jobs", 1)):
        parser.add_argument(f"--{name}", type=positive, default=usual, help=f"(default: {usual})")
    parser.add_argument("--out", type=Path, default=Path("build/untuned.jsonl"), help="the records, JSON lines")
    parser.add_argument("--table", action="store_true", help="run nothing, print the tables")
    options = parser.parse_args()
    settings, labels = options.kfac2 or [{}], options.label or ["default"]
    if len(settings) != len(labels):
        parser.error(f"each --kfac2 needs a --label, got {len(settings)} and {len(labels)}")
    if options.table:
        print(comparison([r for r in load(options.out) if r["net"] in options.nets and r["steps"] == options.steps]))
        return
    tried = {name: [(f"{rate:g}", {"lr": rate}) for rate in rates] for name, rates in RATES.items()}
    tried["kfac2"] = list(zip(labels, settings, strict=True))
    jobs = [Job(net, optimizer, label, seed, options.steps, arguments)
            for seed in range(options.seeds) for net in options.nets for optimizer in options.optimizers
            for label, arguments in tried[optimizer]]  # fmt: skip
    try:
        jobs = missing(jobs, options.out)
    except ValueError as error:
        parser.error(str(error))
    sys.exit(1 if run(jobs, options.out, options.jobs) else 0)


if __name__ == "__main__":
    main()

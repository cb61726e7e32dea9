"""A study of rivals: one-level K-FAC, second levels, AdamW, SOAP on fifteen problems, with an equal search for each.

For every problem: each rival as it comes and at the same number of points of its box on seed 0; the point with the
least training loss at the end, and the rival as it comes, then run on other seeds. A run that is recorded is not done
again, so the same command goes on where it was stopped. Tables and pictures are written at the end, or by `--table`.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import traceback
import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from arguments import add_some, positive
from experiments.data import DataError
from output import write
from study_problems import PROBLEMS, StudyProblem, images
from study_rivals import RIVALS, Settings, points
from study_tables import Record, readme, winner
from timing import Clock, configure
from torch import Tensor, nn
from torch.optim import Optimizer
from untuned import load, rounded

import kfac2

LARGE = 1024  # samples of a batch from which on the space of directions is measured in a forward pass of its own
POINTS, FULL_POINTS, FULL_STEPS = 12, 24, 2  # the last: how many times as many steps


class Job(NamedTuple):
    """A run to make."""

    problem: str
    rival: str
    point: int  # of the rival's box; 0: as it comes
    seed: int  # of weights, batches, and the labels that K-FAC draws
    steps: int
    settings: Settings


class Plan(NamedTuple):
    """Which runs a study consists of."""

    problems: Sequence[str]
    rivals: Sequence[str]
    points: int
    seeds: int
    steps: dict[str, int]  # of each problem

    def of(self, records: Iterable[Record]) -> list[Record]:
        """Return the records that belong to this study."""
        return [
            r for r in records
            if r["problem"] in self.problems and r["rival"] in self.rivals and r["steps"] == self.steps[r["problem"]]
            and r["point"] < self.points and r["seed"] <= self.seeds
        ]  # fmt: skip

    def search(self, problem: str) -> list[Job]:
        """Return the runs that a problem's winners are chosen from."""
        boxes = {rival: points(rival, self.points, PROBLEMS[problem].nats) for rival in self.rivals}
        return [
            Job(problem, rival, point, 0, self.steps[problem], boxes[rival][point])
            for point in range(self.points) for rival in self.rivals
        ]  # fmt: skip

    def finals(self, problem: str, records: Sequence[Record]) -> list[Job]:
        """Return the runs on other seeds: of each rival's winner, and of the rival as it comes."""
        chosen = []
        for rival in self.rivals:
            best = winner(records, problem, rival)
            if best is not None:
                box = points(rival, self.points, PROBLEMS[problem].nats)
                chosen += [(rival, point, box[point]) for point in sorted({0, best})]
        return [
            Job(problem, rival, point, seed, self.steps[problem], settings)
            for seed in range(1, self.seeds + 1) for rival, point, settings in chosen
        ]  # fmt: skip

    def remaining(self, records: Sequence[Record]) -> float:
        """Estimate the CPU seconds of the runs that are missing, by those that are there."""
        total = 0.0
        for problem in self.problems:
            here = [r for r in records if r["problem"] == problem]
            for rival in self.rivals:
                same = [r for r in here if r["rival"] == rival]
                is_searched = sum(r["seed"] == 0 for r in same) == self.points
                finals = 1 if is_searched and winner(same, problem, rival) == 0 else 2
                seconds = next((mean_seconds(group) for group in (same, here, records) if group), 0.0)
                total += seconds * (self.points + finals * self.seeds - len(same))
        return total


def mean_seconds(records: Sequence[Record]) -> float:
    return sum(r["seconds"] for r in records) / len(records)


def one_step(problem: StudyProblem, model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> float:
    """Return the loss of a batch, and take a step if it is finite."""
    optimizer.zero_grad()
    distribution = problem.prediction.distribution
    kfac = optimizer if isinstance(optimizer, kfac2.KFAC) else None
    has_own_pass = kfac is not None and kfac.options.coarse == "directions" and len(x) >= LARGE
    if kfac is not None and has_own_pass:
        kfac.accumulate_fisher(lambda part: distribution(model(x[part])), samples=len(x))
    out = model(x)
    if kfac is not None and not has_own_pass:
        kfac.accumulate_fisher(distribution(out))
    loss = problem.prediction.loss(out, y)
    if math.isfinite(value := loss.item()):
        loss.backward()
        optimizer.step()
    return value


@torch.no_grad()
def tested(problem: StudyProblem, model: nn.Module) -> tuple[float, float]:
    """Return loss and accuracy on the test data."""
    model.eval()
    x, y = problem.test()
    out = model(x)
    return problem.prediction.loss(out, y).item(), problem.prediction.correct(out, y).float().mean().item()


def train(job: Job) -> Record:
    """Train, and return a record; a loss that is not finite ends the run, which has diverged."""
    problem, clock = PROBLEMS[job.problem], Clock("cpu", 1)
    torch.manual_seed(job.seed)
    model = problem.make()
    optimizer = RIVALS[job.rival].make(model, job.settings)
    generator = torch.Generator().manual_seed(job.seed + 1000)
    problem.draw(problem.batch, torch.Generator())  # reads the data, which no run's time should have
    torch.manual_seed(job.seed + RIVALS[job.rival].labels)
    losses, in_steps, start = [], 0.0, clock.now()
    for _ in range(job.steps):
        x, y = problem.draw(problem.batch, generator)
        before = clock.now()
        losses.append(one_step(problem, model, optimizer, x, y))
        in_steps += clock.now() - before
        if not math.isfinite(losses[-1]):
            break
    seconds = clock.now() - start
    test_loss, accuracy = tested(problem, model)
    return {
        **job._asdict(),
        "diverged": not math.isfinite(losses[-1]),
        "seconds": round(seconds, 3),
        "step_seconds": rounded(in_steps / len(losses)),  # batches are drawn outside it
        "test_loss": rounded(test_loss),
        "test_accuracy": rounded(accuracy),
        "losses": kept([rounded(loss) for loss in losses], job.seed, job.steps),  # of each batch, before its step
    }


def kept(losses: list[float | None], seed: int, steps: int) -> list[float | None]:
    """Return the losses that are recorded: of a run of the search the last tenth, which is all that it is judged by."""
    return losses if seed else losses[-max(1, round(steps / 10)) :]


def attempt(job: Job) -> Record | None:
    """Train; an error is printed, and the other runs go on."""
    configure(threads=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return train(job)
    except Exception:
        print(f"\n{job} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return None


def key(run: Record) -> tuple[str | int, ...]:
    return tuple(run[name] for name in ("problem", "rival", "point", "seed", "steps"))


def missing(jobs: Iterable[Job], records: Iterable[Record]) -> list[Job]:
    """Return the jobs that are not recorded; ValueError if a point is recorded with other settings."""
    found, result = {key(record): record["settings"] for record in records}, []
    for job in jobs:
        old = found.get(key(job._asdict()))
        if old is None:
            result.append(job)
        elif old != job.settings:
            raise ValueError(
                f"point {job.point} of {job.rival} on {job.problem} is recorded with {old}, and now is {job.settings}: "
                "take another --out, or delete the lines of that rival"
            )
    return result


def run(plan: Plan, path: Path, processes: int) -> int:
    """Make the runs that are missing, problem by problem, recording each as it ends; return how many failed."""
    records, failed = plan.of(load(path)), 0
    for problem in plan.problems:
        missing(plan.search(problem), records)  # an error at once, not after hours
    text = path.read_text() if path.exists() else ""
    pools = multiprocessing.get_context("spawn").Pool(processes) if processes > 1 else nullcontext()
    with pools as pool:
        for problem in plan.problems:
            for wanted in (plan.search, partial(plan.finals, records=records)):
                jobs = missing(wanted(problem), records)
                for record in pool.imap_unordered(attempt, jobs) if pool else map(attempt, jobs):
                    if record is None:
                        failed += 1
                        continue
                    records.append(record)
                    text += json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n"
                    write(path, text)
                    minutes = math.ceil(plan.remaining(records) / processes / 60)
                    print(f"{described(record)}; about {minutes} minutes left", flush=True)
    return failed


def described(record: Record) -> str:
    name = " ".join(str(part) for part in key(record)[:4])
    return f"{name}: {record['losses'][0]} to {record['losses'][-1]}, {record['seconds']:.1f} s"


def plan_of(options: argparse.Namespace) -> Plan:
    """Return what the command line asks for; a rival that cannot run here is left out, which is said."""
    lacking = {rival: RIVALS[rival].missing() for rival in options.rivals} if not options.table else {}
    for rival, what in lacking.items():
        if what:
            print(f"{rival} is left out: it needs {what}", file=sys.stderr)
    steps = {name: options.steps or PROBLEMS[name].steps * (FULL_STEPS if options.full else 1) for name in PROBLEMS}
    count = options.points or (FULL_POINTS if options.full else POINTS)
    return Plan(options.problems, [r for r in options.rivals if not lacking.get(r)], count, options.seeds, steps)


def main() -> None:
    """Make the runs that are not recorded yet, then write tables and pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_some(parser, "--problems", PROBLEMS, list(PROBLEMS))
    add_some(parser, "--rivals", RIVALS, list(RIVALS))
    parser.add_argument("--points", type=positive, help=f"searched for each rival (default: {POINTS})")
    parser.add_argument("--seeds", type=positive, default=5, help="of the runs after the search (default: 5)")
    parser.add_argument("--steps", type=positive, help="of each run (default: each problem's own)")
    parser.add_argument("--full", action="store_true", help=f"{FULL_POINTS} points, {FULL_STEPS} times as many steps")
    parser.add_argument("--jobs", type=positive, default=1, help="processes of one thread (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("bench/results/study"), help="the folder of the records")
    parser.add_argument("--table", action="store_true", help="run nothing, write tables and pictures")
    options = parser.parse_args()
    plan, path, failed = plan_of(options), options.out / "records.jsonl", 0
    try:
        if not options.table:
            images()  # if they are missing, that is said here
            failed = run(plan, path, options.jobs)
    except (DataError, ValueError) as error:
        parser.error(str(error))
    records = plan.of(load(path))
    if not records:
        parser.error(f"{path} has no records of this study")
    from study_pictures import pictures  # needs matplotlib

    write(options.out / "README.md", readme(records) + "\n")
    pictures(records, options.out)
    print(f"Tables and pictures: {options.out}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

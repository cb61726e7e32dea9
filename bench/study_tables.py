"""What the records of `study.py` say: steps and seconds to common losses, beside those of one-level K-FAC."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from output import table
from study_problems import PROBLEMS
from study_rivals import RIVALS, Settings

Record = dict[str, Any]
BASE = "one"  # the rival that the others are compared with
SHARES = (0.15, 0.3, 0.5, 0.75, 1.0)  # of the base's run, whose losses there are the targets
LATE = 3  # targets of the summary, the last ones
FEWER, FASTER, WORSE = -0.30, -0.15, 0.03  # changes that the summary counts: of steps, of seconds, and of both
NEVER = "–"  # noqa: RUF001


def final(record: Record) -> float:
    """Return the mean training loss of the last tenth of the steps; infinity if the run has diverged."""
    last = max(1, round(record["steps"] / 10))
    return math.inf if record["diverged"] else float(np.mean(record["losses"][-last:]))


def searched(records: Iterable[Record], problem: str, rival: str) -> list[Record]:
    """Return the runs of a search, which are on seed 0."""
    return [r for r in records if (r["problem"], r["rival"], r["seed"]) == (problem, rival, 0)]


def winner(records: Iterable[Record], problem: str, rival: str) -> int | None:
    """Return the point with the least final loss on seed 0, the first of equals; None if nothing is recorded."""
    tried = searched(records, problem, rival)
    return min(tried, key=lambda r: (final(r), r["point"]))["point"] if tried else None


def smoothed(record: Record) -> np.ndarray:
    """Return after each step the mean loss of the last 5 % of a run's steps, at least 5.

    It is infinity as long as there are fewer, and from where a run diverges.
    """
    steps = record["steps"]
    window = min(steps, max(5, round(steps / 20)))
    losses = np.array([loss for loss in record["losses"] if loss is not None])
    curve = np.full(steps, math.inf)
    if len(losses) >= window:
        curve[window - 1 : len(losses)] = np.convolve(losses, np.ones(window) / window, "valid")
    return curve


def median(values: Sequence[Any] | np.ndarray) -> Any:
    """Return the median over the first axis, of an even number the larger of the middle two."""
    return np.sort(np.asarray(values), axis=0)[len(values) // 2]


def targets_of(curves: Sequence[np.ndarray]) -> list[float]:
    """Return the least losses that the median curve has had by `SHARES` of the run."""
    curve = np.minimum.accumulate(median(curves))
    return [float(curve[math.ceil(share * len(curve)) - 1]) for share in SHARES]


def steps_to(curve: np.ndarray, target: float) -> float:
    """Return after how many steps a curve is first at most `target`; infinity if never."""
    is_there = (curve <= target) & np.isfinite(curve)
    return float(is_there.argmax() + 1) if is_there.any() else math.inf


def change(value: float, base: float) -> float:
    """Return value / base − 1; infinity where the value never comes, NaN where the base's does not."""
    return value / base - 1 if math.isfinite(base) else math.nan


class Outcome(NamedTuple):
    """How a rival did on a problem, with the settings of one point: medians over seeds."""

    settings: Settings
    runs: int
    diverged: int
    finals: tuple[float, float, float]  # median, least, most
    test_loss: float
    test_accuracy: float
    steps: list[float]  # to each target
    step_seconds: float

    @property
    def seconds(self) -> list[float]:
        """CPU seconds to each target."""
        return [steps * self.step_seconds for steps in self.steps]


Outcomes = dict[str, Outcome]  # by rival


def runs_of(records: Iterable[Record], problem: str, rival: str, is_tuned: bool) -> list[Record]:
    """Return the runs on the seeds after the search's, of the winner or of the rival as it comes."""
    here = [r for r in records if (r["problem"], r["rival"]) == (problem, rival)]
    point = winner(here, problem, rival) if is_tuned else 0
    return [r for r in here if r["point"] == point and r["seed"] > 0]


def outcome(runs: Sequence[Record], targets: Sequence[float]) -> Outcome:
    """Summarise the runs of one point."""
    curves, finals = [smoothed(r) for r in runs], [final(r) for r in runs]

    def middle(name: str) -> float:
        return float(median([math.inf if r[name] is None else r[name] for r in runs]))

    return Outcome(
        settings=runs[0]["settings"],
        runs=len(runs),
        diverged=sum(r["diverged"] for r in runs),
        finals=(float(median(finals)), min(finals), max(finals)),
        test_loss=middle("test_loss"),
        test_accuracy=middle("test_accuracy"),
        steps=[float(median([steps_to(curve, target) for curve in curves])) for target in targets],
        step_seconds=middle("step_seconds"),
    )


def outcomes(records: Sequence[Record], problem: str, is_tuned: bool) -> tuple[list[float], Outcomes]:
    """Return a problem's targets, and each rival's outcome; none if the base has no runs there."""
    runs = {rival: runs_of(records, problem, rival, is_tuned) for rival in RIVALS}
    if not runs[BASE]:
        return [], {}
    targets = targets_of([smoothed(r) for r in runs[BASE]])
    return targets, {rival: outcome(each, targets) for rival, each in runs.items() if each}


def digits(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else NEVER


def percent(value: float) -> str:
    return f"{100 * value:+.0f} %" if math.isfinite(value) else NEVER


def changes(values: Sequence[float], base: Sequence[float]) -> str:
    return ", ".join(percent(change(v, b)) for v, b in zip(values, base, strict=True))


def described(settings: Settings) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items()) or "as it comes"


def of_problem(problem: str, targets: Sequence[float], found: Outcomes) -> str:
    """Write the table of a problem."""
    rows, base = [], found[BASE]
    for rival, one in found.items():
        middle, least, most = one.finals
        is_base = rival == BASE
        rows.append([
            rival, described(one.settings),
            f"{digits(middle)} ({digits(least)} to {digits(most)})" + f", {one.diverged} diverged" * (one.diverged > 0),
            f"{digits(one.test_loss)}, {100 * one.test_accuracy:.1f} %",
            ", ".join(f"{s:.0f}" if math.isfinite(s) else NEVER for s in one.steps),
            "" if is_base else changes(one.steps, base.steps),
            ", ".join(f"{s:.2g}" if math.isfinite(s) else NEVER for s in one.seconds),
            "" if is_base else changes(one.seconds, base.seconds),
        ])  # fmt: skip
    header = ["rival", "settings", "final loss", "test loss, right", "steps", "change", "seconds", "change"]
    runs = "/".join(str(n) for n in sorted({one.runs for one in found.values()}))
    return f"{problem}: {PROBLEMS[problem].title}; {runs} seeds; targets {', '.join(map(digits, targets))}\n\n" + table(
        header, rows
    )


def summary(each: dict[str, Outcomes]) -> str:
    """Write three tables, problems by rivals: changes of steps and of seconds to the last targets, final losses."""
    rivals = [rival for rival in RIVALS if any(rival in found for found in each.values())]
    parts = []
    for title, name in (("steps", "steps"), ("CPU seconds", "seconds")):
        rows = []
        for problem, found in each.items():
            base = getattr(found[BASE], name)[-LATE:]
            row = [changes(getattr(found[r], name)[-LATE:], base) if r in found else "" for r in rivals if r != BASE]
            rows.append([problem, *row])
        late = ", ".join(f"{100 * share:.0f}" for share in SHARES[-LATE:])
        caption = f"Change of {title} to the losses that `{BASE}` has by {late} % of its run"
        parts.append(f"{caption}\n\n{table(['problem', *(r for r in rivals if r != BASE)], rows)}")
    rows = [[p, *(digits(found[r].finals[0]) if r in found else "" for r in rivals)] for p, found in each.items()]
    parts.append(f"Final training loss\n\n{table(['problem', *rivals], rows)}")
    return "\n\n".join(parts)


def sentence(each: dict[str, Outcomes], rival: str) -> str:
    """Say on how many problems a rival is clearly better than the base, and where it is worse."""
    both = {problem: found for problem, found in each.items() if rival in found}
    if not both:
        return f"`{rival}` has no records."
    at_last, at_late, worse, higher = [], [], [], []
    for problem, found in both.items():
        pairs = [
            (change(s, b), change(t, c)) for s, b, t, c in
            zip(found[rival].steps, found[BASE].steps, found[rival].seconds, found[BASE].seconds, strict=True)
        ]  # fmt: skip
        good = [steps <= FEWER and seconds <= FASTER for steps, seconds in pairs[-LATE:]]
        at_last += [problem] * good[-1]
        at_late += [problem] * all(good)
        steps, seconds = pairs[-1]
        if steps > WORSE or seconds > WORSE:
            worse.append(f"{problem} ({percent(steps)}, {percent(seconds)})")
        end = change(found[rival].finals[0], found[BASE].finals[0])
        if end > WORSE:
            higher.append(f"{problem} ({percent(end)})")
    return (
        f"`{rival}` needs at least {-100 * FEWER:.0f} % fewer steps and at least {-100 * FASTER:.0f} % less time than "
        f"`{BASE}` to the last target on {len(at_last)} of {len(both)} problems{named(at_last)}, to each of the last "
        f"{LATE} targets on {len(at_late)}; to the last target it needs over {100 * WORSE:.0f} % more steps or more "
        f"time (steps, time; {NEVER}: never there) on {len(worse)}{named(worse)}; it ends at a loss over "
        f"{100 * WORSE:.0f} % higher on {len(higher)}{named(higher)}."
    )


def named(problems: Sequence[str]) -> str:
    return f": {', '.join(problems)}" if problems else ""


def part(records: Sequence[Record], is_tuned: bool) -> str:
    """Write all tables of the winners, or of the rivals as they come."""
    found = {problem: outcomes(records, problem, is_tuned) for problem in PROBLEMS}
    found = {problem: both for problem, both in found.items() if both[1]}
    each = {problem: rivals for problem, (_, rivals) in found.items()}
    sentences = "\n".join(f"- {sentence(each, rival)}" for rival in RIVALS if rival != BASE)
    tables = [of_problem(problem, targets, rivals) for problem, (targets, rivals) in found.items()]
    return "\n\n".join([sentences, summary(each), *tables])


def effort(records: Sequence[Record]) -> str:
    """Write how many points of each rival are recorded on seed 0 of each problem: these numbers must be equal."""
    return of_searches(records, lambda runs: str(len(runs)))


def sensitivity(records: Sequence[Record]) -> str:
    """Write the median and the worst final loss of each rival over all its points on seed 0."""

    def cell(runs: Sequence[Record]) -> str:
        ends = [final(r) for r in runs]
        return f"{digits(float(np.median(ends)))} ({digits(max(ends))})" if ends else ""

    return of_searches(records, cell)


def of_searches(records: Sequence[Record], cell: Callable[[Sequence[Record]], str]) -> str:
    """Write a table, problems by rivals, of what is to be told of the runs of each search."""
    known = [p for p in PROBLEMS if any(r["problem"] == p for r in records)]
    rows = [[problem, *(cell(searched(records, problem, rival)) for rival in RIVALS)] for problem in known]
    return table(["problem", *RIVALS], rows)


def readme(records: Sequence[Record]) -> str:
    """Write everything."""
    rivals = "\n".join(f"- `{name}`: {rival.title}" for name, rival in RIVALS.items())
    shares = ", ".join(f"{100 * share:.0f}" for share in SHARES)
    return f"""# Rivals with an equal search

Written by `python bench/study.py --table` from `records.jsonl`; `make study` makes the runs. One thread, CPU time.

{rivals}

Each rival has the same number of points on seed 0: as it comes, and a scrambled Sobol sequence in its box
(`bench/study_rivals.py`). Its winner has the least mean training loss over the last tenth of the steps; winner and the
rival as it comes are run on other seeds, of which all numbers here are medians. Targets are the least losses that the
median curve of `{BASE}` (running mean over 5 % of the steps, at least 5) has had by {shares} % of its run.
`again` is `{BASE}` with other labels drawn for its Fisher, in the search and after it: so much is chance.
*Seconds* are steps times the median seconds of a step, drawing of batches left out; {NEVER}: never.

![by steps](tuned-steps.png)

![by seconds](tuned-seconds.png)

## Tuned

{part(records, is_tuned=True)}

## As they come

![by steps](untuned-steps.png)

![by seconds](untuned-seconds.png)

{part(records, is_tuned=False)}

## How much the settings matter

Final training loss over all points that were searched, on seed 0: the median, and the worst ({NEVER}: it diverged)

{sensitivity(records)}

## Points searched

{effort(records)}"""

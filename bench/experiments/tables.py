"""Markdown tables of records."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from measure import table

from experiments.grid import ranked
from experiments.intervals import mean_and_half
from experiments.records import Group, Record, by_settings, labels, networks
from experiments.settings import Settings

_ENDS = (
    ("train_loss", "train loss", ".4f"),
    ("train_accuracy", "train acc.", ".2%"),
    ("test_loss", "test loss", ".4f"),
    ("test_accuracy", "test acc.", ".2%"),
    ("seconds", "seconds", ".1f"),
)


def comparison(records: Sequence[Record], what: str = "") -> str:
    """Write a section for each network: the last epoch of each optimizer, mean ± 95 % interval.

    The last column tells when the mean training loss first is where one-level K-FAC's ends (the lower one's, if
    several were run): the gain by epoch and by time.

    Args:
        records: finished ones.
        what: added to the title.
    """
    return "\n\n".join(_section(title + what, by_settings(some)) for title, some in networks(records).items())


def _section(title: str, groups: Sequence[Group]) -> str:
    ends = [_curve(group, "train_loss")[-1] for group in groups if group[0].settings.optimizer == "kfac1"]
    goal = min((end for end in ends if np.isfinite(end)), default=None)
    header = ["optimizer", "η", "seeds", "epochs", *(name for _, name, _ in _ENDS)]
    header += [f"to {goal:.4f}: epoch / s"] if goal is not None else []
    rows = []
    for group, label in zip(groups, labels(groups), strict=True):
        settings = group[0].settings
        row = [label, f"{settings.lr:g}", str(len(group)), str(settings.epochs)]
        row += [_end(group, metric, spec) for metric, _, spec in _ENDS]
        rows.append(row + ([_reached(group, goal)] if goal is not None else []))
    where = ", ".join(dict.fromkeys(_where(record) for group in groups for record in group))
    return f"### {title[0].upper()}{title[1:]}\n\n{table(header, rows)}\n\nOn {where}."


def _where(record: Record) -> str:
    machine = record.machine
    place = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
    return f"{place} (torch {machine['torch']}, threads: {machine['threads']})"


def _curve(group: Group, metric: str) -> np.ndarray:
    return mean_and_half([record.values(metric) for record in group])[0]


def _end(group: Group, metric: str, spec: str) -> str:
    means, halves = mean_and_half([record.values(metric)[-1:] for record in group])
    if not np.isfinite(means[0]):
        return "diverged"
    return f"{means[0]:{spec}}" + (f" ± {halves[0]:{spec}}" if np.isfinite(halves[0]) else "")


def _reached(group: Group, goal: float) -> str:
    there = np.flatnonzero(_curve(group, "train_loss") <= goal)
    return f"{there[0] + 1} / {_curve(group, 'seconds')[there[0]]:.1f}" if len(there) else "never"


def winners(records: Sequence[Record], metric: str) -> str:
    """Write the winner of each grid, with the second beside it, for each network."""
    header = ["optimizer", "points", "η", "μ", "λ", "κ", *(name for _, name, _ in _ENDS), "second best"]
    sections = []
    for title, some in networks(records).items():
        rows = []
        for label, groups in ranked(some, metric).items():
            numbers = _numbers(groups[0][0].settings)
            second = ", ".join(_numbers(groups[1][0].settings)) if len(groups) > 1 else "none"
            ends = [_end(groups[0], name, spec) for name, _, spec in _ENDS]
            rows.append([label, str(len(groups)), *numbers, *ends, second])
        sections.append(f"### Grid: {title}, by {metric.replace('_', ' ')}\n\n{table(header, rows)}")
    return "\n\n".join(sections)


def _numbers(settings: Settings) -> list[str]:
    values = (settings.lr, settings.momentum, settings.damping, settings.kl_clip)
    return ["none" if value is None else f"{value:g}" for value in values]


def windows(records: Sequence[Record]) -> str:
    """Write what each window of the coarse step leads to, and what the first step and the last epoch look like."""
    header = ["coarse step taken", "seeds", *(name for _, name, _ in _ENDS[:-1])]
    header += [
        "coarse / fine, first step",
        "in step 100",
        "all-ones share, first step",
        "at the end",
        "logits at the end",
    ]
    rows = []
    for group in by_settings(records):
        steps = [[step for row in record.epochs for step in row["steps"]] for record in group]
        row = [group[0].settings.window, str(len(group))]
        row += [_end(group, metric, spec) for metric, _, spec in _ENDS[:-1]]
        places = (("coarse_to_fine", 0), ("coarse_to_fine", 99), ("all_ones", 0), ("all_ones", -1), ("logits", -1))
        rows.append(row + [_of_steps(steps, metric, place) for metric, place in places])
    return f"### Where the gain of the second level comes from\n\n{table(header, rows)}"


def _of_steps(steps: Sequence[Sequence[dict[str, float | None]]], metric: str, place: int) -> str:
    """Mean over seeds of a number of one step; a run that is too short gives its last."""
    values = [[row[min(place, len(row) - 1)][metric]] for row in steps]
    mean = mean_and_half([[np.nan if value is None else value for value in row] for row in values])[0][0]
    return f"{mean:.3g}"

"""The curves of `study.py`: a panel for each problem, medians over seeds with the whole range, by step and by time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import matplotlib
import numpy as np
from output import into_place
from study_problems import PROBLEMS
from study_rivals import RIVALS
from study_tables import Record, median, runs_of, smoothed

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

COLUMNS = 4
TICKS = (  # up to which ratio of the ends of a logarithmic axis which multiples of the powers of ten are marked
    (3, (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)),
    (30, (1, 1.5, 2, 3, 5, 7)),
    (math.inf, (1,)),
)
STYLES = {  # Okabe and Ito's colours, told apart by colour-blind readers; line styles beside them for print
    "one": ("#000000", "-"),
    "again": ("#999999", ":"),
    "ones": ("#E69F00", "--"),
    "directions": ("#D55E00", "-"),
    "pair": ("#CC79A7", "-."),
    "adamw": ("#0072B2", ":"),
    "soap": ("#009E73", "--"),
}


def panel(axis: Axes, records: Sequence[Record], problem: str, is_tuned: bool, by_time: bool) -> None:
    """Draw each rival's curve: running means as in the tables."""
    axis.set_title(fill(PROBLEMS[problem].title, 46), fontsize=8)
    top = 0.0
    for rival in RIVALS:
        runs = runs_of(records, problem, rival, is_tuned)
        if not runs:
            continue
        curves = np.stack([smoothed(r) for r in runs])
        curves[~np.isfinite(curves)] = math.nan
        shown = np.isfinite(curves).all(0)  # all runs are there, and go on
        if not shown.any():
            continue
        x = 1.0 + np.flatnonzero(shown)
        if by_time:
            x *= float(median([r["step_seconds"] for r in runs]))
        curves, (color, line) = curves[:, shown], STYLES[rival]
        middle = median(curves)
        axis.fill_between(x, curves.min(0), curves.max(0), color=color, alpha=0.15, linewidth=0)
        axis.plot(x, middle, color=color, linestyle=line, linewidth=1.3, label=rival)
        top = max(top, float(middle[0]))
    axis.set_yscale("log")
    if top:
        axis.set_ylim(top=1.1 * top)  # what rises above its start is cut off
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=next(subs for span, subs in TICKS if high < span * low)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3, which="both", linewidth=0.4)


def picture(records: Sequence[Record], problems: Sequence[str], is_tuned: bool, by_time: bool) -> Figure:
    """Draw a panel for each problem."""
    columns = min(COLUMNS, max(1, len(problems)))
    rows = max(1, math.ceil(len(problems) / columns))
    size = (3.6 * columns, 2.9 * rows + 0.6)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    handles: dict[str, Artist] = {}
    for axis in axes.flat[len(problems) :]:
        axis.set_axis_off()
    for problem, axis in zip(problems, axes.flat, strict=False):
        panel(axis, records, problem, is_tuned, by_time)
        lines, names = axis.get_legend_handles_labels()
        handles.update(zip(names, lines, strict=True))
    order = [name for name in RIVALS if name in handles]
    if order:
        figure.legend([handles[name] for name in order], order, loc="outside upper center", ncols=len(RIVALS))
    figure.supxlabel("CPU seconds" if by_time else "step", fontsize=9)
    figure.supylabel("training loss", fontsize=9)
    return figure


def pictures(records: Sequence[Record], folder: Path) -> None:
    """Write the pictures of winners and of rivals as they come, by step and by CPU seconds."""
    problems = [p for p in PROBLEMS if any(r["problem"] == p and r["seed"] > 0 for r in records)]
    for is_tuned, kind in ((True, "tuned"), (False, "untuned")):
        for by_time, unit in ((False, "steps"), (True, "seconds")):
            figure = picture(records, problems, is_tuned, by_time)
            with into_place(folder / f"{kind}-{unit}.png") as unfinished:
                figure.savefig(unfinished, format="png", dpi=110)
            plt.close(figure)

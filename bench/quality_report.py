"""Tables and a picture of the records of `quality.py`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
from output import into_place, table

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

METHODS = {
    "one level": "K-FAC's v, damped by the best of 0.01, 0.03, 0.1 ... 30 times λ; labels drawn once, as by default",
    "one level, damped by λ": "the same with λ itself",
    "one level, exact labels": 'the same with `fisher="exact"` (again the best of eight dampings)',
    "ekfac": '`inverse="ekfac"`, the best of eight dampings; labels drawn once',
    "ekfac, fresh": "the second moments in K-FAC's basis taken from F (the best of eight dampings)",
    "exact blocks": "F + λI, block-diagonal: one block for each layer",
    "ones": "`levels=2`: one level and the coarse step, both damped as one level is",
    "ones, best weight": "the best combination of these two",
    "layers": "Z = {v_i}, one unknown for each layer",
    "pair": "Z = {v, d}, d the last update: two unknowns",
    "directions": "Z = {v_i, d_i}, two unknowns for each layer",
    "directions, uncoupled": "the same without F between layers",
    "directions, sampled": "the same with SᵀS/M of labels drawn once in the place of ZᵀFZ",
    "directions, sampled on ¼": "the same on a quarter of the batch",
    "rows": "one unknown for each output row of v_i in layers of at most 64 outputs",
    "rows + d": "these and d_i",
    "directions on ekfac": "Z = {v_i, d_i} with EKFAC's v",
    "directions on blocks": "Z = {v_i, d_i} with the v of exact blocks",
    "full inverse": "(F + λI)⁻¹g",
}
MIDDLE = 1e-2
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
_MARKERS = "osD^vP*"
Record = dict[str, Any]


def ratio(own: float, reference: float) -> float:
    """Return own / reference; two directions that gain nothing are equal."""
    if reference > 0:
        return own / reference
    return math.inf if own > 0 else 1.0


def values(records: Iterable[Record], method: str, source: str, number: str) -> list[float]:
    """Return a method's numbers at the points that have them all; decreases are over one level's.

    Args:
        records: of one damping or more.
        method: a name of METHODS.
        source: `"batch"` or `"minibatch"`.
        number: `"q"`, `"unit"` or `"decrease"`.
    """
    found = [record[source][number] for record in records]
    if number != "decrease":
        return [numbers[method] for numbers in found]
    return [ratio(numbers[method], numbers["one level"]) for numbers in found]


def best_damped(records: Iterable[Record], method: str, source: str) -> list[float]:
    """Return the decreases of a method at its best λ over one level's at its own best, for each point."""
    points: dict[tuple[Any, ...], list[dict[str, float]]] = {}
    for record in records:
        points.setdefault((record["net"], record["seed"], record["step"]), []).append(record[source]["decrease"])
    return [ratio(max(n[method] for n in some), max(n["one level"] for n in some)) for some in points.values()]


def digits(numbers: Sequence[float]) -> str:
    if not numbers:
        return "-"
    return f"{middle:.2f}" if math.isfinite(middle := median(numbers)) else "∞"


def after_start(records: Iterable[Record]) -> list[Record]:
    """Leave step 0 out: there is no last update yet."""
    return [record for record in records if record["step"]]


def medians(records: Sequence[Record]) -> str:
    """Write the table of medians over networks and points."""
    dampings = sorted({record["damping"] for record in records}, reverse=True)
    columns = [("q", "batch", "q"), ("m/m*", "batch", "unit"), ("same", "batch", "decrease")]
    columns.append(("other", "minibatch", "decrease"))
    header = ["", *(f"{title} {damping:g}" for title, *_ in columns for damping in dampings)]
    header += ["same, best λ", "other, best λ"]
    rows = []
    for method in METHODS:
        row = [method]
        for _, source, number in columns:
            for damping in dampings:
                some = [record for record in records if record["damping"] == damping]
                row.append(digits(values(some, method, source, number)))
        row += [digits(best_damped(records, method, source)) for source in ("batch", "minibatch")]
        rows.append(row)
    return table(header, rows)


def by_net(records: Sequence[Record], source: str, number: str) -> str:
    """Write a table of medians over the points of each network, at the middle damping."""
    nets = list(dict.fromkeys(record["net"] for record in records))
    some = {net: [r for r in records if r["net"] == net and r["damping"] == MIDDLE] for net in nets}
    rows = [[method, *(digits(values(some[net], method, source, number)) for net in nets)] for method in METHODS]
    return table(["", *nets], rows)


def tables(records: Sequence[Record]) -> str:
    """Write all tables."""
    later = after_start(records)
    points = {(record["net"], record["seed"], record["step"]) for record in later}
    steps = ", ".join(str(step) for step in sorted({step for *_, step in points}))
    lines = [f"- *{method}*: {what}." for method, what in METHODS.items()]
    return "\n".join(
        [
            "# The quality of directions, against the dense Fisher",
            "",
            f"Medians over {len(points)} points: {len({net for net, *_ in points})} networks of at most "
            f"{max(record['parameters'] for record in later):,} parameters, trained by `kfac2.KFAC(model)`, at steps "
            f"{steps}. Written by `make quality`.",
            "",
            "*q*: share of the largest decrease of the damped model that the direction reaches with its best scale, "
            "at λ = 1e-1, 1e-2, 1e-3.",
            "*m/m\\**: what it reaches with step size 1; below 0 it overshoots. *Same*: its decrease of the loss with "
            "the best of 23 step sizes,",
            "over one level's, on the same batch. *Other*: likewise, with gradient, factors, F and d of a mini-batch, "
            "on another batch eight times as large, on which",
            "the step size is chosen too. *Best λ*: each method, one level too, with the best of the three.",
            "∞: one level gains nothing at half of the points or more. Where a damping is picked (the best of eight), "
            "it is picked by q:",
            "m/m\\* says little then.",
            "",
            medians(later),
            "",
            *lines,
            "",
            "q at λ = 1e-2, by network:",
            "",
            by_net(later, "batch", "q"),
            "",
            "Decrease of the loss over one level's at λ = 1e-2, on the same batch:",
            "",
            by_net(later, "batch", "decrease"),
            "",
            "The same from a mini-batch, on another batch:",
            "",
            by_net(later, "minibatch", "decrease"),
            "",
        ]
    )


def picture(records: Sequence[Record], path: Path) -> None:
    """Draw medians by method at the middle damping, behind them the points of each network."""
    later = [record for record in after_start(records) if record["damping"] == MIDDLE]
    panels = [
        ("batch", "q", "share q of the model's\nlargest decrease"),
        ("batch", "decrease", "decrease of the loss / one level's,\nsame batch"),
        ("minibatch", "decrease", "from a mini-batch,\non another batch"),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(15, 7.5), sharey=True, layout="constrained")
    for axis, (source, number, title) in zip(axes, panels, strict=True):
        panel(axis, later, source, number)
        axis.set_title(title, fontsize=11)
    axes[0].set_yticks(range(len(METHODS)), list(METHODS))
    axes[0].set_ylim(len(METHODS) - 0.5, -0.5)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=9)
    figure.suptitle("Directions against the dense Fisher, λ = 1e-2: each point a network at a step, bars their medians")
    with into_place(path) as part:
        figure.savefig(part, format="png", dpi=100)
    plt.close(figure)


def panel(axis: Axes, records: Sequence[Record], source: str, number: str) -> None:
    """Draw one number of all methods."""
    nets = list(dict.fromkeys(record["net"] for record in records))
    low, high = (0.0, 1.05) if number == "q" else (0.1, 10.0)
    for i, net in enumerate(nets):
        own = [record for record in records if record["net"] == net]
        found = [(v, y) for y, method in enumerate(METHODS) for v in values(own, method, source, number)]
        shown = [min(max(v, low), high) for v, _ in found]
        heights = [y + 0.09 * (i - (len(nets) - 1) / 2) for _, y in found]
        axis.scatter(shown, heights, s=20, color=_COLORS[i % 7], marker=_MARKERS[i % 7], alpha=0.65, label=net)
    for y, method in enumerate(METHODS):
        found_median = min(max(median(values(records, method, source, number)), low), high)
        axis.plot([found_median] * 2, [y - 0.42, y + 0.42], color="black", linewidth=3.5, solid_capstyle="butt")
        axis.axhline(y + 0.5, color="#dddddd", linewidth=0.6)
    if number == "q":
        axis.set_xlim(0, 1.05)
    else:
        axis.set_xscale("log")
        axis.set_xlim(0.09, 11)
        axis.set_xticks([0.1, 0.3, 1, 3, 10], ["≤ 0.1", "0.3", "1", "3", "≥ 10"])
        axis.minorticks_off()
        axis.axvline(1, color="#888888", linewidth=1, linestyle=":")
